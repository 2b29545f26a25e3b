"""How many predictions a training step learns from.

A language model makes one for each token, an autoencoder one for each pixel, a
classifier one for each example. Where they are few, new pairs learn noise.
"""

import math

import keras
import numpy as np

from keras_srlora.backend import devices
from keras_srlora.backend import keras_private

# Losses that compare each value of an output with a target.
OF_VALUES = (
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

# Losses that compare vectors along the last axis: classes, or an embedding.
OF_VECTORS = (
    keras.losses.SparseCategoricalCrossentropy,
    keras.losses.CategoricalCrossentropy,
    keras.losses.CategoricalFocalCrossentropy,
    keras.losses.CategoricalHinge,
    keras.losses.KLDivergence,
    keras.losses.CosineSimilarity,
    keras.losses.sparse_categorical_crossentropy,
    keras.losses.categorical_crossentropy,
    keras.losses.categorical_focal_crossentropy,
    keras.losses.categorical_hinge,
    keras.losses.kl_divergence,
    keras.losses.cosine_similarity,
)


def predictions_per_step(model, steps):
    """Predictions that the loss compares with targets, on the average.

    Args:
        model: the model that `fit` trains.
        steps: int. Steps of the epoch that are done, at least one. Validation,
            at the end of an epoch, counts other examples.

    Returns:
        A float; `None` where the model does not say: it has no `outputs` or a
        sequence of any length, or its loss is not one of Keras.
    """
    per_example = predictions_per_example(model)
    metric = keras_private.loss_metric(model)
    if per_example is None or metric is None:
        return None
    # Keras weights the mean of its losses with the number of examples.
    examples = float(keras.ops.convert_to_numpy(metric.count))
    examples = float(np.sum(devices.gather((examples,))))
    return examples / steps * per_example or None


def predictions_per_example(model):
    """How many the loss of a compiled model has for one example, or `None`.

    A loss of one's own does not say.
    """
    outputs = getattr(model, "outputs", None) or []
    losses = _loss_of_each(outputs, model)
    if losses is None:
        return None
    counts = [
        _count(output.shape[1:], keras.losses.get(loss))
        for output, loss in zip(outputs, losses)
        if loss is not None
    ]
    return None if None in counts else sum(counts) or None


def _loss_of_each(outputs, model):
    """What `compile` was given for each output."""
    loss = getattr(model, "loss", None)
    if isinstance(loss, dict):
        loss = [loss.get(name) for name in model.output_names]
    if not isinstance(loss, (list, tuple)):
        return [loss] * len(outputs)
    return loss if len(loss) == len(outputs) else None


def _count(shape, loss):
    """Predictions in an output, whose shape lacks the batch."""
    if not _is_one_of(loss, OF_VALUES):
        if not _is_one_of(loss, OF_VECTORS):
            return None
        shape = shape[:-1]
    return None if None in shape else math.prod(shape)


def _is_one_of(loss, known):
    return any(
        isinstance(loss, item) if isinstance(item, type) else loss is item
        for item in known
    )
