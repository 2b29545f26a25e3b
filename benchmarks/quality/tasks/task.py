"""What a task is: a pretrained model, and the data that it is adapted to.

A task knows how to build its model with a new head where it needs one, and has
arrays to train on, to choose the learning rate on, and to report on.
"""

import dataclasses
from collections.abc import Callable

import keras


@dataclasses.dataclass
class Task:
    """What a method adapts, to what.

    Attributes:
        build: `(seed)` -> the pretrained model with a new head; built.
        targets: names of the layers to adapt.
        splits: `{"train": (x, y), "validation": ..., "test": ...}`.
        loss: as in `compile`.
        metrics: list, as in `compile`.
        batch_size, epochs: of a run.
    """

    build: Callable
    targets: list
    splits: dict
    loss: object
    metrics: list
    batch_size: int
    epochs: int

    @property
    def steps(self):
        """Training steps of a run; a batch that is not full is left out."""
        x, _ = self.splits["train"]
        return self.epochs * (count(x) // self.batch_size)


def count(x):
    """Examples in the input of a task."""
    return len(next(iter(x.values())) if isinstance(x, dict) else x)


def part(x, chosen):
    """Some of the examples of an input."""
    if isinstance(x, dict):
        return {key: value[chosen] for key, value in x.items()}
    return x[chosen]


def split(x, y, **sizes):
    """Consecutive parts of the given sizes."""
    splits, start = {}, 0
    for name, size in sizes.items():
        chosen = slice(start, start + size)
        splits[name] = part(x, chosen), y[chosen]
        start += size
    assert start <= count(x), (start, count(x))
    return splits


def classification():
    """The loss of a head that gives logits."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def new_head(classes, seed):
    """A layer that gives logits, with the weights of a seed."""
    initializer = keras.initializers.GlorotUniform(seed)
    return keras.layers.Dense(
        classes, kernel_initializer=initializer, name="head"
    )


def pretrained(make, path):
    """Returns `build`: pretrained weights under the new head of a seed."""

    def build(seed):
        model = make(seed)
        head = model.get_layer("head").get_weights()
        model.load_weights(path)
        model.get_layer("head").set_weights(head)
        return model

    return build
