"""Factors and updates that are not finite, which no file or kernel may hold."""

import keras
import numpy as np
from keras import ops

from keras_srlora.backend import devices
from keras_srlora.layers import pairs


def check_finite_factors(layers):
    """Raises `ValueError` where a factor has NaN or infinite entries.

    Asked before an adapter is written or merged, so that a run that diverged
    changes no kernel and no file.
    """
    for layer in layers:
        for factor in layer.factors:
            if not _is_finite(factor):
                raise ValueError(
                    f"A factor of layer {layer.path!r} has entries that are "
                    "NaN or infinite: training diverged. Load an earlier "
                    "checkpoint or adapter, and train with a smaller learning "
                    f"rate. Received: {_entries_of(factor)}"
                )


def check_finite_update(layers):
    """Raises `ValueError` where a merged kernel would not be finite.

    Finite factors may have a product that overflows, or that the dtype of the
    kernel cannot hold. Asked before adapters are merged or exported.
    """
    check_finite_factors(layers)
    for layer in layers:
        dtype = keras.backend.standardize_dtype(layer.frozen.matrix().dtype)
        merged = ops.cast(pairs.effective_matrix(layer), dtype)
        if not _is_finite(merged):
            raise ValueError(
                f"The effective kernel of layer {layer.path!r}, frozen kernel "
                "plus scaled product of the factors, is NaN or infinite in "
                f"{dtype}. Load an earlier checkpoint or adapter, and train "
                "with a smaller learning rate. Received: factors with entries "
                f"up to {_largest(layer)}"
            )


def _is_finite(values):
    # Zero times any other number is none; several times faster on PyTorch than
    # `isfinite`, and with a single temporary.
    values = ops.stop_gradient(ops.convert_to_tensor(values))
    nothing = ops.sum(ops.multiply(values, 0))
    return bool(ops.convert_to_numpy(ops.equal(nothing, 0)))


def _entries_of(factor):
    value = ops.cast(ops.stop_gradient(factor), "float32")
    values = devices.to_numpy(value)
    count = int(np.sum(~np.isfinite(values)))
    return f"{count} of the {values.size} entries of {factor.path!r}"


def _largest(layer):
    return [float(np.max(np.abs(v))) for v in pairs.factors_to_numpy(layer)]
