"""Draws pictures of runs.

Each function draws into a matplotlib `Axes` and returns it. It takes a run in
any of these forms: a model with SRLoRA layers, a list of such layers, a
`RecompositionCallback`, a `Recomposer`, or the path of a file that
`save_adapter` wrote. matplotlib must be installed:
`pip install keras-srlora[plots]`.

Example:

```python
from keras_srlora import plots

axes = plots.plot_active_directions(callback, layer="encoder_0/query")
axes.figure.savefig("directions.png")
```
"""

from __future__ import annotations

import collections
import functools
import os
import re
from typing import NamedTuple

import keras
import numpy as np

from keras_srlora.adapters.combine import part_of
from keras_srlora.adapters.format import FACTORS
from keras_srlora.adapters.format import open_adapter
from keras_srlora.functional.low_rank import thin_svd
from keras_srlora.layers import pairs
from keras_srlora.layers.base import SRLoRALayer
from keras_srlora.layers.find import srlora_layers
from keras_srlora.layers.record import EVENT

# More recompositions than these are drawn with short lines.
FEW_LINES = 40

STEP, SLOT, DIRECTION = map(EVENT.index, ("step", "slot", "direction"))


class LayerRun(NamedTuple):
    """What a picture needs to know of one layer.

    Attributes:
        path: of the layer.
        events: float64, `(m, 6)`, with the columns of `Record.events`.
        slot_direction: int, `(r,)`. Direction in each slot at the end.
        starts_as_lora: bool. Whether the first pairs started along none.
        update: function that returns the factors `(k, in)` and `(k, out)` of
            the whole update.
    """

    path: str
    events: np.ndarray
    slot_direction: np.ndarray
    starts_as_lora: bool
    update: object

    def stays(self, total_steps):
        """`[(direction, slot, begin, end)]`; -1 for a start along none."""
        stays = []
        for slot in range(len(self.slot_direction)):
            rows = self.events[self.events[:, SLOT] == slot]
            begins = [0, *rows[:, STEP].astype(int)]
            ends = [*begins[1:], total_steps]
            # First pairs that start along directions take the leading ones.
            first = -1 if self.starts_as_lora else slot
            directions = [first, *rows[:, DIRECTION].astype(int)]
            for direction, begin, end in zip(directions, begins, ends):
                stays.append((int(direction), slot, begin, end))
        return stays


def plot_loss(losses, run=None, *, label=None, smooth=1, ax=None):
    """Shows the loss against steps, with a line at each recomposition.

    If there are many recompositions, the lines are short.

    Args:
        losses: list of the losses of all steps, or a dict from labels to such
            lists.
        run: a run whose recompositions are marked, or `None`. A run is a
            `RecompositionCallback`, a `Recomposer`, a model, or the path of a
            file that `save_adapter` wrote.
        label: str. Name of the curve, if `losses` is a list.
        smooth: int. Number of steps of a running mean. Defaults to `1`: none.
        ax: `matplotlib.axes.Axes`, or `None` for a new one.

    Returns:
        The `Axes`.
    """
    ax = _axes(ax)
    curves = losses if isinstance(losses, dict) else {label: losses}
    for name, values in curves.items():
        values = np.asarray(values, "float64")
        kernel = np.ones(smooth) / smooth
        mean = np.convolve(values, kernel, mode="valid")
        ax.plot(np.arange(len(mean)) + smooth, mean, label=name, linewidth=1.5)
    if run is not None:
        steps = {int(s) for x in layer_runs(run) for s in x.events[:, STEP]}
        for i, step in enumerate(sorted(steps)):
            ax.axvline(
                step,
                ymax=1.0 if len(steps) <= FEW_LINES else 0.04,
                color="0.5",
                alpha=0.4,  # on a dark page as well
                linewidth=0.8,
                zorder=0,
                label="a recomposition" if i == 0 else None,
            )
    ax.set_xlabel("step")
    ax.set_ylabel(f"loss, mean of {smooth} steps" if smooth > 1 else "loss")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False)
    return ax


def plot_active_directions(run, *, layer=None, total_steps=None, ax=None):
    """Shows which directions are active when, in one layer.

    This is a figure of the paper.

    Args:
        run: a `RecompositionCallback`, a `Recomposer`, a model, or the path of
            a file that `save_adapter` wrote.
        layer: str. Path of the layer, or a regular expression that matches one
            path. Defaults to `None`: the first layer.
        total_steps: int. Length of the run. Defaults to `None`: that of the
            `Recomposer`, or one interval more than the last recomposition.
        ax: `matplotlib.axes.Axes`, or `None` for a new one.

    Returns:
        The `Axes`.
    """
    ax = _axes(ax)
    chosen = _choose(layer_runs(run), layer)
    total = total_steps or _length(run, [chosen])
    rank = len(chosen.slot_direction)
    for direction, slot, begin, end in chosen.stays(total):
        # Pairs that started along none share the row below the first.
        row, height = direction + 1, 0.9
        if direction < 0:
            row, height = (slot + 0.5) / rank - 0.5, 0.9 / rank
        ax.barh(row, end - begin, height, left=begin, color=f"C{slot % 10}")
    ax.set_xlim(0, total)
    ax.set_xlabel("step")
    ax.set_ylabel("singular direction (0: none yet)")
    ax.set_title(f"{chosen.path}\na colour for each slot", fontsize="medium")
    return ax


def plot_lifetimes(run, *, total_steps=None, ax=None):
    """Shows how long directions stay active, by kind of layer.

    This is a figure of the paper.

    Args:
        run: a `RecompositionCallback`, a `Recomposer`, a model, or the path of
            a file that `save_adapter` wrote.
        total_steps: int, or `None`; as in `plot_active_directions`.
        ax: `matplotlib.axes.Axes`, or `None` for a new one.

    Returns:
        The `Axes`: a row for each layer name, over all blocks. A circle's
        area and the number above it show how many directions stayed so long.
    """
    ax = _axes(ax)
    runs = layer_runs(run)
    total = total_steps or _length(run, runs)
    lifetimes = collections.defaultdict(list)
    for of_layer in runs:
        kind = of_layer.path.rsplit("/", 1)[-1]
        for direction, _, begin, end in of_layer.stays(total):
            if direction >= 0:
                lifetimes[kind].append(end - begin)
    if not lifetimes:
        raise ValueError(
            "No pair started along a direction in this run: there are no "
            f"lifetimes to show. Received: {len(runs)} layers"
        )
    # Recompositions are an interval apart, give or take a step.
    grouped = {
        kind: _grouped(steps, total / 50) for kind, steps in lifetimes.items()
    }
    most = max(counts.max() for _, counts in grouped.values())
    for row, (steps, counts) in enumerate(grouped.values()):
        areas = 400 * counts / most
        ax.scatter(steps, np.full(len(steps), row), areas, "C0", alpha=0.6)
        for step, count, area in zip(steps, counts, areas):
            ax.annotate(
                str(count),
                (step, row),
                (0, np.sqrt(area) / 2 + 2),
                textcoords="offset points",
                ha="center",
                fontsize="x-small",
            )
    ax.set_yticks(range(len(grouped)), grouped)
    ax.set_ylim(len(grouped) - 0.5, -0.6)
    ax.set_xlim(0, 1.03 * total)
    ax.set_xlabel("steps that a direction stays active")
    ax.set_title("above a circle: how many directions", fontsize="medium")
    return ax


def plot_spectrum(runs, *, layer=None, ax=None):
    """Shows the singular values of a layer's whole update.

    LoRA with `r` pairs has an update of rank `r`. A run that recomposes has one
    of a higher rank.

    Args:
        runs: a run, or a dict from labels to runs. A run is a
            `RecompositionCallback`, a `Recomposer`, a model, or the path of a
            file that `save_adapter` wrote.
        layer: str, or `None`; as in `plot_active_directions`.
        ax: `matplotlib.axes.Axes`, or `None` for a new one.

    Returns:
        The `Axes`.
    """
    ax = _axes(ax)
    runs = runs if isinstance(runs, dict) else {None: runs}
    for label, run in runs.items():
        chosen = _choose(layer_runs(run), layer)
        _, values, _ = thin_svd(*chosen.update())
        ax.semilogy(np.arange(1, len(values) + 1), values, "o-", label=label)
    ax.set_xlabel("number of the singular value, the largest first")
    ax.set_ylabel("singular value of the update")
    ax.set_title(chosen.path, fontsize="medium")
    if any(label is not None for label in runs):
        ax.legend(frameon=False)
    return ax


def plot_importance(events, *, layer=None, ax=None):
    """Shows the importance of one layer's pairs at each recomposition.

    Args:
        events: a `RecompositionCallback`, a `Recomposer`, or a list of
            `Recomposition`.
        layer: str. Path of the layer, or `None` for the first event's.
        ax: `matplotlib.axes.Axes`, or `None` for a new one.

    Returns:
        The `Axes`: a line for each slot; a cross where its pair was fused.
    """
    ax = _axes(ax)
    events = getattr(events, "events", events)
    if not isinstance(events, list):
        raise ValueError(
            "The scores of all pairs are with a `RecompositionCallback`, a "
            "`Recomposer`, or a list of `Recomposition`. "
            f"Received: {events!r}"
        )
    if not events:
        raise ValueError(
            "Nothing was recomposed: there are no scores to show. "
            f"Received: {events!r}"
        )
    path = layer or events[0].layer
    events = [event for event in events if event.layer == path]
    if not events:
        raise ValueError(f"No event is of that layer. Received: {layer=}")
    steps = [event.step for event in events]
    scores = np.array([event.importance for event in events])
    for slot, of_slot in enumerate(scores.T):
        ax.plot(steps, of_slot, "-", color=f"C{slot % 10}", linewidth=1)
        fused = [i for i, event in enumerate(events) if slot in event.slots]
        ax.plot(
            np.take(steps, fused),
            np.take(of_slot, fused),
            "x",
            color=f"C{slot % 10}",
        )
    if np.all(scores > 0):
        ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("importance")
    ax.set_title(
        f"{path}\na line for each slot, a cross where its pair is fused",
        fontsize="medium",
    )
    return ax


def layer_runs(run) -> list[LayerRun]:
    """The layers of a run, in any of the forms that this module takes."""
    if isinstance(run, (str, os.PathLike)):
        return _from_file(run)
    if isinstance(run, keras.Model):
        layers = srlora_layers(run)
    elif isinstance(run, SRLoRALayer):
        layers = [run]
    else:
        run = getattr(run, "recomposer", run)
        layers = getattr(run, "layers", run)
    if not isinstance(layers, list) or not layers:
        raise ValueError(
            "A run must be a model, a list of SRLoRA layers, a callback, a "
            "`Recomposer`, or the path of an adapter file. "
            f"Received: {run!r}"
        )
    for layer in layers:
        if not isinstance(layer, SRLoRALayer):
            raise ValueError(
                f"Layer {layer.path!r} was merged, and has no record any more. "
                "Draw before merging, or pass the path of a file of "
                f"`save_adapter`. Received: a {type(layer).__name__}"
            )
        if not layer.initialized:
            raise ValueError(
                f"The kernel of layer {layer.path!r} was not decomposed yet: "
                "there is nothing to show. Train first."
            )
    return [
        LayerRun(
            layer.path,
            layer.record.events,
            layer.record.slot_direction,
            layer.record.starts_as_lora,
            lambda layer=layer: pairs.update_factors(layer),
        )
        for layer in layers
    ]


def _from_file(filepath):
    return [
        LayerRun(
            saved["path"],
            record.events,
            record.slot_direction,
            record.starts_as_lora,
            functools.partial(_update, arrays, scale, record),
        )
        for saved, arrays, record, scale in open_adapter(filepath)
    ]


def _update(arrays, scale, record):
    a, b = (arrays[name] for name in FACTORS)
    whole = part_of(a, b, scale, record)
    return whole.a, whole.b


def _choose(runs, layer):
    if layer is None:
        return runs[0]
    found = [x for x in runs if x.path == layer]
    found = found or [x for x in runs if re.fullmatch(layer, x.path)]
    if len(found) != 1:
        raise ValueError(
            f"`layer` must be the path of one layer, and matches {len(found)}. "
            f"Received: layer={layer!r}; paths such as "
            f"{[x.path for x in runs[:3]]}"
        )
    return found[0]


def _grouped(values, width):
    """Means and sizes of groups of values, each at most `width` wide."""
    groups: list[list] = []
    for value in sorted(values):
        if groups and value - groups[-1][0] <= width:
            groups[-1].append(value)
        else:
            groups.append([value])
    return (
        np.array([np.mean(group) for group in groups]),
        np.array([len(group) for group in groups]),
    )


def _length(run, runs):
    """Steps of a run, as far as it is known."""
    pace = getattr(getattr(run, "recomposer", run), "pace", None)
    if pace is not None and pace.total_steps:
        return pace.total_steps
    steps = sorted({int(s) for x in runs for s in x.events[:, STEP]})
    if not steps:
        return 1
    return steps[-1] + max(1, int(np.median(np.diff([0, *steps]))))


def _axes(ax):
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Pictures need the package matplotlib: `pip install matplotlib`, "
            "or `pip install keras-srlora[plots]`."
        ) from error
    return plt.subplots(figsize=(7, 4), layout="constrained")[1]
