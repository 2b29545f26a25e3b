"""Singular directions of a matrix, exact or randomized.

Exact: the thin SVD. Randomized: the range finder of Halko, Martinsson and
Tropp, "Finding structure with randomness" (arXiv 0909.4061, algorithms 4.4 and
5.1), with a Chebyshev polynomial of the matrix in place of its power, as in
filtered subspace iteration (Zhou, Saad, Tiago and Chelikowsky, 2006): spectra
of pretrained kernels are flat, and powers tell their directions apart slowly.
"""

from typing import NamedTuple

import numpy as np
from keras import ops

from keras_srlora.backend.devices import along_kernel
from keras_srlora.backend.devices import to_numpy
from keras_srlora.backend.precision import full_precision

OVERSAMPLING = 24
# How often `W Wᵀ` is applied to the basis.
PRODUCTS = 3
# A polynomial must not make the leading directions so much larger than the last
# that rounding to float32 drowns these.
LARGEST_AMPLIFICATION = 1e5
METHODS = ("auto", "exact", "randomized")


class Directions(NamedTuple):
    """Leading singular directions, one a row, in falling order.

    `matrix ≈ left.T @ diag(singular_values) @ right`, and to rounding
    `left @ matrix = diag(singular_values) @ right`, by which a layer recognises
    the kernel that its record belongs to.

    Attributes:
        left: float32 array of shape `(count, in)`, orthonormal rows.
        singular_values: float32 array of shape `(count,)`.
        right: float32 array of shape `(count, out)`, orthonormal rows.
    """

    left: np.ndarray
    singular_values: np.ndarray
    right: np.ndarray

    @property
    def tolerance(self):
        """Singular values at or below it are rounding errors, as in NumPy's
        `matrix_rank`: the largest one times the larger side times epsilon.
        """
        side = max(self.left.shape[1], self.right.shape[1])
        return self.singular_values[0] * side * np.finfo("float32").eps


@full_precision()
def decompose(matrix, count, method="auto"):
    """Computes the `count` leading singular directions of a matrix.

    Everything runs in float32 on the matrix's device, whatever its dtype; only
    the `count` directions, and the few numbers that choose the polynomial, come
    to the host.

    Args:
        matrix: tensor of shape `(in, out)`.
        count: int. How many directions, at most `min(in, out)`.
        method: `"exact"`, `"randomized"`, or `"auto"`: randomized where it
            works on less than a quarter of the smaller side.

    Returns:
        A `Directions` of NumPy arrays. The sign of each pair of vectors is
        fixed (the largest entry of the left one is positive), so that backends
        agree.
    """
    matrix = ops.cast(matrix, "float32")
    method = choose_method(matrix.shape, count, method)
    if method == "exact":
        left, singular_values, right = ops.svd(matrix, full_matrices=False)
    else:
        left, singular_values, right = _randomized_svd(matrix, count)
    left = to_numpy(ops.transpose(left[:, :count]))
    singular_values = to_numpy(singular_values[:count])
    right = to_numpy(right[:count])
    largest = np.argmax(np.abs(left), axis=1)[:, None]
    sign = np.where(np.take_along_axis(left, largest, axis=1) < 0, -1.0, 1.0)
    sign = sign.astype("float32")
    return Directions(left * sign, singular_values, right * sign)


def choose_method(shape, count, method):
    """The method that `"auto"` chooses for a matrix of this shape."""
    if method != "auto":
        return method
    small = 4 * (count + OVERSAMPLING) <= min(shape)
    return "randomized" if small else "exact"


def _randomized_svd(matrix, count):
    def project(basis):
        rows = along_kernel(matrix, ops.transpose(basis), 0)
        return ops.matmul(rows, matrix)

    def expand(projected):
        rows = along_kernel(matrix, projected, 1)
        return ops.matmul(matrix, ops.transpose(rows))

    width = min(count + OVERSAMPLING, *matrix.shape)
    # A fixed generator, not Keras's: a decomposition is a function of the
    # matrix, equal on every backend and every device.
    start = np.random.default_rng(0).standard_normal(
        (matrix.shape[0], width), "float32"
    )
    projected = project(ops.convert_to_tensor(start))
    # Squares of very large and very small entries would be out of range.
    unit = float(to_numpy(ops.max(ops.abs(projected)))) or 1.0

    def apply(basis):
        return expand(project(basis) / unit) / unit

    basis, _ = ops.qr(expand(projected / unit) / unit)
    products = PRODUCTS - 1
    while products:
        image = apply(basis)
        edge, degree = _choose_filter(basis, image, count, products)
        basis, _ = ops.qr(_chebyshev(apply, basis, image, edge, degree))
        products -= degree
    # The basis is one of the left side, so that `left @ matrix` is
    # `singular_values * right` to rounding, however near the directions are.
    left, singular_values, right = ops.svd(
        project(basis) / unit, full_matrices=False
    )
    return ops.matmul(basis, left), singular_values * unit, right


def _choose_filter(basis, image, count, most):
    """Which eigenvalues of `W Wᵀ` to damp, and the polynomial's degree.

    A Ritz value is never above the eigenvalue of its place, so that no wanted
    direction is damped.
    """
    # Not NumPy's: its threads would stand in the way of the backend's.
    ritz, _ = ops.eigh(ops.matmul(ops.transpose(basis), image))
    ritz = to_numpy(ritz)[::-1]
    floor = np.finfo("float32").eps * ritz[0]
    # 1 for a kernel of zeros.
    edge = max(ritz[min(count, len(ritz) - 1)], floor) or 1.0
    leading = np.arccosh(max(2 * ritz[0] / edge - 1, 1.0))
    # T_d(x) = cosh(d · arccosh(x)) for x above 1.
    room = np.arccosh(LARGEST_AMPLIFICATION) / max(leading, 1e-9)
    return float(edge), int(np.clip(room, 1, most))


def _chebyshev(apply, basis, image, edge, degree):
    """`T_degree(2 W Wᵀ / edge - 1) @ basis`; `image` is `W Wᵀ @ basis`."""
    previous, current = basis, (2 / edge) * image - basis
    for _ in range(degree - 1):
        previous, current = (
            current,
            (4 / edge) * apply(current) - 2 * current - previous,
        )
    return current
