"""What the examples share: SRLoRA and Keras's LoRA, trained and compared.

Both adapt the same kernels of the same pretrained backbone, and get the same
head and the same batches in the same order. Each has its own learning rate.
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


@dataclasses.dataclass
class Task:
    """What a script brings."""

    title: str
    load_backbone: Callable  # () -> a fresh pretrained backbone
    add_head: Callable  # backbone -> the model to train
    target_layer_names: list
    train: tf.data.Dataset
    validation: tf.data.Dataset
    convert: Callable  # an example of these two -> (x, y)


@dataclasses.dataclass
class Run:
    """What one method did."""

    method: str
    parameters: int
    learning_rate: float
    losses: list  # one a step
    accuracy: float
    seconds: float
    record: list = dataclasses.field(default_factory=list)  # of recompositions

    @property
    def final_loss(self):
        """Mean of the last tenth of the run."""
        return float(np.mean(self.losses[-max(1, len(self.losses) // 10) :]))

    def to_dict(self):
        record = [event.to_dict() for event in self.record]
        return {**vars(self), "record": record}


def compare(task, args):
    """Trains with both methods; prints a table, saves a picture."""
    print(
        f"{task.title}: {len(task.train):,} training and "
        f"{len(task.validation):,} validation examples; Keras on "
        f"{keras.backend.backend()}",
        flush=True,
    )
    runs = [train_srlora(task, args), train_keras_lora(task, args)]
    print_table(runs)
    save(runs, task.title, args.output)


def train_srlora(task, args):
    keras.utils.set_random_seed(args.seed)
    backbone = task.load_backbone()
    keras_srlora.enable_srlora(
        backbone,
        rank=args.rank,
        target_rank=args.target_rank,
        target_layer_names=task.target_layer_names,
        recipe=args.recipe,
    )
    model = task.add_head(backbone)
    recomposition = keras_srlora.RecompositionCallback(verbose=1)
    train, validation = make_batches(task, args)
    run = fit(
        "SRLoRA",
        model,
        train,
        validation,
        args.learning_rate,
        args.epochs,
        [recomposition],
    )
    run.record = recomposition.record
    merge_and_check(model, validation)
    return run


def train_keras_lora(task, args):
    keras.utils.set_random_seed(args.seed)
    backbone = task.load_backbone()
    backbone.enable_lora(args.rank, target_layer_names=task.target_layer_names)
    # It leaves the biases of these layers trainable.
    for variable in backbone.trainable_variables:
        if not variable.name.startswith("lora_kernel"):
            variable.trainable = False
    model = task.add_head(backbone)
    train, validation = make_batches(task, args)
    return fit(
        "Keras LoRA",
        model,
        train,
        validation,
        args.lora_learning_rate,
        args.epochs,
    )


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


def fit(method, model, train, validation, learning_rate, epochs, callbacks=()):
    parameters = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    print(
        f"\n{method}: {parameters:,} trainable parameters, "
        f"{epochs * len(train)} steps",
        flush=True,
    )
    schedule = keras.optimizers.schedules.PolynomialDecay(
        learning_rate, decay_steps=epochs * len(train), end_learning_rate=0.0
    )
    model.compile(
        optimizer=keras.optimizers.AdamW(schedule, weight_decay=0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    losses = StepLosses()
    start = time.time()
    history = model.fit(
        train,
        validation_data=validation,
        epochs=epochs,
        callbacks=[losses, *callbacks],
        shuffle=False,  # `train` does it
        verbose=1 if sys.stdout.isatty() else 2,
    )
    if not np.isfinite(losses.values).all():
        raise SystemExit(
            f"{method} diverged: its loss is not finite. Try a learning rate "
            f"below {learning_rate:g}."
        )
    return Run(
        method=method,
        parameters=parameters,
        learning_rate=learning_rate,
        losses=losses.values,
        accuracy=float(history.history["val_accuracy"][-1]),
        seconds=time.time() - start,
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


def merge_and_check(model, validation):
    """Back to plain Keras layers; the model must predict the same."""
    x, _ = next(validation.as_numpy_iterator())
    before = keras.ops.convert_to_numpy(model(x, training=False))
    layers = keras_srlora.merge_srlora(model)
    after = keras.ops.convert_to_numpy(model(x, training=False))
    change = np.abs(after - before).max()
    if not change < 1e-3:
        raise SystemExit(
            f"Merging changed the predictions: a logit moved by {change:.2g}."
        )
    print(
        f"Merged {len(layers)} layers into plain Keras layers; the largest "
        f"change of a logit is {change:.1e}",
        flush=True,
    )


# The outcome.


def print_table(runs):
    columns = {
        "method": [run.method for run in runs],
        "trainable parameters": [f"{run.parameters:,}" for run in runs],
        "learning rate": [f"{run.learning_rate:g}" for run in runs],
        "final training loss": [f"{run.final_loss:.4f}" for run in runs],
        "validation accuracy": [f"{run.accuracy:.4f}" for run in runs],
        "seconds": [f"{run.seconds:.0f}" for run in runs],
    }
    print()
    print("  ".join(name.ljust(12) for name in columns))
    for row in zip(*columns.values()):
        cells = zip(columns, row)
        print("  ".join(c.ljust(max(12, len(name))) for name, c in cells))
    print(
        "\nAt the same rank Keras's LoRA has more parameters: it splits an "
        "attention kernel\n(in, heads, size) into (in, heads, rank) and "
        "(rank, size).",
        flush=True,
    )


def save(runs, title, folder):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plot_curves(runs, title, folder / "curves.png")
    everything = [run.to_dict() for run in runs]
    (folder / "runs.json").write_text(json.dumps(everything, indent=1))
    print(f"Saved {folder}/curves.png and {folder}/runs.json", flush=True)


def plot_curves(runs, title, path):
    """Both losses against steps, with the recompositions marked."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for run, color in zip(runs, ("#c2410c", "#1d4ed8")):
        steps = range(1, len(run.losses) + 1)
        label = f"{run.method}: validation accuracy {run.accuracy:.3f}"
        axes.plot(steps, run.losses, color=color, alpha=0.25, linewidth=0.7)
        axes.plot(
            steps, smoothed(run.losses), color=color, linewidth=2, label=label
        )
    recomposed = {event.step for run in runs for event in run.record}
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
        axes.set_ylim(bottom=0)
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


def make_parser(description, **defaults):
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", help="name or folder of a KerasHub preset")
    add("--dataset", help="name of a tensorflow_datasets data set")
    add("--rank", type=int, help="pairs a kernel")
    add("--target-rank", type=int, help="directions that SRLoRA may visit")
    add("--recipe", default="paper", help="of SRLoRA")
    add("--epochs", type=int)
    add("--batch-size", type=int)
    add("--learning-rate", type=float, help="of SRLoRA")
    add("--lora-learning-rate", type=float, help="of Keras's LoRA")
    add("--train-examples", type=int, help="0 for all")
    add("--validation-examples", type=int, help="0 for all")
    add("--seed", type=int, default=0)
    add("--output", help="folder for the picture and the record")
    add("--cache-dir", help="folder for what is made only once")
    add("--smoke", action="store_true", help="a tiny run, to see it work")
    parser.set_defaults(**defaults)
    return parser


def parse_arguments(parser, **smoke):
    """With `--smoke`, other defaults."""
    if parser.parse_args().smoke:
        parser.set_defaults(**smoke)
    return parser.parse_args()
