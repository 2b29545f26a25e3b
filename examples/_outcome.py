"""The outcome of an example: a table, every number, a picture."""

import json
import pathlib

import _compare
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {
    "srlora": "#c2410c",
    "lora": "#0e7490",
    "pissa": "#15803d",
    "keras_lora": "#1d4ed8",
    "full": "#525252",
}


def table(rows):
    """A table in Markdown, aligned; `rows` are dicts with the same keys."""
    header = list(rows[0])
    lines = [header, *([str(row[name]) for name in header] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths))} |"
        for line in lines
    )


def run_rows(runs):
    """A row for each run, for `table`."""
    return [
        {
            "method": _compare.METHODS[run.method],
            "trainable parameters": f"{run.parameters:,}",
            "learning rate": f"{run.learning_rate:g}",
            "final training loss": f"{run.final_loss:.4f}",
            **{
                f"validation {name}": f"{score:.4f}"
                for name, score in run.scores.items()
            },
            "recompositions": run.recompositions,
            "seconds": f"{run.seconds:.0f}",
        }
        for run in runs
    ]


def show(runs):
    """Prints the table, and what its columns mean."""
    print(f"\n{table(run_rows(runs))}\n")
    print(
        "final training loss: mean over the last tenth of the steps; seconds: "
        "time of `fit` with compilation",
        flush=True,
    )


def too_short(run):
    """A remark on an SRLoRA run without recompositions."""
    return (
        f"This run of {len(run.losses)} steps is too short to recompose, so "
        "SRLoRA was plain LoRA.\nThe README's picture shows a longer run."
    )


def save_text(text, folder):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"Saved {folder}/table.md", flush=True)


def save(runs, title, folder):
    """Writes the curves, every number and the table."""
    folder = pathlib.Path(folder)
    save_text(table(run_rows(runs)), folder)
    plot_curves(runs, title, folder / "curves.png")
    everything = [run.to_dict() for run in runs]
    (folder / "runs.json").write_text(json.dumps(everything, indent=1))
    print(f"Saved {folder}/curves.png and {folder}/runs.json", flush=True)


def plot_curves(runs, title, path):
    """The losses against steps, with the recompositions marked."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    curves = []
    for run in runs:
        steps = range(1, len(run.losses) + 1)
        scores = [f"{name} {x:.3f}" for name, x in run.scores.items()]
        label = f"{_compare.METHODS[run.method]}: {', '.join(scores)}"
        color = COLORS[run.method]
        axes.plot(steps, run.losses, color=color, alpha=0.15, linewidth=0.7)
        curves.append(smoothed(run.losses))
        axes.plot(steps, curves[-1], color=color, linewidth=2, label=label)
    recomposed = {event.step for run in runs for event in run.events}
    for step in recomposed:
        # Between the last step before it and the first one after it.
        line = axes.axvline(
            step + 0.5, color="0.6", linewidth=0.8, linestyle="--", zorder=0
        )
    if recomposed:
        line.set_label("recomposition of SRLoRA")
    axes.set_title(title, loc="left")
    axes.set_xlabel("training step")
    axes.set_ylabel("training loss")
    axes.set_xlim(1, len(runs[0].losses))
    if max(runs[0].losses) > 10 * runs[0].final_loss:
        axes.set_yscale("log")
    else:
        # Single batches scatter far beyond the means.
        low, high = np.min(curves), np.max(curves)
        axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(framealpha=1, edgecolor="none")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def smoothed(losses):
    """Mean over a window of a twentieth of the run around each step."""
    half = max(1, len(losses) // 40)
    return [
        np.mean(losses[max(0, i - half) : i + half + 1])
        for i in range(len(losses))
    ]
