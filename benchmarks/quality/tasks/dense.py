"""An MLP and an autoencoder, pretrained on clothes, adapted to digits."""

import dataclasses
import functools

import keras
import numpy as np

from benchmarks.quality import data
from benchmarks.quality.tasks.task import Task
from benchmarks.quality.tasks.task import classification
from benchmarks.quality.tasks.task import new_head
from benchmarks.quality.tasks.task import pretrained
from benchmarks.quality.tasks.task import split

HIDDEN = ["hidden_1", "hidden_2", "hidden_3"]


def mlp(seed):
    """A head of its own for each seed."""
    inputs = keras.Input((784,))
    x = inputs
    for name in HIDDEN:
        x = keras.layers.Dense(512, activation="gelu", name=name)(x)
    head = new_head(10, seed)
    return keras.Model(inputs, head(x))


def pretrain_mlp(folder):
    """On clothes; 5 epochs."""
    keras.utils.set_random_seed(0)
    x, y = data.fashion_mnist("train")
    model = mlp(seed=0)
    model.compile(keras.optimizers.Adam(1e-3), classification())
    model.fit(x.reshape(-1, 784), y, batch_size=128, epochs=5, verbose=0)
    model.save_weights(folder / "mlp.weights.h5")


def digits():
    """6,000 digits to train on; minutes for a whole table."""
    folder = data.fetched("mlp-fashion-mnist", pretrain_mlp)

    x, y = data.mnist()
    return Task(
        build=pretrained(mlp, folder / "mlp.weights.h5"),
        targets=HIDDEN,
        splits=split(
            x.reshape(-1, 784), y, train=6000, validation=1000, test=3000
        ),
        loss=classification(),
        metrics=["accuracy"],
        batch_size=64,
        epochs=8,
    )


# The autoencoder has no new head, and a loss that goes on falling with the
# rank.

AUTOENCODER = {
    "encode_1": 256,
    "encode_2": 64,
    "decode_1": 256,
    "decode_2": 784,
}


def autoencoder():
    """784 pixels through a code of 64 numbers."""
    inputs = keras.Input((784,))
    x = inputs
    for name, units in AUTOENCODER.items():
        last = name == "decode_2"
        activation = "sigmoid" if last else "gelu"
        x = keras.layers.Dense(units, activation=activation, name=name)(x)
    return keras.Model(inputs, x)


def pretrain_autoencoder(folder):
    """On clothes; 20 epochs."""
    keras.utils.set_random_seed(0)
    x, _ = data.fashion_mnist("train")
    x = x.reshape(-1, 784)
    model = autoencoder()
    model.compile(keras.optimizers.Adam(1e-3), "mean_squared_error")
    model.fit(x, x, batch_size=128, epochs=20, verbose=0)
    model.save_weights(folder / "autoencoder.weights.h5")


def autoencoder_digits(train=6000, epochs=16, loss=None):
    """6,000 digits to train on; the loss is the part of their variance that
    is missing.
    """
    folder = data.fetched("autoencoder-fashion-mnist", pretrain_autoencoder)

    x, _ = data.mnist()
    x = x.reshape(-1, 784)
    variance = float(np.mean(np.var(x, axis=0)))

    def build(seed):
        model = autoencoder()
        model.load_weights(folder / "autoencoder.weights.h5")
        return model

    def relative(y_true, y_pred):
        return keras.ops.mean(keras.ops.square(y_true - y_pred)) / variance

    return Task(
        build=build,
        targets=list(AUTOENCODER),
        splits=split(x, x, train=train, validation=1000, test=3000),
        loss=loss or relative,
        metrics=[],
        batch_size=64,
        epochs=epochs,
    )


def segmentation(train, epochs):
    """Which pixels of a noisy digit are of the digit."""
    task = autoencoder_digits(train, epochs)
    rng = np.random.default_rng(0)

    def build(seed):
        model = task.build(seed)
        model.get_layer("decode_2").activation = keras.activations.linear
        inputs = keras.Input((784,))
        pixels = keras.layers.Reshape((784, 1))(model(inputs))
        return keras.Model(inputs, pixels)

    def noisy(x):
        noise = 0.5 * rng.standard_normal(x.shape)
        return (x + noise).astype("float32"), (x > 0.5).astype("float32")

    splits = {name: noisy(x) for name, (x, _) in task.splits.items()}
    return dataclasses.replace(
        task,
        build=build,
        splits={name: (x, y[..., None]) for name, (x, y) in splits.items()},
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
    )


few_digits = functools.partial(autoencoder_digits, loss="mean_squared_error")
TASKS = {
    "digits": digits,
    "autoencoder_digits": autoencoder_digits,
    # As many steps with few digits.
    "autoencoder_256": functools.partial(few_digits, 256, 375),
    "autoencoder_1024": functools.partial(few_digits, 1024, 94),
    "segmentation_256": functools.partial(segmentation, 256, 375),
    "segmentation_512": functools.partial(segmentation, 512, 188),
}
