"""Slots of restarted pairs, in every stock optimizer."""

import dataclasses

import keras
import numpy as np
import pytest
from support import regression_data
from support import statistics
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
    with pytest.warns(UserWarning, match="does not know.*charm"):
        keras_srlora.recompose(sensitivity, optimizer)


# Slots that are registered.


@pytest.fixture
def registered(monkeypatch):
    """What a test registers is forgotten after it."""
    own = {name: dict(of) for name, of in known_slots.OF_CLASS.items()}
    monkeypatch.setattr(known_slots, "OF_CLASS", own)


class Charming(Custom):
    """Its slots hold what a test puts there."""


class Grandchild(Charming):
    pass


@pytest.mark.parametrize("cls", [Charming, Grandchild])
@pytest.mark.parametrize("treatment", ["zero", "zero_first_moments", "keep"])
@pytest.mark.parametrize("kind", known_slots.KINDS)
def test_a_registered_slot_is_treated_as_its_kind(
    kind, treatment, cls, rng, registered
):
    """Of the class itself and of one that comes of it, without a warning."""
    keras_srlora.register_optimizer_slots(Charming, {"charm": kind})
    optimizer = cls()
    layer, sensitivity, _ = trained(optimizer, rng)
    layer.recipe = dataclasses.replace(layer.recipe, slots=treatment)
    slots = {
        v.name: slot
        for v in layer.factors
        for slot in optimizer.extra
        if slot.path.endswith(f"{v.name}_charm")
    }
    for slot in slots.values():
        slot.assign(rng.standard_normal(slot.shape))
    before = {name: to_numpy(slot) for name, slot in slots.items()}
    (event,) = keras_srlora.recompose(sensitivity, optimizer)
    fused = list(event.slots)
    stay = [k for k in range(layer.rank) if k not in fused]
    assert len(slots) == 2 and fused and stay
    for factor in layer.factors:
        was, now = before[factor.name], to_numpy(slots[factor.name])
        np.testing.assert_array_equal(was[stay], now[stay])
        zeroed = {
            known_slots.FIRST_MOMENT: treatment != "keep",
            known_slots.SECOND_MOMENT: treatment == "zero",
            known_slots.GRADIENT_SUM: True,
        }
        expected = was[fused]
        if kind == known_slots.WEIGHT_AVERAGE:
            expected = to_numpy(factor)[fused]
        elif zeroed[kind]:
            expected = np.zeros_like(expected)
        np.testing.assert_array_equal(now[fused], expected)


def test_other_optimizers_stay_as_they_are(rng, registered):
    """A name is that of a class's slot, not of every optimizer's."""
    keras_srlora.register_optimizer_slots(Charming, {"charm": "first_moment"})
    layer, sensitivity, _ = trained(optimizer := Custom(), rng)
    with pytest.warns(UserWarning, match="register_optimizer_slots"):
        keras_srlora.recompose(sensitivity, optimizer)
    kinds = known_slots.slot_kinds(keras.optimizers.Adam())
    assert "charm" not in kinds and kinds["momentum"] == "first_moment"


@pytest.mark.parametrize(
    ("cls", "slots"),
    [
        (Charming, {"charm": "third_moment"}),
        (Charming, {"charm": "first_moment", "other": None}),
        (Charming(), {"charm": "first_moment"}),
        ("Charming", {"charm": "first_moment"}),
    ],
)
def test_what_is_no_kind_or_no_class_is_refused(cls, slots, registered):
    with pytest.raises(ValueError, match="second_moment.*Received"):
        keras_srlora.register_optimizer_slots(cls, slots)
    assert "Charming" not in known_slots.OF_CLASS


# Optimizers of PyTorch.


on_torch = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="torch's own optimizers"
)
TORCH_OPTIMIZERS = {
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "Adam": {"lr": 0.01},
    "Adam with amsgrad": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01},
    "NAdam": {"lr": 0.01},
    "RAdam": {"lr": 0.01},
    "Adamax": {"lr": 0.01},
    "RMSprop": {"lr": 0.01, "momentum": 0.9, "centered": True},
    "Adagrad": {"lr": 0.01},
    "Adadelta": {"lr": 0.1},
    "ASGD": {"lr": 0.01},
}


def trained_by_torch(make, rng, steps=4):
    """A layer, and an optimizer of torch after a few steps of it."""
    layer = two_layer_model(rng).get_layer("hidden")
    layer.initialize_factors()
    optimizer = make([v.value for v in layer.factors])
    recomposer = keras_srlora.Recomposer([layer], optimizer, interval=1000)
    x = keras.ops.convert_to_tensor(regression_data(rng)[0])
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) ** 2).mean().backward()
        optimizer.step()
    return layer, recomposer.sensitivity, optimizer


@on_torch
@pytest.mark.parametrize("treatment", ["zero", "zero_first_moments", "keep"])
@pytest.mark.parametrize("name", TORCH_OPTIMIZERS)
def test_slots_of_torch_are_treated_by_row(name, treatment, rng):
    import torch

    cls = getattr(torch.optim, name.split()[0])
    layer, sensitivity, optimizer = trained_by_torch(
        lambda v: cls(v, **TORCH_OPTIMIZERS[name]), rng
    )
    layer.recipe = dataclasses.replace(layer.recipe, slots=treatment)
    kinds = known_slots.slot_kinds(optimizer)
    before = {
        (v.name, slot): to_numpy(tensor)
        for v in layer.factors
        for slot, tensor in optimizer.state[v.value].items()
        if getattr(tensor, "shape", None) == v.value.shape
    }
    assert len(before) >= 2
    # Also what the recipe keeps is known, so that nothing is warned of.
    assert {slot for _, slot in before} <= kinds.keys()
    (event,) = keras_srlora.recompose(sensitivity, optimizer)
    fused = list(event.slots)
    stay = [k for k in range(layer.rank) if k not in fused]
    for factor in layer.factors:
        for (owner, slot), was in before.items():
            if owner != factor.name:
                continue
            now = to_numpy(optimizer.state[factor.value][slot])
            np.testing.assert_array_equal(was[stay], now[stay])
            first = kinds[slot] == known_slots.FIRST_MOMENT
            expected = was[fused]
            if kinds[slot] == known_slots.WEIGHT_AVERAGE:
                expected = to_numpy(factor)[fused]
            elif treatment == "zero" or (treatment != "keep" and first):
                expected = np.zeros_like(expected)
            np.testing.assert_array_equal(now[fused], expected, slot)
    # And it goes on with its factors.
    optimizer.step()


@on_torch
def test_a_slot_of_torch_is_registered(rng, registered):
    import torch

    class Mine(torch.optim.SGD):
        """Keeps a thing of the size of each weight."""

        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["thing"] = torch.ones_like(p)
                    self.state[p]["count"] = torch.tensor(3.0)

    def make(variables):
        return Mine(variables, lr=0.01)

    layer, sensitivity, optimizer = trained_by_torch(make, rng)
    with pytest.warns(UserWarning, match="'Mine'.*thing.*register_optimizer"):
        (event,) = keras_srlora.recompose(sensitivity, optimizer)
    keras_srlora.register_optimizer_slots(Mine, {"thing": "first_moment"})
    layer, sensitivity, optimizer = trained_by_torch(make, rng)
    (event,) = keras_srlora.recompose(sensitivity, optimizer)
    for factor in layer.factors:
        thing = to_numpy(optimizer.state[factor.value]["thing"])
        expected = np.ones_like(thing)
        expected[list(event.slots)] = 0.0
        np.testing.assert_array_equal(thing, expected)
        assert float(optimizer.state[factor.value]["count"]) == 3.0


@on_torch
def test_steps_of_torch_are_scored_with_the_weights_before_them(rng):
    """`|w · g|` of the gradient that the step used."""
    import torch

    layer = two_layer_model(rng).get_layer("hidden")
    layer.initialize_factors()
    optimizer = torch.optim.SGD([v.value for v in layer.factors], lr=0.5)
    keras_srlora.Recomposer([layer], optimizer, interval=1000)
    x = keras.ops.convert_to_tensor(regression_data(rng)[0])
    weights = [to_numpy(v) for v in layer.factors]
    (layer(x) ** 2).mean().backward()
    gradients = [to_numpy(v.value.grad) for v in layer.factors]
    optimizer.step()
    found = statistics(layer)
    for w, g, average in zip(
        weights, gradients, (found.average_a, found.average_b)
    ):
        assert average.max() > 0
        np.testing.assert_allclose(average, 0.15 * np.abs(w * g), rtol=1e-4)
