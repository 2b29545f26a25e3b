import contextlib
import gc
import os
import pathlib
import signal

# The build of PyTorch with CUDA brings Triton, which crashes the process where
# it is imported after TensorFlow.
with contextlib.suppress(ImportError):
    import triton  # noqa: F401

import pytest
from processes import optimize_no_graphs

# Most of JAX's time goes into compiling small functions, each of which runs a
# few times. They are compiled fast rather than well, and once for all models
# and processes. JAX reads this when it is imported, in child processes too.
CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"
FAST_JAX = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    # A third of the time that compiling a small function takes.
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
# The compiler of PyTorch would start a process for each core, which imports
# PyTorch, for the few functions of `jit_compile=True`.
FAST_TORCH = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
for name, value in (FAST_JAX | FAST_TORCH).items():
    os.environ.setdefault(name, value)

# Files that take long, the longest first: a process that began one of them last
# would run on alone.
LONG = (
    "test_examples",
    "test_backbones",
    "test_stale_functions",
    "test_devices",
    "test_resume",
    "test_directions",
    "test_documentation",
    "test_files_and_names",
    "test_quantized",
    "test_adapter",
    "test_enable_and_merge",
    "test_sensitivity",
)


def pytest_collection_modifyitems(items):
    ranks = {name: rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(LONG)))


# Keras is imported late: pytest-xdist's first process only hands out the tests.


@pytest.fixture(scope="session", autouse=True)
def _graphs_run_a_few_times():
    optimize_no_graphs()


# How many tests share a look through all objects of the process.
TESTS_A_COLLECTION = 8
_tests_since_collection = TESTS_A_COLLECTION


@pytest.fixture(autouse=True)
def _libraries_are_no_garbage():
    """Hides the libraries' objects, and old graphs, from the collector.

    Where layers change, the package looks through all objects for the models
    that hold them, and most tests change layers. Without this, each of them
    looks through half a million of the libraries, and through the graphs that
    TensorFlow never frees. A model that a module's tests share is hidden, too.
    """
    global _tests_since_collection
    _tests_since_collection += 1
    if _tests_since_collection >= TESTS_A_COLLECTION:
        _tests_since_collection = 0
        gc.collect()
        gc.freeze()
        # Tracing and building make many objects that stay.
        gc.set_threshold(20_000, 10, 10)


@pytest.fixture(autouse=True)
def _seeded():
    import keras

    keras.utils.set_random_seed(0)


@pytest.fixture
def ctrl_c_raises():
    """Where a suite runs in the background, Ctrl-C may be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def rng():
    import numpy as np

    return np.random.default_rng(0)
