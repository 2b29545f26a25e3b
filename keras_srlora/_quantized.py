"""Kernels that `layer.quantize` quantized: read, never written.

Fusing a pair into such a kernel would quantize it again, and each time lose
bits; a kernel in float8, which Keras stores in full and rounds in each step,
would lose the pair in the next one. What is fused stays beside the kernel, as
factors that are not trained.
"""

from keras import ops

from keras_srlora import _keras

INTEGER_MODES = ("int8", "int4")
MODES = ("float8", *INTEGER_MODES)


def is_quantized(layer):
    return layer.quantization_mode is not None


def rows_beside_kernel(direction_count, recipe):
    """How many pairs a run may fuse beside a quantized kernel.

    One is fused for each direction that a pair restarts along; where pairs
    start along it at a length of their own, it is subtracted too.
    """
    return direction_count * (2 if recipe.subtracts else 1)


def float_kernel(layer):
    """The kernel as it is stored, or dequantized where that is of integers.

    Returns:
        tensor of shape `_keras.kernel_shape(layer)`, float32 if dequantized.
    """
    if layer.quantization_mode not in INTEGER_MODES:
        return ops.convert_to_tensor(_keras.stored_kernel(layer))
    # Unpacked, but still integers.
    kernel = ops.cast(layer.kernel, "float32")
    if layer.quantization_mode == "int8":
        return ops.divide(kernel, _keras.kernel_scale(layer))
    scale = ops.convert_to_tensor(layer.kernel_scale)
    rows = ops.reshape(kernel, (-1, scale.shape[-1]))
    if getattr(layer, "kernel_zero", None) is None:
        rows = ops.divide(rows, scale)
    else:
        # A scale and a zero for each group of rows.
        group = ops.cast(layer.g_idx, "int32")
        zero = ops.cast(layer.kernel_zero, "float32")
        rows = ops.subtract(rows, ops.take(zero, group, axis=0))
        rows = ops.multiply(rows, ops.take(scale, group, axis=0))
    return ops.reshape(rows, kernel.shape)
