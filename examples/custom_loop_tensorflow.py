"""SRLoRA in a loop of your own with TensorFlow.

What it shows: `SensitivityOptimizer` scores the pairs inside a `tf.function`,
from the gradients of a `tf.GradientTape`; `recompose` fuses and restarts pairs
between two steps, outside of the function, which is not traced again.

A small network that was pretrained on the digits 0 to 4 is adapted to the
digits 5 to 9: `python custom_loop_tensorflow.py`, a few seconds.
"""

import os

if os.environ.setdefault("KERAS_BACKEND", "tensorflow") != "tensorflow":
    raise SystemExit(
        "This loop is for TensorFlow. Unset KERAS_BACKEND or run the script "
        f"of its backend. Received: KERAS_BACKEND={os.environ['KERAS_BACKEND']}"
    )

import functools

import _digits
import keras
import tensorflow as tf

import keras_srlora


def train(model, optimizer, batches, interval):
    """Returns the loss of each step and the record of recompositions."""
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    variables = model.trainable_variables
    optimizer.build(variables)

    @tf.function
    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
        gradients = tape.gradient(loss, variables)
        # Scores the pairs, then hands the gradients on to Adam.
        optimizer.apply(gradients, variables)
        return loss

    losses, record = [], []
    for step, (x, y) in enumerate(batches):
        # `step` steps are done. None before the first and after the last.
        if step > 0 and step % interval == 0:
            events = keras_srlora.recompose(
                optimizer.sensitivity, optimizer, step
            )
            _digits.print_recompositions(events)
            record.extend(events)
        losses.append(train_step(x, y))
        _digits.print_loss(step + 1, len(batches), losses)
    return [float(loss) for loss in losses], record


def main():
    steps = _digits.parse_arguments(__doc__).steps
    keras.utils.set_random_seed(0)
    model = _digits.pretrained_model()

    # From here on the hidden kernels are frozen; factors and head are trained.
    keras_srlora.enable_srlora(
        model, rank=_digits.RANK, target_rank=_digits.TARGET_RANK
    )
    optimizer = keras_srlora.SensitivityOptimizer(
        keras.optimizers.Adam(3e-3), model
    )

    loop = functools.partial(train, model, optimizer)
    _digits.adapt(model, steps, loop)


if __name__ == "__main__":
    main()
