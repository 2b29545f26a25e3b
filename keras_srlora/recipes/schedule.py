"""When a run recomposes, in steps."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Schedule:
    """Recompositions at even intervals.

    Attributes:
        interval: steps between two recompositions, not always whole; 0 while
            there is no schedule.
        origin: step from which the intervals are counted.
        recomposed_at: step of the last recomposition, or the origin.
        turns: number of groups of layers; each recomposition is one of a group.
        turn: the group that comes next.
    """

    interval: float = 0.0
    origin: float = 0
    recomposed_at: float = 0
    turns: int = 1
    turn: int = 0

    @classmethod
    def start(cls, step: int, interval: float, turns: int = 1) -> Schedule:
        """A schedule that recomposes each group once an interval.

        The first group comes after a whole interval, the others follow it.
        """
        # Not two groups in a step: then all of them may come at once.
        turns = turns if interval >= turns else 1
        each = interval / turns
        origin = step + interval - each
        return cls(each, origin, origin, turns)

    def is_due(self, step: int) -> bool:
        """Whether an interval ended since the last recomposition."""
        return bool(self._due(step))

    def take(self, step: int) -> list[int]:
        """The groups to recompose now: those that are due, or else all."""
        groups = self._due(step) or list(range(self.turns))
        self.turn = (groups[-1] + 1) % self.turns
        self.recomposed_at = step
        return groups

    def take_layers(self, step: int, layers: list) -> list:
        """The layers of those groups: every `turns`-th is of one group."""
        groups = self.take(step)
        return [x for i, x in enumerate(layers) if i % self.turns in groups]

    def _due(self, step):
        if not self.interval:
            return []
        # More than one where steps were skipped, as in an accumulation.
        passed = self._count(step) - self._count(self.recomposed_at)
        return [
            (self.turn + i) % self.turns for i in range(min(passed, self.turns))
        ]

    def _count(self, step):
        # The margin: 3 · (10 / 3) may be a little below 10.
        return int((step - self.origin) / self.interval + 1e-9)
