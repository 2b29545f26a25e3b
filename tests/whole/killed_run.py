"""A training script that may kill itself, and that resumes what it finds.

`test_resume.py` runs `train` in a child process, which dies of `kill -9`, and
in its own process for the run that resumes it, and for the one that nothing
interrupts.
"""

import os
import pathlib
import signal

import keras
import numpy as np
from support import converted_model

import keras_srlora
from keras_srlora.layers import pairs
from keras_srlora.layers.base import SRLoRALayer

EPOCHS = 4
KILL_EPOCH = 2  # from 0
MIDDLE = 2  # of the 5 batches of an epoch

OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw_schedule": lambda: keras.optimizers.AdamW(
        keras.optimizers.schedules.CosineDecay(0.02, 20), weight_decay=0.1
    ),
    "sgd_momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adafactor": lambda: keras.optimizers.Adafactor(0.02),
    "lion": lambda: keras.optimizers.Lion(0.003),
    # An odd number of batches: epochs end in the middle of an accumulation.
    "adam_accumulation": lambda: keras.optimizers.Adam(
        0.01, gradient_accumulation_steps=2
    ),
}


def make_model(optimizer):
    """With dropout, and with an optimizer that can take up a saved state."""
    model = converted_model(OPTIMIZERS[optimizer](), dropout=0.2)
    model.optimizer.build(model.trainable_variables)
    return model


def train(folder, route, optimizer, moment=None):
    """The script: goes on from what is in `folder`, saves there, maybe dies."""
    folder = pathlib.Path(folder)
    model, first_epoch = find(folder, route, optimizer)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 12)).astype("float32")
    y = np.tanh(x @ rng.standard_normal((12, 3)).astype("float32"))
    if moment:
        die_at(moment, model)
    model.fit(
        x,
        y,
        batch_size=8,
        epochs=EPOCHS,
        initial_epoch=first_epoch,
        shuffle=False,
        verbose=0,
        callbacks=[
            saving_callback(folder, route),
            keras_srlora.RecompositionCallback(interval=3),
            *([Death(moment)] if moment else []),
        ],
    )
    return model


def saving_callback(folder, route):
    """What a user of Keras would use."""
    if route == "backup":
        return keras.callbacks.BackupAndRestore(
            str(folder / "backup"), double_checkpoint=True
        )
    return keras.callbacks.ModelCheckpoint(
        str(folder / ("epoch-{epoch:02d}" + route)),
        save_weights_only=route == ".weights.h5",
    )


def find(folder, route, optimizer):
    """The newest file that can be read, and the number of its epoch."""
    for path in sorted(folder.glob(f"epoch-*{route}"), reverse=True):
        epoch = int(path.name.removesuffix(route).split("-")[1])
        try:
            if route == ".keras":
                return keras.saving.load_model(path), epoch
            model = make_model(optimizer)
            model.load_weights(path)
            return model, epoch
        except (OSError, ValueError):
            continue  # half of a file
    return make_model(optimizer), 0


# The ways to die.


def die():
    """As `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


class Death(keras.callbacks.Callback):
    """Knows the time."""

    epoch = -1

    def __init__(self, moment):
        super().__init__()
        self.moment = moment

    def on_epoch_begin(self, epoch, logs=None):
        Death.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        now = Death.epoch == KILL_EPOCH and batch == MIDDLE
        if self.moment == "middle" and now:
            die()


def die_at(moment, model):
    """Lays a trap in a function."""

    def trap(owner, name, calls, before=True):
        function = getattr(owner, name)
        count = 0

        def trapped(*args, **kwargs):
            nonlocal count
            if Death.epoch == KILL_EPOCH:
                count += 1
            if before and count == calls:
                die()
            result = function(*args, **kwargs)
            if count == calls:
                die()
            return result

        setattr(owner, name, trapped)

    if moment == "recomposition":
        # Of two layers, one is done.
        trap(pairs, "fuse_and_restart", calls=2)
    elif moment == "writing":
        trap(SRLoRALayer, "save_own_variables", calls=2)
    elif moment == "between":
        # `BackupAndRestore` writes the number of the epoch next.
        trap(model, "save_weights", calls=1, before=False)
