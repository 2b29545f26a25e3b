"""What people report who fine-tune with Keras, KerasHub and PEFT."""

import copy

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops
from pieces import NAMES
from pieces import WIDTH
from pieces import assert_close
from pieces import batch
from pieces import blocks
from pieces import called
from pieces import collected_warnings
from pieces import convert
from pieces import differ
from pieces import encoder
from pieces import fit
from pieces import ids
from pieces import nudge
from pieces import pooled
from pieces import predicted
from pieces import tuned_encoder
from support import functions_reading
from support import to_numpy

import keras_srlora

BACKEND = keras.backend.backend()
on_jax = pytest.mark.skipif(BACKEND != "jax", reason="a function of JAX")


def with_head(inner=None, count=1):
    inner = inner or encoder()
    inputs = keras.Input((WIDTH,))
    x = inner(inputs)
    keras.utils.set_random_seed(8)
    heads = [layers.Dense(3, name=f"head_{i}")(x) for i in range(count)]
    return keras.Model(inputs, heads if count > 1 else heads[0])


def factors(model):
    return [to_numpy(v) for v in model.trainable_variables if "lora" in v.path]


def trained(rng, callbacks=(), compile_args=(), epochs=2, **fit_args):
    """A model after a run, and what it computes."""
    keras.utils.set_random_seed(9)
    model = with_head()
    convert(model, recipe="adaptive")
    arguments = {"optimizer": keras.optimizers.Adam(0.05), "loss": "mse"}
    model.compile(**arguments, **dict(compile_args))
    x, y = batch(rng, 32), batch(rng, 32, 3)
    callbacks = [keras_srlora.RecompositionCallback(interval=3), *callbacks]
    fit(model, (x, y), callbacks, epochs, **fit_args)
    return model, x


def same_rng():
    return np.random.default_rng(5)


# A user's own `jax.jit` functions.


@on_jax
@pytest.mark.parametrize("change", ["merge_srlora", "unload_srlora", "load"])
def test_a_jitted_function_follows_a_change(change, rng, tmp_path):
    import functools

    import jax

    model, x = tuned_encoder(), batch(rng)
    keras_srlora.save_adapter(model, tmp_path / "a.safetensors")
    by_closure = jax.jit(lambda x: model(x, training=False))
    by_part = jax.jit(functools.partial(model.__call__, training=False))
    nested = jax.jit(lambda x: by_closure(x) + 0.0)
    for function in (by_closure, by_part, nested):
        assert_close(function(x), called(model, x))
    if change == "load":
        with collected_warnings():
            keras_srlora.unload_srlora(model)
        keras_srlora.load_adapter(model, tmp_path / "a.safetensors")
    else:
        getattr(keras_srlora, change)(model)
    nudged = called(model, x)
    for function in (by_closure, by_part, nested):
        assert_close(function(x), nudged)


@on_jax
def test_a_jitted_stateless_call_follows_another_scale(rng, tmp_path):
    import jax

    model, x = tuned_encoder(), batch(rng)
    other = tuned_encoder(lora_alpha=6.0)
    keras_srlora.save_adapter(other, tmp_path / "b.safetensors")

    @jax.jit
    def function(trainable, others, x):
        return model.stateless_call(trainable, others, x)[0]

    def outputs():
        return function(
            [v.value for v in model.trainable_variables],
            [v.value for v in model.non_trainable_variables],
            x,
        )

    assert_close(outputs(), called(model, x))
    keras_srlora.add_adapter(model, "b", tmp_path / "b.safetensors")
    assert_close(outputs(), called(other, x))
    keras_srlora.set_adapter(model, "default")
    assert_close(outputs(), called(model, x))
    keras_srlora.merge_srlora(model)
    assert_close(outputs(), called(model, x))


@on_jax
@pytest.mark.parametrize("name", ["__call__", "stateless_call"])
def test_a_jitted_method_of_a_model_follows_a_change(name, rng):
    import jax

    function = jax.jit(getattr(tuned_encoder(), name))
    found = functions_reading([])
    assert any(x is function for x in found)


@on_jax
def test_functions_of_libraries_are_left_alone(rng):
    import jax.numpy as jnp

    jnp.linalg.norm(jnp.ones(3))
    for function in functions_reading([]):
        module = getattr(function.__wrapped__, "__module__", "")
        assert not str(module).startswith(("jax.", "keras."))


# Callbacks that use the model while it is trained.


class AtEpochEnd(keras.callbacks.Callback):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def on_epoch_end(self, epoch, logs=None):
        self.function(self.model)


def look_at_pretrained(model):
    x = batch(np.random.default_rng(0))
    with keras_srlora.adapter_disabled(model):
        predicted(model, x)


def test_switching_off_in_a_callback_changes_no_run():
    expected, _ = trained(same_rng())
    model, _ = trained(same_rng(), [AtEpochEnd(look_at_pretrained)])
    assert_close(factors(model), factors(expected))


def test_saving_in_a_callback_changes_no_run_and_is_exact(tmp_path):
    path = tmp_path / "a.safetensors"
    expected, x = trained(same_rng())
    model, _ = trained(
        same_rng(),
        [
            AtEpochEnd(
                lambda model: keras_srlora.save_adapter(
                    model, path, include_trainable=True
                )
            )
        ],
    )
    assert_close(factors(model), factors(expected))
    keras.utils.set_random_seed(9)
    fresh = with_head()
    keras_srlora.load_adapter(fresh, path)
    assert_close(called(fresh, x), called(model, x))


def test_switching_adapters_in_a_callback_is_whole(rng):
    """Training goes on with the one that is current, and harms no other."""
    seen = {}

    def switch(model):
        name = keras_srlora.list_adapters(model)
        if len(name) == 1:
            seen["default"] = called(model, x)
            keras_srlora.add_adapter(model, "b")
        else:
            seen["b"] = called(model, x)
            keras_srlora.set_adapter(model, "default")

    model = encoder()
    convert(model, recipe="adaptive")
    x, y = batch(rng, 32), batch(rng, 32)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.fit(x, y, verbose=0, epochs=2, callbacks=[AtEpochEnd(switch)])
    assert differ(seen["b"], seen["default"])
    assert_close(called(model, x), seen["default"])
    keras_srlora.set_adapter(model, "b")
    assert_close(called(model, x), seen["b"])


@pytest.mark.parametrize("back", ["merge_srlora", "unload_srlora"])
def test_merging_in_the_middle_of_a_run_is_told(back, rng):
    with pytest.raises((RuntimeError, ValueError)) as caught:
        trained(rng, [AtEpochEnd(getattr(keras_srlora, back))], epochs=3)
    assert "during the run" in str(caught.value)


@pytest.mark.parametrize("back", ["merge_srlora", "unload_srlora"])
def test_a_recomposer_of_a_merged_model_is_told(back, rng):
    model = encoder()
    convert(model, recipe="lora_restarts")
    adam = keras.optimizers.Adam(0.01)
    recomposer = keras_srlora.Recomposer(model, adam, total_steps=9, interval=2)
    getattr(keras_srlora, back)(model)
    with pytest.raises(RuntimeError, match="removed"):
        for step in range(9):
            recomposer.before_step(step)


def test_one_callback_follows_two_models_by_turns(rng):
    callback = keras_srlora.RecompositionCallback(interval=2)
    for model in (tuned_encoder(), tuned_encoder(seed=8)):
        model.compile("adam", "mse")
        x = batch(rng, 32)
        model.fit(x, x, batch_size=8, verbose=0, callbacks=[callback])
        assert callback.events
        assert {e.layer for e in callback.events} <= set(NAMES)
        assert callback.recomposer.layers[0] in model.layers


def own_fit(model, callbacks):
    x = batch(np.random.default_rng(0), 32)
    model.fit(x, x, batch_size=8, epochs=2, verbose=0, callbacks=callbacks)


class AtEpochBegin(AtEpochEnd):
    def on_epoch_begin(self, epoch, logs=None):
        self.function(self.model)

    def on_epoch_end(self, epoch, logs=None):
        pass


def ready(seed=7):
    model = tuned_encoder("lora_restarts", seed=seed)
    model.compile("adam", "mse")
    return model


def test_one_callback_in_two_fits_at_once_is_told(rng):
    """A `fit` inside of another one; each goes on with one of its own."""
    outer, inner, x = ready(), ready(8), batch(rng)
    callback = keras_srlora.RecompositionCallback(interval=2)
    nested = AtEpochBegin(lambda _: own_fit(inner, [callback]))
    before = factors(inner)
    with pytest.raises(ValueError, match="has not ended"):
        own_fit(outer, [callback, nested])
    assert_close(factors(inner), before)
    own_callback = keras_srlora.RecompositionCallback(interval=2)
    nested = AtEpochBegin(lambda _: own_fit(inner, [own_callback]))
    callback = keras_srlora.RecompositionCallback(interval=2)
    own_fit(outer, [callback, nested])
    for model, of_model in ((outer, callback), (inner, own_callback)):
        assert of_model.events
        assert isinstance(model.optimizer, keras.optimizers.Adam)
        assert not hasattr(model.optimizer, "sensitivity")
        assert_close(predicted(model, x), called(model, x))


def test_a_model_that_is_fitted_within_its_own_fit_is_told():
    model = ready()
    callback = keras_srlora.RecompositionCallback(interval=2)
    nested = AtEpochBegin(lambda model: own_fit(model, [callback]))
    with pytest.raises(RuntimeError, match="nor `fit`"):
        own_fit(model, [callback, nested])


@pytest.mark.parametrize("same", [True, False])
def test_two_callbacks_in_one_fit_are_told(same, rng):
    """They would fuse the same pairs by turns, with the scores of no step."""
    model = ready()
    first = keras_srlora.RecompositionCallback(interval=2)
    second = keras_srlora.RecompositionCallback(interval=2)
    before = factors(model)
    with pytest.raises(ValueError, match="a single one"):
        own_fit(model, [first, first if same else second])
    assert_close(factors(model), before)
    assert not hasattr(model.optimizer, "sensitivity")
    for callback in (first, second, first):
        own_fit(model, [callback])
        assert callback.events


# How `fit` is called.


@pytest.mark.parametrize("weights", ["sample_weight", "class_weight", "none"])
def test_a_callback_that_only_watches_changes_no_step(weights, rng):
    results = []
    x, y = batch(rng, 32), np.arange(32) % 3
    extra = {
        "sample_weight": {"sample_weight": np.linspace(0, 1, 32)},
        "class_weight": {"class_weight": {0: 1.0, 1: 3.0, 2: 0.1}},
        "none": {},
    }[weights]
    for callbacks in ([], [keras_srlora.RecompositionCallback(interval=99)]):
        keras.utils.set_random_seed(3)
        model = with_head()
        convert(model, recipe="adaptive")
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.05), loss)
        with collected_warnings():
            model.fit(
                x,
                y,
                batch_size=8,
                shuffle=False,
                verbose=0,
                callbacks=callbacks,
                **extra,
            )
        results.append(factors(model))
    assert_close(*results)


HOW = {
    "eager": {"run_eagerly": True},
    "jit": {"jit_compile": True},
    "executions": {"steps_per_execution": 2},
}
if BACKEND == "torch":
    # `torch.compile` takes minutes, and Keras refuses executions there.
    for name in ("jit", "executions"):
        del HOW[name]


@pytest.mark.parametrize("how", HOW)
def test_the_way_to_run_a_step_changes_no_run(how):
    expected, x = trained(same_rng())
    model, _ = trained(same_rng(), compile_args=HOW[how])
    if how != "executions":  # which recompose later
        assert_close(called(model, x), called(expected, x), 1e-4)
    assert_close(predicted(model, x), called(model, x))
    keras_srlora.merge_srlora(model)
    assert_close(predicted(model, x), called(model, x))
    model.fit(x, predicted(model, x), verbose=0)


def test_several_outputs_with_losses_of_their_own(rng):
    model, x = with_head(count=2), batch(rng, 32)
    convert(model, recipe="lora_restarts")
    model.compile(
        "adam", ["mse", "mae"], loss_weights=[1.0, 0.5], metrics=[["mae"], []]
    )
    callback = keras_srlora.RecompositionCallback(interval=2)
    y = batch(rng, 32, 3)
    model.fit(
        x, [y, y], batch_size=8, epochs=3, verbose=0, callbacks=[callback]
    )
    assert len(callback.events) > 0
    expected = called(model, x)
    assert_close(predicted(model, x), expected)
    keras_srlora.merge_srlora(model)
    assert_close(called(model, x), expected)


def test_training_on_batches_follows_a_change(rng):
    model, x, y = with_head(), batch(rng, 8), batch(rng, 8, 3)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.train_on_batch(x, y)
    convert(model, recipe="adaptive")
    frozen = to_numpy(model.layers[1].get_layer("first").frozen.variable)
    for _ in range(3):
        loss = float(model.train_on_batch(x, y))
        assert loss > float(model.test_on_batch(x, y))
    assert_close(
        to_numpy(model.layers[1].get_layer("first").frozen.variable), frozen
    )
    expected = called(model, x)
    keras_srlora.merge_srlora(model)
    assert_close(model.predict_on_batch(x), expected)
    assert float(model.train_on_batch(x, y)) > float(model.test_on_batch(x, y))


# What a layer has beside its kernel.


def regularized():
    keras.utils.set_random_seed(7)
    inputs = keras.Input((WIDTH,))
    x = layers.Dense(
        WIDTH,
        activation=layers.LeakyReLU(0.3),
        activity_regularizer=keras.regularizers.L1(0.1),
        bias_regularizer="l2",
        name="first",
    )(inputs)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def test_the_loss_of_activities_stays(rng, tmp_path):
    model, x = regularized(), batch(rng, 8)
    y = batch(rng, 8, 3)
    model.compile("sgd", "mse")
    expected = model.evaluate(x, y, verbose=0)
    convert(model, names=["first"], recipe="adaptive")
    assert model.evaluate(x, y, verbose=0) == pytest.approx(expected, rel=1e-4)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.evaluate(x, y, verbose=0) == pytest.approx(expected, rel=1e-4)
    keras_srlora.merge_srlora(model)
    assert model.evaluate(x, y, verbose=0) == pytest.approx(expected, rel=1e-4)


def masked():
    keras.utils.set_random_seed(7)
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(20, WIDTH, mask_zero=True, name="embedding")(inputs)
    x = layers.Dense(WIDTH, "tanh", name="first")(x)
    x = layers.TimeDistributed(layers.Dense(WIDTH, name="second"))(x)
    return keras.Model(inputs, layers.GlobalAveragePooling1D()(x))


@pytest.mark.parametrize("names", [["first"], ["embedding"], ["second"]])
def test_a_mask_reaches_what_comes_behind(names, rng):
    model = masked()
    x = np.maximum(ids(rng), 1)
    x[:, 3:] = 0
    expected = called(model, x)
    made = convert(model, names=names, recipe="adaptive")
    assert_close(called(model, x), expected)
    nudge(made)
    tuned = called(model, x)
    # What is padded is not seen.
    short = ops.mean(
        keras.Model(model.input, model.layers[-2].output)(x)[:, :3], axis=1
    )
    assert_close(tuned, short)
    assert_close(predicted(model, x), tuned)


# PyTorch takes no dot in the name of a parameter.
UNICODE = ["größe-α" if BACKEND == "torch" else "größe.α", "層 1"]


def test_names_in_any_script(rng, tmp_path):
    def model():
        keras.utils.set_random_seed(7)
        inputs = keras.Input((WIDTH,))
        x = inputs
        for name in UNICODE:
            x = layers.Dense(WIDTH, "tanh", name=name)(x)
        return keras.Model(inputs, x)

    directions = tmp_path / "verzeichnis ü.safetensors"
    tuned, x = model(), batch(rng)
    nudge(convert(tuned, names=UNICODE, directions=directions))
    keras_srlora.save_adapter(tuned, tmp_path / "äpfel.safetensors")
    fresh = model()
    keras_srlora.load_adapter(fresh, tmp_path / "äpfel.safetensors")
    assert_close(called(fresh, x), called(tuned, x))
    tuned.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_close(called(loaded, x), called(tuned, x))
    again = convert(model(), names=UNICODE, directions=directions)
    assert len(again) == 2


# Files and copies.


def test_weights_of_a_converted_model_are_no_plain_models(rng, tmp_path):
    """Told, or right: the frozen kernel alone is neither."""
    model = blocks(lambda x: layers.Dense(3, name="head")(pooled(x)))
    with collected_warnings():
        nudge(keras_srlora.enable_srlora(model, 2, recipe="paper"))
    model.save_weights(tmp_path / "model.weights.h5")
    plain = blocks(lambda x: layers.Dense(3, name="head")(pooled(x)))
    with pytest.raises(ValueError, match="variables"):
        plain.load_weights(tmp_path / "model.weights.h5")


def test_plain_weights_in_a_converted_model_start_anew(rng, tmp_path):
    def head(x):
        return layers.Dense(3, name="head")(pooled(x))

    plain, model = blocks(head, seed=3), blocks(head)
    x = ids(rng)
    plain.save_weights(tmp_path / "plain.weights.h5")
    with collected_warnings():
        nudge(keras_srlora.enable_srlora(model, 2, recipe="paper"))
        keras_srlora.load_plain_weights(model, tmp_path / "plain.weights.h5")
    assert_close(called(model, x), called(plain, x))
    keras_srlora.initialize_factors(model)
    assert_close(called(model, x), called(plain, x))


def test_a_deep_copy_is_another_model(rng):
    model, x = tuned_encoder(), batch(rng)
    expected = called(model, x)
    copied = copy.deepcopy(model)
    assert_close(called(copied, x), expected)
    nudge([y for y in copied.layers if hasattr(y, "factors")])
    assert differ(called(copied, x), expected)
    assert_close(called(model, x), expected)
    keras_srlora.unload_srlora(copied)
    assert_close(called(model, x), expected)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a SavedModel")
@pytest.mark.parametrize("merged", [False, True])
def test_an_exported_model_computes_the_same(merged, rng, tmp_path):
    import tensorflow as tf

    model, x = tuned_encoder(), batch(rng)
    if merged:
        keras_srlora.merge_srlora(model)
    model.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(tmp_path / "exported")
    assert_close(served.serve(x), called(model, x))


def test_a_clone_without_dropout_has_the_layers(rng):
    keras.utils.set_random_seed(7)
    inputs = keras.Input((WIDTH,))
    x = layers.Dense(WIDTH, "tanh", name="first")(inputs)
    x = layers.Dropout(0.9)(x)
    model = keras.Model(inputs, layers.Dense(WIDTH, name="second")(x))
    convert(model, recipe="adaptive")

    def without(layer):
        if isinstance(layer, layers.Dropout):
            return layers.Identity(name=layer.name)
        return layer.__class__.from_config(layer.get_config())

    clone = keras.models.clone_model(model, clone_function=without)
    kinds = [type(layer).__name__ for layer in clone.layers]
    assert kinds.count("SRLoRADense") == 2 and "Dropout" not in kinds
    assert len(clone.trainable_variables) == len(model.trainable_variables)


def test_a_model_that_is_frozen_is_merged_whole(rng):
    model, x = with_head(tuned_encoder()), batch(rng)
    expected = called(model, x)
    model.trainable = False
    keras_srlora.merge_srlora(model)
    assert_close(called(model, x), expected)
    model.trainable = True
    assert len(model.trainable_variables) == 6


def test_an_optimizer_for_the_head_and_one_for_the_factors(rng):
    """A loop with two of them: the run follows that of the factors."""
    model = with_head()
    made = convert(model, recipe="lora_restarts")
    own = [v for layer in made for v in layer.factors]
    rest = [v for v in model.trainable_variables if "lora" not in v.path]
    adam, sgd = keras.optimizers.Adam(0.05), keras.optimizers.SGD(0.1)
    adam.build(own)
    sgd.build(rest)
    recomposer = keras_srlora.Recomposer(model, adam, interval=2)
    for step in range(5):
        recomposer.before_step(step)
        recomposer.optimizer.apply([ops.ones(v.shape) for v in own], own)
        sgd.apply([ops.ones(v.shape) for v in rest], rest)
    assert {e.layer for e in recomposer.events} == {x.path for x in made}
    assert int(adam.iterations) == int(sgd.iterations) == 5
