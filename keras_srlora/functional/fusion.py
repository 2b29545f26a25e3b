"""Fusing pairs into a kernel and restarting their slots, as pure functions.

Factors are stored with one pair a row: `a` as `(rank, in)`, `b` as
`(rank, out)`, so that the effective kernel is `W + s · aᵀ @ b`.
"""

import keras
from keras import ops

from keras_srlora.backend import devices
from keras_srlora.backend.precision import full_precision
from keras_srlora.functional.contraction import matmul


def in_full(kernel, remainder=None):
    """A stored kernel in float32 (or in float64 where it is), not rounded.

    Args:
        kernel: tensor, or variable.
        remainder: float32 array of its shape, the part that rounding to the
            kernel's dtype cut off; or `None`.
    """
    full = ops.cast(kernel, full_dtype(kernel))
    if remainder is None:
        return full
    return ops.add(full, devices.laid_out_as(full, remainder))


def effective_kernel(kernel, a, b, scale):
    """`W + s · aᵀ @ b`, of shape `(in, out)`, from a kernel `in_full`.

    For initialisation, recomposition and merging; the layer's call never
    computes it.
    """
    a = devices.along_kernel(kernel, a, 0)
    b = devices.along_kernel(kernel, b, 1)
    return ops.add(kernel, _product(a, b, scale, full_dtype(kernel)))


def recompose_pairs(
    kernel, a, b, restarted, fresh_a, fresh_b, scale, remainder=None
):
    """Fuses the pairs of some slots into the kernel and restarts these slots.

    ```
    W ← W + s · a[low]ᵀ @ b[low] - s · fresh_a[low]ᵀ @ fresh_b[low]
    ```

    The effective kernel does not change (SRLoRA, arXiv 2505.12433, section 3).
    The pairs that stay are bit-equal. Shapes depend on nothing but the
    layer, so that a compiled backend compiles once.

    Args:
        kernel: tensor of shape `(in, out)`.
        a: tensor of shape `(rank, in)`.
        b: tensor of shape `(rank, out)`.
        restarted: bool tensor of shape `(rank, 1)`; true in the slots to fuse.
        fresh_a: tensor of shape `(rank, in)`; zero in the other slots.
        fresh_b: tensor of shape `(rank, out)`; likewise.
        scale: float. `lora_alpha / rank`.
        remainder: float32 tensor of shape `(in, out)`, or `None`; see
            `in_full`.

    Returns:
        `(kernel, a, b)`: the kernel in full, not rounded to its dtype; the
        factors in theirs.
    """
    a, fresh_a = (devices.along_kernel(kernel, x, 0) for x in (a, fresh_a))
    b, fresh_b = (devices.along_kernel(kernel, x, 1) for x in (b, fresh_b))
    new_a = ops.where(restarted, ops.cast(fresh_a, a.dtype), a)
    new_b = ops.where(restarted, ops.cast(fresh_b, b.dtype), b)
    zero = ops.zeros_like(a)
    dtype = full_dtype(kernel)
    fused = _product(ops.where(restarted, a, zero), b, scale, dtype)
    # `new_a`, not `fresh_a`: rounding to the factors' dtype is subtracted too.
    fresh = _product(ops.where(restarted, new_a, zero), new_b, scale, dtype)
    return ops.add(in_full(kernel, remainder), fused - fresh), new_a, new_b


def relative_change(before, after):
    """Largest change of an entry, as a part of the largest entry; a float."""
    largest = ops.max(ops.abs(before))
    change = ops.max(ops.abs(ops.subtract(after, before)))
    drift = ops.divide(change, ops.where(largest > 0, largest, 1.0))
    return float(devices.to_numpy(drift))


@full_precision()
def _product(a, b, scale, dtype):
    a = ops.transpose(ops.cast(a, dtype))
    return matmul(scale * a, ops.cast(b, dtype))


def full_dtype(kernel):
    """`"float64"` for a kernel that is, otherwise `"float32"`."""
    dtype = keras.backend.standardize_dtype(kernel.dtype)
    return "float64" if dtype == "float64" else "float32"
