"""Writes the tables and pictures of the laboratory from its results.

    python -m benchmarks.quality.report

For each task and rank, each method at the learning rate that was chosen for it:
mean loss on the test split, the difference to LoRA of the same rank, paired by
seed, with its 95 % interval, and the part of LoRA's gap to four times the rank
that the method closes.
"""

import collections
import pathlib

import numpy as np

from benchmarks.quality import pages
from benchmarks.quality.comparison import FEWEST_SEEDS
from benchmarks.quality.comparison import VERDICTS
from benchmarks.quality.comparison import chosen_runs
from benchmarks.quality.comparison import differences
from benchmarks.quality.comparison import gap
from benchmarks.quality.comparison import interval
from benchmarks.quality.comparison import method_of
from benchmarks.quality.comparison import test_loss
from benchmarks.quality.comparison import verdict
from benchmarks.quality.records import RESULTS
from benchmarks.quality.records import read
from benchmarks.shared import plots
from benchmarks.shared.tables import fill_in
from benchmarks.shared.tables import markdown

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "recipes.md"
SUMMARISED = (
    "adaptive",
    "flat_loss",
    "lora_restarts",
    "paper",
    "pissa",
    "rslora",
    "adalora_like",
    "lora",
)
PLOTTED = (
    "lora",
    "lora_4r",
    "pissa",
    "paper",
    "lora_restarts",
    "flat_loss",
    "adaptive",
)
COLUMNS = (
    "rank",
    "method",
    "learning rate",
    "training loss",
    "test loss",
    "to LoRA, paired",
    "of the gap to 4r",
    "accuracy",
    "recompositions",
    "training loss after a quarter",
    "steps to LoRA's",
    "seeds",
)


def main():
    """Reads `results/*.jsonl`, writes `results/tables.md` and the pictures.

    And the two tables of `docs/recipes.md`.
    """
    tables = ["# Results\n", "Written by `report.py`.\n"]
    done = {
        path.stem: read(path)
        for path in sorted(RESULTS.glob("*.jsonl"))
        if path.stat().st_size
    }
    tasks = {task: chosen_runs(runs) for task, runs in done.items()}
    tables.append(summary(tasks))
    for task, cells in tasks.items():
        tables.append(table(task, cells))
        if len({rank for rank, method in cells if method == "pissa"}) > 1:
            plot(task, cells, RESULTS / f"{task}.png")
    (RESULTS / "tables.md").write_text("\n".join(tables), encoding="utf-8")
    fill_in(PAGE, "figures", pages.figures(tasks, done))
    fill_in(PAGE, "curve", pages.curve(tasks))
    fill_in(PAGE, "long", pages.long_runs(done))
    fill_in(PAGE, "predictions", pages.predictions(done))
    fill_in(PAGE, "labels", pages.labels(done))
    fill_in(PAGE, "noise", pages.noise(done))
    fill_in(PAGE, "ranks", pages.by_rank(done))
    fill_in(PAGE, "quarters", pages.quarters(done))
    fill_in(PAGE, "repeated", pages.repeated(done))
    fill_in(PAGE, "prototypes", pages.prototypes(done))
    fill_in(PAGE, "paces", pages.paces(done))


def summary(tasks):
    """In how many cells a method beats LoRA and PiSSA of the same rank."""
    rows = [["method", "rival", "cells", *VERDICTS]]
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
                rows.append(
                    [f"`{method}`", f"`{rival}`", counts.total()]
                    + [counts[x] for x in VERDICTS]
                )
    return (
        f"## All cells of at least {FEWEST_SEEDS} seeds\n\n"
        "Better, worse: by the 95 % interval of the paired difference.\n\n"
        f"{markdown(rows)}\n"
    )


def table(task, cells):
    """A Markdown table, the best method of each rank first."""
    rows = [COLUMNS]

    def order(key):
        rank, method = key
        return rank, test_loss(cells[key]), method

    for rank, method in sorted(cells, key=order):
        runs = cells[rank, method]
        records = list(runs.values())
        lora = cells.get((rank, "lora"))
        quadruple = method_of(cells, rank, "lora_4r")
        accuracy = [r["test_accuracy"] for r in records if "test_accuracy" in r]
        rows.append(
            [
                rank,
                f"`{method}`",
                f"{records[0]['rate']:g}",
                f"{np.mean([r['train_loss'] for r in records]):.4f}",
                f"{test_loss(runs):.4f}",
                paired(runs, lora) if lora and method != "lora" else "",
                gap(runs, lora, quadruple) if lora and quadruple else "",
                f"{np.mean(accuracy):.4f}" if accuracy else "",
                records[0]["recompositions"],
                f"{np.mean([after_a_quarter(r) for r in records]):.4f}",
                steps_to(runs, lora) if lora else "",
                len(runs),
            ]
        )
    return f"## {task}\n\n{markdown(rows)}\n"


def paired(runs, lora):
    """The mean difference to LoRA and half of its 95 % interval."""
    found = differences(runs, lora)
    if len(found) < FEWEST_SEEDS:
        return f"{found.mean():+.4f}"
    mean, half = interval(found)
    return f"{mean:+.4f} ± {half:.4f}"


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
    figure, axes = plots.subplots()
    ranks = collections.defaultdict(list)
    for rank, method in sorted(cells):
        ranks[method].append(rank)
    for index, method in enumerate(PLOTTED):
        if method not in ranks:
            continue
        losses = [test_loss(cells[rank, method]) for rank in ranks[method]]
        # Dashed: where it is level the gated recipe lies on LoRA's line.
        line = "--" if method == "flat_loss" else "-"
        axes.plot(
            ranks[method],
            losses,
            line,
            marker="o",
            color=f"C{index}",
            label=method,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({rank for rank, _ in cells}))
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(plots.PLAIN)
    axes.yaxis.set_major_formatter(plots.PLAIN)
    if max(axes.get_ylim()) < 10 * min(axes.get_ylim()):
        axes.yaxis.set_minor_formatter(plots.PLAIN)
    axes.set_xlabel("rank")
    axes.set_ylabel("loss on the test split")
    axes.set_title(task, loc="left")
    axes.legend()
    plots.save(figure, path)


if __name__ == "__main__":
    main()
