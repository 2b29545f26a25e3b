"""Where Keras stores a kernel, a quantized one too."""

import keras
from keras import ops

from keras_srlora.backend.keras_private.nesting import remove_variable
from keras_srlora.backend.keras_private.nesting import unlocked


def stored_kernel(layer):
    """The variable of a kernel, or of an embedding table.

    `layer.kernel` is a property that computes a tensor for a quantized layer
    or one with low-rank factors. Private: `Dense._kernel`,
    `Embedding._embeddings`.
    """
    if isinstance(layer, keras.layers.Embedding):
        return layer._embeddings
    return layer._kernel


def unpacked_kernel(layer):
    """The stored kernel, whose int4 entries lie two in a byte, unpacked.

    By the property of the plain class: that of an SRLoRA layer is the effective
    kernel. Private: no name, but the property is Keras's own.
    """
    for plain in (keras.layers.Dense, keras.layers.EinsumDense):
        if isinstance(layer, plain):
            return plain.kernel.fget(layer)
    return stored_kernel(layer)


def kernel_shape(layer):
    """Shape of the kernel, which int4 stores flat, two entries a byte.

    Private: `Dense._orig_input_dim`, `Dense._orig_output_dim`; that of an
    `EinsumDense` has no underscore.
    """
    if layer.quantization_mode != "int4":
        return tuple(stored_kernel(layer).shape)
    if isinstance(layer, keras.layers.EinsumDense):
        return tuple(layer.original_kernel_shape)
    return layer._orig_input_dim, layer._orig_output_dim


def kernel_scale(layer):
    """The scale of an int8 kernel, in the kernel's axes.

    That of an `EinsumDense` is stored in the axes of the output. Private:
    `EinsumDense._adjust_scale_for_dequant`.
    """
    scale = ops.convert_to_tensor(layer.kernel_scale)
    if isinstance(layer, keras.layers.EinsumDense):
        scale = layer._adjust_scale_for_dequant(scale)
    return scale


def kernel_constraint(layer):
    """The constraint of a kernel or of an embedding table; public names."""
    if isinstance(layer, keras.layers.Embedding):
        return layer.embeddings_constraint
    return layer.kernel_constraint


def kernel_regularizer(layer):
    """The regularizer of a kernel or of an embedding table; public names."""
    if isinstance(layer, keras.layers.Embedding):
        return layer.embeddings_regularizer
    return layer.kernel_regularizer


def stored_variables(layer):
    """A plain layer's variables, in the order of its weights file.

    `Dense.variable_serialization_spec`, without an underscore but not
    documented; where there is none, no quantization is supported.
    """
    mode = layer.quantization_mode
    if mode is None:
        names = ["kernel", "bias"]
    else:
        names = layer.variable_serialization_spec[mode]
    variables = [
        stored_kernel(layer)
        if name in ("kernel", "embeddings")
        else getattr(layer, name, None)
        for name in names
    ]
    return [v for v in variables if v is not None]


def call_quantized(layer, inputs, training, activation):
    """Calls a quantized layer as Keras does, with another activation.

    Private: `Dense._int8_call` and its like.
    """
    method = getattr(type(layer), f"_{layer.quantization_mode}_call")
    return method(_WithActivation(layer, activation), inputs, training)


class _WithActivation:
    def __init__(self, layer, activation):
        self._layer = layer
        self.activation = activation

    def __getattr__(self, name):
        return getattr(self._layer, name)


def replace_quantized_kernel(layer, kernel):
    """Makes a layer with an int8 or int4 kernel a plain one.

    Keras has no inverse of `Layer.quantize`. Private: `Dense._kernel`,
    `Layer._is_quantized`.
    """
    shape = kernel_shape(layer)
    for variable in stored_variables(layer):
        if variable is not layer.bias:
            remove_variable(layer, variable)
    for name in ("_kernel", "kernel_scale", "kernel_zero", "g_idx"):
        vars(layer).pop(name, None)
    layer._is_quantized = False
    layer.quantization_config = None
    # "int8_from_float32" → "float32"
    layer.dtype_policy = layer.dtype_policy.get_config()["source_name"]
    with unlocked(layer):
        layer._kernel = layer.add_weight(
            name="kernel", shape=shape, regularizer=layer.kernel_regularizer
        )
    layer._kernel.assign(kernel)
