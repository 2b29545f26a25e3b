"""Singular directions of a matrix, exact or randomized.

Exact: the thin SVD. Randomized: the range finder with oversampling and power
iterations of Halko, Martinsson and Tropp, "Finding structure with randomness"
(arXiv 0909.4061, algorithms 4.4 and 5.1), as in `torch.svd_lowrank` and
scikit-learn's `randomized_svd`.
"""

from typing import NamedTuple

import numpy as np
from keras import ops

OVERSAMPLING = 16
POWER_ITERATIONS = 4
METHODS = ("auto", "exact", "randomized")


class Directions(NamedTuple):
    """Leading singular directions, one a row, in falling order.

    `matrix ≈ left.T @ diag(singular_values) @ right`.

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


def decompose(matrix, count, method="auto"):
    """Computes the `count` leading singular directions of a matrix.

    Everything runs in float32 on the matrix's device, whatever its dtype; only
    the `count` directions come to the host.

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
    if method == "auto":
        small = 4 * (count + OVERSAMPLING) <= min(matrix.shape)
        method = "randomized" if small else "exact"
    if method == "exact":
        left, singular_values, right = ops.svd(matrix, full_matrices=False)
    else:
        left, singular_values, right = _randomized_svd(matrix, count)
    left = ops.convert_to_numpy(ops.transpose(left[:, :count]))
    singular_values = ops.convert_to_numpy(singular_values[:count])
    right = ops.convert_to_numpy(right[:count])
    largest = np.argmax(np.abs(left), axis=1)[:, None]
    sign = np.where(np.take_along_axis(left, largest, axis=1) < 0, -1.0, 1.0)
    sign = sign.astype("float32")
    return Directions(left * sign, singular_values, right * sign)


def _randomized_svd(matrix, count):
    rows, columns = matrix.shape
    width = min(count + OVERSAMPLING, rows, columns)
    # A fixed generator, not Keras's: a decomposition is a function of the
    # matrix, equal on every backend and every device.
    start = np.random.default_rng(0).standard_normal((columns, width))
    start = ops.convert_to_tensor(start.astype("float32"))
    basis, _ = ops.qr(ops.matmul(matrix, start))
    transposed = ops.transpose(matrix)
    for _ in range(POWER_ITERATIONS):
        # Orthonormalising after each product keeps the small directions from
        # drowning in the large ones.
        other, _ = ops.qr(ops.matmul(transposed, basis))
        basis, _ = ops.qr(ops.matmul(matrix, other))
    small = ops.matmul(ops.transpose(basis), matrix)
    left, singular_values, right = ops.svd(small, full_matrices=False)
    return ops.matmul(basis, left), singular_values, right
