"""The gate of the default recipe: by itself, and in a run."""

import json

import keras
import numpy as np
import pytest
from support import assert_same_variables
from support import effective

import keras_srlora
from keras_srlora import Recipe
from keras_srlora import RecompositionCallback
from keras_srlora.recipes import gate as gates
from keras_srlora.recipes.definition import RECIPES
from keras_srlora.recipes.gate import FlatLoss

# By itself: 800 steps, windows of 80, a reading each 10.


def answers(loss_at, steps=800, noise=0.0):
    """`{step: answer}` and the gate, for a loss as a function of the step."""
    gate, rng, found = FlatLoss.start(steps, 0), np.random.default_rng(0), {}
    for step in range(1, steps):
        if gate.is_due(step):
            loss = loss_at(step, found) * (1 + noise * rng.standard_normal())
            answer = gate.read(step, 10 * loss, 10)
            if answer:
                found[step] = answer
    return found, gate


def first(step):
    """What a run learns in its first steps."""
    return 2.0 if step <= 10 else 1.0


def test_a_falling_loss_is_left_alone():
    found, gate = answers(lambda step, _: np.exp(-step / 300))
    assert found == {} and gate.phase == gates.WAITING


def test_a_flat_loss_is_probed_and_the_probe_that_pays_opens_the_gate():
    def loss(step, found):
        # A tenth lower with each hundred steps after the probe.
        probed = min(found, default=step)
        return first(step) * (1 - 0.001 * (step - probed))

    found, gate = answers(loss)
    assert list(found.values()) == ["recompose", "go"]
    # Two flat windows, and then one that lies below.
    assert 160 <= min(found) <= 190 < max(found) <= min(found) + 100
    # The probe is judged by a window of losses after it, and by no other.
    assert max(found) >= min(found) + 80
    assert gate.is_open


def test_a_probe_that_brings_nothing_is_the_last():
    found, gate = answers(lambda step, _: first(step))
    assert list(found.values()) == ["recompose"]
    assert gate.phase == gates.STOPPED and not gate.is_due(10**6)
    # Three windows after the probe.
    assert gate.read_at == min(found) + 240


def slow(step):
    """A hundredth lower with each window, probe or not."""
    return first(step) * np.exp(-step / 8000)


def test_a_loss_that_falls_at_its_own_pace_does_not_open_the_gate():
    found, gate = answers(lambda step, _: slow(step))
    # After three windows it may be flat again.
    assert set(found.values()) == {"recompose"} and len(found) == 3
    assert min(np.diff(list(found))) >= 240
    assert gate.phase != gates.STOPPED


@pytest.mark.parametrize("probes", [1, 2])
def test_a_loss_that_falls_faster_after_a_probe_opens_it(probes):
    def loss(step, found):
        probed = list(found)[probes - 1] if len(found) >= probes else step
        return slow(step) * (1 - 0.001 * (step - probed))

    found, gate = answers(loss)
    assert list(found.values()) == probes * ["recompose"] + ["go"]
    assert gate.is_open


def test_the_pace_is_a_line_through_two_windows(rng):
    """By a fit of NumPy to many draws of the two."""
    gate = FlatLoss(80, base=0.99, variance=4e-4, before=1.0)
    gate.before_variance = 1e-4
    draws = rng.normal([[1.0], [0.99]], [[0.01], [0.02]], (2, 20_000))
    lines = np.polyfit([-1, 0], draws, 1)
    for windows in (1.0, 2.5):
        expected = lines[0] * windows + lines[1]
        mean, variance = gate._at_its_pace(windows)
        # Of 20,000 draws: four standard errors, of each.
        spread = expected.std() / 20_000**0.5
        assert abs(mean - expected.mean()) < 4 * spread
        np.testing.assert_allclose(variance, expected.var(), rtol=0.04)
    # A loss that rose is not expected to go on rising.
    gate.before = 0.9
    assert gate._at_its_pace(2.0)[0] == 0.99


def test_the_gate_closes_when_the_loss_falls_no_more():
    def loss(step, found):
        probed = min(found, default=step)
        return first(step) * max(0.9, 1 - 0.001 * (step - probed))

    found, gate = answers(loss)
    assert list(found.values()) == ["recompose", "go"]
    assert gate.phase == gates.STOPPED
    # For good, whatever it is given to read at the ends of epochs.
    for step in range(800, 1600, 10):
        assert gate.read(step, 1.0, 10) is None
        assert gate.phase == gates.STOPPED


@pytest.mark.parametrize("unit", [1e-3, 1e3])
def test_the_unit_of_the_loss_does_not_matter(unit):
    def loss(step, found):
        # The first probe brings nothing: all phases but the last are passed.
        probed = list(found)[1] if len(found) > 1 else step
        return slow(step) * (1 - 0.001 * (step - probed))

    expected, _ = answers(loss, noise=0.005)
    found, _ = answers(lambda *args: unit * loss(*args), noise=0.005)
    assert found == expected and "go" in found.values()


def test_a_loss_that_is_noise_is_not_taken_for_flat():
    """Where a fall could hide in the noise, the run stays as it is."""
    found, _ = answers(lambda step, _: first(step), noise=0.2)
    assert found == {}


def test_a_longer_look_sees_through_noise():
    """Noise of 8 % a reading: two windows are too few, and four are enough."""
    found, _ = answers(lambda step, _: first(step), noise=0.08)
    assert 320 <= min(found) and found[min(found)] == "recompose"


@pytest.mark.parametrize("floor", [0.0, 10.0])
def test_a_floor_below_the_loss_does_not_make_it_flat(floor):
    """Of what there is to learn, an eighth is learnt in each window."""
    found, _ = answers(lambda step, _: floor + np.exp(-step / 600))
    assert found == {}
    # With a twentieth it is flat, in time.
    found, _ = answers(
        lambda step, _: floor + first(step) + np.exp(-step / 200)
    )
    assert min(found) > 200


def test_a_run_that_has_not_begun_to_learn_is_not_flat():
    """A learning rate that warms up; `b` that is still small."""
    found, gate = answers(lambda step, _: 1.0)
    assert found == {} and gate.phase == gates.WAITING


def test_nothing_is_left_to_learn_at_a_small_loss():
    found, gate = answers(lambda step, _: 1.0 if step < 20 else 5e-4)
    assert found == {} and gate.phase == gates.STOPPED


@pytest.mark.parametrize("loss", [np.nan, np.inf, -1.0, 0.0])
def test_odd_losses_do_not_break_it(loss):
    with np.errstate(invalid="ignore"):
        _, gate = answers(lambda step, _: loss)
    assert gate.read(10**4, 0.0, 0) is None


def test_round_trip_through_json():
    _, gate = answers(lambda step, _: first(step), steps=300)
    state = json.loads(json.dumps(gate.to_dict()))
    assert gate.points and FlatLoss.from_dict(state) == gate


# In a run: a rank of 1, where the teacher has 12.


def teacher_data():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2048, 12)).astype("float32")
    return x, (x @ rng.standard_normal((12, 12))).astype("float32")


def student(recipe="adaptive", rate=0.03):
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
    """The default recipe, for a run of 800 steps."""
    return keras_srlora.Recipe(
        **{**RECIPES["adaptive"].to_dict(), "steps_per_pair": 40, **kwargs}
    )


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
        student(recipe, rate=0.003)
        for recipe in ("adaptive", Recipe(start="lora"))
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
    model, callback = student(quick()), RecompositionCallback()
    model.fit(
        *teacher_data(),
        batch_size=2048,
        epochs=300,
        verbose=0,
        callbacks=[callback],
    )
    assert len(callback.events) > 3


def test_an_accumulation_is_finished_before_a_probe():
    model = student(quick())
    adam = keras.optimizers.Adam(0.03, gradient_accumulation_steps=3)
    model.compile(adam, "mse")
    callback = RecompositionCallback()
    train(model, callback, epochs=100)
    steps = [event.step for event in callback.events]
    assert len(steps) > 2 and all(step % 3 == 0 for step in steps)


@pytest.mark.parametrize("epochs", [9, 21])
def test_a_resumed_run_decides_the_same(epochs, tmp_path):
    """Interrupted before the gate opens, and after."""
    whole, callback = student(quick()), RecompositionCallback()
    train(whole, callback)
    first = min(event.step for event in callback.events)

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
    steps = [e.step for e in callback.events if e.step >= 16 * epochs]
    assert [e.step for e in again.events] == steps and len(steps) > 3
    assert (first >= 16 * epochs) == (epochs == 9)
    np.testing.assert_array_equal(
        effective(resumed.get_layer("student")),
        effective(whole.get_layer("student")),
    )


def test_what_the_gate_does_is_printed(capsys):
    train(student(quick()), RecompositionCallback(verbose=1))
    printed = capsys.readouterr().out
    assert "the loss is flat at" in printed and "it paid" in printed


def test_a_model_without_a_mean_loss_is_told(monkeypatch):
    model = student()
    monkeypatch.setattr(
        keras_srlora.callback._keras, "loss_metric", lambda model: None
    )
    with pytest.warns(UserWarning, match="has no mean of its training loss"):
        train(model, RecompositionCallback(), epochs=2)
