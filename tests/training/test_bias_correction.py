"""The steps of a restarted pair have a pace; the others go on as before."""

import dataclasses

import keras
import numpy as np
import pytest
from support import assert_same_variables
from support import converted_model
from support import regression_data
from support import statistics
from support import to_numpy
from support import two_layer_model

import keras_srlora
from keras_srlora.layers.find import srlora_layers
from keras_srlora.recipes.definition import RECIPES
from keras_srlora.training.bias_correction import COMPANION
from keras_srlora.training.bias_correction import corrected_betas
from keras_srlora.training.scoring import find_corrections

RATE = 0.01
RESTART, STEPS = 12, 24
RECIPE = dataclasses.replace(
    RECIPES["lora_restarts"], slots="fast_start", steps_per_pair=1, stop=1.0
)
on_torch = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="an optimizer of torch"
)


class Adam:
    """arXiv 1412.6980, algorithm 1, in float64; with Keras's place of ε."""

    epsilon = 1e-7  # Keras's default

    def __init__(self, shape, beta_1=0.9, beta_2=0.999, amsgrad=False):
        self.m, self.v, self.most = np.zeros((3, *shape))
        self.t = 0
        self.beta_1, self.beta_2, self.amsgrad = beta_1, beta_2, amsgrad

    def decay(self, weight):
        return weight

    def step(self, weight, gradient):
        self.t += 1
        self.m = self.beta_1 * self.m + (1 - self.beta_1) * gradient
        self.v = self.beta_2 * self.v + (1 - self.beta_2) * gradient**2
        self.most = np.maximum(self.most, self.v)
        v = self.most if self.amsgrad else self.v
        first = self.m / (1 - self.beta_1**self.t)
        root = np.sqrt(1 - self.beta_2**self.t)
        return weight - RATE * first / ((np.sqrt(v) + self.epsilon) / root)


class Adamax(Adam):
    """The same, algorithm 2."""

    def step(self, weight, gradient):
        self.t += 1
        self.m = self.beta_1 * self.m + (1 - self.beta_1) * gradient
        self.v = np.maximum(self.beta_2 * self.v, np.abs(gradient))
        first = self.m / (1 - self.beta_1**self.t)
        return weight - RATE * first / (self.v + self.epsilon)


class AdamW(Adam):
    """Decoupled decay, arXiv 1711.05101, algorithm 2; not corrected."""

    def decay(self, weight):
        return weight * (1 - RATE * 0.1)

    def step(self, weight, gradient):
        return super().step(self.decay(weight), gradient)


REFERENCES = {
    "adam": (lambda **k: keras.optimizers.Adam(RATE, **k), Adam),
    "adamw": (
        lambda **k: keras.optimizers.AdamW(RATE, weight_decay=0.1, **k),
        AdamW,
    ),
    "other decays": (
        lambda **k: keras.optimizers.Adam(RATE, 0.5, 0.9, **k),
        lambda shape: Adam(shape, 0.5, 0.9),
    ),
    "amsgrad": (
        lambda **k: keras.optimizers.Adam(RATE, amsgrad=True, **k),
        lambda shape: Adam(shape, amsgrad=True),
    ),
    "adamax": (lambda **k: keras.optimizers.Adamax(RATE, **k), Adamax),
}


def gradients(layer, count, rng):
    """Gradients of all sizes, which do not depend on the weights."""
    return [
        [
            (rng.standard_normal(v.shape) * 10.0 ** rng.integers(-3, 2)).astype(
                "float32"
            )
            for v in layer.factors
        ]
        for _ in range(count)
    ]


def new_layer(rng, recipe=RECIPE):
    layer = two_layer_model(rng, recipe=recipe).get_layer("hidden")
    layer.initialize_factors()
    return layer


def apply(optimizer, layer, gradients):
    values = [keras.ops.convert_to_tensor(g) for g in gradients]
    optimizer.apply(values, layer.factors)


def run(optimizer, layer, seen):
    """Steps, a recomposition, steps; `(slots, restarted, ended)`."""
    for g in seen[:RESTART]:
        apply(optimizer, layer, g)
    (event,) = keras_srlora.recompose(
        optimizer.sensitivity, optimizer, step=RESTART
    )
    restarted = [to_numpy(v) for v in layer.factors]
    for g in seen[RESTART:]:
        apply(optimizer, layer, g)
    ended = [to_numpy(v) for v in layer.factors]
    return list(event.slots), restarted, ended


def usual_correction(n):
    """Of Adam's usual decays."""
    return np.sqrt(1 - 0.999**n) / (1 - 0.9**n)


def expected(make, before, restarted, slots, seen):
    """Each factor by an Adam of its own, and by another from the restart.

    What the other one does beside its decay is scaled.
    """
    result = []
    for i, weight in enumerate(before):
        old, new = make(weight.shape), make(weight.shape)
        kept = weight.astype("float64")
        for g in seen:
            kept = old.step(kept, g[i].astype("float64"))
        fresh = restarted[i].astype("float64")
        for n, g in enumerate(seen[RESTART:], start=1):
            decayed = new.decay(fresh)
            step = new.step(fresh, g[i].astype("float64")) - decayed
            t = RESTART + n
            pace = usual_correction(t) / usual_correction(n) / 2
            fresh = decayed + pace * step
        kept[slots] = fresh[slots]
        result.append(kept)
    return result


@pytest.mark.parametrize("name", REFERENCES)
def test_a_restarted_pair_has_the_pace_whatever_the_decays(name, rng):
    make, reference = REFERENCES[name]
    layer = new_layer(rng)
    seen = gradients(layer, RESTART + STEPS, rng)
    before = [to_numpy(v) for v in layer.factors]
    optimizer = keras_srlora.SensitivityOptimizer(make(), [layer])
    slots, restarted, ended = run(optimizer, layer, seen)
    assert 0 < len(slots) < layer.rank
    wanted = expected(reference, before, restarted, slots, seen)
    for found, correct in zip(ended, wanted):
        # 36 steps of .01; 1 - .999 has a rounding error of 3e-5 in float32.
        np.testing.assert_allclose(found, correct, atol=2e-4)
    # They did train.
    moved = np.abs(ended[1][slots] - restarted[1][slots]).max()
    assert moved > 0.01


@pytest.mark.parametrize("name", ["adam", "adamw", "adamax"])
def test_other_pairs_are_those_of_the_plain_optimizer_to_the_bit(name, rng):
    make, _ = REFERENCES[name]
    layer, plain = new_layer(rng), new_layer(rng)
    for to, of in zip(plain.factors, layer.factors):
        to.assign(of)
    seen = gradients(layer, RESTART + STEPS, rng)
    optimizer = keras_srlora.SensitivityOptimizer(make(), [layer])
    slots, _, ended = run(optimizer, layer, seen)
    alone = make()
    for g in seen:
        apply(alone, plain, g)
    kept = np.setdiff1d(np.arange(layer.rank), slots)
    for found, factor in zip(ended, plain.factors):
        np.testing.assert_array_equal(found[kept], to_numpy(factor)[kept])
        assert not np.array_equal(found, to_numpy(factor))


def test_accumulated_gradients_count_as_steps(rng):
    layer = new_layer(rng)
    seen = gradients(layer, RESTART + STEPS, rng)
    before = [to_numpy(v) for v in layer.factors]
    adam = keras.optimizers.Adam(RATE, gradient_accumulation_steps=2)
    optimizer = keras_srlora.SensitivityOptimizer(adam, [layer])
    twice = [g for g in seen for _ in range(2)]
    for g in twice[: 2 * RESTART]:
        apply(optimizer, layer, g)
    (event,) = keras_srlora.recompose(optimizer.sensitivity, optimizer)
    restarted = [to_numpy(v) for v in layer.factors]
    for g in twice[2 * RESTART :]:
        apply(optimizer, layer, g)
    wanted = expected(Adam, before, restarted, list(event.slots), seen)
    for factor, correct in zip(layer.factors, wanted):
        np.testing.assert_allclose(to_numpy(factor), correct, atol=2e-4)


def test_a_weight_average_is_that_of_the_scaled_weights(rng):
    layer = new_layer(rng)
    seen = gradients(layer, RESTART + STEPS, rng)
    adam = keras.optimizers.Adam(RATE, use_ema=True, ema_momentum=0.5)
    optimizer = keras_srlora.SensitivityOptimizer(adam, [layer])
    slots, restarted, ended = run(optimizer, layer, seen[: RESTART + 1])
    averages = [
        to_numpy(v) for v in adam.variables if v.path.endswith("_average")
    ]
    for start, end, average in zip(restarted, ended, averages, strict=True):
        # The average started from the new pair, a step ago.
        middle = (0.5 * start + 0.5 * end)[slots]
        np.testing.assert_allclose(average[slots], middle, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.RMSprop(RATE),
        lambda: keras.optimizers.Nadam(RATE),
        lambda: keras.optimizers.SGD(RATE, momentum=0.9),
    ],
    ids=["rmsprop", "nadam", "sgd"],
)
def test_other_optimizers_are_treated_as_shared(make, rng):
    results = []
    for slots in ("fast_start", "shared"):
        keras.utils.set_random_seed(1)
        layer = new_layer(
            np.random.default_rng(1), dataclasses.replace(RECIPE, slots=slots)
        )
        seen = gradients(layer, RESTART + STEPS, np.random.default_rng(2))
        optimizer = keras_srlora.SensitivityOptimizer(make(), [layer])
        results.append(run(optimizer, layer, seen)[2])
        assert not find_corrections(optimizer)
    assert_same_variables(*results)


def test_an_optimizer_whose_steps_nothing_scales_is_treated_as_shared(rng):
    """A bare `Sensitivity` scores the pairs of a loop."""
    layer = new_layer(rng)
    seen = gradients(layer, RESTART, rng)
    sensitivity = keras_srlora.Sensitivity([layer])
    adam = keras.optimizers.Adam(RATE)
    for g in seen:
        sensitivity.update(
            [keras.ops.convert_to_tensor(x) for x in g], layer.factors
        )
        apply(adam, layer, g)
    (event,) = keras_srlora.recompose(sensitivity, adam)
    (velocity,) = [
        to_numpy(v)
        for v in adam.variables
        if v.path.endswith("lora_kernel_b_velocity")
    ]
    assert velocity[list(event.slots)].all()


def test_a_new_optimizer_forgets_the_restarts_of_another(rng):
    model = converted_model("adam", recipe=RECIPE)
    data = regression_data(rng, 40)
    fit(model, data, 4)
    layer = model.get_layer("first")
    assert layer.companions.arrays_of(COMPANION)
    model.compile("adam", "mse")
    callback = keras_srlora.RecompositionCallback(interval=100)
    with pytest.warns(UserWarning, match="Nothing will be recomposed"):
        model.fit(*data, batch_size=8, verbose=0, callbacks=[callback])
    assert not layer.companions.arrays_of(COMPANION)


def fit(model, data, epochs, initial_epoch=0, whole=None):
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = epoch + 1 == epochs

    callback = keras_srlora.RecompositionCallback(interval=4)
    model.fit(
        *data,
        batch_size=8,
        epochs=whole or epochs,
        initial_epoch=initial_epoch,
        shuffle=False,
        verbose=0,
        callbacks=[callback, Stop()],
    )
    return callback.events


def test_a_run_resumes_to_the_bit_soon_after_a_restart(tmp_path, rng):
    data = regression_data(rng, 40)
    whole = converted_model("adam", recipe=RECIPE)
    events = fit(whole, data, 4)
    # Some before the interruption, of which the last is three steps old.
    assert {event.step for event in events} == {4, 8, 12, 16}
    first = converted_model("adam", recipe=RECIPE)
    fit(first, data, 3, whole=4)
    first.save(tmp_path / "model.keras")
    second = keras.saving.load_model(tmp_path / "model.keras")
    fit(second, data, 4, initial_epoch=3, whole=4)
    assert_same_variables(whole.variables, second.variables)
    assert_same_variables(whole.optimizer.variables, second.optimizer.variables)
    for a, b in zip(srlora_layers(whole), srlora_layers(second)):
        ages = [x.companions.arrays_of(COMPANION)["began"] for x in (a, b)]
        assert ages[0].any()
        np.testing.assert_array_equal(*ages)


def test_the_default_recipe_scales_the_steps():
    assert RECIPES["adaptive"].scales_steps
    for name in ("paper", "lora_restarts"):
        assert not RECIPES[name].scales_steps


def test_scores_and_ages_are_both_kept(rng):
    """Neither takes the other's place among what a layer saves."""
    model = converted_model("adam", recipe=RECIPE)
    fit(model, regression_data(rng, 40), 4)
    layer = model.get_layer("first")
    assert statistics(layer).average_a.shape == layer.factors[0].shape
    assert layer.companions.arrays_of(COMPANION)["began"].shape == (2,)


@on_torch
@pytest.mark.parametrize(
    "name, arguments, reference",
    [
        ("Adam", {}, Adam),
        ("AdamW", {"weight_decay": 0.1}, AdamW),
        ("Adam", {"foreach": False}, Adam),
        ("Adamax", {}, Adamax),
    ],
)
def test_a_pair_of_torch_has_the_pace(name, arguments, reference, rng):
    import torch

    layer = new_layer(rng)
    before = [to_numpy(v) for v in layer.factors]
    seen = gradients(layer, RESTART + STEPS, rng)
    cls = getattr(torch.optim, name)
    # It adds ε to the corrected root, Keras to the other: so small, no matter.
    optimizer = cls(
        [v.value for v in layer.factors], lr=RATE, eps=1e-12, **arguments
    )
    recomposer = keras_srlora.Recomposer([layer], optimizer, interval=RESTART)
    seen = seen[: 2 * RESTART]
    for step, g in enumerate(seen):
        events = recomposer.before_step(step)
        if events:
            (event,) = events
            restarted = [to_numpy(v) for v in layer.factors]
        for factor, value in zip(layer.factors, g):
            factor.value.grad = torch.as_tensor(value)
        optimizer.step()

    def make(shape):
        adam = reference(shape)
        adam.epsilon = 1e-12
        return adam

    wanted = expected(make, before, restarted, list(event.slots), seen)
    for factor, correct in zip(layer.factors, wanted):
        np.testing.assert_allclose(to_numpy(factor), correct, atol=2e-4)


@on_torch
def test_groups_of_other_decays_are_treated_as_shared(rng):
    import torch

    layer = new_layer(rng)
    a, b = (v.value for v in layer.factors)
    optimizer = torch.optim.Adam(
        [{"params": [a]}, {"params": [b], "betas": (0.5, 0.9)}], lr=RATE
    )
    assert corrected_betas(optimizer, layer.factors) is None
    assert corrected_betas(optimizer, layer.factors[:1]) == (0.9, 0.999)


@on_torch
def test_a_second_recomposer_of_an_optimizer_takes_over_its_layers(rng):
    """A step is scaled once; other layers go on with the first one."""
    import torch

    one, two = new_layer(rng), new_layer(rng)
    values = [v.value for layer in (one, two) for v in layer.factors]
    optimizer = torch.optim.Adam(values, lr=RATE)
    first = keras_srlora.Recomposer([one], optimizer, interval=RESTART)
    other = keras_srlora.Recomposer([two], optimizer, interval=RESTART)
    second = keras_srlora.Recomposer([one], optimizer, interval=RESTART)
    found = find_corrections(optimizer)
    assert set(found) == {one, two}
    assert found[one].ages.is_attached and found[two].ages.is_attached
    hooks = optimizer._optimizer_step_pre_hooks.values()
    assert len(hooks) == len(optimizer._optimizer_step_post_hooks) == 2
    before = to_numpy(first.sensitivity.variables[0])
    for layer in (one, two):
        for factor, g in zip(layer.factors, gradients(layer, 1, rng)[0]):
            factor.value.grad = torch.as_tensor(g)
    optimizer.step()
    np.testing.assert_array_equal(
        before, to_numpy(first.sensitivity.variables[0])
    )
    for recomposer in (other, second):
        assert to_numpy(recomposer.sensitivity.variables[0]).any()
