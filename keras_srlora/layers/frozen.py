"""Frozen kernels: how they are stored, and where fused pairs go.

Two classes with the same verbs. A float kernel takes fused pairs up. A kernel
that `layer.quantize` quantized is read, never written: fusing a pair into it
would quantize it again, and each time lose bits; a kernel in float8, which
Keras stores in full and rounds in each step, would lose the pair in the next
one. Fused pairs stay beside such a kernel, as factors that are not trained.
"""

import keras
import numpy as np
from keras import ops

from keras_srlora.backend import devices
from keras_srlora.backend.keras_private.kernels import kernel_scale
from keras_srlora.backend.keras_private.kernels import replace_quantized_kernel
from keras_srlora.backend.keras_private.kernels import stored_kernel
from keras_srlora.backend.keras_private.kernels import unpacked_kernel
from keras_srlora.backend.keras_private.nesting import remove_variable
from keras_srlora.functional.contraction import as_kernel
from keras_srlora.functional.contraction import as_matrix
from keras_srlora.functional.contraction import matmul
from keras_srlora.functional.fusion import effective_kernel
from keras_srlora.functional.fusion import in_full

INTEGER_MODES = ("int8", "int4")
MODES = ("float8", *INTEGER_MODES)
# Of the format that Keras rounds kernels to, `float8_e4m3fn`.
LARGEST_FLOAT8 = 448.0
HALF_PRECISION = ("bfloat16", "float16")
FUSED = ("fused_kernel_a", "fused_kernel_b")
REMAINDER = "remainder"


def freeze_kernel(layer):
    """The `FloatKernel` or `QuantizedKernel` of a layer that is being built."""
    kernel = QuantizedKernel if is_quantized(layer) else FloatKernel
    return kernel(layer)


class FloatKernel:
    """A frozen kernel of floats, which fused pairs are added to.

    Attributes:
        variable: the kernel's variable.
        remainder: float32, `(in, out)`. The part that rounding cut off a kernel
            in half precision; the next recomposition starts from both, so that
            small pairs add up that are each below the kernel's rounding.
            `None`: nothing.
        room: how many pairs can be fused; `None`: any number.
    """

    room = None

    def __init__(self, layer):
        self.variable = stored_kernel(layer)
        self.remainder = None
        self._plan = layer.plan()

    @property
    def variables(self):
        """Those that fusing a pair changes."""
        return [self.variable]

    def matrix(self):
        """The kernel as it is stored, `(in, out)`; rounded."""
        return as_matrix(self.variable, self._plan)

    def in_full(self):
        """The kernel with its remainder, in float32 (or float64)."""
        return in_full(self.matrix(), self.remainder)

    def store(self, matrix, rows):
        """Stores a kernel that is given in full.

        Args:
            matrix: tensor of shape `(in, out)`.
            rows: factors of the fused pairs; not needed here.
        """
        rounded = ops.cast(matrix, self.variable.dtype)
        remainder = None
        dtype = keras.backend.standardize_dtype(self.variable.dtype)
        if dtype in HALF_PRECISION:
            cut_off = ops.subtract(matrix, in_full(rounded))
            remainder = np.array(devices.to_numpy(cut_off))
        # Last, when nothing can fail any more.
        self.variable.assign(as_kernel(rounded, self._plan))
        self.remainder = remainder

    def check_room(self, rows, path):
        """Raises where there is no room for these fused pairs: never."""

    def adopt(self, rows):
        """Follows a kernel that was loaded together with its record."""

    def add_fused(self, rows, low_rank):
        """The term of a step for pairs beside the kernel: none."""
        return low_rank

    def merge(self, layer, matrix):
        """Makes an effective kernel that of the plain layer."""
        matrix = ops.cast(matrix, self.variable.dtype)
        self.variable.assign(as_kernel(matrix, self._plan))

    def unload(self, layer, matrix):
        """Makes the pretrained kernel that of the plain layer."""
        self.merge(layer, matrix)

    def to_arrays(self):
        """Beside the variables, as `{name: array}`."""
        return {} if self.remainder is None else {REMAINDER: self.remainder}

    def from_arrays(self, arrays):
        """The inverse of `to_arrays`."""
        found = arrays.get(REMAINDER)
        self.remainder = None if found is None else np.array(found)


class QuantizedKernel:
    """A quantized kernel with the pairs that were fused beside it.

    Attributes:
        fused: two variables `(room, in)` and `(room, out)`, not trained.
        room: how many pairs can be fused or subtracted.
    """

    remainder = None

    def __init__(self, layer):
        self._layer = layer
        self._plan = layer.plan()
        self.room = rows_beside_kernel(layer.direction_count, layer.recipe)
        sizes = self._plan.in_features, self._plan.out_features
        self.fused = [
            layer.add_weight(
                name=name,
                shape=(self.room, size),
                initializer="zeros",
                trainable=False,
            )
            for name, size in zip(FUSED, sizes)
        ]

    @property
    def variables(self):
        return self.fused

    def matrix(self):
        """The dequantized kernel with the pairs beside it."""
        matrix = as_matrix(float_kernel(self._layer), self._plan)
        a, b = map(ops.convert_to_tensor, self.fused)
        return effective_kernel(matrix, a, b, 1.0)

    def in_full(self):
        return in_full(self.matrix())

    def store(self, matrix, rows):
        """Stores the factors of the fused pairs; the kernel stays."""
        for variable, array in zip(self.fused, rows):
            padding = variable.shape[0] - len(array)
            variable.assign(np.pad(array, ((0, padding), (0, 0))))

    def check_room(self, rows, path):
        if len(rows[0]) > self.room:
            raise ValueError(
                f"The quantized kernel of layer {path!r} has room for "
                f"{self.room} pairs beside it. Build the layer with a "
                "`target_rank` at least as large as that of the saved one. "
                f"Received: {len(rows[0])} pairs"
            )

    def adopt(self, rows):
        self.store(None, rows)

    def add_fused(self, rows, low_rank):
        a, b = self.fused
        hidden = matmul(rows, ops.transpose(a))
        return ops.add(low_rank, matmul(hidden, b))

    def merge(self, layer, matrix):
        kernel = as_kernel(matrix, self._plan)
        if has_integers(layer):
            replace_quantized_kernel(layer, kernel)
        else:
            stored = stored_kernel(layer)
            stored.assign(ops.cast(kernel, stored.dtype))
            _rescale_float8(layer, kernel)
        self._remove_fused(layer)

    def unload(self, layer, matrix):
        """The quantized kernel was never written: it is the pretrained one."""
        self._remove_fused(layer)

    def _remove_fused(self, layer):
        for variable in self.fused:
            # A function that was compiled before still reads them.
            variable.assign(ops.zeros(variable.shape, variable.dtype))
            remove_variable(layer, variable)

    def to_arrays(self):
        return {}

    def from_arrays(self, arrays):
        """Nothing: the record has the fused pairs."""


def _rescale_float8(layer, kernel):
    """Lets the rounding to float8 hold the largest entry of a new kernel.

    Keras does so in training steps alone; entries above that of the old kernel
    would be cut off until then.
    """
    history = keras.quantizers.compute_float8_amax_history(
        kernel, layer.kernel_amax_history
    )
    layer.kernel_amax_history.assign(history)
    scale = keras.quantizers.compute_float8_scale(
        ops.max(ops.abs(kernel)), layer.kernel_scale, LARGEST_FLOAT8
    )
    layer.kernel_scale.assign(scale)


def is_quantized(layer) -> bool:
    """Whether `layer.quantize` quantized its kernel."""
    return layer.quantization_mode is not None


def has_integers(layer) -> bool:
    """Whether the stored kernel has integers, which mean others."""
    return layer.quantization_mode in INTEGER_MODES


def rows_beside_kernel(direction_count, recipe) -> int:
    """How many pairs a run may fuse beside a quantized kernel.

    One is fused for each direction that a pair restarts along; where pairs
    start along it at a length of their own, it is subtracted too.
    """
    return direction_count * (2 if recipe.subtracts else 1)


def float_kernel(layer):
    """The kernel as it is stored, or dequantized where that is of integers.

    Returns:
        tensor of the kernel's shape, float32 if dequantized.
    """
    if not has_integers(layer):
        return ops.convert_to_tensor(stored_kernel(layer))
    # Unpacked, but still integers.
    kernel = ops.cast(unpacked_kernel(layer), "float32")
    if layer.quantization_mode == "int8":
        return ops.divide(kernel, kernel_scale(layer))
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
