"""The default recipe: long lives of pairs, and directions that come again."""

import contextlib

import keras
import numpy as np
import pytest
from support import finite_stream
from support import regression_data

import keras_srlora
from keras_srlora import Recipe
from keras_srlora import RecompositionCallback
from keras_srlora.layers.record import Record
from keras_srlora.recipes.definition import RECIPES
from keras_srlora.training.recomposition import choose_directions


def converted(recipe, rank=2, target_rank=4, accumulation=None):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((12,))
    x = keras.layers.Dense(16, activation="tanh", name="hidden")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    keras_srlora.enable_srlora(
        model,
        rank,
        target_rank=target_rank,
        target_layer_names=["hidden"],
        recipe=recipe,
    )
    adam = keras.optimizers.Adam(gradient_accumulation_steps=accumulation)
    model.compile(adam, "mse")
    return model


def fit(model, callback, epochs):
    """8 steps an epoch."""
    data = regression_data(np.random.default_rng(0))
    model.fit(
        *data, batch_size=8, epochs=epochs, verbose=0, callbacks=[callback]
    )
    return callback.events


def quick(**changes):
    """The default recipe, for a run of some fifty steps."""
    small = {
        "steps_per_pair": 8,
        "predictions_per_pair": 1,
        "lives_per_run": 7,
        "predictions_per_slot": 1,
        "turns": 1,
    }
    return Recipe(**{**RECIPES["adaptive"].to_dict(), **small, **changes})


def test_a_pair_lives_a_part_of_the_run_and_restarts_until_the_stop():
    # 400 steps: a life is 40, two pairs take turns, 0.85 of the run is 340.
    recipe = quick(pair_life=0.1)
    events = fit(converted(recipe), RecompositionCallback(), 50)
    steps = [event.step for event in events]
    assert steps == list(range(20, 340, 20))
    lives = {}
    for event in events:
        (slot,) = event.slots
        lives.setdefault(slot, [0]).append(event.step)
    for begins in lives.values():
        # The first pair of all has half a life: both began at once.
        assert set(np.diff(begins)[1:]) == {40}


def test_a_life_has_a_least_length():
    # 64 steps: a twentieth is 3, below the 8 of the recipe.
    events = fit(converted(quick()), RecompositionCallback(), 8)
    assert [event.step for event in events] == list(range(4, 54, 4))


def test_a_short_run_is_left_alone_and_verbose_says_why(capsys):
    callback = RecompositionCallback(verbose=1)
    assert fit(converted(quick()), callback, 6) == []
    assert (
        "plain LoRA: it has 48 steps, and the recipe needs 7 lifetimes of a "
        "pair, 8 steps each."
    ) in capsys.readouterr().out
    # An interval is obeyed.
    events = fit(converted(quick()), RecompositionCallback(interval=20), 6)
    assert [event.step for event in events] == [20, 40]


def test_steps_of_a_life_are_those_of_the_optimizer(capsys):
    # Two batches make a step: a life of 8 steps has 16 batches.
    model = converted(quick(), accumulation=2)
    events = fit(model, RecompositionCallback(), 16)
    assert [event.step for event in events] == list(range(8, 108, 8))
    model = converted(quick(), accumulation=2)
    assert fit(model, RecompositionCallback(verbose=1), 8) == []
    assert (
        "it has 64 steps, 2 of which make one of the optimizer, and the recipe "
        "needs 7 lifetimes of a pair, 16 steps each."
    ) in capsys.readouterr().out


def test_a_life_has_a_least_number_of_predictions():
    # Batches of 8 with 3 values each: 144 take 6 steps, 192 take 8.
    for predictions, life in ((144, 6), (192, 8)):
        recipe = quick(steps_per_pair=1, predictions_per_pair=predictions)
        events = fit(converted(recipe), RecompositionCallback(), 10)
        assert [e.step for e in events] == list(range(life // 2, 68, life // 2))


def test_a_run_of_few_predictions_is_lora():
    recipe = quick(steps_per_pair=1, predictions_per_pair=192)
    model = converted(recipe)
    # 48 steps of 24 predictions are not seven times 192.
    with pytest.warns(
        UserWarning, match="from 24 .*for 8 steps.*7 lifetimes.*48"
    ):
        assert fit(model, RecompositionCallback(), 6) == []
    lora = converted(Recipe(start="lora"))
    data = regression_data(np.random.default_rng(0))
    lora.fit(*data, batch_size=8, epochs=6, verbose=0)
    for ours, theirs in zip(model.get_weights(), lora.get_weights()):
        # Another compiled step, which may add in another order.
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    # An interval is obeyed here as well.
    events = fit(converted(recipe), RecompositionCallback(interval=20), 6)
    assert [event.step for event in events] == [20, 40]


def test_a_run_of_few_predictions_for_its_rank_is_lora():
    # 80 steps of 24 predictions are 960 for each of two pairs.
    recipe = quick(predictions_per_slot=961)
    with pytest.warns(
        UserWarning, match="1,920 .*needs 961 for each pair.*2 pairs in a layer"
    ):
        assert fit(converted(recipe), RecompositionCallback(), 10) == []
    events = fit(converted(recipe), RecompositionCallback(interval=20), 6)
    assert [event.step for event in events] == [20, 40]
    for rank, least in ((2, 960), (1, 1920)):
        recipe = quick(predictions_per_slot=least)
        assert fit(converted(recipe, rank), RecompositionCallback(), 10)
    # A recipe for runs of any length takes them as they are.
    recipe = quick(predictions_per_slot=10**9, lives_per_run=1)
    assert fit(converted(recipe), RecompositionCallback(), 10)


def test_a_run_whose_epochs_have_few_predictions_is_lora():
    # An epoch has 8 steps of 24 predictions.
    recipe = quick(steps_per_pair=1, predictions_per_pair=193)
    with pytest.warns(
        UserWarning, match="an epoch has 192 .*learns from 193.*same ones again"
    ):
        assert fit(converted(recipe), RecompositionCallback(), 30) == []
    events = fit(converted(recipe), RecompositionCallback(interval=20), 6)
    assert [event.step for event in events] == [20, 40]
    recipe = quick(steps_per_pair=1, predictions_per_pair=192)
    assert fit(converted(recipe), RecompositionCallback(), 30)
    # A recipe for runs of any length takes them as they are.
    recipe = quick(predictions_per_pair=193, lives_per_run=1)
    assert fit(converted(recipe), RecompositionCallback(), 30)


def own_loss(y_true, y_pred):
    return keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)


@pytest.mark.parametrize("loss", ["mse", own_loss])
def test_a_run_whose_pairs_see_the_same_examples_often_is_lora(loss):
    def run(callback, epochs=50, **changes):
        # 400 steps, 8 an epoch: a pair trains for 40 steps.
        model = converted(quick(pair_life=0.1, **changes))
        model.compile("adam", loss)
        return fit(model, callback, epochs)

    with pytest.warns(UserWarning, match="for 40 steps, .* 5 epochs.*allows 4"):
        assert run(RecompositionCallback(), epochs_per_pair=4) == []
    assert run(RecompositionCallback(), epochs_per_pair=5)
    # An interval is obeyed, and a recipe for any run takes this one.
    assert run(RecompositionCallback(interval=20), 6, epochs_per_pair=4)
    assert run(RecompositionCallback(), epochs_per_pair=4, lives_per_run=1)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_an_epoch_of_unknown_length_is_counted_when_it_has_ended():
    data = finite_stream(regression_data(np.random.default_rng(0)))
    for predictions, recomposes in ((192, True), (193, False)):
        recipe = quick(steps_per_pair=1, predictions_per_pair=predictions)
        model, callback = converted(recipe), RecompositionCallback()
        warns = pytest.warns(UserWarning, match="an epoch has 192")
        with contextlib.nullcontext() if recomposes else warns:
            model.fit(data, epochs=30, verbose=0, callbacks=[callback])
        assert bool(callback.events) == recomposes


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_a_loss_of_ones_own_counts_steps_alone_and_says_so():
    recipe = quick(steps_per_pair=2, predictions_per_pair=10**9)
    for unknown_length in (False, True):
        model, callback = converted(recipe), RecompositionCallback()
        model.compile("adam", own_loss)
        with pytest.warns(UserWarning, match="predictions .* is unknown"):
            if unknown_length:
                data = regression_data(np.random.default_rng(0))
                data = finite_stream(data)
                model.fit(data, epochs=30, verbose=0, callbacks=[callback])
            else:
                fit(model, callback, 10)
        assert callback.events
    # A run of too few steps does not warn, and one with an interval neither.
    model = converted(quick(predictions_per_pair=2))
    model.compile("adam", own_loss)
    assert fit(model, RecompositionCallback(), 2) == []
    assert fit(model, RecompositionCallback(interval=2), 2)


def test_the_callback_is_told_the_number_of_predictions():
    def told(count):
        recipe = quick(steps_per_pair=1, predictions_per_pair=192)
        model = converted(recipe)
        model.compile("adam", own_loss)
        callback = RecompositionCallback(predictions_per_step=count)
        events = fit(model, callback, 10)
        assert callback.to_dict()["predictions_per_step"] == count
        assert callback.recomposer.pace.state.predictions == count
        return [event.step for event in events]

    assert told(24) == list(range(4, 68, 4))  # a life of 8 steps
    with pytest.warns(UserWarning, match="an epoch has 184 predictions"):
        assert told(23) == []
    with pytest.raises(ValueError, match="predictions_per_step.*Received"):
        RecompositionCallback(predictions_per_step=0)


def test_directions_come_again_in_turn_and_change_no_function():
    events = fit(converted(quick()), RecompositionCallback(), 10)
    directions = [event.directions for event in events]
    assert directions[:8] == [(0,), (1,), (2,), (3,)] * 2
    assert max(event.drift for event in events) <= 1e-6


@pytest.mark.parametrize("order", ["largest_singular_value", "random"])
def test_the_least_visited_come_first_and_none_that_stays_in_a_slot(order):
    rng = np.random.default_rng(0)
    for _ in range(50):
        count, rank = rng.integers(3, 9), 3
        record = Record(
            directions=type("D", (), {"singular_values": rng.random(count)}),
            visits=rng.integers(0, 3, count),
            slot_direction=rng.permutation(count)[:rank],
        )
        kept = np.arange(rank)[: rng.integers(0, rank)]
        n = rank - len(kept)
        recipe = quick(order=order)
        chosen = choose_directions(record, recipe, n, kept)
        assert len(set(chosen)) == len(chosen) <= n
        active = record.slot_direction[kept]
        visited = [i for i in chosen if record.visits[i]]
        assert not set(visited) & set(active)
        left = np.setdiff1d(np.arange(count), chosen)
        left = [i for i in left if not record.visits[i] or i not in active]
        if left and len(chosen):
            assert record.visits[chosen].max() <= record.visits[left].min()
        # Without coming again only those that were never used.
        once = quick(order=order, reuse_directions=False)
        fresh = choose_directions(record, once, n, kept)
        assert set(fresh) <= set(np.flatnonzero(record.visits == 0))


def test_a_record_is_taken_back_over_directions_that_came_again():
    model = converted(quick())
    fit(model, RecompositionCallback(), 10)
    record = model.get_layer("hidden").record
    assert record.visits.max() > 1
    for count in range(len(record.events) + 1):
        taken = record.taken_back(count)
        directions = record.column("direction")[:count].astype(int)
        np.testing.assert_array_equal(
            taken.visits, np.bincount(directions, minlength=4)
        )


def test_directions_that_come_again_must_not_be_subtracted():
    with pytest.raises(ValueError, match="come again only where"):
        Recipe(reuse_directions=True)


@pytest.mark.parametrize("loss", ["plain", "minus five", "times 1000"])
def test_the_loss_decides_nothing(loss):
    losses = {
        "plain": "mse",
        "minus five": lambda y, p: keras.ops.mean((y - p) ** 2) - 5.0,
        "times 1000": lambda y, p: 1000.0 * keras.ops.mean((y - p) ** 2),
    }
    model = converted(quick())
    model.compile("adam", losses[loss])
    events = fit(model, RecompositionCallback(), 10)
    assert [event.step for event in events] == list(range(4, 68, 4))


def three_layers(recipe, **ranks):
    keras.utils.set_random_seed(3)
    inputs = x = keras.Input((12,))
    for index in range(3):
        x = keras.layers.Dense(12, activation="tanh", name=f"in_{index}")(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    keras_srlora.enable_srlora(
        model,
        2,
        target_layer_names=["in_."],
        rank_pattern=ranks,
        recipe=recipe,
    )
    model.compile("adam", "mse")
    return model


def test_of_different_ranks_the_mean_counts():
    # 80 steps of 24 predictions are 640 for each of three pairs.
    for least, recomposes in ((640, True), (641, False)):
        model = three_layers(quick(predictions_per_slot=least), in_0=5)
        warns = pytest.warns(UserWarning, match="3 pairs in a layer")
        with contextlib.nullcontext() if recomposes else warns:
            assert bool(fit(model, RecompositionCallback(), 10)) == recomposes


def turns_of(events):
    return [(event.step, event.layer.rsplit("/")[-1]) for event in events]


def test_layers_take_turns():
    # A life is 12: each layer is due every 6 steps, one every second step.
    recipe = quick(steps_per_pair=12, turns=3, lives_per_run=1)
    events = turns_of(fit(three_layers(recipe), RecompositionCallback(), 5))
    expected = [(s, f"in_{(s - 6) // 2 % 3}") for s in range(6, 34, 2)]
    assert events == expected
    # With more groups than layers, some turns are of none.
    recipe = quick(steps_per_pair=12, turns=6, lives_per_run=1)
    events = turns_of(fit(three_layers(recipe), RecompositionCallback(), 5))
    turns = [(s, s - 6) for s in range(6, 34) if (s - 6) % 6 < 3]
    assert events == [(s, f"in_{n % 6}") for s, n in turns]
    # An interval is one for all layers.
    events = fit(three_layers(recipe), RecompositionCallback(interval=30), 5)
    assert turns_of(events) == [(30, f"in_{i}") for i in range(3)]


def test_a_run_goes_on_with_its_turns_and_its_life(tmp_path):
    """Killed after an epoch, between the turns of two layers."""
    recipe = quick(
        steps_per_pair=1, predictions_per_pair=240, turns=3, lives_per_run=1
    )
    whole = three_layers(recipe)
    expected = turns_of(fit(whole, RecompositionCallback(), 6))
    data = regression_data(np.random.default_rng(0))
    first, second = three_layers(recipe), three_layers(recipe)
    found = []
    for model, begin, end in ((first, 0, 3), (second, 3, 6)):
        if begin:
            model.fit(*data, batch_size=8, epochs=1, verbose=0)
            model.load_weights(tmp_path / "a.weights.h5")
        keras.utils.set_random_seed(9)
        callback = RecompositionCallback()
        model.fit(
            *data,
            batch_size=8,
            initial_epoch=begin,
            # The length of the whole run; it is stopped in its middle.
            epochs=6,
            verbose=0,
            callbacks=[callback, StopAfter(end)],
        )
        model.save_weights(tmp_path / "a.weights.h5")
        found += turns_of(callback.events)
    assert found == expected
    assert [step for step, _ in found][:2] == [5, 7]


class StopAfter(keras.callbacks.Callback):
    def __init__(self, epochs):
        super().__init__()
        self.epochs = epochs

    def on_epoch_end(self, epoch, logs=None):
        if epoch + 1 == self.epochs:
            self.model.stop_training = True
