"""Writes the tables and pictures of the laboratory from its results.

    python benchmarks/quality/report.py

For each task and rank, each method at the learning rate that was chosen for it:
mean loss on the test split, the difference to LoRA of the same rank, paired by
seed, with its 95 % interval, and the part of LoRA's gap to four times the rank
that the method closes.
"""

import collections

import matplotlib
import numpy as np
import run
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = run.HERE / "results"
VERDICTS = ("better", "level", "worse")
SUMMARISED = (
    "adaptive",
    "lora_restarts",
    "paper",
    "pissa",
    "rslora",
    "adalora_like",
    "lora",
)
PLOTTED = ("lora", "lora_4r", "pissa", "paper", "lora_restarts", "adaptive")
SMALLEST_GAP = 1e-3  # of losses that begin near 1


def main():
    """Reads `results/*.jsonl`, writes `results/tables.md` and the pictures."""
    tables = ["# Results\n", "Written by `report.py`.\n"]
    tasks = {
        path.stem: chosen_runs(run.read(path))
        for path in sorted(RESULTS.glob("*.jsonl"))
        if path.stat().st_size
    }
    tables.append(summary(tasks))
    for task, cells in tasks.items():
        tables.append(table(task, cells))
        plot(task, cells, RESULTS / f"{task}.png")
    (RESULTS / "tables.md").write_text("\n".join(tables), encoding="utf-8")


def chosen_runs(done):
    """`{(rank, method): {seed: record}}` at the chosen learning rates."""
    cells = collections.defaultdict(dict)
    for cell in {key[:3] for key in done}:
        best = run.best_rate(done, cell)
        for key, record in done.items():
            if key[:4] == (*cell, best):
                cells[cell[2], cell[1]][record["seed"]] = record
    return dict(cells)


def summary(tasks):
    """In how many cells a method beats LoRA and PiSSA of the same rank."""
    lines = [
        "## All cells of at least 3 seeds\n",
        "Better, worse: by the 95 % interval of the paired difference.\n",
        "| method | rival | cells | better | level | worse |",
        "|---" * 6 + "|",
    ]
    for method in SUMMARISED:
        for rival in ("lora", "pissa"):
            counts = collections.Counter(
                verdict(differences(runs, cells[rank, rival]))
                for cells in tasks.values()
                for (rank, name), runs in cells.items()
                if name == method and (rank, rival) in cells
            )
            del counts[None]
            if method != rival and counts:
                lines.append(
                    f"| `{method}` | `{rival}` | {counts.total()} | "
                    + " | ".join(str(counts[x]) for x in VERDICTS)
                    + " |"
                )
    return "\n".join(lines) + "\n"


def verdict(found):
    """What the differences of some seeds say; `None` for fewer than 3."""
    if len(found) < 3:
        return None
    mean, half = interval(found)
    return VERDICTS[1 if abs(mean) <= half else 0 if mean < 0 else 2]


def interval(found):
    """The mean and half of its 95 % interval."""
    half = stats.t.ppf(0.975, len(found) - 1) * stats.sem(found)
    return found.mean(), half


def table(task, cells):
    """A Markdown table, the best method of each rank first."""
    lines = [
        f"## {task}\n",
        "| rank | method | learning rate | training loss | test loss | "
        "to LoRA, paired | of the gap to 4r | accuracy | recompositions | "
        "training loss after a quarter | steps to LoRA's | seeds |",
        "|---" * 12 + "|",
    ]

    def test_loss(key):
        return np.mean([r["test_loss"] for r in cells[key].values()])

    for rank, method in sorted(cells, key=lambda k: (k[0], test_loss(k))):
        runs = cells[rank, method]
        records = list(runs.values())
        lora = cells.get((rank, "lora"))
        # The same runs by another name.
        quadruple = cells.get((rank, "lora_4r"), cells.get((4 * rank, "lora")))
        accuracy = [r["test_accuracy"] for r in records if "test_accuracy" in r]
        lines.append(
            f"| {rank} | `{method}` | {records[0]['rate']:g} | "
            f"{np.mean([r['train_loss'] for r in records]):.4f} | "
            f"{test_loss((rank, method)):.4f} | "
            f"{paired(runs, lora) if lora and method != 'lora' else ''} | "
            f"{gap(runs, lora, quadruple) if lora and quadruple else ''} | "
            f"{f'{np.mean(accuracy):.4f}' if accuracy else ''} | "
            f"{records[0]['recompositions']} | "
            f"{np.mean([after_a_quarter(r) for r in records]):.4f} | "
            f"{steps_to(runs, lora) if lora else ''} | {len(runs)} |"
        )
    return "\n".join(lines) + "\n"


def differences(runs, others):
    """Test losses of the seeds that both have, one minus the other."""
    return np.array(
        [
            runs[seed]["test_loss"] - others[seed]["test_loss"]
            for seed in runs
            if seed in others
        ]
    )


def paired(runs, lora):
    """The mean difference to LoRA and half of its 95 % interval."""
    found = differences(runs, lora)
    if len(found) < 3:
        return f"{found.mean():+.4f}"
    mean, half = interval(found)
    return f"{mean:+.4f} ± {half:.4f}"


def gap(runs, lora, quadruple):
    """`(LoRA_r - method) / (LoRA_r - LoRA_4r)`, where 4r is better."""
    whole = differences(quadruple, lora)
    if verdict(whole) != "better" or whole.mean() > -SMALLEST_GAP:
        return ""
    return f"{differences(runs, lora).mean() / whole.mean():.2f}"


def after_a_quarter(record):
    """Training loss around a quarter of the run: the mean of a tenth of it."""
    points = len(record["curve"])
    return np.mean(record["curve"][points // 5 : points * 3 // 10])


def steps_to(runs, lora):
    """Part of the run after which the training loss is LoRA's final one."""
    parts = []
    for seed in runs:
        if seed in lora:
            curve = np.array(runs[seed]["curve"])
            reached = np.flatnonzero(curve <= lora[seed]["train_loss"])
            if not len(reached):
                return "never"
            parts.append((reached[0] + 1) / len(curve))
    return f"{np.mean(parts):.2f}" if parts else ""


def plot(task, cells, path):
    """Test loss against rank, for the methods that were run at several."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    ranks = collections.defaultdict(list)
    for rank, method in sorted(cells):
        ranks[method].append(rank)
    for method in filter(ranks.__contains__, PLOTTED):
        losses = [
            np.mean([r["test_loss"] for r in cells[rank, method].values()])
            for rank in ranks[method]
        ]
        axes.plot(ranks[method], losses, marker="o", label=method)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("rank")
    axes.set_ylabel("loss on the test split")
    axes.set_title(task, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
