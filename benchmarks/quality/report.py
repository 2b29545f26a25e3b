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
from scipy import stats

from benchmarks.quality.records import RESULTS
from benchmarks.quality.records import best_rate
from benchmarks.quality.records import read
from benchmarks.shared import plots
from benchmarks.shared.tables import fill_in
from benchmarks.shared.tables import markdown

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "recipes.md"
VERDICTS = ("better", "level", "worse")
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
SMALLEST_GAP = 1e-3  # of losses that begin near 1
FEWEST_SEEDS = 3  # that an interval, or a figure of the documentation, needs
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

# The tables of the documentation.
TITLES = {
    "teacher_rank_48": "teacher, flat update of rank 48",
    "teacher_rank_12": "teacher, flat update of rank 12",
    "teacher_rank_4": "teacher, flat update of rank 4",
    "teacher_power_law": "teacher, power law",
    "autoencoder_digits": "autoencoder, clothes to digits",
    "digits": "MLP, clothes to digits",
    "vit_digits": "ViT, clothes to digits",
    "bbc": "MiniLM, BBC News",
    "newsgroups": "MiniLM, newsgroups",
    "rotten_tomatoes": "MiniLM, Rotten Tomatoes",
    "masked_newsgroups": "MiniLM, masked tokens of newsgroups",
}
HEADINGS = {
    "lora": "LoRA",
    "lora_4r": "LoRA, 4 × rank",
    "pissa": "PiSSA",
    "paper": "`paper`",
    "lora_restarts": "`lora_restarts`",
    "flat_loss": "behind a gate",
}
CURVE = (1, 2, 4, 8, 16, 32, 64)
# Long runs with plenty of data, at LoRA's own best learning rate.
LONG = {
    "code": "GPT, 96 wide, reviews to source code, 2,000 steps",
    "code_small": "GPT, 64 wide, the same",
    "code_6000": "GPT, 96 wide, 6,000 steps",
    "vit_clothes": "ViT, digits to clothes, 3,560 steps",
}
# Task, rank, rate: LoRA's best rates, and one below that of the GPT.
PROTOTYPED = (
    ("code_small", 2, 0.03, "GPT at 3e-2"),
    ("code_small", 2, 0.01, "GPT at 1e-2"),
    ("vit_clothes", 2, 0.01, "ViT at 1e-2"),
    ("autoencoder_digits", 2, 0.03, "autoencoder at 3e-2"),
    ("digits", 2, 0.03, "MLP at 3e-2"),
)
LONG_METHODS = ("lora", "lora_4r", "paper", "lora_restarts", "adaptive")


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
        plot(task, cells, RESULTS / f"{task}.png")
    (RESULTS / "tables.md").write_text("\n".join(tables), encoding="utf-8")
    fill_in(PAGE, "figures", figures(tasks))
    fill_in(PAGE, "curve", curve(tasks))
    fill_in(PAGE, "long", long_runs(done))
    fill_in(PAGE, "prototypes", prototypes(done))


def chosen_runs(done):
    """`{(rank, method): {seed: record}}` at the chosen learning rates."""
    cells = collections.defaultdict(dict)
    for cell in {key[:3] for key in done}:
        best = best_rate(done, cell)
        for key, record in done.items():
            if key[:4] == (*cell, best):
                cells[cell[2], cell[1]][record["seed"]] = record
    return dict(cells)


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


def figures(tasks):
    """Of each task and rank, the test losses, and what became of the default.

    Where a method has too few seeds, none.
    """
    rows = [["task", "rank", *HEADINGS.values(), "to LoRA"]]
    for task, title in TITLES.items():
        cells = tasks[task]
        for rank in sorted(r for r, method in cells if method == "flat_loss"):
            found = [method_of(cells, rank, method) for method in HEADINGS]
            to_lora = verdict(
                differences(cells[rank, "flat_loss"], cells[rank, "lora"])
            )
            to_lora = f"**{to_lora}**" if to_lora != "level" else to_lora
            rows.append([title, rank, *map(shown, found), to_lora])
            title = ""
    return markdown(rows)


def prototypes(done):
    """One row a prototype, one column a task at one rate; the first seed."""
    methods = ["lora", "lora_4r"]
    for task, rank, rate, _ in PROTOTYPED:
        methods += [
            method
            for _, method, r, lr, _ in done[task]
            if method.startswith("x:") and (r, lr) == (rank, rate)
        ]
    rows = [["method", *(title for *_, title in PROTOTYPED)]]
    for method in dict.fromkeys(methods):
        row = []
        for task, rank, rate, _ in PROTOTYPED:
            found = at_rate(done[task], task, method, rank, rate)
            row.append(f"{found[0]['test_loss']:.4f}" if 0 in found else "–")
        rows.append([described(method), *row])
    return markdown(rows)


def described(method):
    """A method's name in words; what is not said is a prototype's default."""
    if not method.startswith("x:"):
        return HEADINGS[method]
    return f"`{method.removeprefix('x:').replace(',', ' ')}`"


def long_runs(done):
    """Each method at LoRA's best rate: losses, and the part of the gap.

    The gap is that to LoRA of four times the rank at the same rate. Few seeds:
    their number is in the last column.
    """
    names = ["LoRA", "LoRA, 4 × rank", "`paper`", "`lora_restarts`"]
    header = ["task", "rank", "rate", *names, "`adaptive`", "of the gap"]
    rows = [[*header, "seeds"]]
    for task, title in LONG.items():
        runs = done.get(task, {})
        for rank in sorted({key[2] for key in runs if key[1] == "adaptive"}):
            rate = best_rate(runs, (task, "lora", rank))
            found = {
                method: at_rate(runs, task, method, rank, rate)
                for method in LONG_METHODS
            }
            lora, default = found["lora"], found["adaptive"]
            if not default:
                continue
            paired = [seed for seed in default if seed in lora]
            row = [title, rank, f"{rate:g}"]
            row += [f"{test_loss(x):.4f}" if x else "–" for x in found.values()]
            closed = "–"
            if found["lora_4r"]:
                closed = gap_of_means(lora, default, found["lora_4r"])
            rows.append([*row, closed, len(paired)])
            title = ""
    return markdown(rows)


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


def gap_of_means(lora, method, quadruple):
    """The part of the gap to four times the rank, of the means over seeds."""
    whole = test_loss(lora) - test_loss(quadruple)
    return f"{(test_loss(lora) - test_loss(method)) / whole:.0%}"


def curve(tasks):
    """How LoRA's test loss depends on its rank."""
    rows = [["task", *CURVE]]
    for task, title in TITLES.items():
        found = [method_of(tasks[task], rank, "lora") for rank in CURVE]
        rows.append([title, *map(shown, found)])
    return markdown(rows)


def method_of(cells, rank, method):
    """The runs of a method; those of LoRA may go by two names."""
    other = {"lora": (rank / 4, "lora_4r"), "lora_4r": (4 * rank, "lora")}
    return cells.get((rank, method)) or cells.get(other.get(method))


def shown(runs):
    """The test loss for a table; a dash for too few seeds."""
    if not runs or len(runs) < FEWEST_SEEDS:
        return "–"
    return f"{test_loss(runs):.4f}"


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


def paired(runs, lora):
    """The mean difference to LoRA and half of its 95 % interval."""
    found = differences(runs, lora)
    if len(found) < FEWEST_SEEDS:
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
