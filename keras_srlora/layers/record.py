"""A layer's memory of its run, on the host.

NumPy arrays, not variables: nothing of it is needed on the accelerator between
two recompositions. It is saved with the layer's weights.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from keras_srlora.functional.decomposition import Directions

# Columns of `Record.events`, one row a fused pair.
# Each run counts its steps anew; the recompositions of a layer are numbered
# from 1 through all of its runs.
EVENT = ("recomposition", "step", "slot", "score", "direction", "drift")
NO_DIRECTION = -1
FORMAT = 2
FORMAT_NAME = "record_format"


@dataclasses.dataclass
class Record:
    """Record of one layer, with `t` directions, rank `r`, `m` fused pairs.

    Fused pairs are kept as factors. The pretrained kernel is the frozen one
    plus `Σ anchors[i] · left[i]ᵀ right[i]` minus `s · fused_aᵀ @ fused_b`.

    Attributes:
        directions: `Directions` of the pretrained kernel; `None` before the
            layer is initialised.
        anchors: float, `(t,)`. Coefficient with which a direction was
            subtracted from the kernel when a pair started along it.
        visits: int, `(t,)`. How many pairs started along each direction.
        slot_direction: int, `(r,)`. Direction in each slot, -1 for none.
        fused_a: float, `(m, in)`. The pairs that were fused, in order.
        fused_b: float, `(m, out)`.
        events: float64, `(m, 6)`, with columns `EVENT`.
    """

    # All `None` in a layer that is not initialised.
    directions: Directions = None  # type: ignore[assignment]
    anchors: np.ndarray = None  # type: ignore[assignment]
    visits: np.ndarray = None  # type: ignore[assignment]
    slot_direction: np.ndarray = None  # type: ignore[assignment]
    fused_a: np.ndarray = None  # type: ignore[assignment]
    fused_b: np.ndarray = None  # type: ignore[assignment]
    events: np.ndarray = None  # type: ignore[assignment]

    @classmethod
    def start(cls, directions: Directions, rank: int) -> Record:
        """The record of a layer whose kernel was just decomposed."""
        count = len(directions.singular_values)
        dtype = directions.left.dtype
        return cls(
            directions=directions,
            anchors=np.zeros(count, dtype),
            visits=np.zeros(count, "int64"),
            slot_direction=np.full(rank, NO_DIRECTION, "int64"),
            fused_a=np.zeros((0, directions.left.shape[1]), dtype),
            fused_b=np.zeros((0, directions.right.shape[1]), dtype),
            events=np.zeros((0, len(EVENT)), "float64"),
        )

    @property
    def initialized(self) -> bool:
        return self.directions is not None

    @property
    def used(self) -> np.ndarray:
        """Which directions a pair started along; bool, `(t,)`."""
        return self.visits > 0

    @property
    def unused(self) -> np.ndarray:
        """Indices of the directions that no pair started along yet."""
        return np.flatnonzero(self.visits == 0)

    def column(self, name) -> np.ndarray:
        """A column of `EVENT` of all events; float64, `(m,)`."""
        return self.events[:, EVENT.index(name)]

    @property
    def slot_started(self) -> np.ndarray:
        """The recomposition that started each slot's pair, 0 for first pairs;
        int, `(r,)`.
        """
        started = np.zeros(len(self.slot_direction), "int64")
        # Of several events of a slot the last one counts.
        started[self.column("slot").astype(int)] = self.column("recomposition")
        return started

    @property
    def starts_as_lora(self) -> bool:
        """Whether the first pairs started along no direction."""
        restarted = self.column("direction")
        return len(np.setdiff1d(np.flatnonzero(self.used), restarted)) == 0

    def add_fused(self, a, b) -> None:
        """Keeps pairs that go into the frozen kernel."""
        self.fused_a = np.concatenate([self.fused_a, a])
        self.fused_b = np.concatenate([self.fused_b, b])

    def add_events(self, count, columns) -> None:
        """Notes a recomposition that fused `count` pairs.

        Args:
            count: int.
            columns: dict from names of `EVENT` to numbers or arrays. Other
                columns are zero; `recomposition` is the next number.
        """
        rows = np.zeros((count, len(EVENT)))
        rows[:, EVENT.index("recomposition")] = 1 + max(
            self.column("recomposition"), default=0
        )
        for name, values in columns.items():
            rows[:, EVENT.index(name)] = values
        self.events = np.concatenate([self.events, rows])

    def set_drift(self, count, drift) -> None:
        """Notes the drift of the last recomposition, of `count` pairs."""
        self.events[-count:, EVENT.index("drift")] = drift

    def copy(self) -> Record:
        """A copy that can be changed."""
        # The other arrays are never written to: longer ones take their place.
        return dataclasses.replace(
            self,
            anchors=self.anchors.copy(),
            visits=self.visits.copy(),
            slot_direction=self.slot_direction.copy(),
        )

    def frozen_rows(self, scale) -> tuple[np.ndarray, np.ndarray]:
        """The sum of all that went into the pretrained kernel.

        Returns:
            Factors `(k, in)` and `(k, out)`; the frozen kernel is the
            pretrained one plus their product.
        """
        found, anchored = self.directions, self.anchors != 0
        subtracted = self.anchors[anchored, None] * found.left[anchored]
        return (
            np.concatenate([scale * self.fused_a, -subtracted]),
            np.concatenate([self.fused_b, found.right[anchored]]),
        )

    def images(self, scale):
        """`left @ kernel` after each recomposition, latest first.

        Yields:
            `(m, image)`: how many pairs were fused by then, and a float32 array
            of shape `(t, out)`.
        """
        found, number = self.directions, self.column("recomposition")
        remaining = found.singular_values - self.anchors
        image = remaining[:, None] * found.right + scale * (
            (found.left @ self.fused_a.T) @ self.fused_b
        )
        end = len(number)
        yield end, image
        while end:
            begin = np.searchsorted(number, number[end - 1])
            fused = slice(begin, end)
            image = image - scale * (
                (found.left @ self.fused_a[fused].T) @ self.fused_b[fused]
            )
            restarted = self.column("direction")[fused].astype(int)
            image[restarted] += (
                self.anchors[restarted, None] * found.right[restarted]
            )
            end = begin
            yield end, image

    def taken_back(self, count: int) -> Record:
        """The record when the first `count` pairs were fused."""
        slot, direction = (
            self.column(name).astype("int64") for name in ("slot", "direction")
        )
        undone = direction[count:]
        anchors, visits = self.anchors.copy(), self.visits.copy()
        anchors[undone] = 0.0
        np.subtract.at(visits, undone, 1)
        first = np.setdiff1d(np.flatnonzero(visits), direction)
        slot_direction = np.full_like(self.slot_direction, NO_DIRECTION)
        slot_direction[: len(first)] = first
        slot_direction[slot[:count]] = direction[:count]
        return dataclasses.replace(
            self,
            anchors=anchors,
            visits=visits,
            slot_direction=slot_direction,
            fused_a=self.fused_a[:count],
            fused_b=self.fused_b[:count],
            events=self.events[:count],
        )

    def to_arrays(self) -> dict:
        """Everything as `{name: array}`; empty before initialisation."""
        if not self.initialized:
            return {}
        arrays = {
            field.name: np.asarray(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name != "directions"
        }
        arrays[FORMAT_NAME] = np.array(FORMAT)
        return arrays | self.directions._asdict()

    @classmethod
    def from_arrays(cls, arrays) -> Record:
        """The inverse of `to_arrays`.

        Raises:
            ValueError: if the arrays are of another format.
        """
        if "left" not in arrays:
            return cls()
        received = arrays.get(FORMAT_NAME)
        received = None if received is None else int(np.array(received))
        if received != FORMAT:
            raise ValueError(
                "The saved record of an SRLoRA layer has a format that this "
                "version of keras_srlora does not read. Received: format "
                f"{received}; this version reads format {FORMAT}"
            )
        record = cls.start(
            Directions(
                *(np.array(arrays[name]) for name in Directions._fields)
            ),
            rank=len(arrays["slot_direction"]),
        )
        for field in dataclasses.fields(cls):
            if field.name != "directions":
                setattr(record, field.name, np.array(arrays[field.name]))
        return record
