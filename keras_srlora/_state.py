"""What an adapter remembers beside its weights, on the host.

NumPy arrays, not variables: nothing of it is needed on the accelerator between
two recompositions. It is saved with the layer's weights.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_srlora._decomposition import Directions

# Columns of `AdapterState.history`, one row a fused pair.
HISTORY = ("step", "slot", "score", "direction", "drift")
NO_DIRECTION = -1


class Schedule(NamedTuple):
    """When a run recomposes, in steps; saved so that a resumed run goes on.

    Attributes:
        interval: steps between two recompositions, not always whole; 0 before
            the first run.
        origin: step from which the intervals are counted.
        epoch_steps: steps of an epoch; 0 while unknown.
        recomposed_at: step of the last recomposition, or the origin.
    """

    interval: float = 0.0
    origin: int = 0
    epoch_steps: int = 0
    recomposed_at: int = 0

    def is_due(self, step):
        if not self.interval:
            return False
        return self._count(step) > self._count(self.recomposed_at)

    def _count(self, step):
        # The margin: 3 · (10 / 3) may be a little below 10.
        return int((step - self.origin) / self.interval + 1e-9)


class Statistics(NamedTuple):
    """Running averages of the sensitivity of one layer's two factors.

    float32 variables (or arrays, between two runs): `average` is `Ī`,
    `uncertainty` is `Ū`; shapes `(rank, in)` for `_a`, `(rank, out)` for `_b`.
    """

    average_a: object
    uncertainty_a: object
    average_b: object
    uncertainty_b: object


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
        schedule: `Schedule` of the run.
        statistics: `Statistics`, or `None` before the first run.
    """

    directions: Directions | None = None
    anchors: np.ndarray | None = None
    used: np.ndarray | None = None
    slot_direction: np.ndarray | None = None
    slot_started: np.ndarray | None = None
    fused_a: np.ndarray | None = None
    fused_b: np.ndarray | None = None
    history: np.ndarray | None = None
    schedule: Schedule = Schedule()
    statistics: Statistics | None = None

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

    def to_arrays(self):
        """Everything as `{name: array}`; empty before initialisation."""
        if not self.initialized:
            return {}
        arrays = {
            field.name: np.asarray(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in ("directions", "statistics")
        }
        arrays.update(self.directions._asdict())
        if self.statistics is not None:
            arrays.update(_as_arrays(self.statistics))
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
        interval, *steps = map(float, state.schedule)
        state.schedule = Schedule(interval, *map(int, steps))
        if Statistics._fields[0] in arrays:
            state.statistics = Statistics(
                *(np.array(arrays[name]) for name in Statistics._fields)
            )
        return state

    def with_statistics_of(self, running):
        """Takes over the variables of a run that goes on with this state.

        A checkpoint that is loaded during `fit` must reach the statistics that
        the compiled step updates.
        """
        if running.statistics is None or self.statistics is running.statistics:
            return self
        if isinstance(running.statistics.average_a, np.ndarray):
            return self
        for name, variable in running.statistics._asdict().items():
            value = getattr(self.statistics, name, None)
            variable.assign(
                np.zeros(variable.shape, "float32") if value is None else value
            )
        self.statistics = running.statistics
        return self

    def detach_statistics(self):
        """Turns variables into arrays, which outlive the run's optimizer."""
        if self.statistics is not None:
            self.statistics = Statistics(**_as_arrays(self.statistics))


def _as_arrays(statistics):
    return {
        name: np.array(ops.convert_to_numpy(value), "float32")
        for name, value in statistics._asdict().items()
    }
