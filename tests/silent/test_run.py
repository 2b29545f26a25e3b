"""A run does what it says: schedule, optimizer, other callbacks, numbers."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from keras import ops
from pieces import WIDTH
from pieces import assert_close
from pieces import assert_unchanged
from pieces import batch
from pieces import called
from pieces import collected_warnings
from pieces import convert
from pieces import encoder
from pieces import state_of
from pieces import tuned_encoder
from support import assert_same_variables

import keras_srlora
from keras_srlora import RecompositionCallback

# The schedule of the default recipe does not depend on what the loss is.


def mse(y, prediction):
    return ops.mean(ops.square(y - prediction), axis=-1)


class OwnStep(keras.Model):
    """A `train_step` that reports its loss under a name of its own."""

    def _loss_of(self, x, y):
        return ops.mean(mse(y, self(x, training=True)))

    if keras.backend.backend() == "tensorflow":

        def train_step(self, data):
            import tensorflow as tf

            x, y = data
            with tf.GradientTape() as tape:
                loss = self._loss_of(x, y)
            variables = self.trainable_variables
            self.optimizer.apply(tape.gradient(loss, variables), variables)
            return {"distance": loss}

    elif keras.backend.backend() == "torch":

        def train_step(self, data):
            import torch

            x, y = data
            self.zero_grad()
            loss = self._loss_of(x, y)
            loss.backward()
            variables = self.trainable_variables
            with torch.no_grad():
                self.optimizer.apply([v.value.grad for v in variables])
            return {"distance": loss}

    else:

        def train_step(self, state, data):
            import jax

            x, y = data
            trainable, frozen, optimizer, metrics = state

            def loss_of(trainable, frozen):
                out, frozen = self.stateless_call(trainable, frozen, x)
                return ops.mean(mse(y, out)), frozen

            gradient_of = jax.value_and_grad(loss_of, has_aux=True)
            (loss, frozen), gradients = gradient_of(trainable, frozen)
            trainable, optimizer = self.optimizer.stateless_apply(
                optimizer, gradients, trainable
            )
            return {"distance": loss}, (trainable, frozen, optimizer, metrics)


LOSSES = {
    "minus_5": lambda y, z: mse(y, z) - 5.0,
    "plus_10000": lambda y, z: mse(y, z) + 1e4,
    "times_1000": lambda y, z: 1000.0 * mse(y, z),
    "times_a_millionth": lambda y, z: 1e-6 * mse(y, z),
    "cosine_similarity": "cosine_similarity",
    "own_train_step": "mse",
    "add_loss": None,
    "two_outputs": ["mse", "cosine_similarity"],
}


@keras.saving.register_keras_serializable("silent")
class AddsALoss(keras.layers.Layer):
    def call(self, x):
        self.add_loss(1.0 - ops.mean(x))
        return x


def steps_of(loss="mse", kind=None):
    """Steps of the recompositions of a run of 120 steps, default recipe."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((64, 12)).astype("float32")
    y = x @ rng.standard_normal((12, 12)).astype("float32")
    x, y = np.tile(x, (20, 1)), np.tile(y, (20, 1))
    keras.utils.set_random_seed(5)
    inputs = keras.Input((12,))
    layer = keras_srlora.SRLoRADense(12, rank=1, use_bias=False, name="student")
    # The default recipe, for a short run.
    layer.recipe = dataclasses.replace(
        layer.recipe,
        steps_per_pair=5,
        predictions_per_pair=1,
        lives_per_run=1,
    )
    outputs = layer(inputs)
    if kind == "add_loss":
        outputs = AddsALoss()(outputs)
    if kind == "two_outputs":
        outputs, y = [outputs, keras.layers.Identity()(outputs)], [y, y]
    make = OwnStep if kind == "own_train_step" else keras.Model
    model = make(inputs, outputs)
    model.compile(keras.optimizers.Adam(0.1), loss)
    callback = RecompositionCallback()
    model.fit(
        x,
        y,
        batch_size=64,
        epochs=6,
        shuffle=False,
        verbose=0,
        callbacks=[callback],
    )
    return [event.step for event in callback.events]


@pytest.fixture(scope="module")
def expected_steps():
    steps = steps_of()
    assert steps
    return steps


@pytest.mark.parametrize("kind", LOSSES)
def test_the_loss_does_not_decide_when_the_default_recomposes(
    kind, expected_steps
):
    assert steps_of(LOSSES[kind], kind) == expected_steps


# The optimizer of the model is the user's.


def model_and_data(rng, optimizer, recipe="adaptive"):
    model = encoder()
    convert(model, recipe)
    model.compile(optimizer, "mse")
    return model, batch(rng, 32), batch(rng, 32)


class Look(keras.callbacks.Callback):
    """Reads attributes of the optimizer at many moments of a run."""

    def __init__(self, read):
        super().__init__()
        self.read = read
        self.found = []

    def look(self, *arguments, **keywords):
        self.found.append(self.read(self.model.optimizer))

    on_train_begin = on_epoch_begin = on_epoch_end = look
    on_train_batch_begin = on_train_batch_end = on_train_end = look
    on_test_begin = look


ATTRIBUTES = {
    "beta_1": 0.8,
    "beta_2": 0.95,
    "epsilon": 1e-5,
    "amsgrad": True,
    "weight_decay": 0.01,
    "global_clipnorm": 2.0,
    "use_ema": True,
    "ema_momentum": 0.9,
    "ema_overwrite_frequency": 7,
    "gradient_accumulation_steps": 2,
    "loss_scale_factor": 4.0,
    "name": "mine",
}


def test_every_attribute_of_the_optimizer_is_read_in_fit(rng):
    adam = keras.optimizers.Adam(0.01, **ATTRIBUTES)
    model, x, y = model_and_data(rng, adam)

    def read(optimizer):
        return {
            name: getattr(optimizer, name, "missing") for name in ATTRIBUTES
        }

    look = Look(read)
    callbacks = [RecompositionCallback(), look]
    model.fit(
        x,
        y,
        validation_data=(x, y),
        batch_size=8,
        verbose=0,
        callbacks=callbacks,
    )
    assert len(look.found) > 6
    for found in look.found:
        assert found == ATTRIBUTES
    assert model.optimizer is adam


@pytest.mark.parametrize("name", ["clipnorm", "clipvalue"])
def test_clipping_is_read_in_fit(name, rng):
    adam = keras.optimizers.Adam(0.01, **{name: 0.5})
    model, x, y = model_and_data(rng, adam)
    look = Look(lambda optimizer: getattr(optimizer, name))
    model.fit(x, y, verbose=0, callbacks=[RecompositionCallback(), look])
    assert set(look.found) == {0.5}


def test_attributes_of_other_optimizers_are_read_in_fit(rng):
    sgd = keras.optimizers.SGD(0.01, momentum=0.7, nesterov=True)
    model, x, y = model_and_data(rng, sgd)
    look = Look(lambda optimizer: (optimizer.momentum, optimizer.nesterov))
    model.fit(x, y, verbose=0, callbacks=[look, RecompositionCallback()])
    assert set(look.found) == {(0.7, True)}


@keras.saving.register_keras_serializable("silent")
class Annotated(keras.optimizers.Adam):
    """An optimizer with an attribute and a method of its own."""

    note = "of the class"

    def double(self):
        return 2 * self.beta_1


def test_attributes_and_methods_of_an_own_optimizer_are_read_in_fit(rng):
    model, x, y = model_and_data(rng, Annotated(0.01))
    look = Look(lambda optimizer: (optimizer.note, optimizer.double()))
    model.fit(x, y, verbose=0, callbacks=[RecompositionCallback(), look])
    assert set(look.found) == {("of the class", 1.8)}


WRITTEN = {
    "beta_1": 0.5,
    "beta_2": 0.9,
    "weight_decay": 0.25,
    "clipnorm": 1.5,
    "ema_momentum": 0.7,
    "mark": "new",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_attribute_that_is_written_in_fit_is_the_users(name, rng):
    adam = keras.optimizers.AdamW(0.01, clipnorm=9.0)
    model, x, y = model_and_data(rng, adam)

    class Write(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            setattr(self.model.optimizer, name, WRITTEN[name])

    look = Look(lambda optimizer: getattr(optimizer, name))
    callbacks = [RecompositionCallback(), Write(), look]
    model.fit(x, y, batch_size=8, verbose=0, callbacks=callbacks)
    assert getattr(adam, name) == WRITTEN[name]
    assert look.found[-1] == WRITTEN[name]


def test_a_weight_decay_that_is_written_is_applied(rng):
    """Before the first step, so that it is in the compiled one."""
    results = []
    for decay, callbacks in ((0.9, []), (0.0, [_WriteDecay(0.9)])):
        adam = keras.optimizers.AdamW(0.05, weight_decay=decay)
        model, x, y = model_and_data(rng, adam)
        x, y = x[:16], np.zeros((16, WIDTH), "float32")
        callbacks = [RecompositionCallback(), *callbacks]
        model.fit(
            np.ones_like(x),
            y,
            batch_size=8,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )
        results.append(model.variables)
    assert_same_variables(*results)


class _WriteDecay(keras.callbacks.Callback):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def on_train_begin(self, logs=None):
        self.model.optimizer.weight_decay = self.value


@pytest.mark.parametrize("place", ["before", "behind"])
def test_swap_ema_weights_works_beside_the_callback(place, rng):
    """As without the callback, which recomposes nothing in so short a run."""
    results = []
    x, y = batch(rng, 32), batch(rng, 32)
    for ours in ([], [RecompositionCallback()]):
        swap = [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)]
        adam = keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.9)
        model, *_ = model_and_data(rng, adam)
        callbacks = swap + ours if place == "before" else ours + swap
        model.fit(
            x,
            y,
            batch_size=8,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )
        results.append(model.variables)
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-6)


def test_the_optimizer_inside_of_a_loss_scale_is_the_users(rng):
    adam = keras.optimizers.Adam(0.01, beta_1=0.8)
    outer = keras.optimizers.LossScaleOptimizer(adam)
    model, x, y = model_and_data(rng, outer)
    look = Look(lambda optimizer: optimizer.inner_optimizer.beta_1)
    model.fit(x, y, verbose=0, callbacks=[RecompositionCallback(), look])
    assert set(look.found) == {0.8}
    assert model.optimizer is outer and outer.inner_optimizer is adam


def test_the_optimizer_is_the_users_after_a_run_that_broke_off(rng):
    adam = keras.optimizers.Adam(0.01, beta_1=0.8)
    model, x, y = model_and_data(rng, adam)

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.fit(x, y, verbose=0, callbacks=[RecompositionCallback(), Stop()])
    assert model.optimizer.beta_1 == 0.8
    model.optimizer.clipnorm = 1.0
    assert adam.clipnorm == 1.0
    model.fit(x, y, verbose=0)


def test_a_learning_rate_schedule_is_seen_by_other_callbacks(rng):
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 100)
    adam = keras.optimizers.Adam(schedule)
    model, x, y = model_and_data(rng, adam)
    look = Look(
        lambda optimizer: float(ops.convert_to_numpy(optimizer.learning_rate))
    )
    model.fit(
        x, y, batch_size=8, verbose=0, callbacks=[RecompositionCallback(), look]
    )
    assert look.found[0] == pytest.approx(0.1)
    assert look.found[-1] < 0.1
    with pytest.raises(TypeError):
        model.optimizer.learning_rate = 0.5


# Callbacks outside of `fit`.


@pytest.mark.parametrize("method", ["evaluate", "predict"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_callback_outside_of_fit_leaves_the_model_as_it_is(method, when, rng):
    adam = keras.optimizers.Adam(0.01)
    model, x, y = model_and_data(rng, adam, "paper")
    callback = RecompositionCallback(interval=2)
    if when == "after":
        model.fit(x, y, batch_size=8, verbose=0, callbacks=[callback])
    else:
        model.optimizer.build(model.trainable_variables)
    before = state_of(model), [np.array(v) for v in adam.variables]
    arguments = (x, y) if method == "evaluate" else (x,)
    getattr(model, method)(*arguments, verbose=0, callbacks=[callback])
    assert model.optimizer is adam
    assert_unchanged(model, before[0])
    assert_same_variables(adam.variables, before[1])
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[callback])
    assert callback.events and model.optimizer is adam


@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_kernels_are_decomposed_when_training_starts_and_no_sooner(method, rng):
    layer = keras_srlora.SRLoRADense(3, rank=2, recipe="paper")
    model = keras.Sequential([keras.Input((WIDTH,)), layer])
    model.compile("adam", "mse")
    before, x, y = state_of(model), batch(rng), batch(rng, width=3)
    arguments = (x, y) if method == "evaluate" else (x,)
    getattr(model, method)(
        *arguments, verbose=0, callbacks=[RecompositionCallback()]
    )
    assert not layer.initialized
    assert_unchanged(model, before)


def test_a_model_without_optimizer_predicts_with_the_callback(rng):
    model = tuned_encoder()
    x = batch(rng)
    out = model.predict(x, verbose=0, callbacks=[RecompositionCallback()])
    assert_close(out, called(model, x))


def test_a_frozen_model_is_evaluated_with_the_callback(rng):
    model = tuned_encoder()
    model.trainable = False
    model.compile("adam", "mse")
    x = batch(rng)
    model.evaluate(x, x, verbose=0, callbacks=[RecompositionCallback()])


# Numbers of NumPy.

INTEGERS = [np.int64, np.int32, np.uint8]
FLOATS = [np.float32, np.float64, np.float16]


@pytest.mark.parametrize("kind", INTEGERS)
def test_an_interval_may_be_an_integer_of_numpy(kind, rng):
    model, x, y = model_and_data(rng, "adam", "paper")
    callback = RecompositionCallback(interval=kind(2), verbose=kind(0))
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[callback])
    assert {event.step for event in callback.events} == {2}
    json.dumps(callback.to_dict())


@pytest.mark.parametrize("kind", [*FLOATS, np.int64])
def test_fractions_may_be_numbers_of_numpy(kind, rng):
    model, x, y = model_and_data(rng, "adam", "paper")
    beta = kind(0) if kind is np.int64 else kind(0.85)
    recipe = keras_srlora.Recipe(score="magnitude", beta1=beta, beta2=beta)
    callback = RecompositionCallback(2, kind(1), recipe)
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[callback])
    assert callback.events
    json.dumps(callback.to_dict())
    keras_srlora.Sensitivity(keras_srlora.initialize_factors(model), beta, beta)


@pytest.mark.parametrize("kind", INTEGERS)
def test_ranks_may_be_integers_of_numpy(kind, rng, tmp_path):
    """To the end: configs and files are JSON."""
    model = encoder()
    pattern = {"first": kind(3)}
    keras_srlora.enable_srlora(
        model,
        kind(2),
        target_rank=kind(6),
        lora_alpha=kind(4),
        target_layer_names=["first", "second"],
        rank_pattern=pattern,
        verbose=kind(0),
    )
    _round_trips(model, rng, tmp_path)


@pytest.mark.parametrize("kind", FLOATS)
def test_a_lora_alpha_may_be_a_float_of_numpy(kind, rng, tmp_path):
    model = encoder()
    layers = convert(model, lora_alpha=kind(3))
    assert layers[0].scale == 1.5
    _round_trips(model, rng, tmp_path)


def _round_trips(model, rng, tmp_path):
    x = batch(rng)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_close(called(loaded, x), called(model, x))
    keras_srlora.save_adapter(model, tmp_path / "a.safetensors")
    again = encoder()
    keras_srlora.load_adapter(again, tmp_path / "a.safetensors")
    assert_close(called(again, x), called(model, x))
    json.loads(model.to_json())


@pytest.mark.parametrize("kind", INTEGERS)
def test_a_layer_takes_numbers_of_numpy(kind, rng, tmp_path):
    layer = keras_srlora.SRLoRADense(
        3, rank=kind(2), target_rank=kind(4), lora_alpha=np.float32(2)
    )
    model = keras.Sequential([keras.Input((WIDTH,)), layer])
    x = batch(rng)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_close(called(loaded, x), called(model, x))


@pytest.mark.parametrize("kind", INTEGERS)
def test_a_recipe_takes_numbers_of_numpy(kind, rng, tmp_path):
    recipe = keras_srlora.Recipe(
        fusion_ratio=np.float32(0.5),
        steps_per_pair=kind(3),
        stop=np.float64(0.5),
    )
    json.dumps(recipe.to_dict())
    model = encoder()
    convert(model, recipe)
    _round_trips(model, rng, tmp_path)


@pytest.mark.parametrize("kind", INTEGERS)
def test_exports_take_an_integer_of_numpy(kind, tmp_path):
    model = tuned_encoder()
    rank, names, _ = keras_srlora.export_lora(
        model, tmp_path / "a.lora.h5", kind(2)
    )
    assert rank == 2 and names == ["first", "second"]
    modules = {"first": "one", "second": "two"}
    keras_srlora.export_peft(model, tmp_path / "peft", kind(2), modules)
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert config["r"] == 2


@pytest.mark.parametrize("kind", INTEGERS)
def test_a_step_may_be_an_integer_of_numpy(kind, rng):
    model = tuned_encoder()
    adam = keras.optimizers.Adam()
    optimizer = keras_srlora.SensitivityOptimizer(adam, model)
    variables = model.trainable_variables
    optimizer.build(variables)
    gradients = [ops.ones(v.shape) for v in variables]
    optimizer.apply(gradients, variables)
    events = keras_srlora.recompose(optimizer.sensitivity, optimizer, kind(3))
    assert {event.step for event in events} == {3}
    json.dumps([event.to_dict() for event in events])


@pytest.mark.parametrize("value", [True, 2.5, "2", 0, -1, None])
def test_what_is_no_positive_integer_is_still_refused(value):
    model = encoder()
    if value is not None:
        with pytest.raises(ValueError, match="interval"):
            RecompositionCallback(interval=value)
    with pytest.raises(ValueError, match="rank"):
        keras_srlora.enable_srlora(model, value, target_layer_names=["first"])
    with collected_warnings():
        convert(model)


# Half precision, weights included.


@pytest.mark.parametrize("recipe", ["paper", "lora_restarts"])
def test_a_run_in_float16_is_right(recipe, rng):
    """Finite, as good as in float32, and itself after switching and merging."""
    x, y = batch(rng, 64), batch(rng, 64) / 2
    weights, losses = encoder().get_weights(), {}
    for dtype in ("float32", "float16"):
        inputs = keras.Input((WIDTH,), dtype=dtype)
        hidden = keras.layers.Dense(WIDTH, "tanh", name="first", dtype=dtype)
        outer = keras.layers.Dense(WIDTH, name="second", dtype=dtype)
        model = keras.Model(inputs, outer(hidden(inputs)))
        # An initializer draws other numbers in float16.
        model.set_weights(weights)
        data = x.astype(dtype), y.astype(dtype)
        pretrained = called(model, data[0])
        convert(model, recipe)
        assert_close(called(model, data[0]), pretrained, 5e-3)
        model.compile(keras.optimizers.SGD(0.2), "mse")
        callback = RecompositionCallback(interval=3)
        with collected_warnings():
            history = model.fit(
                *data,
                batch_size=8,
                epochs=4,
                shuffle=False,
                verbose=0,
                callbacks=[callback],
            )
        losses[dtype] = history.history["loss"]
        assert callback.events
    # LoRA's pairs start with other random numbers in float16.
    tolerance = 0.03 if recipe == "paper" else 0.1
    np.testing.assert_allclose(
        losses["float16"], losses["float32"], rtol=tolerance
    )
    tuned = called(model, data[0])
    assert tuned.dtype == "float16"
    with keras_srlora.adapter_disabled(model):
        assert_close(called(model, data[0]), pretrained, 5e-3)
    np.testing.assert_array_equal(called(model, data[0]), tuned)
    keras_srlora.merge_srlora(model)
    assert_close(called(model, data[0]), tuned, 5e-3)
