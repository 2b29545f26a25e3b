"""Whether a run's loss shows that the rank limits it.

A pure state machine over means of the training loss. While the loss falls,
the pairs are still learning and a restart would cost what they could learn;
once it is flat, a restart has little to lose, and whether it helps is seen.

Every fall is compared with the whole fall of the loss so far. Neither the unit
of the loss nor a constant added to it changes a decision.
"""

import dataclasses
import math

import numpy as np

WAITING, PROBING, GOING, STOPPED = range(4)

# A window is a tenth of the run, and is read in eight parts.
WINDOW = 0.1
POINTS = 8
# The loss is flat where from window to window it falls by less than a fiftieth
# of what it has fallen so far, a standard error included.
SETTLED = 0.02
# A recomposition pays where the loss then falls by 1 % of that more than it
# would have anyway, by more than a standard error, within three windows.
PAYS = 0.01
PATIENCE = 3
# A run has begun to learn where the loss has fallen by three standard
# deviations of its readings.
BEGUN = 3.0


@dataclasses.dataclass
class FlatLoss:
    """Decides when a run starts to recompose, and whether it goes on.

    It waits for a loss that is flat, lets one recomposition probe, goes on
    while the loss falls, and stops where it does not. Where the loss falls no
    faster after the probe than before it, it waits again.

    Attributes:
        window: steps of a window.
        phase: one of the above.
        read_at: step at which the loss was read last.
        since: step of the probe, or at which the loss last fell enough.
        first: the first loss; `None` before.
        base: the loss to compare with, since then.
        variance: of the mean that `base` is.
        before: the loss a window before the probe.
        before_variance: of the mean that `before` is.
        points: list of `(sum of losses, count)`, the last four windows.
    """

    window: int
    phase: int = WAITING
    read_at: int = 0
    since: int = 0
    first: float | None = None
    base: float = 0.0
    variance: float = 0.0
    before: float = 0.0
    before_variance: float = 0.0
    points: list = dataclasses.field(default_factory=list)

    @classmethod
    def start(cls, total_steps, step, steps_per_pair=1):
        """The gate of a run of `total_steps` that is at `step`.

        A window is no shorter than `steps_per_pair`, which a pair needs.
        """
        window = max(POINTS, int(WINDOW * total_steps), steps_per_pair)
        return cls(window=window, read_at=step)

    @property
    def is_open(self):
        """Whether a recomposition has paid."""
        return self.phase == GOING

    def describe(self):
        """One line about the phase."""
        return (
            "the loss falls; plain LoRA",
            f"the loss is flat at {self.base:.4g}; one recomposition probes",
            f"it paid: the loss fell to {self.base:.4g}; recomposing",
            f"no gain any more after {self.base:.4g}; plain LoRA from here on",
        )[self.phase]

    def is_due(self, step):
        """Whether the loss should be read."""
        steps = self.window // POINTS
        return self.phase != STOPPED and step - self.read_at >= steps

    def read(self, step, total, count):
        """Takes the losses since the last reading.

        Args:
            step: int. Training steps done.
            total: sum of the losses.
            count: their number; 0 where there are none.

        Returns:
            `"recompose"` where one recomposition shall probe, `"go"` where it
            has paid, else `None`.
        """
        self.read_at = step
        if self.phase == STOPPED or count <= 0:
            return None
        self.points = [*self.points, (total, count)][-4 * POINTS :]
        if self.first is None:
            self.first = total / count
        if len(self.points) < POINTS:
            return None
        mean, variance = _mean(self.points[-POINTS:])
        if self.phase == WAITING:
            return self._wait(step, mean, variance)
        return self._compare(step, mean, variance)

    def _wait(self, step, mean, variance):
        learnt = self.first - mean
        # A loss that never fell is that of a run that has not begun to learn.
        if not learnt > BEGUN * math.sqrt(POINTS * variance):
            return None
        limit = SETTLED * learnt
        if not any(self._falls_less(limit, span) for span in (1, 2)):
            return None
        before = _mean(self.points[-2 * POINTS : -POINTS])
        self._begin(step, mean, variance)
        self.before, self.before_variance = before
        self.phase = PROBING
        # The probe is judged by the losses after it.
        self.points = []
        return "recompose"

    def _falls_less(self, limit, span):
        """Whether the loss falls by less than `limit` in a window.

        By the last two spans of so many windows: the longer, the less noise.
        Where the noise alone is as large as the limit, nothing is known.
        """
        count = span * POINTS
        if len(self.points) < 2 * count:
            return False
        before = _mean(self.points[-2 * count : -count])
        after = _mean(self.points[-count:])
        fall, error = _fall(before, after)
        return max(0.0, fall) + error < span * limit

    def _compare(self, step, mean, variance):
        windows = (step - self.since) / self.window
        probing = self.phase == PROBING
        expected = self._at_its_pace(windows if probing else 0.0)
        gain, error = _fall(expected, (mean, variance))
        learnt = 0.0 if self.first is None else self.first - self.base
        pays = PAYS * learnt
        if gain - error > pays:
            self._begin(step, mean, variance)
            self.phase = GOING
            return "go" if probing else None
        if windows >= PATIENCE:
            # A loss that falls, but no faster, shows nothing about the rank.
            fall, error = _fall((self.base, self.variance), (mean, variance))
            falls = fall - error > pays
            self.phase = WAITING if falls else STOPPED
        return None

    def _at_its_pace(self, windows):
        """The loss that many windows after the probe, had there been none.

        On the line through the two windows before it: mean and variance.
        """
        fall = max(0.0, self.before - self.base)
        mean = self.base - windows * fall
        of_base = (1 + windows) ** 2 * self.variance
        return mean, of_base + windows**2 * self.before_variance

    def _begin(self, step, mean, variance):
        self.since, self.base, self.variance = step, mean, variance

    def to_dict(self) -> dict:
        """All fields, as JSON can hold them."""
        state = dataclasses.asdict(self)
        return {**state, "points": [list(pair) for pair in self.points]}

    def get_config(self) -> dict:
        """As `to_dict`: Keras registers no class without this method."""
        return self.to_dict()

    @classmethod
    def from_dict(cls, state: dict):
        """The inverse of `to_dict`."""
        return cls(**{**state, "points": [tuple(p) for p in state["points"]]})


def _mean(points):
    """Mean of the losses of a window, and the variance of that mean."""
    totals, counts = np.transpose(points)
    means = totals / counts
    mean = float(totals.sum() / counts.sum())
    return mean, float(means.var(ddof=1) / len(points))


def _fall(before, after):
    """By how much the loss fell, and the standard error of that."""
    return before[0] - after[0], math.sqrt(before[1] + after[1])
