"""A second `fit` goes on with what the first one compiled."""

import keras
import numpy as np
import pytest
from support import assert_same_variables
from support import regression_data
from support import statistics
from support import to_numpy

import keras_srlora
from keras_srlora import Recipe
from keras_srlora import RecompositionCallback

pytestmark = pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="nothing is compiled"
)


class Traced(keras.layers.Layer):
    """Counts how often Python runs it: when something is traced."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = []

    def call(self, x):
        self.calls.append(1)
        return 1.0 * x


@pytest.fixture
def data(rng):
    return regression_data(rng)


def new_model(**kwargs):
    keras.utils.set_random_seed(2)
    inputs = keras.Input((12,))
    x = keras_srlora.SRLoRADense(
        16, rank=2, target_rank=12, recipe="paper", name="hidden"
    )(inputs)
    traced = Traced(name="traced")
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(traced(x)))
    model.compile(keras.optimizers.Adam(0.01), "mse", **kwargs)
    return model


def traces(model, run):
    """How often the model was traced in a run."""
    calls = model.get_layer("traced").calls
    before = len(calls)
    run(model)
    return len(calls) - before


def scored(data, epochs=1, **kwargs):
    def run(model):
        callback = RecompositionCallback(**{"interval": 3, **kwargs})
        model.fit(
            *data,
            batch_size=8,
            epochs=epochs,
            shuffle=False,
            verbose=0,
            callbacks=[callback],
        )
        run.events = callback.events

    return run


def plain(data):
    return lambda model: model.fit(
        *data, batch_size=8, shuffle=False, verbose=0
    )


@pytest.mark.parametrize("steps", [1, 2])
def test_a_second_fit_traces_nothing(steps, data):
    model, run = new_model(steps_per_execution=steps), scored(data)
    assert traces(model, run) > 0
    first = statistics(model.get_layer("hidden"))
    for _ in range(2):
        assert traces(model, run) == 0
        # And it scores, recomposes and trains.
        assert run.events
    assert len(model.get_layer("hidden").record.events) >= 3
    second = statistics(model.get_layer("hidden"))
    assert np.abs(second.average_b - first.average_b).max() > 0


def test_one_epoch_at_a_time_is_the_same_training(data):
    """As that of a model whose functions are compiled in each `fit`."""
    kept, anew = new_model(), new_model()
    for _ in range(3):
        scored(data)(kept)
        scored(data)(anew)
        anew.train_function = None
    assert_same_variables(kept.variables, anew.variables)
    assert_same_variables(kept.optimizer.variables, anew.optimizer.variables)


def test_fits_with_and_without_the_callback_keep_a_function_each(data):
    model = new_model()
    assert traces(model, scored(data)) > 0
    assert traces(model, plain(data)) > 0
    held = statistics(model.get_layer("hidden"))
    for run in (plain(data), scored(data), plain(data), scored(data)):
        assert traces(model, run) == 0
    # Without the callback nothing was scored.
    before = statistics(model.get_layer("hidden"))
    plain(data)(model)
    after = statistics(model.get_layer("hidden"))
    for old, new in zip(before, after):
        np.testing.assert_array_equal(old, new)
    assert np.abs(before.average_b - held.average_b).max() > 0


def test_predicting_and_evaluating_are_not_traced_again(data):
    model = new_model()
    model.predict(data[0], verbose=0)
    model.evaluate(*data, verbose=0)
    scored(data)(model)

    def both(model):
        model.predict(data[0], verbose=0)
        model.evaluate(*data, verbose=0)

    assert traces(model, both) == 0
    np.testing.assert_allclose(
        model.predict(data[0], verbose=0), to_numpy(model(data[0])), atol=1e-5
    )


def test_what_would_be_stale_is_traced_anew(data):
    """Another optimizer, or other betas of the scores."""
    model = new_model()
    scored(data)(model)
    model.compile(keras.optimizers.SGD(0.01), "mae")
    optimizer = model.optimizer
    run = scored(data)
    assert traces(model, run) > 0
    assert model.optimizer is optimizer
    assert int(to_numpy(optimizer.iterations)) == 8
    assert traces(model, run) == 0
    recipe = Recipe(beta1=0.5, beta2=0.25)
    assert traces(model, scored(data, recipe=recipe, interval=7)) > 0
    # Recomposed before the last step, which left (1 - beta1) · I, and of
    # I - (1 - beta1) · I the part (1 - beta2).
    average = statistics(model.get_layer("hidden")).average_b
    uncertainty = statistics(model.get_layer("hidden")).uncertainty_b
    assert average.max() > 0
    np.testing.assert_allclose(uncertainty, 0.75 * average, rtol=1e-5)


def test_a_model_that_is_merged_and_converted_again_is_traced_anew(data):
    inputs = keras.Input((12,))
    x = keras.layers.Dense(16, name="hidden")(inputs)
    traced = Traced(name="traced")
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(traced(x)))
    for _ in range(2):
        keras_srlora.enable_srlora(
            model, 2, target_layer_names=["hidden"], recipe="paper"
        )
        model.compile(keras.optimizers.Adam(0.01), "mse")
        run = scored(data)
        assert traces(model, run) > 0 and run.events
        keras_srlora.merge_srlora(model)


def test_a_run_that_an_exception_ended_leaves_nothing_stale(data):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 4:
                raise KeyboardInterrupt

    model = new_model()
    with pytest.raises(KeyboardInterrupt):
        model.fit(
            *data,
            batch_size=8,
            shuffle=False,
            verbose=0,
            callbacks=[RecompositionCallback(interval=3), Stop()],
        )
    run = scored(data)
    run(model)
    assert run.events and type(model.optimizer).__name__ == "Adam"
    plain(data)(model)
    assert type(model.optimizer).__name__ == "Adam"
    assert len(model.get_layer("hidden").record.events) >= 3
