"""Uses that are rare and right, and mistakes that get an error."""

import gc
import signal
import weakref

import keras
import numpy as np
import pytest
from keras import ops
from pieces import NAMES
from pieces import assert_close
from pieces import batch
from pieces import called
from pieces import convert
from pieces import encoder
from pieces import nudge
from support import effective
from support import to_numpy

import keras_srlora
from keras_srlora import Recipe
from keras_srlora import RecompositionCallback
from keras_srlora.conversion import containers
from keras_srlora.conversion.holders import Holders
from keras_srlora.layers import pairs
from keras_srlora.recipes.definition import RECIPES

BACKEND = keras.backend.backend()


def fit(model, rng, callbacks, epochs=1, batch_size=8):
    model.fit(
        batch(rng, 32),
        batch(rng, 32),
        batch_size=batch_size,
        epochs=epochs,
        verbose=0,
        callbacks=callbacks,
    )


# Ctrl-C waits for the end of what has begun.


@pytest.fixture
def ctrl_c(monkeypatch, ctrl_c_raises):
    """Presses it after each call of a function."""

    def press_after(owner, name):
        function = getattr(owner, name)

        def interrupted(*args, **kwargs):
            result = function(*args, **kwargs)
            signal.raise_signal(signal.SIGINT)
            return result

        monkeypatch.setattr(owner, name, interrupted)

    return press_after


@pytest.mark.parametrize("owner, name", [(pairs, "forget_update")])
def test_a_merge_that_is_interrupted_is_whole(owner, name, rng, ctrl_c):
    model, x = encoder(), batch(rng)
    nudge(convert(model))
    expected = called(model, x)
    ctrl_c(owner, name)
    with pytest.raises(KeyboardInterrupt):
        keras_srlora.merge_srlora(model)
    assert all(type(y) is keras.layers.Dense for y in model.layers[1:])
    assert_close(called(model, x), expected)


def test_a_conversion_that_is_interrupted_is_whole(rng, ctrl_c):
    model, x = encoder(), batch(rng)
    expected = called(model, x)
    ctrl_c(containers, "add_factors")
    with pytest.raises(KeyboardInterrupt):
        convert(model)
    assert len(keras_srlora.initialize_factors(model)) == len(NAMES)
    assert_close(called(model, x), expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_switch_that_breaks_off_at_its_end_is_whole(error, monkeypatch):
    model = encoder()
    layers = convert(model)
    keras_srlora.add_adapter(model, "second")
    # Another scale: compiled functions have to follow.
    layers[0].lora_alpha = 8.0
    nudge(layers)
    expected = [effective(layer) for layer in layers]

    def fail(self):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Holders, "follow", fail)
        with pytest.raises(error):
            keras_srlora.set_adapter(model, "default")
    for name in ("second", "default", "second"):
        keras_srlora.set_adapter(model, name)
    for layer, kernel in zip(layers, expected):
        assert_close(effective(layer), kernel)


# Adapters.


def test_adapters_outlive_a_part_that_was_merged(rng):
    inner = encoder(name="inner")
    inputs = keras.Input((8,))
    x = keras.layers.Dense(8, name="outer")(inner(inputs))
    model = keras.Model(inputs, x)
    convert(model, names=[*NAMES, "outer"])
    keras_srlora.add_adapter(model, "second")
    nudge([model.get_layer("outer")])
    keras_srlora.merge_srlora(inner)
    expected = effective(model.get_layer("outer"))
    keras_srlora.set_adapter(model, "default")
    keras_srlora.set_adapter(model, "second")
    assert_close(effective(model.get_layer("outer")), expected)
    keras_srlora.combine_adapters(model, {"default": 1.0, "second": 1.0})


def long_run(rng, dtype="float32"):
    """Directions came again: more fused pairs than directions."""
    model = encoder()
    recipe = Recipe(**{**RECIPES["adaptive"].to_dict(), "stop": 1.0})
    convert(model, recipe, rank=1, target_rank=2)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    fit(model, rng, [RecompositionCallback(interval=2)], epochs=4)
    layer = model.get_layer("first")
    assert len(layer.record.fused_a) == 7 > layer.target_rank
    return model


def test_the_adapter_of_a_long_run_can_be_combined(rng, tmp_path):
    model, x = long_run(rng), batch(rng)
    expected = called(model, x)
    path = tmp_path / "long.safetensors"
    keras_srlora.save_adapter(model, path)
    keras_srlora.combine_adapters(model, {"default": 1.0})
    assert_close(called(model, x), expected)
    other = encoder()
    convert(other, RECIPES["adaptive"], rank=3, target_rank=4)
    keras_srlora.add_adapter(other, "long", path)
    assert_close(called(other, x), expected)
    # It goes on with all directions, and can be taken back.
    other.compile("adam", "mse")
    fit(other, rng, [RecompositionCallback(interval=1)])
    keras_srlora.unload_srlora(other)
    assert_close(called(other, x), called(encoder(), x))


@pytest.mark.skipif(BACKEND == "jax", reason="float64 is off by default")
def test_a_sum_in_float64_is_exact():
    inputs = keras.Input((8,), dtype="float64")
    layer = keras.layers.Dense(8, name="first", dtype="float64")
    model = keras.Model(inputs, layer(inputs))
    keras_srlora.enable_srlora(model, 2, target_layer_names=["first"])
    nudge([layer])
    expected = effective(layer)
    keras_srlora.combine_adapters(model, {"default": 1.0})
    assert expected.dtype == "float64"
    # A few roundings of float64; of float32 it was 1e-7.
    np.testing.assert_allclose(effective(layer), expected, atol=1e-13)


# Layers.


@keras.saving.register_keras_serializable("tests")
class Own(keras_srlora.SRLoRADense):
    """A user's subclass."""


def test_a_subclass_can_be_saved_and_merged(rng, tmp_path):
    def build():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((8,))
        return keras.Model(inputs, Own(8, rank=2, name="own")(inputs))

    model, x = build(), batch(rng)
    keras_srlora.initialize_factors(model)
    nudge([model.get_layer("own")])
    expected = called(model, x)
    path = tmp_path / "own.safetensors"
    keras_srlora.save_adapter(model, path, include_trainable=True)
    other = build()
    keras_srlora.load_adapter(other, path)
    assert_close(called(other, x), expected)
    keras_srlora.merge_srlora(model)
    assert_close(called(model, x), expected)
    assert type(model.get_layer("own")) is keras.layers.Dense


# Keras tries again by other names where a layer raises.
@pytest.mark.filterwarnings("ignore:Skipping nested container:UserWarning")
def test_a_quantized_layer_without_room_refuses_a_file(rng, tmp_path):
    def quantized(target_rank):
        model = encoder()
        for name in NAMES:
            model.get_layer(name).quantize("int8")
        convert(model, "lora_restarts", target_rank=target_rank)
        return model

    model, small = quantized(6), quantized(2)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    fit(model, rng, [RecompositionCallback(interval=2)], epochs=4)
    path = tmp_path / "m.weights.h5"
    model.save_weights(path)
    small.compile(keras.optimizers.Adam(0.05), "mse")
    small.optimizer.build(small.trainable_variables)
    layer = small.get_layer("first")
    before = [to_numpy(v) for v in layer.variables]
    with pytest.raises(ValueError, match="has room for 2 pairs.*target_rank"):
        small.load_weights(path)
    for variable, value in zip(layer.variables, before):
        np.testing.assert_array_equal(to_numpy(variable), value)


# Callbacks that merge.


class Merging(keras.callbacks.Callback):
    def __init__(self, event):
        super().__init__()
        setattr(self, event, self.merge)

    def merge(self, *args):
        keras_srlora.merge_srlora(self.model)


@pytest.mark.parametrize("event", ["on_train_end", "on_epoch_end"])
def test_another_callback_may_merge_when_training_ends(event, rng):
    model, x = encoder(), batch(rng)
    convert(model)
    model.compile("adam", "mse")
    fit(model, rng, [Merging(event), RecompositionCallback(interval=2)])
    assert all(type(y) is keras.layers.Dense for y in model.layers[1:])
    assert np.isfinite(called(model, x)).all()
    fit(model, rng, [])


# Functions of a recipe.


def registered(function):
    return keras.saving.register_keras_serializable("tests")(function)


@registered
def positions(singular_values, unused, count):
    return np.arange(count) + 100


@registered
def twice_the_same(pairs, count):
    return np.zeros(2, "int64")


@registered
def never(steps, recompositions):
    return float("nan")


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"order": positions}, "`order`.*1 different numbers out of"),
        ({"selection": twice_the_same}, "`selection`.*1 different numbers"),
        ({"schedule": never}, "`schedule`.*steps above zero.*nan"),
    ],
)
def test_a_function_that_chooses_wrongly_is_told(choice, message, rng):
    model, x = encoder(), batch(rng)
    convert(model, Recipe(**choice))
    model.compile("adam", "mse")
    expected = called(model, x)
    callback = RecompositionCallback(None if "schedule" in choice else 1)
    with pytest.raises(ValueError, match=message):
        fit(model, rng, [callback])
    assert not callback.events
    if "schedule" in choice:
        assert_close(called(model, x), expected)
    keras_srlora.unload_srlora(model)
    assert_close(called(model, x), called(encoder(), x))


@pytest.mark.parametrize("value", ["no", 1, None])
def test_reuse_directions_is_true_or_false(value):
    with pytest.raises(ValueError, match="must be True or False"):
        Recipe(start="lora", scale="as_lora", reuse_directions=value)


# One batch an epoch.


@pytest.mark.parametrize("validated", [False, True])
def test_predictions_are_counted_where_an_epoch_has_one_batch(validated, rng):
    model = encoder()
    changes = {"epochs_per_pair": None}
    recipe = Recipe(**{**RECIPES["adaptive"].to_dict(), **changes})
    convert(model, recipe, rank=1)
    model.compile("adam", "mse")
    callback = RecompositionCallback()
    data = batch(rng, 32), batch(rng, 32)
    other = batch(rng, 4), batch(rng, 4)
    with pytest.warns(UserWarning, match="an epoch has 256 predictions"):
        model.fit(
            *data,
            batch_size=32,
            epochs=1200,
            verbose=0,
            callbacks=[callback, Stopping()],
            validation_data=other if validated else None,
        )
    assert callback.recomposer.pace.state.predictions == 256


class Stopping(keras.callbacks.Callback):
    """Ends a run early, whose length is that of all its epochs."""

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch >= 1


# Loops of PyTorch.


@pytest.mark.skipif(BACKEND != "torch", reason="an optimizer of PyTorch")
class TestLoop:
    def start(self):
        import torch

        model = encoder()
        convert(model, "lora_restarts")
        parameters = [v.value for v in model.trainable_variables]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        recomposer = keras_srlora.Recomposer(model, optimizer, interval=2)
        return model, optimizer, recomposer

    def closure(self, model, optimizer):
        def compute():
            optimizer.zero_grad()
            loss = ops.mean(ops.square(model(np.ones((2, 8), "float32"))))
            loss.backward()
            return loss

        return compute

    def test_nothing_keeps_a_finished_run_alive(self):
        def run():
            model, optimizer, recomposer = self.start()
            for step in range(5):
                recomposer.before_step(step)
                self.closure(model, optimizer)()
                optimizer.step()
            assert recomposer.events
            return [weakref.ref(x) for x in (model, optimizer, recomposer)]

        references = run()
        keras.backend.clear_session()
        gc.unfreeze()
        gc.collect()
        assert [reference() for reference in references] == [None] * 3

    def test_a_closure_is_refused(self):
        model, optimizer, recomposer = self.start()
        before = model.get_weights()
        recomposer.before_step(0)
        with pytest.raises(ValueError, match="closure"):
            optimizer.step(self.closure(model, optimizer))
        for value, expected in zip(model.get_weights(), before):
            np.testing.assert_array_equal(value, expected)
