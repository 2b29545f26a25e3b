"""Kernels are multiplied in the precision of their numbers."""

import contextlib

import keras
import pytest

import keras_srlora
from keras_srlora.backend.precision import full_precision
from keras_srlora.functional import fusion
from keras_srlora.functional.decomposition import decompose
from keras_srlora.functional.fingerprint import fingerprint
from keras_srlora.layers.matching import find_record

BACKEND = keras.backend.backend()


def precision():
    """How the backend multiplies matrices of float32 now."""
    if BACKEND == "jax":
        import jax

        return jax.config.jax_default_matmul_precision
    if BACKEND == "tensorflow":
        import tensorflow as tf

        config = tf.config.experimental
        return config.tensor_float_32_execution_enabled()
    import torch

    return torch.get_float32_matmul_precision()


@contextlib.contextmanager
def low_precision():
    """What a user may have chosen, or the backend does by itself."""
    if BACKEND == "jax":
        import jax

        with jax.default_matmul_precision("tensorfloat32"):
            yield
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        config = tf.config.experimental
        config.enable_tensor_float_32_execution(True)
        yield
    else:
        import torch

        torch.set_float32_matmul_precision("high")
        yield
        torch.set_float32_matmul_precision("highest")


FULL = {"jax": "float32", "tensorflow": False, "torch": "highest"}[BACKEND]


def test_the_choice_of_the_user_comes_back():
    with low_precision():
        chosen = precision()
        assert chosen != FULL
        with full_precision():
            assert precision() == FULL
        with pytest.raises(KeyError), full_precision():
            raise KeyError
        assert precision() == chosen


@pytest.mark.parametrize(
    "compute",
    [
        lambda layer: decompose(layer.frozen.in_full(), 4, "randomized"),
        lambda layer: fingerprint(layer.frozen.in_full()),
        find_record,
        lambda layer: fusion.effective_kernel(
            layer.frozen.in_full(), *layer.factors, 1.0
        ),
    ],
)
def test_kernels_are_computed_in_full(compute, monkeypatch):
    layer = keras_srlora.SRLoRADense(40, rank=2)
    layer.build((None, 40))
    layer.initialize_factors()
    seen = []
    matmul = keras.ops.matmul

    def watched(*args, **kwargs):
        seen.append(precision())
        return matmul(*args, **kwargs)

    monkeypatch.setattr(keras.ops, "matmul", watched)
    with low_precision():
        compute(layer)
    assert seen and set(seen) == {FULL}


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch has two ways")
def test_the_newer_way_of_pytorch():
    import torch

    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("an older PyTorch")
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with full_precision():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
    with full_precision():
        assert torch.get_float32_matmul_precision() == "highest"
    assert matmul.fp32_precision == before
