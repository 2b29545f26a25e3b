"""How many predictions a training step is scored on.

A language model makes one for each token, an autoencoder one for each pixel, a
classifier one for each example. The more, the less noise is in a gradient.
"""

import math

import keras
import numpy as np

from keras_srlora.backend import devices
from keras_srlora.backend import keras_private

# Losses that compare each value; others compare vectors, along the last axis.
EACH_VALUE = (
    keras.losses.MeanSquaredError,
    keras.losses.MeanAbsoluteError,
    keras.losses.MeanAbsolutePercentageError,
    keras.losses.MeanSquaredLogarithmicError,
    keras.losses.Huber,
    keras.losses.LogCosh,
    keras.losses.Poisson,
    keras.losses.BinaryCrossentropy,
    keras.losses.BinaryFocalCrossentropy,
    keras.losses.mean_squared_error,
    keras.losses.mean_absolute_error,
    keras.losses.mean_absolute_percentage_error,
    keras.losses.mean_squared_logarithmic_error,
    keras.losses.huber,
    keras.losses.log_cosh,
    keras.losses.poisson,
    keras.losses.binary_crossentropy,
    keras.losses.binary_focal_crossentropy,
)


def predictions_per_step(model, steps):
    """Predictions behind one update, on the average over an epoch so far.

    Args:
        model: the model that `fit` trains.
        steps: int. Steps of the epoch that are done, at least one.
            Validation, at the end of an epoch, counts other examples.

    Returns:
        A float; `None` where the model does not say (a subclass without
        outputs, a sequence of any length, a `train_step` that keeps no loss).
    """
    per_example = predictions_per_example(model)
    metric = keras_private.loss_metric(model)
    if per_example is None or metric is None:
        return None
    # Keras weights the mean of its losses with the number of examples.
    examples = float(keras.ops.convert_to_numpy(metric.count)) / steps
    if not examples:
        return None
    accumulated = model.optimizer.gradient_accumulation_steps or 1
    total = np.sum(devices.gather((examples,)))
    return float(total * per_example * accumulated)


def predictions_per_example(model):
    """How many the loss of a compiled model has for one example, or `None`.

    A loss that Keras does not have counts as one along the last axis.
    """
    outputs = getattr(model, "outputs", None)
    losses = _losses(getattr(model, "loss", None), model)
    if not outputs or losses is None or len(losses) != len(outputs):
        return None
    shapes = [
        output.shape[1:] if _compares_each_value(loss) else output.shape[1:-1]
        for output, loss in zip(outputs, losses)
        if loss is not None
    ]
    if not shapes or any(None in shape for shape in shapes):
        return None
    return sum(math.prod(shape) for shape in shapes)


def _losses(loss, model):
    """The loss of each output, from what `compile` was given."""
    if loss is None:
        return None
    if isinstance(loss, dict):
        return [loss.get(name) for name in getattr(model, "output_names", ())]
    if isinstance(loss, (list, tuple)):
        return list(loss)
    return [loss] * len(getattr(model, "outputs", None) or ())


def _compares_each_value(loss):
    loss = keras.losses.get(loss)
    return any(
        isinstance(loss, known) if isinstance(known, type) else loss is known
        for known in EACH_VALUE
    )
