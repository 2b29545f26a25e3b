import keras
import numpy as np
import pytest
from keras import ops
from support import KINDS
from support import SHAPES
from support import matrix

from keras_srlora.functional.decomposition import decompose

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


def with_spectrum(s, rng):
    left, _ = np.linalg.qr(rng.standard_normal((300, 300)))
    right, _ = np.linalg.qr(rng.standard_normal((400, 300)))
    return ((left * s) @ right.T).astype("float32")


@pytest.mark.parametrize("tall", [False, True])
def test_randomized_keeps_the_energy_of_a_slow_spectrum(tall, rng):
    # S_i = i^-1/2, slower than that of pretrained kernels.
    s = np.arange(1, 301) ** -0.5
    w = with_spectrum(s, rng)
    w = w.T if tall else w
    found = decompose(w, 32, "randomized")
    for energy in (
        np.sum((found.left @ w) ** 2),
        np.sum((found.right @ w.T) ** 2),
    ):
        assert energy >= 0.99 * np.sum(s[:32] ** 2)


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("tall", [False, True])
def test_left_vectors_are_mapped_to_the_right_ones(tall, method, rng):
    """To rounding: `find_record` tells kernels apart by it."""
    w = with_spectrum(np.arange(1, 301) ** -0.1, rng)
    w = w.T if tall else w
    found = decompose(w, 32, method)
    np.testing.assert_allclose(
        found.left @ w,
        found.singular_values[:, None] * found.right,
        atol=TOLERANCE,
    )


def test_randomized_finds_the_small_directions_of_a_steep_spectrum(rng):
    # From 1 to 1e-3 over the 32 directions; a cubed amplification of the first
    # would drown the last in the rounding errors of float32.
    s = 10 ** (-np.arange(300) * 3 / 31)
    w = with_spectrum(s, rng)
    found = decompose(w, 32, "randomized")
    np.testing.assert_allclose(found.singular_values, s[:32], rtol=1e-2)


@pytest.mark.parametrize("unit", [1e-25, 1e-12, 1e12])
def test_randomized_does_not_depend_on_the_unit(unit, rng):
    # In float32, 1e-25 squared is zero.
    w = with_spectrum(np.arange(1, 301) ** -0.5, rng)
    expected = decompose(w, 32, "randomized").singular_values
    found = decompose((w * unit).astype("float32"), 32, "randomized")
    np.testing.assert_allclose(
        found.singular_values / unit, expected, rtol=1e-4
    )


def test_auto_is_randomized_where_few_of_many_are_wanted(monkeypatch, rng):
    from keras_srlora.functional import decomposition

    called = []
    original = decomposition._randomized_svd
    monkeypatch.setattr(
        decomposition,
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
