"""Whether a record belongs to the weights of its layer."""

import warnings

import numpy as np
from keras import ops

from keras_srlora.backend import devices
from keras_srlora.backend.precision import full_precision
from keras_srlora.layers import pairs

# Far above rounding, a bfloat16 kernel's too, and far below a change.
OTHER_KERNEL = 1e-2


@full_precision()
def find_record(layer):
    """How much of the record belongs to the kernel that the layer has.

    `u Wᵀ` of each direction is known from the record: its singular value and
    vector, less the subtracted pairs, plus the fused ones. Weights of an
    earlier step (`EarlyStopping(restore_best_weights=True)`) are those of the
    beginning of the record.

    Returns:
        int. The number of fused pairs.

    Raises:
        ValueError: if it is the kernel of no part of the record: other weights
            were assigned after it was decomposed.
    """
    record = layer.record
    kernel = ops.cast(layer.frozen.matrix(), "float32")
    left = ops.convert_to_tensor(
        devices.along_kernel(
            kernel, record.directions.left.astype("float32"), 0
        )
    )
    image = devices.to_numpy(ops.matmul(left, kernel))
    size = max(np.max(np.abs(image)), np.max(record.directions.singular_values))
    errors = {
        count: np.max(np.abs(image - expected))
        for count, expected in record.images(layer.scale)
    }
    least = min(errors.values())
    if not least <= OTHER_KERNEL * size:
        raise ValueError(
            f"The kernel of layer {layer.path!r} is not the one whose "
            "directions and record the layer holds: other weights were "
            "assigned after it was decomposed. Call "
            "`layer.initialize_factors()` to decompose the kernel "
            f"that it has now. Received: a difference of {least:.3g} where at "
            f"most {OTHER_KERNEL * size:.3g} is rounding."
        )
    # The latest of those that rounding does not tell apart.
    bound = 2 * least + 1e-6 * size
    return max(c for c, error in errors.items() if error <= bound)


def check_record(layer):
    """Raises where factors were trained and nothing is known of the kernel.

    It may be the pretrained one, or one that directions were subtracted from
    and pairs fused into.
    """
    if not _is_trained_without(layer):
        return
    raise ValueError(
        f"Layer {layer.path!r} has trained factors and no record of its "
        "pretrained kernel: its weights came without it, as `clone_model` and "
        "`set_weights` bring them, or it was trained without a "
        "`RecompositionCallback` before its kernel was decomposed. Copy a "
        "model with `model.save` and `keras.models.load_model`, or with "
        "`save_weights` and `load_weights`; before training, call "
        "`keras_srlora.initialize_factors(model)`. Received: "
        f"layer.initialized={layer.initialized}"
    )


def warn_of_trained_factors(layers):
    """Warns where such layers are decomposed: the update goes into the kernel.

    The sum counts as the pretrained kernel from then on.
    """
    found = [layer.path for layer in layers if _is_trained_without(layer)]
    if found:
        warnings.warn(
            f"{len(found)} SRLoRA layers have trained factors and no record of "
            f"their pretrained kernel: {found[:3]}. From now on, the sum of "
            "kernel and update is their pretrained kernel: "
            "`adapter_disabled` and `unload_srlora` keep the update, and "
            "`save_adapter` and the exports do not contain it. "
            "`clone_model` and `set_weights` do not copy the record: use "
            "`copy.deepcopy`, `model.save` or `save_weights` instead. Before a "
            "first training, call `keras_srlora.initialize_factors(model)`.",
            stacklevel=4,
        )


def _is_trained_without(layer):
    """Whether a layer has trained factors and no record."""
    if layer.initialized:
        return False
    return bool(pairs.factors_to_numpy(layer)[1].any())


def take_back_record(layer, count):
    """Drops the record of all but the first `count` fused pairs."""
    layer.record = layer.record.taken_back(count)
    layer.frozen.remainder = None
    layer.companions.restart("sensitivity")
