"""How an einsum equation with one contraction is a product of matrices.

`EinsumDense` covers `x @ W` for kernels of any number of dimensions. A kernel
is the matrix (contracted dimensions) × (dimensions of the kernel alone), after
a permutation where its axes are stored in another order.
"""

import dataclasses
import functools
import math
import string

import keras
import numpy as np
from keras import ops


@dataclasses.dataclass(frozen=True)
class Contraction:
    """An einsum equation read as a product of matrices.

    Attributes:
        equation: str. With an ellipsis written out in letters.
        in_shape: tuple. Contracted dimensions, in the kernel's order.
        out_shape: tuple. Dimensions of the kernel alone, in its order.
        input_axes: tuple. Permutation of the input to (batch…, in…).
        kernel_axes: tuple. Permutation of the kernel to (in…, out…).
        output_axes: tuple. Permutation of (batch…, out…) to the output.
    """

    equation: str
    in_shape: tuple
    out_shape: tuple
    input_axes: tuple
    kernel_axes: tuple
    output_axes: tuple

    # Computed once: a layer asks in each forward pass.

    @functools.cached_property
    def in_features(self) -> int:
        return math.prod(self.in_shape)

    @functools.cached_property
    def out_features(self) -> int:
        return math.prod(self.out_shape)

    @functools.cached_property
    def kernel_is_a_matrix(self) -> bool:
        """Whether the stored kernel is that matrix up to a reshape."""
        return is_identity(self.kernel_axes)

    @functools.cached_property
    def input_in_order(self) -> bool:
        """Whether the contracted dimensions of the input come last."""
        return is_identity(self.input_axes)

    @functools.cached_property
    def output_in_order(self) -> bool:
        """Whether the output has the kernel's dimensions last."""
        return is_identity(self.output_axes)


def as_matrix(kernel, plan):
    """A kernel as a tensor of shape `(in, out)`; no gradient flows through."""
    kernel = ops.stop_gradient(ops.convert_to_tensor(kernel))
    kernel = ops.transpose(kernel, plan.kernel_axes)
    return ops.reshape(kernel, (plan.in_features, plan.out_features))


def as_kernel(matrix, plan):
    """From `(in, out)` to the shape of the stored kernel."""
    matrix = ops.reshape(matrix, plan.in_shape + plan.out_shape)
    return ops.transpose(matrix, np.argsort(plan.kernel_axes).tolist())


def as_rows(x, plan):
    """An input as a matrix, and how the rows of a product are the output.

    Returns:
        `(rows, arrange)`: a tensor of shape `(-1, in)`, and a function from one
        of shape `(-1, out)` to the layer's output.
    """
    if not plan.input_in_order:
        x = ops.transpose(x, plan.input_axes)
    shape = ops.shape(x)
    batch_shape = shape[: len(shape) - len(plan.in_shape)]
    if len(shape) != 2:
        x = ops.reshape(x, (-1, plan.in_features))

    def arrange(y):
        if len(batch_shape) != 1 or len(plan.out_shape) != 1:
            y = ops.reshape(y, (*batch_shape, *plan.out_shape))
        if not plan.output_in_order:
            y = ops.transpose(y, plan.output_axes)
        return y

    return x, arrange


def is_identity(axes):
    """Whether a permutation leaves the order as it is."""
    return tuple(axes) == tuple(range(len(axes)))


def matmul(x, y):
    """The product of two matrices, in their dtype.

    On PyTorch, `keras.ops.matmul` computes float64 in float32.
    """
    if keras.backend.standardize_dtype(x.dtype) == "float64":
        return ops.einsum("ij,jk->ik", x, y)
    return ops.matmul(x, y)


def dense(input_ndim, in_features, out_features):
    """The contraction of `keras.layers.Dense`: nothing is permuted."""
    letters = string.ascii_lowercase[: input_ndim + 1]
    batch, contracted, out = letters[:-2], letters[-2], letters[-1]
    return Contraction(
        equation=f"{batch}{contracted},{contracted}{out}->{batch}{out}",
        in_shape=(in_features,),
        out_shape=(out_features,),
        input_axes=tuple(range(input_ndim)),
        kernel_axes=(0, 1),
        output_axes=tuple(range(input_ndim)),
    )


def analyze(equation, input_ndim, kernel_shape):
    """Reads an `EinsumDense` equation as a product of matrices.

    Args:
        equation: str, e.g. `"abc,cde->abde"`; one ellipsis is allowed as in
            `EinsumDense`.
        input_ndim: int. Number of dimensions of the input.
        kernel_shape: tuple of ints.

    Returns:
        A `Contraction`.

    Raises:
        ValueError: if it is not one contraction: a dimension shared by all
            three operands (a batch of kernels), summed in one operand alone,
            repeated, or none to contract. The message names the equation and
            the dimension.

    Example:

    >>> contraction = analyze("btd,ndh->btnh", 3, (12, 768, 64))
    >>> contraction.in_shape, contraction.out_shape, contraction.kernel_axes
    ((768,), (12, 64), (1, 0, 2))
    """
    inputs, kernel, outputs = _spell_out(equation, input_ndim)

    def refuse(reason):
        raise ValueError(
            "SRLoRA needs an equation with one contraction, which makes the "
            f"kernel one matrix. Received: equation={equation!r}, where "
            f"{reason}. Leave this layer as `keras.layers.EinsumDense` (name "
            "the others in `target_layer_names`)."
        )

    for operand in (inputs, kernel, outputs):
        for letter in operand:
            if operand.count(letter) > 1:
                refuse(f"dimension {letter!r} is repeated in {operand!r}")
    for letter in kernel:
        if letter in inputs and letter in outputs:
            refuse(
                f"dimension {letter!r} is shared by input, kernel and output: "
                "a batch of kernels"
            )
        if letter not in inputs and letter not in outputs:
            refuse(f"dimension {letter!r} is summed in the kernel alone")
    for letter in inputs:
        if letter not in kernel and letter not in outputs:
            refuse(f"dimension {letter!r} is summed in the input alone")
    contracted = [letter for letter in kernel if letter in inputs]
    if not contracted:
        refuse("no dimension is contracted")

    kernel_only = [letter for letter in kernel if letter not in inputs]
    batch = [letter for letter in inputs if letter not in kernel]
    size = dict(zip(kernel, kernel_shape))
    return Contraction(
        equation=f"{inputs},{kernel}->{outputs}",
        in_shape=tuple(size[letter] for letter in contracted),
        out_shape=tuple(size[letter] for letter in kernel_only),
        input_axes=tuple(map(inputs.index, batch + contracted)),
        kernel_axes=tuple(map(kernel.index, contracted + kernel_only)),
        output_axes=tuple(map((batch + kernel_only).index, outputs)),
    )


def _spell_out(equation, input_ndim):
    """Writes the ellipsis in letters that the equation does not use."""
    operands, outputs = equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    if "..." in inputs:
        count = input_ndim - len(inputs.replace("...", ""))
        free = [c for c in string.ascii_letters if c not in equation][:count]
        inputs = inputs.replace("...", "".join(free))
        outputs = outputs.replace("...", "".join(free))
    return inputs, kernel, outputs
