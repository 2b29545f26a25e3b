"""Kernels and factors of every precision that Keras has."""

import keras
import numpy as np
import pytest
from support import dense_layer
from support import matrix
from support import regression_data
from support import state_arrays
from support import to_numpy
from support import two_layer_model

import keras_srlora
from keras_srlora.layers import pairs
from keras_srlora.recipes.definition import RECIPES

BACKEND = keras.backend.backend()
ROUNDOFF = {"bfloat16": 2.0**-9, "float16": 2.0**-12}


@pytest.fixture
def policy(request):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


POLICIES = pytest.mark.parametrize(
    "policy",
    [
        pytest.param(
            "mixed_float16",
            marks=pytest.mark.skipif(
                BACKEND == "jax", reason="no float16 product on a CPU"
            ),
        ),
        "mixed_bfloat16",
        "bfloat16",
        pytest.param(
            "float64",
            marks=pytest.mark.skipif(
                BACKEND == "jax", reason="JAX has no float64 by default"
            ),
        ),
    ],
    indirect=True,
)


def stored(layer):
    return np.float64(
        to_numpy(keras.ops.cast(layer.frozen.variable, "float32"))
    )


def product(layer):
    a, b = (np.float64(x) for x in pairs.factors_to_numpy(layer))
    return layer.scale * a.T @ b


def small_recompositions(layer, steps):
    """Moves pairs by less than the kernel's rounding, and fuses them.

    Returns what all moves add up to, in float64.
    """
    update = 0.0
    for step in steps:
        before = product(layer)
        b = layer.lora_kernel_b
        # A whole direction, the same each time: nothing cancels.
        moved = keras.ops.cast(b, "float32") + 2e-3
        b.assign(keras.ops.cast(moved, b.dtype))
        update = update + product(layer) - before
        slots = np.array([step % layer.rank])
        unused = layer.record.unused[:1]
        pairs.fuse_and_restart(
            layer,
            slots,
            unused,
            np.ones(1),
            RECIPES["paper"].scale_restarted,
            step,
        )
    return update


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_small_fused_pairs_are_not_lost_to_rounding(dtype, rng):
    """20 recompositions are as exact as one.

    The error against a float64 account stays within one rounding of the stored
    kernel, though each fused pair moves it by less than that; the first
    recomposition alone may be as far off.
    """
    w = matrix("gaussian", 48, 40, rng)
    layer = dense_layer(w, rank=4, target_rank=40, dtype=dtype)
    start = stored(layer) + product(layer)
    # What initialisation rounded is part of the account.
    start = start + layer.frozen.remainder
    update = small_recompositions(layer, range(20))
    error = stored(layer) + product(layer) - (start + update)
    # Half a unit in the last place, which is at most twice the roundoff of the
    # largest entry of the stored kernel.
    bound = 2 * ROUNDOFF[dtype] * np.abs(stored(layer)).max()
    assert np.abs(error).max() <= bound
    # Without rounding, what is remembered is the account to float32.
    exact = error + layer.frozen.remainder
    assert np.abs(exact).max() <= 1e-5
    # On the average, the same number tells a coherent loss from rounding.
    lost = np.sum(error * update) / np.sum(update**2)
    assert abs(lost) <= 0.02


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_was_rounded_off_is_saved(dtype, rng, tmp_path):
    """A run that goes on from a file is the uninterrupted one to the bit."""

    def model():
        keras.utils.set_random_seed(3)
        layer = keras_srlora.SRLoRADense(
            20,
            rank=2,
            target_rank=20,
            recipe="paper",
            dtype=dtype,
            train_bias=False,
        )
        built = keras.Sequential([keras.Input((24,), dtype=dtype), layer])
        return built, layer

    whole, layer = model()
    keras_srlora.initialize_factors(whole)
    small_recompositions(layer, range(6))
    whole.save_weights(tmp_path / "middle.weights.h5")
    resumed, other = model()
    resumed.load_weights(tmp_path / "middle.weights.h5")
    for each in (layer, other):
        small_recompositions(each, range(6, 12))
    np.testing.assert_array_equal(stored(layer), stored(other))
    np.testing.assert_array_equal(
        layer.frozen.remainder, other.frozen.remainder
    )
    # And the pretrained kernel comes back, disabled and enabled.
    kept = layer.frozen.remainder
    with keras_srlora.adapter_disabled(whole):
        pretrained = stored(layer)
    np.testing.assert_array_equal(layer.frozen.remainder, kept)
    keras.utils.set_random_seed(3)
    plain = keras_srlora.SRLoRADense(20, rank=2, dtype=dtype)
    plain.build((None, 24))
    error = np.abs(pretrained - stored(plain)).max()
    # The directions are exact, the factors along them were rounded, too.
    assert error <= 4 * ROUNDOFF[dtype] * np.abs(stored(plain)).max()


def test_a_float32_kernel_has_no_remainder(rng):
    layer = dense_layer(matrix("gaussian", 12, 9, rng), rank=3)
    assert layer.frozen.remainder is None
    assert "remainder" not in state_arrays(layer)


@pytest.mark.skipif(BACKEND == "jax", reason="JAX has no float64 by default")
def test_a_float64_kernel_keeps_its_bits(rng):
    """Fusing adds a float32 matrix; what it adds to is not rounded."""
    w = rng.standard_normal((16, 12))
    layer = keras_srlora.SRLoRADense(
        12, rank=2, target_rank=8, recipe="paper", dtype="float64"
    )
    layer.build((None, 16))
    layer.frozen.variable.assign(w)
    layer.initialize_factors()
    for step in range(3):
        pairs.fuse_and_restart(
            layer,
            np.array([0]),
            layer.record.unused[:1],
            np.ones(1),
            RECIPES["paper"].scale_restarted,
            step,
        )
    before = to_numpy(layer.effective_kernel())
    assert before.dtype == np.float64
    model = keras.Sequential([keras.Input((16,), dtype="float64"), layer])
    keras_srlora.merge_srlora(model)
    difference = to_numpy(layer.kernel) - w
    # The product of factors is computed in float32.
    np.testing.assert_allclose(difference, 0.0, atol=2e-6)
    # A kernel rounded to float32 would be one of float32's numbers.
    assert (np.float64(np.float32(to_numpy(layer.kernel))) != before).mean() > (
        0.9
    )


@POLICIES
def test_fit_recomposes_and_merges(policy, rng):
    keras.utils.set_random_seed(0)
    model = two_layer_model(rng, rank=2, target_rank=12)
    layer = model.layers[1]
    x, y = regression_data(rng)
    # The default of 0.999 is 1 in bfloat16.
    model.compile(keras.optimizers.Adam(0.01, beta_2=0.99), "mse")
    callback = keras_srlora.RecompositionCallback(interval=6)
    losses = model.fit(
        x, y, batch_size=8, epochs=6, verbose=0, callbacks=[callback]
    ).history["loss"]
    assert losses[-1] < losses[0]
    dtype = keras.config.dtype_policy().variable_dtype
    assert {v.dtype for v in layer.factors} == {dtype}
    assert len(callback.events) >= 3
    unit = ROUNDOFF.get(dtype, 2.0**-24)
    # Each entry is rounded to its dtype, before and after.
    assert max(record.drift for record in callback.events) <= 4 * unit
    before = to_numpy(keras.ops.cast(model(x), "float32"))
    keras_srlora.merge_srlora(model)
    after = to_numpy(keras.ops.cast(model(x), "float32"))
    compute = keras.config.dtype_policy().compute_dtype
    # Outputs are of size 1, sums of 12 and 16 rounded terms.
    tolerance = 20 * ROUNDOFF.get(compute, 1e-7)
    np.testing.assert_allclose(after, before, atol=tolerance)


@pytest.mark.parametrize("policy", ["bfloat16"], indirect=True)
def test_an_optimizer_that_cannot_move_a_weight_is_said(policy, rng):
    model = two_layer_model(rng, rank=2)
    x, y = regression_data(rng, samples=8)
    layer = model.layers[1]
    keras_srlora.initialize_factors(model)
    before = pairs.factors_to_numpy(layer)
    model.compile("adam", "mse")
    callback = keras_srlora.RecompositionCallback(interval=10)
    with pytest.warns(UserWarning, match="hidden/lora.*beta_2=0.999 is 1"):
        with pytest.warns(UserWarning, match="interval"):
            model.fit(x, y, verbose=0, callbacks=[callback])
    # And it is true.
    for old, new in zip(before, pairs.factors_to_numpy(layer)):
        np.testing.assert_array_equal(old, new)
