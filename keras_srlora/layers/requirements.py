"""Requirements of a layer and its kernel, checked before any change."""

import keras
from keras import ops

from keras_srlora.backend.arguments import check_choice
from keras_srlora.backend.arguments import is_integer
from keras_srlora.backend.arguments import is_number
from keras_srlora.backend.arguments import keras_version
from keras_srlora.functional.decomposition import METHODS
from keras_srlora.layers import pairs
from keras_srlora.layers.frozen import MODES
from keras_srlora.layers.frozen import float_kernel
from keras_srlora.layers.frozen import rows_beside_kernel

# Before, Keras stored quantized kernels in other ways.
QUANTIZED_SINCE = 3, 15


def check_arguments(
    rank, target_rank, lora_alpha, decomposition, use_rslora=False
):
    """Raises `ValueError` for arguments that no kernel could satisfy."""
    if not is_integer(rank) or rank <= 0:
        raise ValueError(
            f"`rank` must be a positive integer. Received: {rank=}"
        )
    if target_rank is not None and (
        not is_integer(target_rank) or target_rank < rank
    ):
        raise ValueError(
            "`target_rank`, the number of directions that a run may visit, "
            "must be an integer of at least `rank`. "
            f"Received: {target_rank=}, {rank=}"
        )
    if lora_alpha is not None and not (
        is_number(lora_alpha) and 0 < lora_alpha < float("inf")
    ):
        raise ValueError(
            f"`lora_alpha` must be a positive number. Received: {lora_alpha=}"
        )
    if not isinstance(use_rslora, bool):
        raise ValueError(
            f"`use_rslora` must be `True` or `False`. Received: {use_rslora=}"
        )
    check_choice("decomposition", decomposition, METHODS)


def check_rank(plan, rank, path):
    """Raises where a kernel (a `Contraction`) is too small for a rank."""
    smaller = min(plan.in_features, plan.out_features)
    if rank > smaller:
        raise ValueError(
            f"`rank` is above the smaller side of the kernel of layer {path!r}"
            f", which is {plan.in_features} x {plan.out_features} as a matrix: "
            f"use at most {smaller}, or leave this layer out. "
            f"Received: rank={rank}"
        )


def check_finite_kernel(kernel, path):
    """Raises `ValueError` where a kernel has NaN or infinite entries."""
    # Zero times any other number is none; several times faster on PyTorch than
    # `isfinite`, and with a single temporary.
    nothing = ops.sum(ops.multiply(ops.convert_to_tensor(kernel), 0))
    if not ops.convert_to_numpy(ops.equal(nothing, 0)):
        raise ValueError(
            f"The kernel of layer {path!r} has entries that are NaN or "
            "infinite: it cannot be decomposed. Check the weights that were "
            "loaded."
        )


def check_quantization(layer):
    """Raises `ValueError` where a quantized kernel cannot be adapted."""
    mode = layer.quantization_mode
    if mode is None:
        return
    if mode not in MODES:
        raise ValueError(
            f"Layer {layer.path!r} is quantized in a way that cannot be "
            f"adapted: only {sorted(MODES)} can. "
            f"Received: quantization_mode={mode!r}"
        )
    if keras_version() < QUANTIZED_SINCE:
        raise ValueError(
            f"Layer {layer.path!r} is quantized; to adapt it you need Keras "
            f"{'.'.join(map(str, QUANTIZED_SINCE))} or newer. Received: Keras "
            f"{keras.__version__}, quantization_mode={mode!r}"
        )


def check_built(layer):
    """Raises `ValueError` where a layer has no kernel yet."""
    if not layer.built:
        raise ValueError(
            f"Layer {layer.name!r} is not built, so it has neither a kernel "
            "nor factors. Build the model first: call it on a batch, or "
            "`model.build(input_shape)`, or start it with `keras.Input`."
        )


def check_initializable(layer):
    """Raises `ValueError` where a layer's kernel cannot be decomposed."""
    check_built(layer)
    check_finite_kernel(float_kernel(layer), layer.path)


def check_recipe(layer, recipe, direction_count):
    """Raises `ValueError` where a recipe fuses more than there is room for.

    Beside a quantized kernel there is room for the recipe that the layer was
    made with.
    """
    room = layer.frozen.room
    if room is None:
        return
    rows = rows_beside_kernel(direction_count, recipe)
    if rows > room:
        raise ValueError(
            f"Beside the quantized kernel of layer {layer.path!r} there is "
            f"room for {room} fused and subtracted "
            f"pairs, and this run may need {rows}. Pass its recipe and "
            "`target_rank` to `enable_srlora`. Received: "
            f"{direction_count} directions, {recipe}"
        )


def check_nothing_beside(layer):
    """Raises where a kernel cannot take up the pairs fused beside it."""
    fused, _ = pairs.frozen_rows(layer, layer.record)
    if layer.frozen.room is not None and len(fused):
        raise ValueError(
            f"The kernel of layer {layer.path!r} is quantized and cannot "
            "take up the pairs that were fused beside it, so that it "
            "cannot be decomposed with them. Call "
            "`keras_srlora.merge_srlora(model)`, which makes it a float "
            "one, `model.quantize` and `enable_srlora` again. Received: "
            f"quantization_mode={layer.quantization_mode!r}"
        )
