"""Layers on many devices: where factors lie, and whether processes agree."""

import warnings

import keras
import numpy as np
from keras import ops

from keras_srlora.backend import devices
from keras_srlora.backend.keras_private.kernels import stored_kernel


def sharded_axes(layer, axes):
    """Over which axes of a device mesh the two factors should be sharded.

    Args:
        layer: a built SRLoRA layer.
        axes: tuple of the names of axes that the kernel is sharded over, or
            `None`: those of its `keras.distribution.TensorLayout`.

    Returns:
        Name or `None`, for the last dimension of either factor. Of several
        dimensions of the kernel that make one of its sides the first one
        counts.
    """
    plan = layer.plan()
    axes = (*axes, *[None] * len(plan.kernel_axes))
    axes = [axes[i] for i in plan.kernel_axes]
    return axes[0], axes[len(plan.in_shape)]


def warn_of_whole_factors(layers):
    """Warns where a layout map shards kernels and has no key for their factors.

    Keys that are written for plain kernels, as KerasHub's own are, match no
    factor, and Keras then keeps it whole on each device.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return
    missing = {}
    for layer in layers:
        kernel = stored_kernel(layer)
        layout = distribution.get_tensor_layout(kernel.path)
        if layout is None:
            continue
        for factor, axis in zip(
            layer.factors, sharded_axes(layer, layout.axes)
        ):
            if axis and distribution.get_tensor_layout(factor.path) is None:
                missing[factor.path] = (None, axis)
    if missing:
        keys = [f"layout_map[{k!r}] = {missing[k]}" for k in sorted(missing)]
        warnings.warn(
            "The layout map shards the kernels of SRLoRA layers and has no key "
            f"for {len(missing)} of their factors, so that each device holds "
            "these, and their optimizer slots, whole. Add keys before the "
            "layers are built or converted; a key is a path, or a regular "
            f"expression that matches a whole path: {'; '.join(keys[:4])}"
            f"{'; ...' if len(keys) > 4 else ''}. With (None, None) a factor "
            "is whole, without a warning.",
            stacklevel=4,
        )


def check_same_start(layers):
    """Raises where the processes of a run do not start from equal weights."""
    if devices.process_count() == 1:
        return
    devices.agree(
        [
            np.concatenate([_first_entries(v) for v in layer.factors])
            for layer in layers
        ],
        [layer.path for layer in layers],
        "weights. Let them start from the same: call "
        "`keras.utils.set_random_seed` with one number in all of them before "
        "the model is made, or broadcast the weights of the first.",
    )


def _first_entries(variable, count=8):
    entries = ops.reshape(ops.stop_gradient(variable), (-1,))[:count]
    return devices.to_numpy(ops.cast(entries, "float32"))
