"""The drift of effective kernels over 50 recompositions."""

import importlib.util
import pathlib

import numpy as np
import pytest

from keras_srlora.backend.arguments import keras_version
from keras_srlora.layers.requirements import QUANTIZED_SINCE

PATH = pathlib.Path(__file__).parents[2] / "benchmarks" / "drift.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("drift", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("recipe", ["paper", "lora_restarts"])
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int8", "int4"]
)
def test_drift_grows_no_faster_than_documented(recipe, dtype, benchmark):
    """At each of 50 recompositions at most `4 u √n`; half precision: `4 u`.

    A kernel of MiniLM's size and spectrum, as flat as noise but for a few
    directions; `benchmarks/drift.py` takes the real ones.
    """
    if dtype in benchmark.RANGES and keras_version() < QUANTIZED_SINCE:
        pytest.skip("needs a newer Keras")
    rng = np.random.default_rng(0)
    kernel = 0.05 * rng.standard_normal((150, 200)).astype("float32")
    kernel += np.outer(rng.standard_normal(150), rng.standard_normal(200)) / 50
    curve = benchmark.drifts(kernel, recipe, dtype)
    roundoff = benchmark.DTYPES[dtype]
    assert len(curve) == 50
    assert benchmark.constant(curve, dtype) <= 4
    # And something was rounded, so that the test is one; where nothing is
    # subtracted, what is fused beside a quantized kernel is not.
    if recipe == "paper" or dtype not in benchmark.RANGES:
        assert curve[-1] > roundoff / 2
