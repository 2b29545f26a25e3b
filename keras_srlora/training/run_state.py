"""Where a run is, as a file holds it."""

from __future__ import annotations

import dataclasses

import numpy as np
from keras import ops

from keras_srlora.files.packing import pack
from keras_srlora.files.packing import unpack
from keras_srlora.recipes.definition import Recipe
from keras_srlora.recipes.protocol import Gate
from keras_srlora.recipes.schedule import Schedule

FORMAT = 1


@dataclasses.dataclass
class RunState:
    """Schedule, gate and position of a run.

    Attributes:
        schedule: `Schedule`; without an interval before it is known.
        gate: a `Gate`, or `None`.
        begun: step of the batch that began last, -1 before the first. The
            saved state is the one after it.
        epoch_steps: steps of an epoch of `fit`; 0 while unknown, or in a loop.
        predictions: how many a step learns from; 0 where the model does not
            say, `None` before it was asked.
        reported: list of `(sum of losses, count)`, numbers or tensors, that the
            gate has not read yet.
    """

    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    gate: Gate | None = None
    begun: int = -1
    epoch_steps: int = 0
    predictions: float | None = None
    reported: list = dataclasses.field(default_factory=list)

    def losses(self) -> tuple[float, float]:
        """Sum and number of the losses that were reported."""
        return (
            sum((_to_float(total) for total, _ in self.reported), 0.0),
            sum((float(count) for _, count in self.reported), 0.0),
        )

    def to_array(self, recipe: Recipe) -> np.ndarray:
        """All of it, by name, with the kind of the gate."""
        gate = None if self.gate is None else self.gate.to_dict()
        return pack(
            {
                "schedule": dataclasses.asdict(self.schedule),
                "begun": self.begun,
                "epoch_steps": self.epoch_steps,
                "predictions": self.predictions,
                "gate_kind": "none" if gate is None else recipe.gate,
                "gate": gate,
                "losses": self.losses() if self.reported else None,
            },
            "run",
            FORMAT,
        )

    @classmethod
    def from_array(cls, array, recipe: Recipe | None) -> RunState:
        """The inverse of `to_array`; without a recipe, without the gate.

        Raises:
            ValueError: if it is of another format, or its gate is of another
                kind than the recipe's.
        """
        saved = unpack(array, "run", FORMAT)
        gate = saved["gate"]
        if recipe is None:
            gate = None
        elif gate is not None:
            if saved["gate_kind"] != recipe.gate:
                raise ValueError(
                    "The saved run has a gate of another kind than its recipe. "
                    f"Received: gate={saved['gate_kind']!r} in the saved run, "
                    f"gate={recipe.gate!r} in the recipe. Pass the recipe that "
                    "the run began with."
                )
            gate_class = recipe.gate_class
            gate = None if gate_class is None else gate_class.from_dict(gate)
        return cls(
            Schedule(**saved["schedule"]),
            gate,
            saved["begun"],
            saved["epoch_steps"],
            saved["predictions"],
            [] if saved["losses"] is None else [tuple(saved["losses"])],
        )


def _to_float(loss):
    if isinstance(loss, (int, float)):
        return float(loss)
    return float(ops.convert_to_numpy(ops.stop_gradient(loss)))
