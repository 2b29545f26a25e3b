import keras
import numpy as np
import pytest
from keras import ops
from support import KINDS
from support import SHAPES
from support import matrix

from keras_srlora._decomposition import decompose

# float32 SVD: a few units of eps times the largest singular value.
TOLERANCE = 2e-5


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_directions_rebuild_the_matrix(shape, kind, method, rng):
    w = matrix(kind, *shape, rng)
    found = decompose(w, min(shape), method)
    rebuilt = (found.left.T * found.singular_values) @ found.right
    size = max(np.linalg.norm(w, 2), 1e-6)
    np.testing.assert_allclose(rebuilt / size, w / size, atol=TOLERANCE)


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_equal_numpy(shape, kind, method, rng):
    w = matrix(kind, *shape, rng)
    count = max(1, min(shape) // 2)
    found = decompose(w, count, method)
    expected = np.linalg.svd(w.astype("float64"), compute_uv=False)[:count]
    # The randomized one is exact here: it works on all columns.
    np.testing.assert_allclose(
        found.singular_values, expected, atol=TOLERANCE * max(expected[0], 1)
    )


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("kind", KINDS)
def test_directions_are_orthonormal(kind, method, rng):
    found = decompose(matrix(kind, 40, 25, rng), 10, method)
    for vectors in (found.left, found.right):
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(10), atol=1e-5)


def test_randomized_keeps_the_energy_of_a_slow_spectrum(rng):
    # S_i = i^-1/2, slower than that of pretrained kernels.
    left, _ = np.linalg.qr(rng.standard_normal((300, 300)))
    right, _ = np.linalg.qr(rng.standard_normal((400, 300)))
    s = np.arange(1, 301) ** -0.5
    w = ((left * s) @ right.T).astype("float32")
    found = decompose(w, 32, "randomized")
    energy = np.sum((found.left @ w) ** 2)
    assert energy >= 0.99 * np.sum(s[:32] ** 2)


def test_auto_is_randomized_where_few_of_many_are_wanted(monkeypatch, rng):
    from keras_srlora import _decomposition

    called = []
    original = _decomposition._randomized_svd
    monkeypatch.setattr(
        _decomposition,
        "_randomized_svd",
        lambda *args: called.append(1) or original(*args),
    )
    decompose(matrix("gaussian", 200, 200, rng), 8)
    assert called
    decompose(matrix("gaussian", 30, 30, rng), 8)
    assert len(called) == 1


def test_left_vectors_have_a_positive_largest_entry(rng):
    found = decompose(matrix("gaussian", 20, 30, rng), 20)
    largest = np.argmax(np.abs(found.left), axis=1)
    assert (found.left[np.arange(20), largest] > 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes_are_decomposed_in_float32(dtype, rng):
    if dtype == "float64" and keras.backend.backend() == "jax":
        pytest.skip("JAX has no float64 unless it is switched on")
    w = ops.cast(matrix("gaussian", 20, 12, rng), dtype)
    found = decompose(w, 5)
    assert {x.dtype for x in found} == {np.dtype("float32")}
    rounded = np.array(ops.convert_to_numpy(ops.cast(w, "float32")))
    expected = np.linalg.svd(rounded, compute_uv=False)[:5]
    np.testing.assert_allclose(found.singular_values, expected, rtol=1e-5)


def test_decomposition_is_deterministic(rng):
    w = matrix("gaussian", 300, 200, rng)
    first, second = (decompose(w, 8, "randomized") for _ in range(2))
    for x, y in zip(first, second):
        np.testing.assert_array_equal(x, y)
