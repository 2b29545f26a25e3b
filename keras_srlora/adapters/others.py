"""Variables that train beside the factors: a head, biases, whole layers."""

from __future__ import annotations

import warnings

import keras
import numpy as np
from keras import ops

from keras_srlora.backend import devices
from keras_srlora.backend.keras_private.nesting import flatten_layers
from keras_srlora.backend.keras_private.nesting import variables_held
from keras_srlora.backend.keras_private.pinned import own_variables
from keras_srlora.conversion.freezing import pretrained_variables
from keras_srlora.functional.fusion import full_dtype
from keras_srlora.layers.base import SRLoRALayer

# Keras lets the optimizer count the scales of float8 layers.
OF_FLOAT8 = ("_scale", "_amax_history")


def trainable_beside(model: keras.Model, layers) -> list:
    """What training changes of a model beside the factors of its layers.

    The other trainable variables, and what their layers update by themselves,
    the moving averages of batch normalization.
    """
    factors = {id(v) for layer in layers for v in layer.factors}
    trained = [v for v in model.trainable_variables if id(v) not in factors]
    return [*trained, *_moving_averages(model)]


def _moving_averages(model):
    if not model.trainable:
        return []
    found = []
    for layer in flatten_layers(model):
        if layer.trainable and not isinstance(layer, SRLoRALayer):
            trained = set(map(id, own_variables(layer)))
            held = variables_held(layer)
            found += [v for v in held if id(v) not in trained]
    return found


def trained_beside(model: keras.Model, layers) -> list:
    """Those that are trained though they have a pretrained value.

    Biases, norms, and layers in `modules_to_save`. A head is none of them: it
    has no pretrained value to go back to.
    """
    pretrained = {id(v) for v in pretrained_variables(model)}
    beside = trainable_beside(model, layers)
    return [
        v
        for v in beside
        if id(v) in pretrained and not v.name.endswith(OF_FLOAT8)
    ]


def warn_of_trained(model, layers, what, stacklevel=3) -> None:
    """Warns where `trained_beside` finds any.

    Args:
        model: a `keras.Model`.
        layers: list of its SRLoRA layers.
        what: str. Their fate, such as `"are left as they are"`.
        stacklevel: int, as in `warnings.warn`.
    """
    found = [v.path for v in trained_beside(model, layers)]
    if found:
        warnings.warn(
            f"{len(found)} trained variables of the pretrained part that are "
            f"no SRLoRA factors {what}: {found[:4]}. Only if they did not "
            "change does the model compute the same as before training.",
            stacklevel=stacklevel,
        )


def to_numpy(variable) -> np.ndarray:
    """A variable's value on the host, in float32 (or in float64)."""
    value = ops.convert_to_tensor(variable)
    return np.array(devices.to_numpy(ops.cast(value, full_dtype(value))))


def check_finite_variables(variables) -> None:
    """Raises `ValueError` where one has entries that are NaN or infinite."""
    for variable in variables:
        if not np.isfinite(to_numpy(variable)).all():
            raise ValueError(
                f"The trainable variable {variable.path!r} has entries that "
                "are NaN or infinite: training diverged. Load an earlier "
                "checkpoint, and train with a smaller learning rate."
            )
