"""The gate "flat_loss": no unit, no constant, and a loss that it can read."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops
from pieces import WIDTH
from pieces import batch
from pieces import collected_warnings
from test_run import OwnStep

import keras_srlora
from keras_srlora import RecompositionCallback
from keras_srlora.recipes.definition import RECIPES
from keras_srlora.recipes.gate import FlatLoss
from keras_srlora.training.losses import LossReader


def answers(unit, constant, noise=0.003):
    """What the gate answers in a run of 800 steps, and its last phase."""
    gate, rng, found = FlatLoss.start(800, 0), np.random.default_rng(0), {}
    for step in range(1, 800):
        if not gate.is_due(step):
            continue
        loss = 0.2 + np.exp(-step / 60)
        if found:
            loss -= 0.002 * (step - min(found))
        loss += noise * rng.standard_normal()
        answer = gate.read(step, 10 * (unit * loss + constant), 10)
        if answer:
            found[step] = answer
    return found, gate.phase


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("constant", [-100.0, -0.2, 0.0, 100.0])
def test_neither_unit_nor_constant_changes_a_decision(unit, constant):
    expected = answers(1.0, 0.0)
    assert set(expected[0].values()) == {"recompose", "go"}
    assert answers(unit, constant * unit) == expected


def test_a_loss_whose_first_reading_is_zero_is_compared_with_it():
    shifted = answers(1.0, -(0.2 + np.exp(-10 / 60)), noise=0.0)
    assert shifted == answers(1.0, 0.0, noise=0.0)


# In a run.

GATED = dataclasses.replace(
    RECIPES["lora_restarts"], gate="flat_loss", steps_per_pair=5, stop=0.8
)


def mse(y, prediction):
    return ops.mean(ops.square(y - prediction), axis=-1)


def steps_of(loss):
    """Steps of the recompositions of a run of 120 steps."""
    rng = np.random.default_rng(1)
    x = np.tile(rng.standard_normal((64, 12)).astype("float32"), (20, 1))
    y = x @ rng.standard_normal((12, 12)).astype("float32")
    keras.utils.set_random_seed(5)
    layer = keras_srlora.SRLoRADense(12, rank=1, use_bias=False, recipe=GATED)
    model = keras.Sequential([keras.Input((12,)), layer])
    model.compile(keras.optimizers.Adam(0.1, epsilon=1e-20), loss)
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


@pytest.mark.parametrize(
    "loss",
    [
        lambda y, z: mse(y, z) - 64.0,
        lambda y, z: mse(y, z) + 64.0,
        lambda y, z: 1024.0 * mse(y, z),
        lambda y, z: mse(y, z) / 1024.0,
    ],
    ids=["below_zero", "above", "large", "small"],
)
def test_a_run_recomposes_at_the_same_steps(loss):
    expected = steps_of("mse")
    assert expected and steps_of(loss) == expected


def test_where_there_is_nothing_to_read_a_warning_names_the_way_out(rng):
    inputs = keras.Input((WIDTH,))
    layer = keras_srlora.SRLoRADense(WIDTH, rank=2, recipe=GATED)
    model = OwnStep(inputs, layer(inputs))
    model.compile("adam", "mse")
    x = batch(rng, 128)
    for size in (2, 128):
        callback = RecompositionCallback()
        with collected_warnings() as messages:
            model.fit(x, x, batch_size=size, verbose=0, callbacks=[callback])
        (message,) = [x for x in messages if "interval" in x]
        assert "recipe" in message
        assert callback.events == []


class Keeps:
    """A model whose `train_step` keeps means by itself."""

    def __init__(self, **means):
        self.metrics = [keras.metrics.Mean(name=name) for name in means]
        for metric, value in zip(self.metrics, means.values(), strict=True):
            metric.update_state([value, value])


@pytest.mark.parametrize(
    "means",
    [{"loss": 2.0}, {"a_loss": 1.0, "total_loss": 2.0}, {"my_loss": 2.0}],
)
def test_a_mean_that_a_train_step_keeps_is_read(means):
    model = Keeps(**means, accuracy=0.5)
    reader = LossReader(model)
    assert reader.read() == (4.0, 2.0) and reader.has_read
    model.metrics[len(means) - 1].update_state(8.0)
    assert reader.read() == (8.0, 1.0)
    assert reader.read() == (0.0, 0.0)


def test_of_two_losses_none_is_guessed():
    reader = LossReader(Keeps(generator_loss=1.0, critic_loss=2.0))
    assert reader.read() == (0.0, 0.0) and not reader.has_read
