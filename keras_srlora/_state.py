"""What an adapter remembers beside its weights, on the host.

NumPy arrays, not variables: nothing of it is needed on the accelerator between
two recompositions. It is saved with the layer's weights.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from keras_srlora._decomposition import Directions
from keras_srlora._gate import FlatLoss
from keras_srlora._random import RANDOM_NAMES
from keras_srlora._random import RandomState

# Columns of `AdapterState.history`, one row a fused pair.
HISTORY = ("step", "slot", "score", "direction", "drift")
NO_DIRECTION = -1


@dataclasses.dataclass
class Schedule:
    """When a run recomposes, in steps; saved so that a resumed run goes on.

    The layers of a run share one.

    Attributes:
        interval: steps between two recompositions, not always whole; 0 before
            the first run.
        origin: step from which the intervals are counted.
        epoch_steps: steps of an epoch; 0 while unknown.
        recomposed_at: step of the last recomposition, or the origin.
        begun: step of the batch that began last, -1 before the first. What is
            saved is the state after it.
    """

    interval: float = 0.0
    origin: int = 0
    epoch_steps: int = 0
    recomposed_at: int = 0
    begun: int = -1

    def epochs_done(self, steps, steps_per_execution=1):
        """Epochs behind the state that was saved with this.

        `None` in the middle of an epoch. `steps`: those of an epoch.
        """
        epoch, place = divmod(self.begun, steps)
        last = (steps - 1) // steps_per_execution * steps_per_execution
        return epoch + 1 if place >= last else None

    def is_due(self, step):
        if not self.interval:
            return False
        return self._count(step) > self._count(self.recomposed_at)

    def _count(self, step):
        # The margin: 3 · (10 / 3) may be a little below 10.
        return int((step - self.origin) / self.interval + 1e-9)


class Statistics(NamedTuple):
    """Running averages of the sensitivity of one layer's two factors.

    float32 arrays: `average` is `Ī`, `uncertainty` is `Ū`; shapes `(rank, in)`
    for `_a`, `(rank, out)` for `_b`.
    """

    average_a: np.ndarray
    uncertainty_a: np.ndarray
    average_b: np.ndarray
    uncertainty_b: np.ndarray


@dataclasses.dataclass
class AdapterState:
    """State of one layer, with `t` directions, rank `r`, `m` fused pairs.

    What was fused is kept as factors. The pretrained kernel is the frozen one
    plus `Σ anchors[i] · left[i]ᵀ right[i]` minus `s · fused_aᵀ @ fused_b`.

    Attributes:
        directions: `Directions` of the pretrained kernel; `None` before the
            layer is initialised.
        anchors: float32, `(t,)`. Coefficient with which a direction was
            subtracted from the kernel when a pair started along it.
        used: bool, `(t,)`. Directions that a pair started along.
        slot_direction: int, `(r,)`. Direction in each slot, -1 for none.
        slot_started: int, `(r,)`. Step at which the slot's pair started.
        fused_a: float32, `(m, in)`. The pairs that were fused, in order.
        fused_b: float32, `(m, out)`.
        history: float64, `(m, 5)`, with columns `HISTORY`.
        remainder: float32, `(in, out)`. What rounding cut off the frozen kernel
            of a layer in half precision; the next recomposition starts from
            both, so that small pairs add up that are each below the kernel's
            rounding. `None`: nothing.
        schedule: `Schedule` of the run.
        statistics: `Statistics`, during a run the `RunningStatistics` of its
            `Sensitivity`, `None` before the first one.
        gate: `FlatLoss` of a run whose recipe has a gate; with the first layer
            alone.
        random: `RandomState` of the model, or the arrays of one that were
            loaded; with the first layer of a run alone. `None` before a run.
    """

    directions: Directions | None = None
    anchors: np.ndarray | None = None
    used: np.ndarray | None = None
    slot_direction: np.ndarray | None = None
    slot_started: np.ndarray | None = None
    fused_a: np.ndarray | None = None
    fused_b: np.ndarray | None = None
    history: np.ndarray | None = None
    remainder: np.ndarray | None = None
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    statistics: object = None
    gate: FlatLoss | None = None
    random: RandomState | dict | None = None

    @classmethod
    def start(cls, directions, rank):
        """The state of a layer whose kernel was just decomposed."""
        count = len(directions.singular_values)
        return cls(
            directions=directions,
            anchors=np.zeros(count, "float32"),
            used=np.zeros(count, "bool"),
            slot_direction=np.full(rank, NO_DIRECTION, "int64"),
            slot_started=np.zeros(rank, "int64"),
            fused_a=np.zeros((0, directions.left.shape[1]), "float32"),
            fused_b=np.zeros((0, directions.right.shape[1]), "float32"),
            history=np.zeros((0, len(HISTORY)), "float64"),
        )

    @property
    def initialized(self):
        return self.directions is not None

    @property
    def unused(self):
        """Indices of the directions that no pair started along yet."""
        return np.flatnonzero(~self.used)

    def images(self, scale):
        """What `left @ kernel` was after each recomposition, latest first.

        Yields:
            `(m, image)`: how many pairs were fused by then, and a float32 array
            of shape `(t, out)`.
        """
        found, history = self.directions, self.history
        remaining = found.singular_values - self.anchors
        image = remaining[:, None] * found.right + scale * (
            (found.left @ self.fused_a.T) @ self.fused_b
        )
        end = len(history)
        yield end, image
        while end:
            begin = end - 1
            # A second run counts its steps anew: only neighbours are of one.
            while begin and history[begin - 1, 0] == history[end - 1, 0]:
                begin -= 1
            fused = slice(begin, end)
            image = image - scale * (
                (found.left @ self.fused_a[fused].T) @ self.fused_b[fused]
            )
            restarted = history[fused, HISTORY.index("direction")].astype(int)
            image[restarted] += (
                self.anchors[restarted, None] * found.right[restarted]
            )
            end = begin
            yield end, image

    def taken_back(self, count):
        """The state when the first `count` pairs were fused."""
        step, slot, direction = (
            self.history[:, HISTORY.index(name)].astype("int64")
            for name in ("step", "slot", "direction")
        )
        undone = direction[count:]
        anchors, used = self.anchors.copy(), self.used.copy()
        anchors[undone], used[undone] = 0.0, False
        first = np.setdiff1d(np.flatnonzero(used), direction)
        slot_direction = np.full_like(self.slot_direction, NO_DIRECTION)
        slot_direction[: len(first)] = first
        slot_started = np.zeros_like(self.slot_started)
        for i in range(count):
            slot_direction[slot[i]], slot_started[slot[i]] = (
                direction[i],
                step[i],
            )
        return dataclasses.replace(
            self,
            anchors=anchors,
            used=used,
            slot_direction=slot_direction,
            slot_started=slot_started,
            fused_a=self.fused_a[:count],
            fused_b=self.fused_b[:count],
            history=self.history[:count],
            # Of pairs that came later.
            statistics=None,
            remainder=None,
        )

    def to_arrays(self):
        """Everything as `{name: array}`; empty before initialisation."""
        if not self.initialized:
            return {}
        apart = ("directions", "schedule", "statistics", "gate", "random")
        arrays = {
            field.name: np.asarray(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in apart
        }
        if self.remainder is None:
            del arrays["remainder"]
        arrays.update(self.directions._asdict())
        arrays["schedule"] = np.array(dataclasses.astuple(self.schedule), "f8")
        statistics = self.statistics_to_numpy()
        if statistics is not None:
            arrays.update(statistics._asdict())
        if self.gate is not None:
            arrays["gate"] = self.gate.to_array()
        if isinstance(self.random, RandomState):
            arrays.update(self.random.to_arrays())
        elif self.random is not None:
            arrays.update(self.random)
        # h5py has no NumPy bool in every version that Keras supports.
        arrays["used"] = arrays["used"].astype("int8")
        return arrays

    @classmethod
    def from_arrays(cls, arrays):
        """The inverse of `to_arrays`."""
        if "left" not in arrays:
            return cls()
        state = cls.start(
            Directions(
                *(np.array(arrays[name]) for name in Directions._fields)
            ),
            rank=len(arrays["slot_direction"]),
        )
        for field in dataclasses.fields(cls):
            if field.name in arrays:
                array = np.array(arrays[field.name])
                setattr(state, field.name, array)
        state.used = state.used.astype("bool")
        random = {
            name: np.array(arrays[name])
            for name in RANDOM_NAMES
            if name in arrays
        }
        state.random = random or None
        if "gate" in arrays:
            state.gate = FlatLoss.from_array(np.array(arrays["gate"]))
        if "schedule" in arrays:
            interval, *steps = map(float, arrays["schedule"])
            state.schedule = Schedule(interval, *map(int, steps))
        if Statistics._fields[0] in arrays:
            state.statistics = Statistics(
                *(np.array(arrays[name]) for name in Statistics._fields)
            )
        return state

    def with_variables_of(self, running):
        """Takes over the variables of a run that goes on with this state.

        A checkpoint that is loaded during `fit` must reach the statistics that
        the compiled step updates, and the seeds that it draws from.
        """
        if self is running:
            return self
        held = running.statistics
        if held is not None and not isinstance(held, Statistics):
            held.assign(self.statistics)
            self.statistics = held
        if isinstance(running.random, RandomState):
            self.attach_random(running.random)
        return self

    def attach_random(self, random):
        """Lets the generators of a model go on where a file left them."""
        if isinstance(self.random, dict):
            random.restore(self.random)
        self.random = random

    def statistics_to_numpy(self):
        """As `Statistics`, which outlive the run; `None` before the first."""
        if self.statistics is None or isinstance(self.statistics, Statistics):
            return self.statistics
        return self.statistics.to_numpy()
