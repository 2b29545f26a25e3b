"""Products of two thin factors, without anything of the product's size.

A kernel's update is `aᵀ @ b`, with one pair a row of either factor: `a` is
`(k, in)`, `b` is `(k, out)`. NumPy arrays.
"""

import numpy as np


def thin_svd(a, b) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Singular value decomposition of `aᵀ @ b`, by way of two thin QRs.

    Returns:
        `(left, values, right)` of shapes `(in, n)`, `(n,)` and `(n, out)`,
        without the singular values that are rounding errors.
    """
    q_a, r_a = np.linalg.qr(a.T)
    q_b, r_b = np.linalg.qr(b.T)
    left, values, right = np.linalg.svd(r_a @ r_b.T, full_matrices=False)
    return without_rounding(q_a @ left, values, right @ q_b.T)


def without_rounding(
    left, values, right
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Leaves out the singular values that are zero but for rounding."""
    side = max(len(left), right.shape[1])
    least = values[:1].sum() * side * np.finfo(values.dtype).eps
    count = int(np.sum(values > least))
    return left[:, :count], values[:count], right[:count]


def balanced(left, values, right, rank):
    """Factors `(rows, rank)` and `(rank, columns)`, filled up with zeros."""
    root = np.sqrt(values[:rank])
    missing = rank - len(root)
    return (
        np.pad(left[:, :rank] * root, ((0, 0), (0, missing))),
        np.pad(root[:, None] * right[:rank], ((0, missing), (0, 0))),
    )


def largest_cut(factored, rank):
    """Largest part of an update that a rank cuts off, in Frobenius norm.

    Args:
        factored: list of `(left, values, right)`, one for each kernel.
        rank: int. How many singular values are kept.
    """
    parts = [
        np.linalg.norm(values[rank:]) / np.linalg.norm(values)
        for _, values, _ in factored
        if len(values)
    ]
    return float(max(parts, default=0.0))
