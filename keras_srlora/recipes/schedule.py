"""When a run recomposes, in steps."""

import dataclasses


@dataclasses.dataclass
class Schedule:
    """Recompositions at even intervals.

    Attributes:
        interval: steps between two recompositions, not always whole; 0 while
            there is no schedule.
        origin: step from which the intervals are counted.
        recomposed_at: step of the last recomposition, or the origin.
    """

    interval: float = 0.0
    origin: int = 0
    recomposed_at: int = 0

    def is_due(self, step: int) -> bool:
        """Whether an interval ended since the last recomposition."""
        if not self.interval:
            return False
        return self._count(step) > self._count(self.recomposed_at)

    def _count(self, step):
        # The margin: 3 · (10 / 3) may be a little below 10.
        return int((step - self.origin) / self.interval + 1e-9)
