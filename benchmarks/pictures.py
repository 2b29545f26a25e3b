"""Draws the pictures of `docs/pictures.md`.

    KERAS_BACKEND=jax python -m benchmarks.pictures

Three runs of 2,000 steps each: a small GPT that was pretrained on film reviews
learns source code (`benchmarks/quality/tasks/language.py`), as LoRA, with the
default recipe and with the published one. Runs are kept in `outputs/pictures`,
and are not run again. Each picture is drawn twice, for the light and the dark
colours of the documentation.
"""

import json
import pathlib
import re

import keras

import keras_srlora
from benchmarks.quality import job
from benchmarks.shared.plots import plt
from keras_srlora import plots

ROOT = pathlib.Path(__file__).parents[1]
RUNS = ROOT / "outputs" / "pictures"
PICTURES = ROOT / "docs" / "pictures"

TASK, RANK = "code_small", 4
DEFAULT, PAPER = "SRLoRA", "SRLoRA, recipe paper"
# Label: recipe, learning rate, whether pairs are recomposed.
METHODS = {
    "LoRA": ("adaptive", 3e-2, False),
    DEFAULT: ("adaptive", 3e-2, True),
    PAPER: ("paper", 1e-2, True),
}
LAYER = ".*layer_1/.*feedforward_intermediate_dense"

# Colours of the documentation's two schemes.
SCHEMES = {
    "light": ("white", "#222222", "#bbbbbb"),
    "dark": ("#1e2129", "#e2e4e9", "#5b6070"),
}


def main():
    """Trains the runs that are missing, and draws."""
    runs = {label: train(label) for label in METHODS}
    PICTURES.mkdir(exist_ok=True)
    for scheme in SCHEMES:
        with plt.rc_context(style(scheme)):
            draw(runs, scheme)


# The runs.


def train(label):
    """`(losses, events, path of the adapter)` of a run, which is kept."""
    name = label.lower().replace(", ", "-").replace(" ", "-")
    numbers, adapter = RUNS / f"{name}.json", RUNS / f"{name}.safetensors"
    if not (numbers.exists() and adapter.exists()):
        RUNS.mkdir(parents=True, exist_ok=True)
        losses, events = fit(adapter, *METHODS[label])
        events = [event.to_dict() for event in events]
        numbers.write_text(json.dumps({"losses": losses, "events": events}))
    found = json.loads(numbers.read_text())
    events = [keras_srlora.Recomposition(**e) for e in found["events"]]
    return found["losses"], events, adapter


def fit(adapter, recipe, learning_rate, recomposes):
    """`(losses, events)` of one run, whose adapter it saves."""
    task = job.load(TASK)
    keras.utils.set_random_seed(0)
    model = task.build(0)
    keras_srlora.enable_srlora(
        model, rank=RANK, target_layer_names=task.targets, recipe=recipe
    )
    schedule = keras.optimizers.schedules.PolynomialDecay(
        learning_rate, task.steps, end_learning_rate=0.0
    )
    model.compile(keras.optimizers.AdamW(schedule), task.loss)
    losses = job.StepLosses()
    callbacks = [losses]
    if recomposes:
        callbacks.append(keras_srlora.RecompositionCallback())
    model.fit(
        job.ShuffledBatches(task, seed=0),
        epochs=task.epochs,
        verbose=2,
        callbacks=callbacks,
    )
    keras_srlora.save_adapter(model, adapter, include_trainable=True)
    values = [float(value) for value in losses.values]
    return values, callbacks[1].events if recomposes else []


# The pictures.


def draw(runs, scheme):
    """The five pictures, in the colours that are set."""
    losses = {label: losses for label, (losses, *_) in runs.items()}
    adapters = {label: path for label, (*_, path) in runs.items()}
    ax = plots.plot_loss(losses, adapters[DEFAULT], smooth=100)
    steps = len(losses[DEFAULT])
    ax.set_xlim(0, steps)
    save(ax, "loss", scheme)

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for ax, label in zip(axes, (DEFAULT, PAPER)):
        plots.plot_active_directions(
            adapters[label], layer=LAYER, total_steps=steps, ax=ax
        )
        ax.set_title(label)
    save(axes[0], "directions", scheme)

    ax = plots.plot_lifetimes(adapters[PAPER], total_steps=steps)
    save(ax, "lifetimes", scheme)

    save(plots.plot_spectrum(adapters, layer=LAYER), "spectrum", scheme)

    _, events, _ = runs[PAPER]
    (path,) = {e.layer for e in events if re.fullmatch(LAYER, e.layer)}
    save(plots.plot_importance(events, layer=path), "importance", scheme)


def style(scheme):
    """Settings of matplotlib."""
    background, text, lines = SCHEMES[scheme]
    of_text = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    return {
        "font.size": 12,  # read on a phone as well
        "figure.facecolor": background,
        "axes.facecolor": background,
        "savefig.facecolor": background,
        "axes.edgecolor": lines,
        "grid.color": lines,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(of_text, text),
    }


def save(ax, name, scheme):
    """Writes a picture and forgets it."""
    path = PICTURES / f"{name}-{scheme}.png"
    ax.figure.savefig(path, dpi=120)
    plt.close(ax.figure)
    print(path.relative_to(ROOT), flush=True)


if __name__ == "__main__":
    main()
