"""Linear teachers: what is to be learnt is known, and so is what a rank can
hold of it.
"""

import functools

import keras
import numpy as np

from benchmarks.quality.tasks.task import Task
from benchmarks.quality.tasks.task import split

WIDTH = 128
SPECTRA = {
    "rank_4": np.r_[np.ones(4), np.zeros(WIDTH - 4)],
    "rank_12": np.r_[np.ones(12), np.zeros(WIDTH - 12)],
    "rank_48": np.r_[np.ones(48), np.zeros(WIDTH - 48)],
    "power_law": 1 / np.arange(1, WIDTH + 1),
}


def teacher(spectrum, noise=0):
    """The loss is the part of the update that is missing, squared.

    Targets to train on have noise of `noise` times the update's variance.
    """
    rng = np.random.default_rng(0)

    def orthogonal():
        return np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]

    # The singular values of a pretrained kernel fall slowly.
    values = 1 / np.sqrt(np.arange(1, WIDTH + 1))
    pretrained = (orthogonal() * values) @ orthogonal()
    update = (orthogonal() * SPECTRA[spectrum]) @ orthogonal()
    update *= 0.5 * np.linalg.norm(pretrained) / np.linalg.norm(update)

    def build(seed):
        inputs = keras.Input((WIDTH,))
        layer = keras.layers.Dense(WIDTH, use_bias=False, name="student")
        model = keras.Model(inputs, layer(inputs))
        layer.set_weights([pretrained.astype("float32")])
        return model

    x = rng.standard_normal((12_000, WIDTH)).astype("float32")
    scale = np.sqrt(WIDTH) / np.linalg.norm(update)
    base = (x @ pretrained).astype("float32")
    y = base + (x @ update).astype("float32")
    splits = split(x, y, train=9600, validation=1200, test=1200)
    if noise:
        x, y = splits["train"]
        added = np.sqrt(noise) / scale * rng.standard_normal(y.shape)
        splits["train"] = x, (y + added).astype("float32")

    def relative(y_true, y_pred):
        return scale**2 * keras.ops.mean(keras.ops.square(y_true - y_pred))

    return Task(
        build=build,
        targets=["student"],
        splits=splits,
        loss=relative,
        metrics=[],
        batch_size=64,
        epochs=10,
    )


TASKS = {
    f"teacher_{name}": functools.partial(teacher, name) for name in SPECTRA
} | {
    f"teacher_noise_{noise}": functools.partial(teacher, "power_law", noise)
    for noise in (1, 10, 100)
}
