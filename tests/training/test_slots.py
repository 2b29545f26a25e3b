"""Slots of restarted pairs, in every stock optimizer."""

import dataclasses

import keras
import numpy as np
import pytest
from support import regression_data
from support import to_numpy
from support import two_layer_model

import keras_srlora
from keras_srlora.training import slots as known_slots

MOMENTS = (known_slots.FIRST_MOMENT, known_slots.SECOND_MOMENT)
OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.01),
    "momentum": lambda: keras.optimizers.SGD(0.01, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "amsgrad": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "adamw": lambda: keras.optimizers.AdamW(0.01),
    "rmsprop": lambda: keras.optimizers.RMSprop(
        0.01, momentum=0.9, centered=True
    ),
    "adagrad": lambda: keras.optimizers.Adagrad(0.01),
    "adadelta": lambda: keras.optimizers.Adadelta(0.1),
    "adamax": lambda: keras.optimizers.Adamax(0.01),
    "adafactor": lambda: keras.optimizers.Adafactor(0.01),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "lion": lambda: keras.optimizers.Lion(0.001),
    "lamb": lambda: keras.optimizers.Lamb(0.01),
    "ema": lambda: keras.optimizers.Adam(0.01, use_ema=True),
    "accumulated": lambda: keras.optimizers.Adam(
        0.01, gradient_accumulation_steps=2
    ),
}
for name in ("Muon", "ScheduleFreeAdamW"):
    # Not in every version that is supported.
    if hasattr(keras.optimizers, name):
        OPTIMIZERS[name.lower()] = getattr(keras.optimizers, name)


def trained(optimizer, rng):
    """A model after a few steps, ready for a recomposition."""
    model = two_layer_model(rng)
    model.compile(optimizer, "mse")
    callback = keras_srlora.RecompositionCallback(interval=10**6)
    with pytest.warns(UserWarning, match="Nothing will be recomposed"):
        model.fit(
            *regression_data(rng, 40),
            batch_size=8,
            verbose=0,
            callbacks=[callback],
        )
    layer = model.get_layer("hidden")
    return layer, keras_srlora.Sensitivity([layer]), model


def slots_of(optimizer, model, layer):
    slots, unknown = known_slots.find_slots(
        optimizer, model.trainable_variables
    )
    return {v.name: slots[id(v)] for v in layer.factors}, unknown


@pytest.mark.parametrize("treatment", ["zero", "zero_first_moments", "keep"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_the_restarted_rows_are_treated(name, treatment, rng):
    optimizer = OPTIMIZERS[name]()
    layer, sensitivity, model = trained(optimizer, rng)
    slots, unknown = slots_of(optimizer, model, layer)
    # All that is not matched is Adafactor's factored second moments.
    assert not unknown or name == "adafactor"
    assert all(slots.values()) or name == "sgd"
    before = [to_numpy(v) for v in optimizer.variables]
    old = {
        (f, i): to_numpy(s) for f in slots for i, (_, s) in enumerate(slots[f])
    }
    layer.recipe = dataclasses.replace(layer.recipe, slots=treatment)
    (event,) = keras_srlora.recompose(sensitivity, optimizer)
    fused = list(event.slots)
    stay = [k for k in range(layer.rank) if k not in fused]
    assert len(fused) == 2
    changed = set()
    for factor in layer.factors:
        for i, (kind, slot) in enumerate(slots[factor.name]):
            changed.add(id(slot))
            was, now = old[factor.name, i], to_numpy(slot)
            np.testing.assert_array_equal(was[stay], now[stay])
            if kind == known_slots.WEIGHT_AVERAGE:
                expected = to_numpy(factor)[fused]
            elif kind == known_slots.GRADIENT_SUM:
                expected = np.zeros_like(was[fused])
            else:
                zero = treatment == "zero" or (
                    treatment == "zero_first_moments"
                    and kind == known_slots.FIRST_MOMENT
                )
                expected = np.zeros_like(was[fused]) if zero else was[fused]
            np.testing.assert_array_equal(now[fused], expected)
    # Slots of every other variable, and the counters, are equal to the bit.
    for was, variable in zip(before, optimizer.variables):
        if id(variable) not in changed:
            np.testing.assert_array_equal(was, to_numpy(variable))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_after_a_recomposition(name, rng):
    optimizer = OPTIMIZERS[name]()
    model = two_layer_model(rng)
    model.compile(optimizer, "mse")
    callback = keras_srlora.RecompositionCallback(interval=6)
    history = model.fit(
        *regression_data(rng),
        batch_size=8,
        epochs=3,
        verbose=0,
        callbacks=[callback],
    )
    assert len(callback.events) == 3
    assert np.isfinite(history.history["loss"]).all()
    if name == "adadelta":
        return  # Too slow a starter to show it in 24 steps.
    assert history.history["loss"][-1] < history.history["loss"][0]


def test_a_weight_average_is_that_of_the_function(rng):
    """After `use_ema` overwrites the weights, no fused pair comes back."""
    optimizer = keras.optimizers.SGD(0.0, use_ema=True)
    layer, sensitivity, model = trained(optimizer, rng)
    # Nothing moved: the averages equal the weights before and after.
    keras_srlora.recompose(sensitivity, optimizer)
    expected = to_numpy(layer.effective_kernel())
    optimizer.finalize_variable_values(model.trainable_variables)
    np.testing.assert_allclose(
        to_numpy(layer.effective_kernel()), expected, atol=1e-6
    )


def test_layers_of_equal_names_are_told_apart(rng):
    inputs = keras.Input((8,))
    x = inputs
    models = []
    for _ in range(2):
        inner = keras.Sequential(
            [keras.Input((8,)), keras.layers.Dense(8, name="same")]
        )
        models.append(inner)
        x = inner(x)
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    layers = keras_srlora.enable_srlora(
        model, rank=2, target_layer_names=["same"]
    )
    assert len(layers) == 2
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    slots, unknown = known_slots.find_slots(
        optimizer, model.trainable_variables
    )
    assert not unknown
    found = [s for layer in layers for f in layer.factors for s in slots[id(f)]]
    assert len({id(slot) for _, slot in found}) == len(found) == 8


class Custom(keras.optimizers.Optimizer):
    """Keeps something that nobody has heard of."""

    def __init__(self, **kwargs):
        super().__init__(learning_rate=0.01, **kwargs)

    def build(self, variables):
        super().build(variables)
        self.extra = self.add_optimizer_variables(variables, "charm")

    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, gradient * learning_rate)


def test_an_optimizer_that_is_not_understood_is_said(rng):
    optimizer = Custom()
    layer, sensitivity, _ = trained(optimizer, rng)
    with pytest.warns(UserWarning, match="does not understand.*charm"):
        keras_srlora.recompose(sensitivity, optimizer)
