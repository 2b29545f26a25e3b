"""The choices of a recipe, each by itself; functions of one's own."""

import json

import keras
import numpy as np
import pytest
from support import dense_layer
from support import effective
from support import frozen_kernel
from support import regression_data
from support import two_layer_model

import keras_srlora
from keras_srlora import Recipe
from keras_srlora import RecompositionCallback
from keras_srlora.layers import pairs
from keras_srlora.recipes import choices
from keras_srlora.recipes.choices import Pairs
from keras_srlora.recipes.definition import RECIPES
from keras_srlora.recipes.definition import get_recipe
from keras_srlora.recipes.gate import FlatLoss

RESTARTS = RECIPES["lora_restarts"]


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
        "turns": 1,
        "fusion_ratio": 0.5,
        "steps_per_pair": 1,
        "predictions_per_pair": 1,
        "pair_life": 0.0,
        "lives_per_run": 1,
        "predictions_per_slot": 1,
        "epochs_per_pair": None,
        "reuse_directions": False,
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


# Where a recipe is said.


def test_a_layer_keeps_its_recipe_in_its_config():
    recipe = Recipe(order="random", stop=0.8)
    layer = keras_srlora.SRLoRADense(4, rank=2, recipe=recipe)
    clone = keras_srlora.SRLoRADense.from_config(layer.get_config())
    assert clone.recipe == recipe


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="`recipe` must be one of.*'paper'"):
        keras_srlora.SRLoRADense(4, recipe="best")


# Functions of one's own.


@keras.saving.register_keras_serializable("test_choices")
def most_important(pairs, count):
    return np.sort(np.argsort(-pairs.scores, kind="stable")[:count])


@keras.saving.register_keras_serializable("test_choices")
def half_as_long(singular_values, tolerance, scale):
    scale_a, scale_b = choices.as_lora(singular_values, tolerance, scale)
    return scale_a / 2, scale_b


@keras.saving.register_keras_serializable("test_choices")
def halve(kind, values):
    return values / 2


@keras.saving.register_keras_serializable("test_choices")
def every_third(steps, recompositions):
    return 3.0


@keras.saving.register_keras_serializable("test_choices")
def length_of_b(evidence):
    return keras.ops.norm(keras.ops.cast(evidence.b, "float32"), axis=1)


@keras.saving.register_keras_serializable("test_choices")
def smallest_singular_value(singular_values, unused, count):
    return unused[np.argsort(singular_values[unused], kind="stable")[:count]]


@keras.saving.register_keras_serializable("test_choices")
class NeverOpen(FlatLoss):
    """A gate with another name."""


OWN = {
    "start": half_as_long,
    "score": length_of_b,
    "selection": most_important,
    "order": smallest_singular_value,
    "scale": half_as_long,
    "slots": halve,
    "schedule": every_third,
    "gate": NeverOpen,
}


def test_shared_second_moments_are_the_mean_of_the_layers_pairs():
    values = np.arange(12.0, dtype="float32").reshape(3, 4)
    treat = Recipe(slots="shared").treat_slots
    shared = keras.ops.convert_to_numpy(treat("second_moment", values))
    np.testing.assert_allclose(shared, [values.mean(axis=0)] * 3)
    assert not np.any(keras.ops.convert_to_numpy(treat("first_moment", values)))
    # So does an optimizer whose steps cannot be scaled.
    treat = Recipe(slots="fast_start").treat_slots
    for corrected, expected in ((False, shared), (True, 0.0 * shared)):
        found = treat("second_moment", values, corrected=corrected)
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(found), expected
        )


def test_every_choice_may_be_a_registered_function():
    assert OWN.keys() == choices.TABLES.keys()
    recipe = Recipe(**OWN)
    document = json.loads(json.dumps(recipe.to_dict()))
    assert document["selection"] == "test_choices>most_important"
    again = get_recipe(document)
    assert again == recipe
    # It is called, not only named.
    pairs = Pairs(np.array([1.0, 3.0, 2.0]), np.zeros(3))
    np.testing.assert_array_equal(again.select_pairs(pairs, 2), [1, 2])
    values, unused = np.array([3.0, 2.0, 1.0]), np.array([0, 1, 2])
    np.testing.assert_array_equal(
        again.select_directions(values, unused, 1), [2]
    )
    assert again.treat_slots("first_moment", 4.0) == 2.0
    assert again.choose_interval(100, 5) == 3.0
    assert again.gate_class is NeverOpen
    lengths = np.full(1, choices.A_LENGTH / 2)
    for scales in (again.scale_first, again.scale_restarted):
        np.testing.assert_array_equal(scales(values[:1], 0.0, 1.0)[0], lengths)
    assert not again.starts_as_lora and again.subtracts


def test_a_function_of_a_table_is_saved_as_its_string():
    recipe = Recipe(
        selection=choices.oldest, gate=FlatLoss, scale=choices.as_lora
    )
    assert recipe == Recipe(
        selection="oldest", gate="flat_loss", scale="as_lora"
    )


def test_a_function_that_is_not_registered_is_refused():
    def mine(pairs, count):
        return np.arange(count)

    for function in (mine, lambda pairs, count: np.arange(count)):
        with pytest.raises(ValueError, match="register_keras_serializable"):
            Recipe(selection=function)


def test_a_name_of_a_function_that_this_process_lacks_is_refused():
    with pytest.raises(ValueError, match="`selection` must be.*nobody>knows"):
        Recipe(selection="nobody>knows")


def test_a_function_in_the_recipe_of_a_saved_model(rng, tmp_path):
    """By name in the `.keras` file, and in use after it."""
    recipe = Recipe(selection=most_important, order=smallest_singular_value)
    model = two_layer_model(rng, rank=2, target_rank=12, recipe=recipe)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.compile("adam", "mse")
    assert loaded.get_layer("hidden").recipe == recipe
    callback = RecompositionCallback(interval=5)
    loaded.fit(
        *regression_data(rng), batch_size=8, verbose=0, callbacks=[callback]
    )
    (event,) = callback.events
    assert event.directions == (11,)
    assert event.slots == (int(np.argmax(event.importance)),)


def test_magnitude_equals_numpy(rng):
    """The Frobenius norm of each pair's product."""
    layer = dense_layer(
        rng.standard_normal((9, 7)).astype("float32"),
        rank=3,
        recipe=Recipe(score="magnitude"),
    )
    for factor in layer.factors:
        factor.assign(rng.standard_normal(factor.shape))
    a, b = pairs.factors_to_numpy(layer)
    expected = [np.linalg.norm(np.outer(x, y)) for x, y in zip(a, b)]
    (scores,) = keras_srlora.Sensitivity([layer]).importance()
    assert scores.dtype == "float32"
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_magnitude_of_a_pair_that_is_zero_is_zero(dtype, rng):
    layer = dense_layer(
        rng.standard_normal((9, 7)).astype("float32"),
        rank=3,
        recipe=Recipe(start="lora", score="magnitude"),
        dtype=dtype,
    )
    (scores,) = keras_srlora.Sensitivity([layer]).importance()
    np.testing.assert_array_equal(scores, np.zeros(3, "float32"))
