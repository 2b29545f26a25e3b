import contextlib

# The build of PyTorch with CUDA brings Triton, which crashes the process where
# it is imported after TensorFlow.
with contextlib.suppress(ImportError):
    import triton  # noqa: F401

import keras
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
