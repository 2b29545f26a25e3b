"""Recipes in `fit`."""

import dataclasses

import keras
import numpy as np
import pytest
from support import effective
from support import frozen_kernel
from support import regression_data
from support import to_numpy
from support import two_layer_model

import keras_srlora
from keras_srlora import Recipe
from keras_srlora import RecompositionCallback
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
    with pytest.warns(UserWarning, match="Nothing will be recomposed"):
        model.fit(
            *regression_data(rng),
            verbose=0,
            callbacks=[RecompositionCallback()],
        )
    kernel = frozen_kernel(model.get_layer("hidden"))
    with pytest.raises(ValueError, match="already.*as LoRA's.*'pissa'"):
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


@pytest.mark.parametrize("started", ["paper", "lora_restarts"])
def test_untrained_pairs_start_as_the_recipe_of_the_run_says(started, rng):
    """The function stays, and the kernel is the pretrained one's again."""
    lora = Recipe(start="lora", scale="as_lora")
    other = {"paper": lora, "lora_restarts": Recipe()}[started]
    model = two_layer_model(rng, recipe=started)
    layer = model.get_layer("hidden")
    pretrained = frozen_kernel(layer)
    keras_srlora.initialize_factors(model)
    model.compile("adam", "mse")
    seen = {}

    class Look(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model  # noqa: B018
            if not seen:
                seen.update(
                    lora=layer.record.starts_as_lora,
                    effective=effective(layer),
                    kernel=frozen_kernel(layer),
                )

    model.fit(
        *regression_data(rng),
        batch_size=8,
        verbose=0,
        callbacks=[RecompositionCallback(interval=7, recipe=other), Look()],
    )
    assert seen["lora"] is (started == "paper")
    np.testing.assert_allclose(seen["effective"], pretrained, atol=1e-5)
    left = np.abs(seen["kernel"] - pretrained).max()
    assert left <= 1e-5 if started == "paper" else left > 0.1
    assert layer.recipe == RECIPES[started]


def test_a_recipe_of_functions_in_a_run(rng):
    """Selection, order, schedule and slots of one's own are what happens."""
    recipe = Recipe(
        start="lora",
        selection=newest,
        order=last_first,
        schedule=every_third_step,
    )
    callback, _ = run(rng, recipe, epochs=2)
    assert [e.step for e in callback.events] == [3, 6, 9, 12, 15]
    assert [e.directions for e in callback.events][:2] == [(11, 10), (9, 8)]
    # The slots that restarted last restart again.
    assert len({e.slots for e in callback.events}) == 1


@keras.saving.register_keras_serializable("test_recipes_in_fit")
def newest(pairs, count):
    order = np.lexsort((np.arange(len(pairs.started)), -pairs.started))
    return np.sort(order[:count])


@keras.saving.register_keras_serializable("test_recipes_in_fit")
def last_first(singular_values, unused, count):
    return unused[::-1][:count]


@keras.saving.register_keras_serializable("test_recipes_in_fit")
def every_third_step(steps, recompositions):
    return 3.0
