"""The protocol of a gate."""

from __future__ import annotations

from typing import Protocol


class Gate(Protocol):
    """Decides by the training loss when a run starts to recompose.

    Register a custom class with
    `keras.saving.register_keras_serializable`, and pass it as
    `Recipe(gate=...)`. Keras registers no class without a `get_config`.
    `keras_srlora.recipes.gate.FlatLoss` is the example.

    Attributes:
        window: steps after which a loss is missed.
        read_at: step at which the loss was read last.
        phase: changes with each decision, which is then printed.
    """

    window: int
    read_at: int
    phase: int

    @classmethod
    def start(
        cls, total_steps: int, step: int, steps_per_pair: int = 1
    ) -> Gate:
        """The gate of a run of `total_steps` that is at `step`."""
        ...

    @property
    def is_open(self) -> bool:
        """Whether the schedule may recompose."""
        ...

    def is_due(self, step: int) -> bool:
        """Whether the loss is to be read now."""
        ...

    def read(self, step: int, total: float, count: float) -> str | None:
        """Takes the sum and the number of the losses since the last reading.

        Returns:
            `"recompose"` for one recomposition now, `"go"` where the schedule
            shall begin, else `None`.
        """
        ...

    def describe(self) -> str:
        """One line about the phase."""
        ...

    def to_dict(self) -> dict:
        """All of it, as JSON can hold it."""
        ...

    @classmethod
    def from_dict(cls, state: dict) -> Gate:
        """The inverse of `to_dict`."""
        ...
