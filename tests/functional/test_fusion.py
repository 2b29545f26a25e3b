"""The properties of a recomposition, across shapes, ranks, dtypes, spectra."""

import numpy as np
import pytest
import reference
from keras import ops
from support import KINDS
from support import SHAPES
from support import dense_layer
from support import effective
from support import frozen_kernel
from support import matrix
from support import to_numpy

from keras_srlora.functional.fusion import recompose_pairs
from keras_srlora.functional.fusion import relative_change
from keras_srlora.layers import pairs
from keras_srlora.layers.matching import find_record
from keras_srlora.recipes import choices


def randomize_factors(layer, rng):
    for factor in layer.factors:
        factor.assign(rng.standard_normal(factor.shape) * 0.1)


def recompose_layer(layer, slots, directions, step=7):
    slots = np.array(slots)
    return pairs.fuse_and_restart(
        layer,
        slots,
        np.array(directions),
        np.arange(len(slots), dtype="float32"),
        choices.sqrt_singular_value,
        step,
    )


@pytest.mark.parametrize("scale", [1.0, 0.25, 2.0])
def test_pure_function_equals_numpy(scale, rng):
    w, a, b = (
        rng.standard_normal(s).astype("float32")
        for s in ((9, 14), (9, 4), (4, 14))
    )
    fresh_a, fresh_b = np.zeros_like(a), np.zeros_like(b)
    low = [1, 3]
    fresh_a[:, low] = rng.standard_normal((9, 2))
    fresh_b[low] = rng.standard_normal((2, 14))
    mask = np.isin(np.arange(4), low)[:, None]
    kernel, new_a, new_b = map(
        to_numpy,
        recompose_pairs(
            ops.convert_to_tensor(w),
            ops.convert_to_tensor(a.T.copy()),
            ops.convert_to_tensor(b),
            ops.convert_to_tensor(mask),
            ops.convert_to_tensor(fresh_a.T.copy()),
            ops.convert_to_tensor(fresh_b),
            scale,
        ),
    )
    expected = w + scale * (a[:, low] @ b[low] - fresh_a[:, low] @ fresh_b[low])
    np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(new_a.T, np.where(mask.T, fresh_a, a))
    np.testing.assert_array_equal(new_b, np.where(mask, fresh_b, b))
    before = reference.effective(w, a, b, scale)
    after = reference.effective(kernel, new_a.T, new_b, scale)
    change = np.abs(after - before).max() / np.abs(before).max()
    # Rounding of the same float32 numbers.
    assert change <= 1e-6


def test_relative_change():
    before = np.array([[1.0, -4.0], [0.5, 2.0]], "float32")
    after = before + np.array([[0.0, 0.1], [-0.2, 0.0]], "float32")
    assert relative_change(before, after) == pytest.approx(0.05)
    zero = np.zeros((2, 2), "float32")
    assert relative_change(zero, zero) == 0.0


@pytest.mark.parametrize("decomposition", ["exact", "randomized"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_initialisation_preserves_the_function(shape, kind, decomposition, rng):
    w = matrix(kind, *shape, rng)
    layer = dense_layer(w, rank=min(3, *shape), decomposition=decomposition)
    error = np.abs(effective(layer) - w).max()
    assert error <= 1e-5 * max(np.abs(w).max(), 1e-12)


def test_pissa_start_holds_the_leading_directions(rng):
    w = matrix("gaussian", 20, 15, rng)
    layer = dense_layer(w, rank=4, lora_alpha=2)
    u, s, vt = np.linalg.svd(w.astype("float64"), full_matrices=False)
    a, b = pairs.factors_to_numpy(layer)
    # Directions of near singular values mix by eps · S / gap: 1e-4.
    np.testing.assert_allclose(
        layer.scale * a.T @ b, (u[:, :4] * s[:4]) @ vt[:4], atol=1e-4
    )
    # Balanced: √S/√s on either side.
    norms = np.sqrt(s[:4] / layer.scale)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), norms, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(b, axis=1), norms, rtol=1e-5)
    # The kernel keeps the rest.
    np.testing.assert_allclose(
        frozen_kernel(layer), (u[:, 4:] * s[4:]) @ vt[4:], atol=1e-4
    )


def test_lora_start_leaves_kernel_and_directions(rng):
    w = matrix("gaussian", 20, 15, rng)
    layer = dense_layer(w, rank=4, recipe="lora_restarts")
    np.testing.assert_array_equal(frozen_kernel(layer), w)
    a, b = pairs.factors_to_numpy(layer)
    assert np.abs(a).max() > 0 and np.abs(b).max() == 0
    assert len(layer.record.unused) == 15


@pytest.mark.parametrize("lora_alpha", [None, 1, 16])
@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(12, 12), (7, 30), (200, 6)])
def test_recomposition_preserves_the_function(
    shape, kind, rank, lora_alpha, rng
):
    layer = dense_layer(
        matrix(kind, *shape, rng), rank=rank, lora_alpha=lora_alpha
    )
    randomize_factors(layer, rng)
    before = effective(layer)
    drift = recompose_layer(layer, [rank - 1], [rank])
    error = np.abs(effective(layer) - before).max() / np.abs(before).max()
    assert drift <= 1e-5 and error <= 1e-5


def test_pairs_that_stay_are_equal_to_the_bit(rng):
    layer = dense_layer(matrix("gaussian", 12, 9, rng), rank=5)
    randomize_factors(layer, rng)
    before = pairs.factors_to_numpy(layer)
    recompose_layer(layer, [0, 3], [5, 6])
    after = pairs.factors_to_numpy(layer)
    for old, new in zip(before, after):
        np.testing.assert_array_equal(old[[1, 2, 4]], new[[1, 2, 4]])
        assert (old[[0, 3]] != new[[0, 3]]).any(axis=1).all()


def test_restarted_pairs_lie_along_the_unused_directions(rng):
    w = matrix("gaussian", 12, 9, rng)
    layer = dense_layer(w, rank=3)
    randomize_factors(layer, rng)
    recompose_layer(layer, [0, 2], [3, 4])
    u, s, vt = np.linalg.svd(w.astype("float64"))
    a, b = pairs.factors_to_numpy(layer)
    for slot, direction in ((0, 3), (2, 4)):
        np.testing.assert_allclose(
            np.outer(a[slot], b[slot]),
            s[direction] * np.outer(u[:, direction], vt[direction]),
            atol=1e-4,
        )


@pytest.mark.parametrize("kind", ["zero", "rank_deficient"])
def test_a_null_direction_starts_a_pair_that_can_learn(kind, rng):
    # √0 in both factors would have no gradient, for ever.
    layer = dense_layer(matrix(kind, 12, 12, rng), rank=8)
    a, b = pairs.factors_to_numpy(layer)
    assert (np.linalg.norm(a, axis=1) > 1e-3).all()
    assert (np.linalg.norm(b, axis=1)[-1]) == 0


def test_what_was_fused_is_remembered_as_factors(rng):
    w = matrix("gaussian", 12, 9, rng)
    layer = dense_layer(w, rank=3, lora_alpha=6)
    for step, directions in enumerate(([3, 4], [5, 6], [7, 8])):
        randomize_factors(layer, rng)
        recompose_layer(layer, [0, 2], directions, step)
    state = layer.record
    assert state.fused_a.shape == (6, 12) and state.fused_b.shape == (6, 9)
    found = state.directions
    pretrained = (
        frozen_kernel(layer)
        + (found.left.T * state.anchors) @ found.right
        - layer.scale * state.fused_a.T @ state.fused_b
    )
    np.testing.assert_allclose(pretrained, w, atol=1e-5)
    np.testing.assert_array_equal(state.slot_direction, [7, 1, 8])
    np.testing.assert_array_equal(state.slot_started, [3, 0, 3])
    assert state.used.all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_weights_move_by_their_rounding_alone(dtype, rng):
    w = matrix("gaussian", 24, 24, rng)
    layer = dense_layer(w, rank=4, dtype=dtype)
    randomize_factors(layer, rng)
    before = effective(layer)
    drift = recompose_layer(layer, [0, 1], [4, 5])
    # Half a unit in the last place of the largest entry: 8 and 11 bits.
    unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    assert drift <= unit
    error = np.abs(effective(layer) - before).max() / np.abs(before).max()
    assert error <= unit


def test_a_changed_kernel_is_noticed(rng):
    layer = dense_layer(matrix("gaussian", 12, 9, rng), rank=3)
    randomize_factors(layer, rng)
    recompose_layer(layer, [0, 2], [3, 4])
    assert find_record(layer) == 2
    layer.frozen.variable.assign(matrix("gaussian", 12, 9, rng))
    with pytest.raises(ValueError, match="not the one whose directions"):
        find_record(layer)
