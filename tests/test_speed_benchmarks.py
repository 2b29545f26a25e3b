"""The benchmarks of speed run: no figure of the documentation rots."""

from importlib.util import find_spec

import keras
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("keras_hub") is None, reason="not installed: keras_hub"
    ),
    # Warnings of Hugging Face's packages are not this one's.
    pytest.mark.filterwarnings("default"),
]


def test_a_step_of_each_method():
    if keras.backend.backend() == "torch":
        pytest.importorskip("peft")
        pytest.importorskip("transformers")
    from benchmarks.speed import step

    found = step.compare(
        rounds=1, rounds_of_statistics=1, steps=1, batch=1, layers=1, width=64
    )
    parameters = found["parameters"]
    assert parameters["floor"] < parameters["srlora"] < parameters["full"]
    assert found["ratios"]["keras_lora"][0] > 0
    if keras.backend.backend() == "torch":
        # The same adapter, on the same kernels.
        assert parameters["peft_lora"] == parameters["srlora"]


def test_recompositions():
    from benchmarks.speed import recomposition

    found = recomposition.measure(layers=1, batch=1, width=64)
    assert found["ratio"] > 0
    # Nothing is compiled again after the first one.
    assert not any(found["compilations"][1:])


def test_growth():
    from benchmarks.speed import growth

    assert growth.recomposition(64, times=2) > 0
    assert growth.decomposition(64, "randomized", times=1) > 0
