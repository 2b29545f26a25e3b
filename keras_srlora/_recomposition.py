"""Fusing pairs into a kernel and restarting their slots, as pure functions.

Factors are stored with one pair a row: `a` as `(rank, in)`, `b` as
`(rank, out)`, so that the effective kernel is `W + s · aᵀ @ b`.
"""

from keras import ops


def effective_kernel(kernel, a, b, scale):
    """`W + s · aᵀ @ b`, in float32, of shape `(in, out)`.

    For initialisation, recomposition and merging; the layer's call never
    computes it.
    """
    kernel = ops.cast(kernel, "float32")
    return kernel + _product(a, b, scale)


def recompose_pairs(kernel, a, b, restarted, fresh_a, fresh_b, scale):
    """Fuses the pairs of some slots into the kernel and restarts these slots.

    ```
    W ← W + s · a[low]ᵀ @ b[low] - s · fresh_a[low]ᵀ @ fresh_b[low]
    ```

    The effective kernel does not change (SRLoRA, arXiv 2505.12433, section 3).
    The pairs that stay are equal to the bit. Shapes depend on nothing but the
    layer, so that a compiled backend compiles once.

    Args:
        kernel: tensor of shape `(in, out)`.
        a: tensor of shape `(rank, in)`.
        b: tensor of shape `(rank, out)`.
        restarted: bool tensor of shape `(rank, 1)`; true in the slots to fuse.
        fresh_a: float32 tensor of shape `(rank, in)`; zero in the other slots.
        fresh_b: float32 tensor of shape `(rank, out)`; likewise.
        scale: float. `lora_alpha / rank`.

    Returns:
        `(kernel, a, b, drift)` in the dtypes that were given, with `drift` the
        largest change of an entry of the effective kernel as a part of its
        largest entry (a float32 scalar).
    """
    before = effective_kernel(kernel, a, b, scale)
    new_a = ops.where(restarted, ops.cast(fresh_a, a.dtype), a)
    new_b = ops.where(restarted, ops.cast(fresh_b, b.dtype), b)
    zero = ops.zeros_like(a)
    fused = _product(ops.where(restarted, a, zero), b, scale)
    # `new_a`, not `fresh_a`: rounding to the factors' dtype is subtracted too.
    fresh = _product(ops.where(restarted, new_a, zero), new_b, scale)
    new_kernel = ops.cast(
        ops.cast(kernel, "float32") + (fused - fresh), kernel.dtype
    )
    after = effective_kernel(new_kernel, new_a, new_b, scale)
    largest = ops.max(ops.abs(before))
    change = ops.max(ops.abs(after - before))
    drift = change / ops.where(largest > 0, largest, 1.0)
    return new_kernel, new_a, new_b, drift


def _product(a, b, scale):
    a = ops.transpose(ops.cast(a, "float32"))
    return ops.matmul(scale * a, ops.cast(b, "float32"))
