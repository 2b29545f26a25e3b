"""Methods beside one another: means, paired differences, parts of a gap.

The runs of a method at a rank and a rate are a dict `{seed: record}`.
"""

import collections

import numpy as np
from scipy import stats

from benchmarks.quality.records import best_rate

VERDICTS = ("better", "level", "worse")
SMALLEST_GAP = 1e-3  # of losses that begin near 1
FEWEST_SEEDS = 3  # that an interval, or a figure of the documentation, needs


def chosen_runs(done):
    """`{(rank, method): {seed: record}}` at the chosen learning rates."""
    cells = collections.defaultdict(dict)
    for cell in {key[:3] for key in done}:
        best = best_rate(done, cell)
        for key, record in done.items():
            if key[:4] == (*cell, best):
                cells[cell[2], cell[1]][record["seed"]] = record
    return dict(cells)


def at_rate(runs, task, method, rank, rate):
    """`{seed: record}` of a method; LoRA of another rank has two names."""
    found = {
        key[4]: record
        for key, record in runs.items()
        if key[:4] == (task, method, rank, rate)
    }
    if method == "lora_4r" and not found:
        return at_rate(runs, task, "lora", 4 * rank, rate)
    return found


def method_of(cells, rank, method):
    """The runs of a method; those of LoRA may go by two names."""
    other = {"lora": (rank / 4, "lora_4r"), "lora_4r": (4 * rank, "lora")}
    return cells.get((rank, method)) or cells.get(other.get(method))


def test_loss(runs):
    """The mean over the seeds."""
    return np.mean([record["test_loss"] for record in runs.values()])


def differences(runs, others):
    """Test losses of the seeds that both have, one minus the other."""
    return np.array(
        [
            runs[seed]["test_loss"] - others[seed]["test_loss"]
            for seed in runs
            if seed in others
        ]
    )


def verdict(found):
    """What the differences of some seeds say; `None` for too few."""
    if len(found) < FEWEST_SEEDS:
        return None
    mean, half = interval(found)
    return VERDICTS[1 if abs(mean) <= half else 0 if mean < 0 else 2]


def interval(found):
    """The mean and half of its 95 % interval."""
    half = stats.t.ppf(0.975, len(found) - 1) * stats.sem(found)
    return found.mean(), half


def gap(runs, lora, quadruple):
    """`(LoRA_r - method) / (LoRA_r - LoRA_4r)`, where 4r is better."""
    whole = differences(quadruple, lora)
    if verdict(whole) != "better" or whole.mean() > -SMALLEST_GAP:
        return ""
    return f"{differences(runs, lora).mean() / whole.mean():.2f}"


def gap_of_means(lora, method, quadruple):
    """The part of the gap to four times the rank, of the means over seeds."""
    if not quadruple:
        return "–"
    whole = test_loss(lora) - test_loss(quadruple)
    return f"{(test_loss(lora) - test_loss(method)) / whole:.0%}"
