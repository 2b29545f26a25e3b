"""What the examples share: the methods, how they train, tables and pictures.

All methods get the same pretrained model, the same head and the same batches in
the same order.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable

import keras
import matplotlib
import numpy as np
import tensorflow as tf

import keras_srlora

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = {
    "srlora": "SRLoRA",
    "lora": "LoRA",
    "pissa": "PiSSA",
    "keras_lora": "Keras LoRA",
    "full": "Full fine-tuning",
}
COLORS = {
    "srlora": "#c2410c",
    "lora": "#1d4ed8",
    "pissa": "#15803d",
    "keras_lora": "#1d4ed8",
    "full": "#525252",
}


@dataclasses.dataclass
class Task:
    """What a script brings."""

    title: str
    load_backbone: Callable  # () -> a fresh pretrained backbone or task
    add_head: Callable  # backbone -> the model to train
    train: tf.data.Dataset
    validation: tf.data.Dataset
    convert: Callable  # an example of these two -> (x, y)
    loss: keras.losses.Loss
    evaluate: Callable  # (model, validation batches) -> {name: number}
    # What is adapted: all projections, or the layers of these names.
    target_layer_names: list | None = None
    exclude_layer_names: tuple = ()


@dataclasses.dataclass
class Run:
    """What one method did."""

    method: str
    parameters: int
    learning_rate: float
    losses: list  # one a step
    seconds: float
    scores: dict = dataclasses.field(default_factory=dict)
    events: list = dataclasses.field(default_factory=list)  # of recompositions

    @property
    def final_loss(self):
        """Mean of the last tenth of the run."""
        return float(np.mean(self.losses[-max(1, len(self.losses) // 10) :]))

    def to_dict(self):
        events = [event.to_dict() for event in self.events]
        return {**vars(self), "events": events}


def run(method, task, args):
    """Trains with one method; returns its `Run`, the backbone and the model."""
    keras.utils.set_random_seed(args.seed)
    backbone = task.load_backbone()
    callbacks = adapt(method, backbone, task, args)
    model = task.add_head(backbone)
    train, validation = make_batches(task, args)
    result = fit(
        method,
        model,
        train,
        learning_rate_of(method, args),
        args.epochs,
        task.loss,
        callbacks,
    )
    result.scores = task.evaluate(model, validation)
    scores = [f"{name} {score:.4f}" for name, score in result.scores.items()]
    print(f"{METHODS[method]} on validation: {', '.join(scores)}", flush=True)
    if method == "srlora" and not result.events:
        print("It recomposed nothing: the recipe leaves so short a run to LoRA")
    return result, backbone, model


# The methods.


def adapt(method, backbone, task, args):
    """Prepares a pretrained model for a method; returns the callbacks of `fit`.

    Without recompositions SRLoRA's layers are LoRA, or with the start of the
    published recipe PiSSA: all three train the same factors.
    """
    if method == "full":
        return []
    if method == "keras_lora":
        enable_keras_lora(backbone, args.rank, task.target_layer_names)
        return []
    # The default of `enable_srlora` starts as LoRA does.
    recipe = {"lora": None, "pissa": "paper"}.get(method, args.recipe)
    keras_srlora.enable_srlora(
        backbone,
        rank=args.rank,
        target_rank=args.target_rank,
        target_layer_names=task.target_layer_names,
        exclude_layer_names=task.exclude_layer_names,
        **({"recipe": recipe} if recipe else {}),
        # All singular directions are many more than a run can visit.
        decomposition="randomized",
    )
    if method != "srlora":
        return []
    return [keras_srlora.RecompositionCallback(verbose=args.verbose)]


def enable_keras_lora(model, rank, target_layer_names):
    backbone = getattr(model, "backbone", model)
    backbone.enable_lora(rank, target_layer_names=target_layer_names)
    # It leaves biases and normalizations of these layers trainable.
    for variable in backbone.trainable_variables:
        if not variable.name.startswith("lora_kernel"):
            variable.trainable = False


def learning_rate_of(method, args):
    """LoRA's, or a part of it.

    The start of PiSSA and of the published recipe makes pairs as large as the
    kernel's own: their best learning rate is about a tenth of LoRA's.
    """
    starts_large = method == "pissa" or (
        method == "srlora" and args.recipe == "paper"
    )
    part = 0.01 if method == "full" else 0.1 if starts_large else 1.0
    return part * args.learning_rate


# Training.


def make_batches(task, args):
    """Batches in an order that depends on the seed alone.

    Made anew for each method: a data set that was used before goes on shuffling
    where it was left.
    """
    train = task.train.shuffle(min(len(task.train), 10_000), seed=args.seed)
    train = train.map(task.convert, num_parallel_calls=tf.data.AUTOTUNE)
    train = train.batch(args.batch_size, drop_remainder=True)
    if len(train) == 0:
        raise SystemExit(
            f"{len(task.train)} training examples do not fill a batch of "
            f"{args.batch_size}."
        )
    validation = task.validation.map(
        task.convert, num_parallel_calls=tf.data.AUTOTUNE
    ).batch(args.batch_size)
    return train.prefetch(2), validation.prefetch(2)


def fit(method, model, train, learning_rate, epochs, loss, callbacks=()):
    parameters = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    steps = epochs * len(train)
    print(
        f"\n{METHODS[method]}: {parameters:,} trainable parameters, {steps} "
        f"steps, learning rate {learning_rate:g}",
        flush=True,
    )
    schedule = keras.optimizers.schedules.PolynomialDecay(
        learning_rate, decay_steps=steps, end_learning_rate=0.0
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.01)
    model.compile(optimizer, loss)
    losses = StepLosses()
    start = time.time()
    model.fit(
        train,
        epochs=epochs,
        callbacks=[losses, *callbacks],
        shuffle=False,  # `train` does it
        verbose=1 if sys.stdout.isatty() else 0,
    )
    if not np.isfinite(losses.values).all():
        raise SystemExit(
            f"{METHODS[method]} diverged: its loss is not finite. Try a "
            f"learning rate below {learning_rate:g}."
        )
    return Run(
        method=method,
        parameters=parameters,
        learning_rate=learning_rate,
        losses=losses.values,
        seconds=time.time() - start,
        events=[e for c in callbacks for e in c.events],
    )


class StepLosses(keras.callbacks.Callback):
    """Keeps the loss of each batch; `logs` has its mean over the epoch.

    Where there is no terminal for a progress bar it prints ten lines a run.
    """

    def __init__(self):
        super().__init__()
        self.values = []

    def on_epoch_begin(self, epoch, logs=None):
        self._sum = 0.0

    def on_train_batch_end(self, batch, logs=None):
        total = logs["loss"] * (batch + 1)
        self.values.append(float(total - self._sum))
        self._sum = total
        step = len(self.values)
        steps = self.params["epochs"] * self.params["steps"]
        every = -(-steps // 10)
        if step % every == 0 and not sys.stdout.isatty():
            loss = np.mean(self.values[-every:])
            print(f"step {step} of {steps}: loss {loss:.3f}", flush=True)


def predict(model, batches):
    """Returns the outputs and the labels of all batches, as NumPy arrays."""
    outputs = model.predict(batches, verbose=0)
    labels = [y for _, y in batches.as_numpy_iterator()]
    return np.asarray(outputs, "float32"), np.concatenate(labels)


def accuracy(model, batches):
    logits, labels = predict(model, batches)
    return {"accuracy": float(np.mean(np.argmax(logits, -1) == labels))}


def merge_and_check(model, validation):
    """Back to plain Keras layers; the model must predict the same."""
    x, _ = next(validation.as_numpy_iterator())
    before = keras.ops.convert_to_numpy(model(x, training=False))
    layers = keras_srlora.merge_srlora(model)
    after = keras.ops.convert_to_numpy(model(x, training=False))
    change = np.abs(after - before).max()
    if not change < 1e-3 * max(1.0, np.abs(before).max()):
        raise SystemExit(
            f"Merging changed the predictions: an output moved by {change:.2g}."
        )
    print(
        f"Merged {len(layers)} layers into plain Keras layers; the largest "
        f"change of an output is {change:.1e}",
        flush=True,
    )


# The outcome.


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
    """What each run was and reached, for `table`."""
    return [
        {
            "method": METHODS[run.method],
            "trainable parameters": f"{run.parameters:,}",
            "learning rate": f"{run.learning_rate:g}",
            "final training loss": f"{run.final_loss:.4f}",
            **{name: f"{score:.4f}" for name, score in run.scores.items()},
            "recompositions": len(run.events),
            "seconds": f"{run.seconds:.0f}",
        }
        for run in runs
    ]


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
    for run in runs:
        steps = range(1, len(run.losses) + 1)
        scores = [f"{name} {x:.3f}" for name, x in run.scores.items()]
        label = f"{METHODS[run.method]}: {', '.join(scores)}"
        color = COLORS[run.method]
        axes.plot(steps, run.losses, color=color, alpha=0.2, linewidth=0.7)
        axes.plot(
            steps, smoothed(run.losses), color=color, linewidth=2, label=label
        )
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


# The command line.


def make_parser(description, methods=("srlora", "keras_lora"), **defaults):
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", help="name or folder of a KerasHub preset")
    add(
        "--method",
        nargs="+",
        choices=METHODS,
        default=list(methods),
        help="one or more",
    )
    add("--rank", type=int, help="pairs a kernel")
    add("--target-rank", type=int, help="directions that SRLoRA may visit")
    add("--recipe", help="of SRLoRA, such as paper; else the package's default")
    add("--epochs", type=int)
    add("--batch-size", type=int)
    add("--learning-rate", type=float, help="of LoRA; the others' follow it")
    add("--train-examples", type=int, help="0 for all")
    add("--validation-examples", type=int, help="0 for all")
    add("--seed", type=int, default=0)
    add("--output", help="folder for pictures, tables and numbers")
    add("--cache-dir", help="folder for what is made only once")
    add("--verbose", type=int, default=1, help="0: no line a recomposition")
    add("--smoke", action="store_true", help="a tiny run, to see it work")
    parser.set_defaults(**defaults)
    return parser


def parse_arguments(parser, **smoke):
    """With `--smoke`, other defaults."""
    if parser.parse_args().smoke:
        parser.set_defaults(**smoke)
    return parser.parse_args()
