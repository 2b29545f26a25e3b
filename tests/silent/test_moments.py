"""The optimizer's state belongs to the adapter that was trained with it."""

import keras
import numpy as np
import pytest
from keras import ops
from pieces import NAMES
from pieces import WIDTH
from pieces import assert_close
from pieces import batch
from pieces import called
from pieces import convert
from pieces import encoder
from pieces import fit
from pieces import nudge
from support import to_numpy

import keras_srlora

OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.05),
    "schedule": lambda: keras.optimizers.Adam(
        keras.optimizers.schedules.CosineDecay(0.05, 12)
    ),
    "adagrad": lambda: keras.optimizers.Adagrad(0.05),
    "nadam": lambda: keras.optimizers.Nadam(0.05),
    "accumulates": lambda: keras.optimizers.AdamW(
        0.05, gradient_accumulation_steps=2
    ),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.05, momentum=0.9)
    ),
}


def compiled(optimizer):
    model = encoder()
    convert(model, recipe="adaptive")
    model.compile(optimizer, "mse")
    return model


def recomposing(callback):
    """The callbacks of a run, with recompositions or without."""
    return [keras_srlora.RecompositionCallback(5)] if callback else []


def data(rng):
    return batch(rng, 32), batch(rng, 32)


def factors(model):
    return [to_numpy(v) for v in model.trainable_variables if "lora" in v.path]


@pytest.mark.parametrize("callback", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_each_adapter_is_trained_as_if_it_were_alone(kind, callback, rng):
    first, second = data(rng), data(rng)
    # Two models, each with one adapter and an optimizer of its own.
    expected = []
    for of_model in (first, second):
        model = compiled(OPTIMIZERS[kind]())
        start = factors(model)
        fit(model, of_model, recomposing(callback))
        fit(model, of_model, recomposing(callback))
        expected.append(factors(model))
    # One model with two, trained by turns.
    model = compiled(OPTIMIZERS[kind]())
    fit(model, first, recomposing(callback))
    keras_srlora.add_adapter(model, "b")
    for factor, value in zip(
        [v for v in model.trainable_variables if "lora" in v.path], start
    ):
        factor.assign(value)
    fit(model, second, recomposing(callback))
    keras_srlora.set_adapter(model, "default")
    fit(model, first, recomposing(callback))
    assert_close(factors(model), expected[0], 1e-4)
    keras_srlora.set_adapter(model, "b")
    fit(model, second, recomposing(callback))
    assert_close(factors(model), expected[1], 1e-4)


def test_switching_keeps_the_learning_rate(rng):
    model = compiled(keras.optimizers.Adam(0.05))
    fit(model, data(rng))
    keras_srlora.add_adapter(model, "b")
    model.optimizer.learning_rate = 0.01
    keras_srlora.set_adapter(model, "default")
    assert float(model.optimizer.learning_rate) == pytest.approx(0.01)
    assert int(model.optimizer.iterations) == 8
    keras_srlora.set_adapter(model, "b")
    assert int(model.optimizer.iterations) == 0


def moments(optimizer):
    """The largest entry of its slots."""
    slots = [v for v in optimizer.variables if len(v.shape)]
    return max(float(ops.max(ops.abs(v))) for v in slots)


NEW = {
    "add": lambda model, path: keras_srlora.add_adapter(model, "b"),
    "add_file": lambda model, path: keras_srlora.add_adapter(model, "b", path),
    "load": lambda model, path: keras_srlora.load_adapter(model, path),
    "combine": lambda model, path: keras_srlora.combine_adapters(
        model, {"default": 0.5}
    ),
}


@pytest.mark.parametrize("how", NEW)
@pytest.mark.parametrize("owner", ["model", "outer", "loop"])
def test_a_new_adapter_has_no_moments(how, owner, rng, tmp_path):
    model = encoder()
    nudge(convert(model), size=0.1)
    path = tmp_path / "a.safetensors"
    keras_srlora.save_adapter(model, path)
    trained = model
    if owner == "outer":
        inputs = keras.Input((WIDTH,))
        head = keras.layers.Dense(WIDTH, name="head")
        trained = keras.Model(inputs, head(model(inputs)))
    optimizer = keras.optimizers.Adam(0.05)
    if owner == "loop":
        optimizer.build(model.trainable_variables)
        grads = [ops.ones(v.shape) for v in model.trainable_variables]
        optimizer.apply(grads, model.trainable_variables)
    else:
        trained.compile(optimizer, "mse")
        fit(trained, data(rng))
    assert moments(optimizer) > 0
    before = int(optimizer.iterations)
    NEW[how](model, path)
    assert moments(optimizer) == 0
    assert int(optimizer.iterations) == 0
    if how != "load":
        keras_srlora.set_adapter(model, "default")
        assert moments(optimizer) > 0
        assert int(optimizer.iterations) == before


def test_an_optimizer_that_cannot_start_anew_is_named(rng):
    class Once(keras.optimizers.Adam):
        count = 0

        def build(self, variables):
            self.count += 1
            if self.count > 1 and not self.built:
                raise RuntimeError("only once")
            super().build(variables)

    model = compiled(Once(0.05))
    fit(model, data(rng))
    optimizer = model.optimizer
    before = [to_numpy(v) for v in optimizer.variables]
    with pytest.warns(UserWarning, match="only once"):
        keras_srlora.add_adapter(model, "b")
    for a, b in zip(optimizer.variables, before, strict=True):
        np.testing.assert_array_equal(to_numpy(a), b)
    fit(model, data(rng))


def test_a_second_compilation_starts_anew_for_each_adapter(rng):
    model = compiled(keras.optimizers.Adam(0.05))
    fit(model, data(rng))
    keras_srlora.add_adapter(model, "b")
    model.compile(keras.optimizers.Adam(0.05), "mse")
    fit(model, data(rng))
    keras_srlora.set_adapter(model, "default")
    assert int(model.optimizer.iterations) == 0
    assert moments(model.optimizer) == 0


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="an optimizer of PyTorch"
)
def test_an_optimizer_of_torch_has_moments_of_each_adapter(rng):
    import torch

    model = encoder()
    layers = convert(model)
    parameters = [v.value for layer in layers for v in layer.factors]
    optimizer = torch.optim.Adam(parameters, 0.05)

    def steps(seed):
        torch.manual_seed(seed)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()

    steps(0)
    state = {p: s["exp_avg"].clone() for p, s in optimizer.state.items()}
    keras_srlora.add_adapter(model, "b")
    assert not optimizer.state
    steps(1)
    keras_srlora.set_adapter(model, "default")
    for parameter, expected in state.items():
        assert int(optimizer.state[parameter]["step"]) == 3
        torch.testing.assert_close(
            optimizer.state[parameter]["exp_avg"], expected
        )


def test_a_head_with_batch_normalization_is_that_of_its_adapter(rng, tmp_path):
    """Moving averages are no trainable variables, but training changes them."""

    def model_with_head():
        inputs = keras.Input((WIDTH,))
        x = keras.layers.BatchNormalization(name="norm")(encoder()(inputs))
        keras.utils.set_random_seed(8)
        return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))

    model, x = model_with_head(), 3 + batch(rng, 32)
    convert(model, names=NAMES)
    fresh = called(model, x)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(x, batch(rng, 32, 3), epochs=3, verbose=0)
    tuned = called(model, x)
    assert float(np.max(np.abs(tuned - fresh))) > 1e-2
    keras_srlora.save_adapter(model, tmp_path / "a", include_trainable=True)
    loaded = model_with_head()
    keras_srlora.load_adapter(loaded, tmp_path / "a")
    assert_close(called(loaded, x), tuned)
    keras_srlora.add_adapter(model, "b")
    model.fit(2 * x, batch(rng, 32, 3), epochs=3, verbose=0)
    keras_srlora.set_adapter(model, "default")
    assert_close(called(model, x), tuned)
