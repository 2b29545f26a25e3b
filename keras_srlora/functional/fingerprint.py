"""Numbers that tell kernels apart."""

import numpy as np
from keras import ops

from keras_srlora.backend import devices
from keras_srlora.backend.precision import full_precision


@full_precision()
def fingerprint(matrix):
    """16 numbers that tell kernels apart: the matrix between random vectors.

    Not a hash: a kernel that pairs were fused into is known to rounding only.
    """
    rows, columns = matrix.shape
    random = np.random.default_rng(0)
    left = random.standard_normal((4, rows)).astype("float32")
    right = random.standard_normal((columns, 4)).astype("float32")
    left = devices.along_kernel(matrix, left, 0)
    sketch = ops.matmul(ops.matmul(left, ops.cast(matrix, "float32")), right)
    return [float(x) for x in np.ravel(devices.to_numpy(sketch))]


def is_fingerprint(numbers):
    """Whether it is a list such as `fingerprint` makes."""
    return (
        isinstance(numbers, list)
        and len(numbers) == 16
        and all(isinstance(x, float) and np.isfinite(x) for x in numbers)
    )
