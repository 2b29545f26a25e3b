"""How a step, a recomposition and a decomposition grow.

    KERAS_BACKEND=jax python -m benchmarks.speed.growth

Two layers of one width in a row, trained by `fit` beside their floor: the same
layers with trainable biases alone. One of rank, width and tokens varies.
"""

import functools
import json
import time

import keras
import numpy as np
from keras import layers
from keras import ops

import keras_srlora
from benchmarks.shared import timings
from benchmarks.speed import contestants
from benchmarks.speed.contestants import BeforeStep
from keras_srlora.functional.decomposition import decompose

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
WIDTHS = (256, 512, 1024, 2048, 4096)
TOKENS = (64, 256, 1024, 4096, 16384)
WIDTH, TOKEN_COUNT, RANK, TARGET_RANK = 1024, 1024, 8, 64
# The exact SVD takes minutes beyond.
LARGEST_EXACT = 2048


def measure():
    """`{curve: {x: seconds}}`; a step has two curves, and their ratio."""
    result = {
        "step by rank": {n: step(rank=n) for n in RANKS},
        "step by width": {n: step(width=n) for n in WIDTHS},
        "step by tokens": {n: step(tokens=n) for n in TOKENS},
        "recomposition by width": {n: recomposition(n) for n in WIDTHS},
        "randomized by width": {
            n: decomposition(n, "randomized") for n in WIDTHS
        },
        "exact by width": {
            n: decomposition(n, "exact") for n in WIDTHS if n <= LARGEST_EXACT
        },
    }
    # As JSON would have it.
    return json.loads(json.dumps(result))


def step(rank=RANK, width=WIDTH, tokens=TOKEN_COUNT):
    """Seconds of both, and the median ratio within each round."""
    loops = {
        name: fit_loop(name, rank, width, tokens)
        for name in ("srlora", "floor")
    }
    seconds = timings.interleave(loops, rounds=9, steps=3)
    return {
        **{k: float(f"{np.median(v):.4g}") for k, v in seconds.items()},
        "ratio": round(timings.ratio(seconds, "srlora", "floor")[0], 3),
    }


def fit_loop(name, rank, width, tokens):
    """A `Loop` of `fit` over rows of random numbers."""
    keras.utils.set_random_seed(0)
    own = []
    if name == "srlora":
        row = [
            keras_srlora.SRLoRADense(
                width,
                rank=rank,
                target_rank=min(width, 8 * rank),
                recipe="paper",
            )
            for _ in range(2)
        ]
        own = [keras_srlora.RecompositionCallback(interval=10**6)]
    else:
        row = [layers.Dense(width) for _ in range(2)]
    model = keras.Sequential([keras.Input((width,)), *row])
    if name == "floor":
        for layer in row:
            layer.kernel.trainable = False
    model.compile(keras.optimizers.AdamW(contestants.RATE), "mse")
    x = np.random.default_rng(0).standard_normal((tokens, width), "float32")

    def train(before_step):
        model.fit(
            x,
            x,
            batch_size=tokens,
            epochs=10**6,
            verbose=0,
            shuffle=False,
            callbacks=[BeforeStep(before_step), *own],
        )

    return timings.Loop(train, functools.partial(contestants.wait, model))


def recomposition(width, times=6):
    """Seconds for one layer, the first one not counted."""
    layer = keras_srlora.SRLoRADense(
        width, rank=RANK, target_rank=TARGET_RANK, recipe="paper"
    )
    model = keras.Sequential([keras.Input((width,)), layer])
    keras_srlora.initialize_factors(model)
    optimizer = keras_srlora.SensitivityOptimizer(
        keras.optimizers.AdamW(contestants.RATE), model
    )
    model.compile(optimizer, "mse")
    x = np.random.default_rng(0).standard_normal((8, width), "float32")
    seconds = []
    for index in range(times):
        model.fit(x, x, verbose=0)
        contestants.wait(model)
        start = time.perf_counter()
        (event,) = keras_srlora.recompose(
            optimizer.sensitivity, optimizer, index
        )
        contestants.wait(model)
        seconds.append(time.perf_counter() - start)
    return float(f"{np.median(seconds[1:]):.4g}")


def decomposition(width, method, times=3):
    """Seconds, the first one not counted."""
    kernel = np.random.default_rng(0).standard_normal((width, width), "float32")
    kernel = ops.convert_to_tensor(kernel)
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        decompose(kernel, TARGET_RANK, method)
        seconds.append(time.perf_counter() - start)
    return float(f"{np.median(seconds[1:]):.4g}")


if __name__ == "__main__":
    print(json.dumps(measure()))
