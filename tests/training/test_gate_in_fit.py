"""The gate that waits for a flat loss, in a run."""

import keras
import numpy as np
import pytest
from support import GATED
from support import assert_same_variables
from support import effective

import keras_srlora
from keras_srlora import Recipe
from keras_srlora import RecompositionCallback
from keras_srlora.training import losses

# A rank of 1, where the teacher has 12.


def teacher_data():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2048, 12)).astype("float32")
    return x, (x @ rng.standard_normal((12, 12))).astype("float32")


def student(recipe=GATED, rate=0.03):
    keras.utils.set_random_seed(5)
    inputs = keras.Input((12,))
    layer = keras_srlora.SRLoRADense(
        12, rank=1, use_bias=False, name="student", recipe=recipe
    )
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.Adam(rate), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def train(model, callback, epochs=50, **kwargs):
    """16 steps an epoch."""
    return model.fit(
        *teacher_data(),
        batch_size=128,
        epochs=epochs,
        verbose=0,
        shuffle=False,
        callbacks=[callback],
        **kwargs,
    ).history["loss"]


def quick(**kwargs):
    """The recipe with the gate, for a run of 800 steps."""
    return keras_srlora.Recipe(
        **{**GATED.to_dict(), "steps_per_pair": 40, **kwargs}
    )


@pytest.mark.slow
def test_where_the_rank_limits_the_run_it_is_recomposed():
    callback = RecompositionCallback()
    losses = train(student(quick()), callback)
    plain = train(
        student(Recipe(start="lora", stop=1e-3)), keras.callbacks.Callback()
    )
    steps = [event.step for event in callback.events]
    # The probe, and then the others in a row.
    assert len(steps) >= 5 and steps[1] - steps[0] > steps[2] - steps[1] >= 40
    assert max(steps) < 0.8 * 800
    assert losses[-1] < 0.5 * plain[-1]


def test_where_the_loss_falls_the_run_is_plain_lora_to_the_bit():
    """8 epochs are too short for the loss to become flat at this rate."""
    callback = RecompositionCallback()
    model, plain = (
        student(recipe, rate=0.003) for recipe in (GATED, Recipe(start="lora"))
    )
    losses = train(model, callback, epochs=8)
    assert callback.events == []
    assert losses == train(plain, keras.callbacks.Callback(), epochs=8)
    assert_same_variables(model.variables, plain.variables)


def test_an_interval_is_obeyed_at_once():
    callback = RecompositionCallback(interval=50)
    train(student(), callback, epochs=10)
    assert [event.step for event in callback.events] == [50, 100]


def test_an_epoch_of_a_single_step_is_read_at_its_end():
    recipe = quick(steps_per_pair=15)
    model, callback = student(recipe), RecompositionCallback()
    model.fit(
        *teacher_data(),
        batch_size=2048,
        epochs=160,
        verbose=0,
        callbacks=[callback],
    )
    assert len(callback.events) > 3


@pytest.mark.slow
def test_an_accumulation_is_finished_before_a_probe():
    model = student(quick())
    adam = keras.optimizers.Adam(0.03, gradient_accumulation_steps=3)
    model.compile(adam, "mse")
    callback = RecompositionCallback()
    train(model, callback, epochs=100)
    steps = [event.step for event in callback.events]
    assert len(steps) > 2 and all(step % 3 == 0 for step in steps)


@pytest.fixture(scope="module")
def uninterrupted():
    """`(its steps of recompositions, the effective kernel at its end)`."""
    model, callback = student(quick()), RecompositionCallback()
    train(model, callback)
    steps = [event.step for event in callback.events]
    return steps, effective(model.get_layer("student"))


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [9, 23])
def test_a_resumed_run_decides_the_same(epochs, uninterrupted, tmp_path):
    """Interrupted before the gate opens, and after."""
    whole, expected = uninterrupted

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == epochs - 1:
                self.model.save_weights(tmp_path / "x.weights.h5")
                raise KeyboardInterrupt

    interrupted = student(quick())
    with pytest.raises(KeyboardInterrupt):
        interrupted.fit(
            *teacher_data(),
            batch_size=128,
            epochs=50,
            verbose=0,
            shuffle=False,
            callbacks=[RecompositionCallback(), Interrupt()],
        )
    resumed = student(quick())
    resumed.load_weights(tmp_path / "x.weights.h5")
    again = RecompositionCallback()
    train(resumed, again, initial_epoch=epochs)
    steps = [step for step in whole if step >= 16 * epochs]
    assert [e.step for e in again.events] == steps and len(steps) > 3
    assert (whole[0] >= 16 * epochs) == (epochs == 9)
    np.testing.assert_array_equal(
        effective(resumed.get_layer("student")), expected
    )


@pytest.mark.slow
def test_what_the_gate_does_is_printed(capsys):
    train(student(quick()), RecompositionCallback(verbose=1))
    printed = capsys.readouterr().out
    assert "the loss is flat at" in printed and "it paid" in printed


def test_a_model_without_a_mean_loss_is_told(monkeypatch):
    class WithoutLoss(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            del logs["loss"]

    monkeypatch.setattr(losses, "_loss_so_far", lambda model: (0.0, 0.0))
    callback = RecompositionCallback()
    with pytest.warns(UserWarning, match="finds no mean of the training loss"):
        student().fit(
            *teacher_data(),
            batch_size=128,
            epochs=2,
            verbose=0,
            callbacks=[WithoutLoss(), callback],
        )
    assert callback.events == []
