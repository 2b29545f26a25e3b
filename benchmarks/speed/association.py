"""Thin products or the materialised kernel: which is faster, where?

    KERAS_BACKEND=jax python -m benchmarks.speed.association

Forward and backward pass of one frozen kernel with a trained pair of factors,
`y = x @ W + (x @ aᵀ) @ b`, in two ways: the two thin products, and
`x @ (W + aᵀ @ b)` with a gradient of its own that leaves out the kernel's. The
time of the second as a part of that of the first: below 1, it would win.
"""

import time

import keras
import numpy as np
from keras import ops

WIDTHS = ((768, 768), (768, 3072), (3072, 768))
TOKENS = (16, 128, 1024, 4096)
RANKS = (1, 8, 32, 128)
ROUNDS = 15


def thin(x, kernel, a, b):
    """As the layers compute it."""
    hidden = ops.matmul(x, ops.transpose(a))
    return ops.add(ops.matmul(x, kernel), ops.matmul(hidden, b))


@ops.custom_gradient
def materialised(x, kernel, a, b):
    """One product; the kernel is put together again in the backward pass."""

    def effective():
        return ops.add(kernel, ops.matmul(ops.transpose(a), b))

    def gradient(*args, upstream=None):
        (dy,) = args if upstream is None else (upstream,)
        hidden = ops.matmul(x, ops.transpose(a))
        d_hidden = ops.matmul(dy, ops.transpose(b))
        return (
            ops.matmul(dy, ops.transpose(effective())),
            None
            if keras.backend.backend() != "jax"
            else ops.zeros_like(kernel),
            ops.matmul(ops.transpose(d_hidden), x),
            ops.matmul(ops.transpose(hidden), dy),
        )

    return ops.matmul(x, effective()), gradient


def forward_and_backward(layer, kernel):
    """A function of `(x, a, b, dy)` that returns the three gradients."""

    def loss(x, a, b, dy):
        return ops.sum(layer(x, kernel, a, b) * dy)

    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        return lambda *args: jax.block_until_ready(compiled(*args))
    if backend == "torch":
        import torch

        def run(x, a, b, dy):
            inputs = [t.detach().requires_grad_() for t in (x, a, b)]
            return torch.autograd.grad(loss(*inputs, dy), inputs)

        return run
    import tensorflow as tf

    @tf.function
    def run(x, a, b, dy):
        with tf.GradientTape() as tape:
            tape.watch([x, a, b])
            value = loss(x, a, b, dy)
        return tape.gradient(value, [x, a, b])

    return run


def compare(tokens, width, rank):
    """Median ratio of the seconds, materialised / thin."""
    rng = np.random.default_rng(0)
    k, n = width
    shapes = {"x": (tokens, k), "a": (rank, k), "b": (rank, n)}
    x, a, b, kernel, dy = (
        ops.convert_to_tensor(rng.standard_normal(s).astype("float32"))
        for s in [*shapes.values(), width, (tokens, n)]
    )
    ways = [forward_and_backward(f, kernel) for f in (thin, materialised)]
    seconds = np.zeros((ROUNDS + 2, 2))
    for row in seconds:
        for index, way in enumerate(ways):
            start = time.perf_counter()
            way(x, a, b, dy)
            row[index] = time.perf_counter() - start
    ratios = seconds[2:, 1] / seconds[2:, 0]
    return float(np.median(ratios))


def measure():
    """`{"in x out": {"tokens": {"rank": ratio}}}`."""
    return {
        f"{k} x {n}": {
            str(tokens): {
                str(rank): round(compare(tokens, (k, n), rank), 3)
                for rank in RANKS
            }
            for tokens in TOKENS
        }
        for k, n in WIDTHS
    }


if __name__ == "__main__":
    for shape, table in measure().items():
        print(f"\n| {shape}, tokens |", *(f"rank {r} |" for r in RANKS))
        print("|---" * (len(RANKS) + 1) + "|")
        for tokens, row in table.items():
            print(f"| {tokens} |", *(f"{v:.2f} |" for v in row.values()))
