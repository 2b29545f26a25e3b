"""How many predictions a training step learns from.

A language model makes one for each token, an autoencoder one for each pixel, a
classifier one for each example. Where they are few, new pairs learn noise. A
label of few classes counts less than one: it says less.
"""

import math

import keras
import numpy as np

from keras_srlora.backend import devices
from keras_srlora.backend.keras_private.fit_state import loss_metric

# Losses that compare each value of an output with a target.
OF_VALUES = (
    keras.losses.MeanSquaredError,
    keras.losses.MeanAbsoluteError,
    keras.losses.MeanAbsolutePercentageError,
    keras.losses.MeanSquaredLogarithmicError,
    keras.losses.Huber,
    keras.losses.LogCosh,
    keras.losses.Poisson,
    keras.losses.mean_squared_error,
    keras.losses.mean_absolute_error,
    keras.losses.mean_absolute_percentage_error,
    keras.losses.mean_squared_logarithmic_error,
    keras.losses.huber,
    keras.losses.log_cosh,
    keras.losses.poisson,
)

# Losses that compare vectors along the last axis: classes, or an embedding. The
# binary labels of an example say little more than one: a ViT that learns ten of
# each picture ends 5 % behind LoRA with restarts.
OF_VECTORS = (
    keras.losses.SparseCategoricalCrossentropy,
    keras.losses.CategoricalCrossentropy,
    keras.losses.CategoricalFocalCrossentropy,
    keras.losses.CategoricalHinge,
    keras.losses.BinaryCrossentropy,
    keras.losses.BinaryFocalCrossentropy,
    keras.losses.KLDivergence,
    keras.losses.CosineSimilarity,
    keras.losses.sparse_categorical_crossentropy,
    keras.losses.categorical_crossentropy,
    keras.losses.categorical_focal_crossentropy,
    keras.losses.categorical_hinge,
    keras.losses.binary_crossentropy,
    keras.losses.binary_focal_crossentropy,
    keras.losses.kl_divergence,
    keras.losses.cosine_similarity,
)


class PredictionCounter:
    """Notes what a model's loss compares, where `fit` traces or runs a step.

    Attributes:
        shapes: list of the shapes of the predictions, without the batch;
            `None` before the first step, or where the model's own `train_step`
            does not call `compute_loss`.
        vectors: list of bools, in the order of `shapes`; see
            `is_one_prediction`.
        names: list of the outputs' names, in the order of `shapes`, where the
            model returns a dict.
    """

    def __init__(self):
        self.shapes: list | None = None
        self.vectors: list = []
        self.names: list = []

    def watch(self, model):
        """Notes the predictions of each call of a model's `compute_loss`.

        A subclass overrides `compute_loss`; an attribute of the instance does
        so for a while. It is set past Keras's `__setattr__`: neither tracked
        nor saved.
        """
        self.stop_watching(model)
        compute_loss = model.compute_loss

        def watched(*args, **kwargs):
            given = dict(zip(("x", "y", "y_pred"), args)) | kwargs
            if given.get("y_pred") is not None:
                self._note(given.get("y"), given["y_pred"])
            return compute_loss(*args, **kwargs)

        watched.before = vars(model).get("compute_loss")  # type: ignore[attr-defined]
        vars(model)["compute_loss"] = watched

    def stop_watching(self, model):
        """Undoes `watch`, where it is in place."""
        watched = vars(model).get("compute_loss")
        if hasattr(watched, "before"):
            del vars(model)["compute_loss"]
            if watched.before is not None:
                vars(model)["compute_loss"] = watched.before

    def _note(self, y, y_pred):
        self.names = sorted(y_pred) if isinstance(y_pred, dict) else []
        predictions = keras.tree.flatten(y_pred)
        self.shapes = [tuple(x.shape)[1:] for x in predictions]
        targets = keras.tree.flatten(y)
        alike = isinstance(y, dict) == isinstance(y_pred, dict)
        if alike and len(targets) == len(predictions):
            self.vectors = list(map(is_one_prediction, targets, predictions))
        else:
            # Perhaps in another order than the outputs.
            self.vectors = [False] * len(predictions)

    def per_step(self, model, steps):
        """Predictions of a step, on the average over an epoch so far.

        Args:
            model: the model that `fit` trains.
            steps: int. Steps of the epoch that are done, at least one.
                Validation, at the end of an epoch, counts other examples.

        Returns:
            A float; `None` where the model does not say: it has sequences of
            any length, or a loss that is not of Keras and may compare single
            values as well as whole vectors.
        """
        metric = loss_metric(model)
        per_example = self._per_example(model)
        if metric is None or per_example is None:
            return None
        # Keras weights the mean of its losses with the number of examples.
        examples = float(keras.ops.convert_to_numpy(metric.count))
        examples = float(np.sum(devices.gather((examples,))))
        return examples / steps * per_example or None

    def _per_example(self, model):
        losses = self._loss_of_each(model)
        if losses is None:
            return None
        counts = [
            count_predictions(shape, loss, as_vectors)
            for shape, loss, as_vectors in zip(
                self.shapes or [], losses, self.vectors
            )
            if loss is not None
        ]
        return None if None in counts else sum(counts)

    def _loss_of_each(self, model):
        """What `compile` was given for each output, or `None`."""
        if self.shapes is None:
            return None
        loss = getattr(model, "loss", None)
        if loss is None:
            # The model's own `compute_loss`.
            loss = type(model).compute_loss
        if isinstance(loss, dict):
            names = self.names or getattr(model, "output_names", [])
            loss = [loss.get(name) for name in names]
        if not isinstance(loss, (list, tuple)):
            return [loss] * len(self.shapes)
        return loss if len(loss) == len(self.shapes) else None


def is_one_prediction(target, prediction):
    """Whether any loss compares each vector of an output as a whole.

    It does if a target is one value for the vector, as the label of a class is,
    or if the vector has one value. A target that has no shape does not say.
    """
    shape = tuple(prediction.shape)
    try:
        of_target = tuple(target.shape)
    except (AttributeError, ValueError):
        # No tensor, or one of TensorFlow whose rank is unknown.
        return False
    if len(shape) < 2 or shape[-1] == 1:
        return True
    if len(of_target) == len(shape):
        return of_target[-1] == 1
    return len(of_target) == len(shape) - 1


def count_predictions(shape, loss, as_vectors=False):
    """Predictions in an output of a shape without the batch, or `None`.

    Args:
        shape: tuple.
        loss: what `compile` was given for this output.
        as_vectors: bool. Whether a loss that is not of Keras compares whole
            vectors; see `is_one_prediction`.

    Returns:
        A float. A value counts one, and a vector `weight_of_label`.
    """
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    if None in shape:
        return None
    if _is_one_of(loss, OF_VALUES):
        return float(math.prod(shape))
    if as_vectors or _is_one_of(loss, OF_VECTORS):
        classes = shape[-1] if shape else 1
        return math.prod(shape[:-1]) * weight_of_label(classes)
    return None


def weight_of_label(classes):
    """What a label counts: its bits over those of a byte, at most one.

    A GPT of 1,024 bytes a step gains with restarts where it predicts bytes or
    their half, and loses where it predicts one bit of each. A single output is
    one of two classes.
    """
    return min(1.0, math.log2(max(classes, 2)) / 8)


def _is_one_of(loss, known):
    return any(
        isinstance(loss, item) if isinstance(item, type) else loss is item
        for item in known
    )
