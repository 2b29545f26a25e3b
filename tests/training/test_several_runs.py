"""Runs that follow each other on the same layers."""

import keras
import numpy as np
import pytest
from support import effective
from support import frozen_kernel
from support import regression_data

import keras_srlora
from keras_srlora import Recipe
from keras_srlora import RecompositionCallback
from keras_srlora.backend import devices
from keras_srlora.recipes.definition import RECIPES

RANK = 4
# One pair at a time, the oldest.
ONE_BY_ONE = Recipe(
    **{
        **RECIPES["lora_restarts"].to_dict(),
        "fusion_ratio": 1 / RANK,
        "reuse_directions": True,
        "stop": 1.0,
    }
)


def new_model():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((12,))
    x = keras.layers.Dense(16, activation="tanh", name="hidden")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    keras_srlora.enable_srlora(
        model, RANK, target_layer_names=["hidden"], recipe=ONE_BY_ONE
    )
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def run(model, interval=3):
    """8 steps; the slots that were fused."""
    callback = RecompositionCallback(interval=interval)
    data = regression_data(np.random.default_rng(0))
    model.fit(*data, batch_size=8, verbose=0, callbacks=[callback])
    steps = [event.step for event in callback.events]
    assert steps == list(range(interval, 8, interval))
    return [slot for event in callback.events for slot in event.slots]


def test_the_oldest_pairs_are_fused_first_through_all_runs():
    model = new_model()
    slots = [slot for _ in range(4) for slot in run(model)]
    # All of them in the first round, and in the same order in each.
    first = slots[:RANK]
    assert sorted(first) == list(range(RANK))
    assert slots == first * (len(slots) // RANK)


def test_the_age_of_pairs_is_saved(tmp_path):
    model, loaded = new_model(), new_model()
    slots = run(model)
    model.save_weights(tmp_path / "m.weights.h5")
    loaded.optimizer.build(loaded.trainable_variables)
    loaded.load_weights(tmp_path / "m.weights.h5")
    path = tmp_path / "m.safetensors"
    keras_srlora.save_adapter(model, path, include_trainable=True)
    other = new_model()
    keras_srlora.load_adapter(other, path)
    for model in (loaded, other):
        assert sorted(slots + run(model)) == list(range(RANK))


def test_weights_from_between_two_runs_are_found(tmp_path):
    # The last recomposition of a run and the next one are at the same step.
    model = new_model()
    run(model)
    between = model.get_weights()
    expected = effective(model.get_layer("hidden"))
    run(model, interval=6)
    model.set_weights(between)
    with pytest.warns(UserWarning, match="weights of an earlier step"):
        path = tmp_path / "m.safetensors"
        keras_srlora.save_adapter(model, path, include_trainable=True)
    other = new_model()
    keras_srlora.load_adapter(other, path)
    # The kernel was computed in another order.
    np.testing.assert_allclose(
        effective(other.get_layer("hidden")), expected, atol=1e-6
    )


def test_a_measurement_that_fails_leaves_kernel_and_record_together(
    monkeypatch,
):
    model = new_model()
    run(model)
    layer = model.get_layer("hidden")

    def out_of_memory(*args):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(
            "keras_srlora.layers.pairs.relative_change", out_of_memory
        )
        with pytest.raises(MemoryError):
            run(model)
    assert len(layer.record.events) == len(layer.record.fused_a)
    run(model)
    keras_srlora.unload_srlora(model)
    np.testing.assert_allclose(
        model.get_layer("hidden").get_weights()[0],
        frozen_kernel(new_model().get_layer("hidden")),
        atol=1e-6,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_remainder_that_cannot_be_kept_changes_nothing(dtype, monkeypatch):
    keras.utils.set_random_seed(0)
    layer = keras_srlora.SRLoRADense(6, rank=2, recipe=ONE_BY_ONE, dtype=dtype)
    layer.build((None, 5))
    layer.initialize_factors()
    layer.factors[1].assign(np.ones((2, 6)))
    before = layer.get_weights()
    to_numpy = devices.to_numpy

    def out_of_memory(tensor):
        if tuple(tensor.shape) == (5, 6):
            raise MemoryError
        return to_numpy(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(devices, "to_numpy", out_of_memory)
        with pytest.raises(MemoryError):
            keras_srlora.layers.pairs.fuse_and_restart(
                layer,
                np.array([0]),
                np.array([0]),
                np.ones(1),
                ONE_BY_ONE.scale_restarted,
                1,
            )
    for value, expected in zip(layer.get_weights(), before):
        np.testing.assert_array_equal(value, expected)
    assert not len(layer.record.fused_a)
