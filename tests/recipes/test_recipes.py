"""The choices of a recipe: each by itself, and in a run."""

import dataclasses

import keras
import numpy as np
import pytest
from support import dense_layer
from support import effective
from support import frozen_kernel
from support import regression_data
from support import to_numpy
from support import two_layer_model

import keras_srlora
from keras_srlora import Recipe
from keras_srlora import RecompositionCallback
from keras_srlora.layers import pairs
from keras_srlora.recipes import choices
from keras_srlora.recipes.choices import Pairs
from keras_srlora.recipes.definition import RECIPES

RESTARTS = RECIPES["lora_restarts"]


def run(rng, recipe, callback=None, epochs=3, **kwargs):
    """24 steps; returns the callback and the layer."""
    model = two_layer_model(rng, target_rank=12, recipe=recipe, **kwargs)
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    callback = callback or RecompositionCallback()
    x, y = regression_data(rng)
    model.fit(
        x, y, batch_size=8, epochs=epochs, verbose=0, callbacks=[callback]
    )
    return callback, model.get_layer("hidden")


# Each choice.


def test_the_published_recipe_is_one_argument_away():
    layer = keras_srlora.SRLoRADense(4, recipe="paper")
    assert RECIPES["paper"] == Recipe() == layer.recipe
    assert keras_srlora.SRLoRADense(4).recipe == RECIPES["adaptive"]
    assert Recipe().to_dict() == {
        "start": "pissa",
        "score": "sensitivity",
        "selection": "least_important",
        "order": "largest_singular_value",
        "scale": "sqrt_singular_value",
        "slots": "zero_first_moments",
        "schedule": "evenly",
        "gate": "none",
        "fusion_ratio": 0.5,
        "steps_per_pair": 1,
        "stop": 1.0,
        "beta1": 0.85,
        "beta2": 0.85,
    }


@pytest.mark.parametrize(
    ("scores", "started", "expected"),
    [
        ([4, 3, 2, 1], [0, 0, 0, 0], [2, 3]),  # of equals, the least important
        ([1, 2, 3, 4], [5, 5, 0, 0], [2, 3]),
        ([1, 2, 3, 4], [5, 0, 5, 9], [0, 1]),
    ],
)
def test_the_oldest_pairs_are_fused_first(scores, started, expected):
    pairs = Pairs(np.array(scores, float), np.array(started))
    np.testing.assert_array_equal(choices.oldest(pairs, 2), expected)


def test_random_directions_are_unused_ones_and_the_same_each_time():
    values, unused = np.arange(10.0), np.array([1, 4, 5, 8, 9])
    taken = choices.random_direction(values, unused, 3)
    assert len(set(taken)) == 3 and set(taken) <= set(unused)
    np.testing.assert_array_equal(
        taken, choices.random_direction(values, unused, 3)
    )


def test_a_restart_as_lora_subtracts_nothing(rng):
    w = rng.standard_normal((20, 15)).astype("float32")
    layer = dense_layer(w, rank=4, lora_alpha=2, recipe=RESTARTS)
    for factor in layer.factors:
        factor.assign(rng.standard_normal(factor.shape))
    a, b = pairs.factors_to_numpy(layer)
    before, slots = effective(layer), np.array([1, 2])
    drift = pairs.fuse_and_restart(
        layer,
        slots,
        np.array([0, 3]),
        np.ones(2),
        layer.recipe.scale_restarted,
        step=7,
    )
    u, _, _ = np.linalg.svd(w)
    new_a, new_b = pairs.factors_to_numpy(layer)
    # The sign of a singular direction is free.
    aligned = np.abs(np.sum(new_a[slots] * u[:, [0, 3]].T, axis=1))
    np.testing.assert_allclose(aligned, 2**0.5, rtol=1e-5)
    np.testing.assert_array_equal(new_b[slots], 0)
    fused = 0.5 * a[slots].T @ b[slots]
    np.testing.assert_allclose(
        frozen_kernel(layer), w + fused, rtol=1e-5, atol=1e-5
    )
    # Rounding of float32 numbers.
    assert drift <= 1e-6
    np.testing.assert_allclose(effective(layer), before, atol=1e-5)


def test_the_length_of_a_is_that_of_the_random_start():
    layer = keras_srlora.SRLoRADense(8, rank=8, recipe=RESTARTS)
    layer.build((None, 4000))
    a, _ = pairs.factors_to_numpy(layer)
    lengths = np.linalg.norm(a, axis=1)
    # The mean of 4,000 squares: two percent off is five standard deviations.
    np.testing.assert_allclose(lengths, choices.A_LENGTH, rtol=0.02)


@pytest.mark.parametrize(
    "choice",
    [
        {"start": "ones"},
        {"score": "gradient"},
        {"selection": "best"},
        {"order": "smallest"},
        {"scale": 2.0},
        {"slots": "halve"},
        {"schedule": None},
        {"fusion_ratio": 0},
        {"fusion_ratio": 1.5},
        {"stop": 0},
        {"stop": 2},
        {"steps_per_pair": 0},
        {"steps_per_pair": 1.5},
        {"beta1": 1},
        {"beta2": -0.1},
    ],
)
def test_an_unknown_choice_is_refused(choice):
    (name,) = choice
    with pytest.raises(ValueError, match=f"`{name}` must be.*Received: {name}"):
        Recipe(**choice)


# In a run.


def test_nothing_is_recomposed_after_the_stop(rng):
    recipe = dataclasses.replace(RESTARTS, steps_per_pair=1)
    callback, layer = run(rng, recipe)
    # 12 steps for 12 / 2 = 6 recompositions; the last would be at the stop.
    assert [event.step for event in callback.events] == [2, 4, 6, 8, 10]
    assert layer.record.used.sum() == 10
    assert max(event.drift for event in callback.events) <= 1e-5


def test_a_pair_gets_its_steps(rng):
    recipe = Recipe(start="lora", selection="oldest", steps_per_pair=12)
    callback, layer = run(rng, recipe)
    # Half of the pairs at a time, so a pair is 12 steps old when it is fused.
    assert [event.step for event in callback.events] == [6, 12, 18]
    first, second, third = (set(event.slots) for event in callback.events)
    assert first == third and first.isdisjoint(second)


def test_a_run_too_short_for_a_recomposition_is_lora(rng):
    with pytest.warns(UserWarning, match="Nothing will be recomposed"):
        callback, _ = run(rng, "lora_restarts")
    assert not callback.events


def test_moments_of_a_restarted_pair_start_from_zero(rng):
    model = two_layer_model(rng, target_rank=12, recipe=RESTARTS)
    keras_srlora.initialize_factors(model)
    optimizer = keras.optimizers.Adam(1e-2)
    model.compile(optimizer, "mse")
    model.fit(*regression_data(rng), batch_size=8, verbose=0)
    layer = model.get_layer("hidden")
    sensitivity = keras_srlora.Sensitivity([layer])
    for variable in sensitivity.variables:
        variable.assign(np.ones(variable.shape))
    (event,) = keras_srlora.recompose(sensitivity, optimizer, step=5)
    moments = [
        to_numpy(v) for v in optimizer.variables if "lora_kernel" in v.path
    ]
    assert len(moments) == 4
    for moment in moments:
        np.testing.assert_array_equal(moment[list(event.slots)], 0)
        assert np.abs(moment).max() > 0


# Where a recipe is said.


def test_a_layer_keeps_its_recipe_in_its_config():
    recipe = Recipe(order="random", stop=0.8)
    layer = keras_srlora.SRLoRADense(4, rank=2, recipe=recipe)
    clone = keras_srlora.SRLoRADense.from_config(layer.get_config())
    assert clone.recipe == recipe


def test_a_callbacks_recipe_leaves_that_of_the_layers(rng):
    recipe = Recipe(slots="keep")
    callback = RecompositionCallback(recipe=recipe, fusion_ratio=0.25)
    callback, layer = run(rng, "paper", callback)
    expected = dataclasses.replace(recipe, fusion_ratio=0.25)
    assert callback.recipe == expected and layer.recipe == Recipe()
    assert all(len(event.slots) == 1 for event in callback.events)
    assert callback.events


def test_a_callback_follows_each_model_that_it_is_used_on(rng):
    callback = RecompositionCallback()
    for recipe in (Recipe(), Recipe(start="lora", selection="oldest")):
        _, layer = run(rng, recipe, callback)
        assert layer.recipe == callback.recipe == recipe
        assert callback.events


def test_layers_that_started_otherwise_are_refused(rng):
    model = two_layer_model(rng, recipe="lora_restarts")
    keras_srlora.initialize_factors(model)
    model.compile("adam", "mse")
    kernel = frozen_kernel(model.get_layer("hidden"))
    with pytest.raises(ValueError, match="'hidden' started already.*'lora'"):
        model.fit(
            *regression_data(rng),
            verbose=0,
            callbacks=[RecompositionCallback(recipe="paper")],
        )
    np.testing.assert_array_equal(
        kernel, frozen_kernel(model.get_layer("hidden"))
    )
    assert model.get_layer("hidden").recipe == RESTARTS


def test_layers_of_different_recipes_are_refused(rng):
    inputs = keras.Input((12,))
    x = keras_srlora.SRLoRADense(12, rank=2, name="one")(inputs)
    x = keras_srlora.SRLoRADense(3, rank=2, name="two", recipe=RESTARTS)(x)
    model = keras.Model(inputs, x)
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match="different recipes.*'one'.*'two'"):
        model.fit(
            *regression_data(rng),
            verbose=0,
            callbacks=[RecompositionCallback()],
        )


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="`recipe` must be one of.*'paper'"):
        keras_srlora.SRLoRADense(4, recipe="best")
