"""`RecompositionCallback` in `fit`."""

import csv
import json
import warnings

import keras
import numpy as np
import pytest
from support import dense_layer
from support import effective
from support import finite_stream
from support import frozen_kernel
from support import matrix
from support import regression_data
from support import statistics
from support import to_numpy
from support import two_layer_model

import keras_srlora
from keras_srlora import RecompositionCallback
from keras_srlora.recipes.schedule import Schedule

BACKEND = keras.backend.backend()


def compiled(rng, optimizer="adam", **kwargs):
    # rank 4 of 12 directions: two pairs a time, four recompositions.
    model = two_layer_model(rng, rank=4, **kwargs)
    model.compile(optimizer, "mse")
    return model


def fit(model, data, callback, batch_size=8, epochs=3, **kwargs):
    callbacks = [callback, *kwargs.pop("callbacks", [])]
    return model.fit(
        *data,
        batch_size=batch_size,
        epochs=epochs,
        verbose=0,
        callbacks=callbacks,
        **kwargs,
    )


def steps_of(callback):
    return sorted({event.step for event in callback.events})


# When.


def test_without_arguments_the_run_is_divided_evenly(rng):
    # 24 steps, (12 - 4) / 2 = 4 recompositions: one every 6, none at the end.
    callback = RecompositionCallback()
    fit(compiled(rng), regression_data(rng), callback)
    assert steps_of(callback) == [6, 12, 18]


def test_an_interval_that_is_not_whole_is_kept_on_average(rng):
    callback = RecompositionCallback(fusion_ratio=0.25)
    fit(compiled(rng), regression_data(rng, 72), callback)
    # 27 steps and, one pair a time, 8 recompositions: every 3.375 steps.
    assert steps_of(callback) == [4, 7, 11, 14, 17, 21, 24]


def test_interval_is_in_steps(rng):
    callback = RecompositionCallback(interval=5)
    fit(compiled(rng), regression_data(rng), callback)
    assert steps_of(callback) == [5, 10, 15, 20]


def test_initial_epoch_counts_as_done(rng):
    callback = RecompositionCallback(interval=5)
    with pytest.warns(UserWarning, match="hold no run that could go on"):
        fit(compiled(rng), regression_data(rng), callback, initial_epoch=1)
    # From step 8 to 24.
    assert steps_of(callback) == [13, 18, 23]


def test_a_second_fit_goes_on_with_the_unused_directions(rng):
    model, data = compiled(rng), regression_data(rng)
    first = RecompositionCallback(interval=10)
    fit(model, data, first)
    second = RecompositionCallback()
    fit(model, data, second)
    used = [i for c in (first, second) for e in c.events for i in e.directions]
    assert sorted(used) == list(range(4, 10))
    # 24 steps for the two that are left; the second would be at the end.
    assert steps_of(second) == [12]


def test_an_interrupted_run_goes_on_by_its_own_schedule(rng):
    data = regression_data(rng)
    whole = RecompositionCallback(interval=5)
    model = compiled(rng)
    fit(model, data, whole, shuffle=False)
    parts = []
    model = compiled(rng)
    for first, last in ((0, 2), (2, 3)):
        part = RecompositionCallback(interval=5)
        fit(
            model,
            data,
            part,
            shuffle=False,
            epochs=last,
            initial_epoch=first,
        )
        parts += steps_of(part)
    assert parts == steps_of(whole)


def fit_stream(model, data, callback, epochs):
    warnings.filterwarnings("ignore", "Your input ran out of data")
    model.fit(
        finite_stream(data),
        epochs=epochs,
        verbose=0,
        shuffle=False,
        callbacks=[callback],
    )


def test_an_epoch_of_unknown_size_is_learned(rng):
    model, data = compiled(rng), regression_data(rng)
    callback = RecompositionCallback()
    fit_stream(model, data, callback, epochs=4)
    # 8 steps to learn it; 24 are left for four recompositions.
    assert steps_of(callback) == [14, 20, 26]


def test_an_epoch_is_learned_from_calls_that_overtake_each_other(rng):
    class Overtaken(RecompositionCallback):
        def on_train_batch_end(self, batch, logs=None):
            # Keras's threads may deliver the 8 of an epoch in any order.
            super().on_train_batch_end(7 - batch, logs)

    callback = Overtaken()
    fit_stream(compiled(rng), regression_data(rng), callback, epochs=4)
    assert steps_of(callback) == [14, 20, 26]


def test_a_single_epoch_of_unknown_size_says_so(rng):
    model, data = compiled(rng), regression_data(rng)
    callback = RecompositionCallback()
    with pytest.warns(UserWarning, match="data set has no size"):
        fit_stream(model, data, callback, epochs=1)
    assert not callback.events


@pytest.mark.skipif(BACKEND == "torch", reason="Keras on torch refuses it")
def test_steps_per_execution_recomposes_between_executions(rng):
    model = two_layer_model(rng, rank=4)
    model.compile("adam", "mse", steps_per_execution=3)
    callback = RecompositionCallback(interval=4)
    fit(model, regression_data(rng), callback, epochs=2)
    # Executions begin at 0, 3, 6 of each epoch of 8.
    assert steps_of(callback) == [6, 8, 14]


def test_accumulation_is_finished_before_a_recomposition(rng):
    optimizer = keras.optimizers.Adam(0.01, gradient_accumulation_steps=2)
    callback = RecompositionCallback(interval=5)
    fit(compiled(rng, optimizer), regression_data(rng), callback)
    assert steps_of(callback) == [6, 10, 16, 20]


def test_schedule_counts_steps():
    schedule = Schedule(interval=2.5, origin=10, recomposed_at=10)
    due = [s for s in range(10, 21) if schedule.is_due(s)]
    assert due[0] == 13
    schedule.recomposed_at = 13
    assert not schedule.is_due(14) and schedule.is_due(15)
    assert not Schedule().is_due(100)
    thirds = Schedule(interval=10 / 3, recomposed_at=7)
    assert thirds.is_due(10)


def test_each_group_of_layers_has_its_turn_once_an_interval():
    schedule = Schedule.start(40, interval=12, turns=4)
    taken = [
        (step, group)
        for step in range(40, 77)
        if schedule.is_due(step)
        for group in schedule.take(step)
    ]
    # The first after a whole interval.
    expected = [(52 + 3 * i, i % 4) for i in range(9)]
    assert taken == expected


def test_groups_whose_steps_were_skipped_are_taken_together():
    schedule = Schedule.start(0, interval=12, turns=4)
    assert schedule.take(18) == [0, 1, 2]
    assert schedule.take(21) == [3]
    # All of them were due, some twice.
    assert sorted(schedule.take(60)) == [0, 1, 2, 3]
    assert schedule.take(63) == [0]


def test_an_interval_too_short_for_turns_has_none():
    schedule = Schedule.start(0, interval=3, turns=4)
    assert [s for s in range(8) if schedule.is_due(s)][0] == 3
    assert schedule.take(3) == [0] and schedule.turns == 1


# What.


def test_the_function_does_not_change_at_a_recomposition(rng):
    model, (x, y) = compiled(rng), regression_data(rng)
    layer = model.get_layer("hidden")
    kernels = {}

    class Watch(keras.callbacks.Callback):
        """Around the callback: its list before and after ours."""

        def __init__(self, name):
            super().__init__()
            self.name = name

        def on_train_batch_begin(self, batch, logs=None):
            self.model  # noqa: B018
            kernels.setdefault(self.name, []).append(effective(layer))

    callback = RecompositionCallback()
    model.fit(
        x,
        y,
        batch_size=8,
        epochs=3,
        verbose=0,
        callbacks=[Watch("before"), callback, Watch("after")],
    )
    assert len(callback.events) == 3
    for before, after in zip(kernels["before"], kernels["after"]):
        change = np.abs(after - before).max() / np.abs(before).max()
        assert change <= 1e-5
    assert max(event.drift for event in callback.events) <= 1e-5
    # And it did change from step to step.
    assert np.abs(kernels["before"][-1] - kernels["before"][0]).max() > 1e-4


@pytest.mark.parametrize(
    "recipe", ["paper", keras_srlora.Recipe(start="lora", scale="as_lora")]
)
def test_the_number_of_trainable_parameters_never_changes(recipe, rng):
    model = compiled(rng, recipe=recipe)
    counts = set()

    class Count(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            variables = self._model.trainable_variables
            counts.add(sum(int(np.prod(v.shape)) for v in variables))

    callback = RecompositionCallback()
    fit(model, regression_data(rng), callback, callbacks=[Count()])
    assert callback.events and len(counts) == 1


def test_the_least_important_pairs_are_fused(rng, monkeypatch):
    model = compiled(rng)
    seen = []
    original = keras_srlora.Sensitivity.importance
    monkeypatch.setattr(
        keras_srlora.Sensitivity,
        "importance",
        lambda *arguments: seen.append(original(*arguments)) or seen[-1],
    )
    callback = RecompositionCallback()
    fit(model, regression_data(rng), callback)
    assert len(seen) == len(callback.events) == 3
    for (scores,), event in zip(seen, callback.events):
        assert set(event.slots) == set(np.argsort(scores)[:2])
        np.testing.assert_array_equal(
            event.scores, [scores[slot] for slot in event.slots]
        )


def test_directions_come_in_order_and_without_repetition(rng):
    callback = RecompositionCallback(interval=3)
    with pytest.warns(UserWarning, match="have used all their directions"):
        fit(compiled(rng), regression_data(rng), callback)
    assert [e.directions for e in callback.events] == [
        (4, 5),
        (6, 7),
        (8, 9),
        (10, 11),
    ]


def test_lora_start_has_all_directions_to_go(rng):
    callback = RecompositionCallback()
    recipe = keras_srlora.Recipe(start="lora")
    fit(compiled(rng, recipe=recipe), regression_data(rng), callback)
    # 12 / 2 = 6 recompositions over 24 steps, none at the end.
    assert steps_of(callback) == [4, 8, 12, 16, 20]
    assert callback.events[0].directions == (0, 1)


def test_an_odd_rest_of_directions_is_used(rng):
    callback = RecompositionCallback()
    fit(compiled(rng, target_rank=7), regression_data(rng), callback)
    # Three directions are left, of which the second recomposition would take
    # one at the end of the run.
    assert steps_of(callback) == [12]
    callback = RecompositionCallback(interval=5)
    with pytest.warns(UserWarning, match="have used all their directions"):
        fit(compiled(rng, target_rank=7), regression_data(rng), callback)
    assert [e.directions for e in callback.events] == [(4, 5), (6,)]


def test_running_out_of_directions_is_said_once(rng):
    callback = RecompositionCallback(interval=1)
    with pytest.warns(UserWarning) as caught:
        history = fit(compiled(rng), regression_data(rng), callback)
    messages = [str(w.message) for w in caught]
    messages = [m for m in messages if "have used all their directions" in m]
    assert len(messages) == 1
    assert "hidden" in messages[0] and "`target_rank`" in messages[0]
    assert len(history.history["loss"]) == 3


def test_a_run_that_begins_with_no_direction_left_says_so(rng):
    model = compiled(rng, target_rank=4)
    with pytest.warns(UserWarning, match="have used all their directions"):
        fit(model, regression_data(rng), RecompositionCallback())


def test_a_short_run_says_that_it_is(rng):
    model = compiled(rng)
    with pytest.warns(UserWarning, match="too few to visit all directions"):
        fit(
            model,
            regression_data(rng),
            RecompositionCallback(),
            epochs=1,
            batch_size=32,
        )


# What happened is data.


def test_the_record_is_plain_data(rng):
    callback = RecompositionCallback()
    fit(compiled(rng), regression_data(rng), callback)
    document = json.loads(json.dumps(callback.to_dict()))
    assert document["recipe"]["fusion_ratio"] == 0.5
    assert document["interval"] is None
    assert document["recipe"]["selection"] == "least_important"
    event = document["events"][0]
    assert sorted(event) == [
        "directions",
        "drift",
        "importance",
        "layer",
        "scores",
        "slots",
        "step",
    ]
    assert event["layer"] == "hidden" and event["directions"] == [4, 5]
    # The layer remembers the same.
    record = callback.recomposer.layers[0].record
    np.testing.assert_array_equal(
        record.column("recomposition"), [1, 1, 2, 2, 3, 3]
    )
    np.testing.assert_array_equal(record.column("step")[:2], [6, 6])


def test_logs_carry_numbers(rng, tmp_path):
    path = tmp_path / "log.csv"
    callback = RecompositionCallback()
    history = fit(
        compiled(rng),
        regression_data(rng),
        callback,
        callbacks=[keras.callbacks.CSVLogger(str(path))],
    ).history
    # Recompositions at 6, 12, 18: in the first, second and third epoch.
    assert history["srlora_recompositions"] == [1, 1, 1]
    assert history["srlora_directions"] == [6.0, 8.0, 10.0]
    assert 0 < max(history["srlora_drift"]) <= 1e-5
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [float(row["srlora_directions"]) for row in rows] == [6, 8, 10]


def test_verbose_prints_a_line_a_recomposition(rng, capsys):
    fit(compiled(rng), regression_data(rng), RecompositionCallback(verbose=1))
    lines = [
        line
        for line in capsys.readouterr().out.splitlines()
        if "recomposed" in line
    ]
    assert len(lines) == 3
    assert lines[0].startswith("step 6: recomposed 1 of 1 layers, 2 pairs")
    fit(compiled(rng), regression_data(rng), RecompositionCallback())
    assert "recomposed" not in capsys.readouterr().out


# The optimizer is the model's own before and after.


def test_the_optimizer_is_unwrapped_after_fit(rng):
    model = compiled(rng)
    optimizer = model.optimizer
    fit(model, regression_data(rng), RecompositionCallback())
    assert model.optimizer is optimizer and type(optimizer).__name__ == "Adam"
    fit(model, regression_data(rng), RecompositionCallback(interval=20))
    assert model.optimizer is optimizer


def test_statistics_go_on_in_a_second_fit(rng):
    model, data = compiled(rng), regression_data(rng)
    quiet = pytest.warns(UserWarning, match="Nothing will be recomposed")
    with quiet:
        fit(model, data, RecompositionCallback(interval=99), epochs=1)
    held = statistics(model.get_layer("hidden"))
    assert held.average_a.max() > 0
    keras_srlora.Sensitivity([model.get_layer("hidden")])
    running = statistics(model.get_layer("hidden"))
    for before, after in zip(held, running, strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_run_that_an_exception_ended_can_be_repeated(rng):
    model, data = compiled(rng), regression_data(rng)

    class Stop(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, data, RecompositionCallback(), callbacks=[Stop()])
    callback = RecompositionCallback()
    fit(model, data, callback)
    assert steps_of(callback) == [6, 12, 18]
    assert type(model.optimizer).__name__ == "Adam"


def test_a_model_fitted_before_is_traced_anew(rng):
    model, data = compiled(rng), regression_data(rng)
    model.fit(*data, batch_size=8, verbose=0)
    model.predict(data[0], verbose=0)
    callback = RecompositionCallback()
    with pytest.warns(UserWarning, match="is their pretrained kernel"):
        fit(model, data, callback)
    # A stale train function would have left the statistics at zero.
    assert len(callback.events) == 3
    np.testing.assert_allclose(
        model.predict(data[0], verbose=0), to_numpy(model(data[0])), atol=1e-5
    )


# Never silent.


def unchanged(model):
    """A context that checks that a refused run changed nothing."""

    class Unchanged:
        def __enter__(self):
            self.values = [to_numpy(v) for v in model.variables]
            self.optimizer = model.optimizer

        def __exit__(self, *exception):
            assert model.optimizer is self.optimizer
            for old, new in zip(self.values, model.variables):
                np.testing.assert_array_equal(old, to_numpy(new))

    return Unchanged()


def refused(model, data, message, callback=None):
    with unchanged(model), pytest.raises(ValueError, match=message):
        fit(model, data, callback or RecompositionCallback())


def test_no_srlora_layer_is_refused(rng):
    inputs = keras.Input((12,))
    model = keras.Model(inputs, keras.layers.Dense(3)(inputs))
    model.compile("adam", "mse")
    refused(model, regression_data(rng), "has no SRLoRA layer")


def test_a_frozen_layer_is_refused(rng):
    model = two_layer_model(rng)
    model.get_layer("hidden").trainable = False
    model.compile("adam", "mse")
    refused(model, regression_data(rng), "factors of layer 'hidden' are frozen")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_kernel_that_is_not_finite_is_refused(value, rng):
    model = compiled(rng)
    kernel = frozen_kernel(model.get_layer("hidden"))
    kernel[3, 4] = value
    model.get_layer("hidden").frozen.variable.assign(kernel)
    refused(model, regression_data(rng), "'hidden' has entries that are NaN")


def test_a_changed_kernel_is_refused(rng):
    model = compiled(rng)
    keras_srlora.initialize_factors(model)
    model.get_layer("hidden").frozen.variable.assign(np.ones((12, 16)))
    refused(model, regression_data(rng), "is not the one whose directions")


def test_an_optimizer_that_cannot_restart_a_pair_is_refused(rng):
    model = compiled(rng, keras.optimizers.Ftrl())
    refused(model, regression_data(rng), "Ftrl keeps no weights")


def test_no_optimizer_is_refused(rng):
    model = two_layer_model(rng)
    model.compile(optimizer=None, loss="mse")
    refused(model, regression_data(rng), "has no optimizer")


def test_an_optimizer_built_for_other_variables_is_refused(rng):
    model = two_layer_model(rng)
    model.get_layer("hidden").trainable = False
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    model.get_layer("hidden").trainable = True
    refused(model, regression_data(rng), "Compile the model again")


def test_an_unbuilt_layer_is_refused(rng):
    model = keras.Sequential([keras_srlora.SRLoRADense(16, rank=2)])
    model.compile("adam", "mse")
    callback = RecompositionCallback()
    callback.set_model(model)  # `evaluate` and `predict` call it, too
    with pytest.raises(ValueError, match="is not built"):
        callback.on_train_begin()


def test_replacing_the_optimizer_during_the_run_is_refused(rng):
    model, data = compiled(rng), regression_data(rng)

    class Replace(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 2:
                self._model.optimizer = keras.optimizers.SGD()

    with pytest.raises(RuntimeError, match="optimizer of the model was rep"):
        fit(model, data, RecompositionCallback(), callbacks=[Replace()])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"interval": 0},
        {"interval": -1},
        {"interval": 2.5},
        {"fusion_ratio": 0},
        {"fusion_ratio": 1.1},
        {"recipe": "best"},
        {"recipe": 1},
    ],
)
def test_bad_arguments_are_refused(kwargs):
    with pytest.raises(ValueError, match=f"`{next(iter(kwargs))}`.*Received"):
        RecompositionCallback(**kwargs)


def test_an_unknown_choice_of_a_recipe_is_refused():
    with pytest.raises(ValueError, match="`slots` must be one of.*'keep'"):
        keras_srlora.Recipe(slots="halve")


def test_factors_that_are_not_finite_are_left_alone(rng):
    model = compiled(rng)
    layer = model.get_layer("hidden")
    keras_srlora.initialize_factors(model)
    optimizer = keras_srlora.SensitivityOptimizer(model.optimizer, model)
    optimizer.build(model.trainable_variables)
    for variable in optimizer.sensitivity.variables:
        variable.assign(np.ones(variable.shape))
    a = to_numpy(layer.lora_kernel_a)
    a[0, 0] = np.nan
    layer.lora_kernel_a.assign(a)
    before = frozen_kernel(layer)
    with pytest.warns(UserWarning, match="'hidden' was not recomposed"):
        events = keras_srlora.recompose(optimizer.sensitivity, optimizer)
    assert events == []
    np.testing.assert_array_equal(before, frozen_kernel(layer))


def test_a_layer_that_no_gradient_reached_is_left_alone(rng):
    model = compiled(rng)
    keras_srlora.initialize_factors(model)
    sensitivity = keras_srlora.Sensitivity([model.get_layer("hidden")])
    with pytest.warns(UserWarning, match="no gradient reached it"):
        assert keras_srlora.recompose(sensitivity) == []


def test_a_recomposition_restarts_the_statistics_of_its_layers_alone(rng):
    layer, frozen = (
        dense_layer(matrix("gaussian", 10, 6, rng), rank=2) for _ in range(2)
    )
    sensitivity = keras_srlora.Sensitivity([layer, frozen])
    for variable in sensitivity.variables:
        variable.assign(np.ones(variable.shape))
    frozen.trainable = False
    with pytest.warns(UserWarning, match="it was frozen"):
        events = keras_srlora.recompose(sensitivity)
    assert len(events) == 1
    for value in statistics(layer):
        assert not value.any()
    for value in statistics(frozen):
        assert value.all()


def test_a_frozen_layer_is_left_alone_in_a_loop(rng):
    layer = two_layer_model(rng).get_layer("hidden")
    layer.initialize_factors()
    sensitivity = keras_srlora.Sensitivity([layer])
    layer.trainable = False
    with pytest.warns(UserWarning, match="'hidden'.*it was frozen"):
        assert keras_srlora.recompose(sensitivity) == []
