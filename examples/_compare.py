"""The code that the examples share: methods, training, the command line.

All methods get the same pretrained model, the same head and the same batches in
the same order.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable

# TensorFlow reads the data on every backend. Without a GPU it logs an error.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import keras_srlora

METHODS = {
    "srlora": "SRLoRA",
    "lora": "LoRA",
    "pissa": "PiSSA",
    "keras_lora": "Keras LoRA",
    "full": "Full fine-tuning",
}


@dataclasses.dataclass
class Task:
    """A model and its data. Each script defines one or more."""

    title: str
    load_backbone: Callable  # () -> a fresh pretrained backbone or task
    add_head: Callable  # backbone -> the model to train
    train: tf.data.Dataset
    validation: tf.data.Dataset
    convert: Callable  # an example of a data set -> (x, y)
    loss: keras.losses.Loss
    evaluate: Callable  # (model, validation batches) -> {name: number}
    unit: str = "examples"  # the word for an example, in the plural
    # The layers to adapt: all projections (`None`), or these.
    target_layer_names: list | None = None
    exclude_layer_names: tuple = ()


def sizes(task):
    """The title of a task and the sizes of its data, in a line."""
    return (
        f"{task.title}: {len(task.train):,} {task.unit} to train on, "
        f"{len(task.validation):,} to validate on"
    )


@dataclasses.dataclass
class Run:
    """The result of one method."""

    method: str
    parameters: int
    learning_rate: float
    losses: list  # one a step
    seconds: float
    scores: dict = dataclasses.field(default_factory=dict)
    events: list = dataclasses.field(default_factory=list)  # of recompositions

    @property
    def recompositions(self):
        """Number of recompositions; each has an event for every layer."""
        return len({event.step for event in self.events})

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
    return result, backbone, model


# The methods.


def adapt(method, backbone, task, args):
    """Prepares a pretrained model for a method; returns the callbacks of `fit`.

    SRLoRA's layers without recompositions are LoRA. With the start of the
    published recipe they are PiSSA.
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
    """LoRA's learning rate, or a part of it.

    PiSSA and the published recipe start with large pairs. Their best learning
    rate is about a tenth of LoRA's. Full fine-tuning takes a smaller one, which
    was not searched for.
    """
    starts_large = method == "pissa" or (
        method == "srlora" and args.recipe == "paper"
    )
    part = 0.03 if method == "full" else 0.1 if starts_large else 1.0
    return part * args.learning_rate


def zero_head(outputs):
    """The same head for all methods and on each backend."""
    return keras.layers.Dense(
        outputs, kernel_initializer="zeros", name="logits"
    )


# Training.


def make_batches(task, args):
    """Batches in an order that depends on the seed alone.

    Each method needs new ones: a data set that was iterated before shuffles in
    another order.
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
    """Keeps the loss of each batch; `logs` has only its mean over the epoch.

    Without a terminal, which shows a progress bar, it prints ten lines a run.
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
    add("--rank", type=int, help="pairs in each kernel")
    add("--target-rank", type=int, help="directions that SRLoRA may visit")
    add("--recipe", help="recipe of SRLoRA: adaptive, lora_restarts or paper")
    add("--epochs", type=int)
    add("--batch-size", type=int)
    add("--learning-rate", type=float, help="of LoRA; others use a part of it")
    add("--train-examples", type=int, help="0 for all")
    add("--validation-examples", type=int, help="0 for all")
    add("--num-layers", type=int, help="only the first layers of the model")
    add("--seed", type=int, default=0)
    add("--output", help="folder for pictures, tables and numbers")
    add("--cache-dir", help="folder for converted models and data")
    add("--verbose", type=int, default=1, help="0: no lines on recompositions")
    add("--smoke", action="store_true", help="a tiny run, as a test")
    parser.set_defaults(**defaults)
    return parser


def parse_arguments(parser, **smoke):
    """With `--smoke`, other defaults."""
    if parser.parse_args().smoke:
        parser.set_defaults(**smoke)
    return parser.parse_args()
