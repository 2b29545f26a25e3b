"""A small ViT between clothes and digits: 28 x 28 pixels in 16 patches."""

import functools

import keras
import numpy as np

from benchmarks.quality import data
from benchmarks.quality.tasks.task import Task
from benchmarks.quality.tasks.task import classification
from benchmarks.quality.tasks.task import new_head
from benchmarks.quality.tasks.task import pretrained
from benchmarks.quality.tasks.task import split

VIT = {
    "image_shape": (28, 28, 3),
    "patch_size": 7,
    "num_layers": 4,
    "num_heads": 4,
    "hidden_dim": 64,
    "mlp_dim": 256,
}
VIT_TARGETS = [
    "query",
    "key",
    "value",
    "attention_output",
    "dense_1",
    "dense_2",
]


def vit(seed):
    """A KerasHub backbone and a head on its class token."""
    import keras_hub

    backbone = keras_hub.models.ViTBackbone(**VIT, name="backbone")
    head = new_head(10, seed)
    return keras.Model(backbone.input, head(backbone.output[:, 0]))


def as_rgb(images):
    """From 0 to 1 in grey to -1 to 1 in three channels."""
    return np.repeat(2 * images[..., None] - 1, 3, axis=-1)


def pretrain_vit(folder):
    """On clothes; 8 epochs, some ten minutes on a core."""
    keras.utils.set_random_seed(0)
    x, y = data.fashion_mnist("train")
    model = vit(seed=0)
    epochs = 8
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, epochs * 60_000 // 128, warmup_target=1e-3, warmup_steps=400
    )
    model.compile(
        keras.optimizers.AdamW(rate, weight_decay=0.05),
        classification(),
        metrics=["accuracy"],
    )
    x_test, y_test = data.fashion_mnist("t10k")
    model.fit(
        as_rgb(x),
        y,
        batch_size=128,
        epochs=epochs,
        verbose=2,
        validation_data=(as_rgb(x_test), y_test),
    )
    model.save_weights(folder / "vit.weights.h5")


def vit_digits():
    """4,800 digits to train on."""
    folder = data.fetched("vit-fashion-mnist", pretrain_vit)

    x, y = data.mnist()
    return Task(
        build=pretrained(vit, folder / "vit.weights.h5"),
        targets=VIT_TARGETS,
        splits=split(as_rgb(x), y, train=4800, validation=1200, test=4000),
        loss=classification(),
        metrics=["accuracy"],
        batch_size=32,
        epochs=4,
    )


def pretrain_vit_on_digits(folder):
    """10,000 of them; 10 epochs, a minute on a core."""
    keras.utils.set_random_seed(0)
    x, y = data.mnist()
    model = vit(seed=0)
    epochs = 10
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, epochs * len(y) // 64, warmup_target=1e-3, warmup_steps=200
    )
    model.compile(
        keras.optimizers.AdamW(rate, weight_decay=0.05),
        classification(),
        metrics=["accuracy"],
    )
    model.fit(as_rgb(x), y, batch_size=64, epochs=epochs, verbose=2)
    model.save_weights(folder / "vit.weights.h5")


def vit_clothes(epochs=4):
    """The other way round: 57,000 clothes to train on, 890 steps an epoch."""
    folder = data.fetched("vit-mnist", pretrain_vit_on_digits)

    x, y = data.shuffled(*data.fashion_mnist("train"))
    splits = split(as_rgb(x), y, train=57_000, validation=3000)
    x, y = data.fashion_mnist("t10k")
    return Task(
        build=pretrained(vit, folder / "vit.weights.h5"),
        targets=VIT_TARGETS,
        splits=splits | {"test": (as_rgb(x), y)},
        loss=classification(),
        metrics=["accuracy"],
        batch_size=64,
        epochs=epochs,
    )


TASKS = {
    "vit_digits": vit_digits,
    "vit_clothes": vit_clothes,
    # A million predictions, so that the default recomposes.
    "vit_clothes_18e": functools.partial(vit_clothes, epochs=18),
}
