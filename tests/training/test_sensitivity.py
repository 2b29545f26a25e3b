"""Scores against NumPy, inside real train steps of every kind."""

import shutil

import keras
import numpy as np
import pytest
import reference
from keras import ops
from support import Recorder
from support import converted_model
from support import dense_layer
from support import matrix
from support import regression_data
from support import statistics
from support import to_numpy
from support import two_layer_model

import keras_srlora

BACKEND = keras.backend.backend()
STEPS, BATCH, INPUTS, OUTPUTS = 20, 8, 10, 6


def linear_model(rng, **kwargs):
    """One SRLoRADense with a mean squared error: gradients by hand."""
    inputs = keras.Input((INPUTS,))
    layer = keras_srlora.SRLoRADense(
        OUTPUTS, rank=3, lora_alpha=6, recipe="paper", **kwargs
    )
    model = keras.Model(inputs, layer(inputs))
    layer.frozen.variable.assign(matrix("gaussian", INPUTS, OUTPUTS, rng))
    x = rng.standard_normal((STEPS * BATCH, INPUTS)).astype("float32")
    y = rng.standard_normal((STEPS * BATCH, OUTPUTS)).astype("float32")
    return model, layer, x, y


def fit(model, x, y, *callbacks, **kwargs):
    # An interval beyond the run: the statistics of all steps stay.
    scoring = keras_srlora.RecompositionCallback(interval=10**6, **kwargs)
    with pytest.warns(UserWarning, match="Nothing will be recomposed"):
        return model.fit(
            x,
            y,
            batch_size=BATCH,
            shuffle=False,
            verbose=0,
            callbacks=[scoring, *callbacks],
        )


def batch(x, index):
    return x[index * BATCH : (index + 1) * BATCH]


def gradients_of(weights, x, y, scale):
    return reference.linear_gradients(
        x.astype("float64"),
        y.astype("float64"),
        weights["kernel"],
        weights["lora_kernel_a"].T,
        weights["lora_kernel_b"],
        weights["bias"],
        scale,
    )


def check(layer, steps, rtol=1e-4):
    """Compares the statistics with the reference over `(weights, gradients)`.

    20 steps of float32 sums of 48 products: relative 1e-4 of the largest.
    """
    found = statistics(layer)
    for name, transpose in (("a", True), ("b", False)):
        weights = [w[f"lora_kernel_{name}"] for w, _ in steps]
        gradients = [g[name].T if transpose else g[name] for _, g in steps]
        expected = reference.sensitivity_run(weights, gradients, 0.85, 0.85)
        actual = (
            getattr(found, f"average_{name}"),
            getattr(found, f"uncertainty_{name}"),
        )
        for e, a in zip(expected, actual):
            assert e.max() > 0
            np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * e.max())


OPTIMIZERS = {
    "sgd": lambda **kw: keras.optimizers.SGD(0.05, momentum=0.9, **kw),
    "adam": lambda **kw: keras.optimizers.Adam(0.01, **kw),
    "adamw": lambda **kw: keras.optimizers.AdamW(
        keras.optimizers.schedules.CosineDecay(0.01, STEPS), **kw
    ),
    "adafactor": lambda **kw: keras.optimizers.Adafactor(0.01, **kw),
    "lion": lambda **kw: keras.optimizers.Lion(0.001, **kw),
    "rmsprop": lambda **kw: keras.optimizers.RMSprop(0.01, **kw),
    "adagrad": lambda **kw: keras.optimizers.Adagrad(0.01, **kw),
    "adadelta": lambda **kw: keras.optimizers.Adadelta(0.1, **kw),
    "adamax": lambda **kw: keras.optimizers.Adamax(0.01, **kw),
    "nadam": lambda **kw: keras.optimizers.Nadam(0.01, **kw),
    "lamb": lambda **kw: keras.optimizers.Lamb(0.01, **kw),
}
OPTIONS = {
    "clipnorm": {"clipnorm": 0.1},
    "global_clipnorm": {"global_clipnorm": 0.1},
    "clipvalue": {"clipvalue": 0.01},
    "use_ema": {"use_ema": True},
    "loss_scale_factor": {"loss_scale_factor": 256.0},
}
COMPILE = {
    "run_eagerly": {"run_eagerly": True},
    "jit_compile": {"jit_compile": True},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_numpy_with_every_stock_optimizer(name, rng):
    run_and_check(OPTIMIZERS[name](), rng)


@pytest.mark.parametrize("option", OPTIONS)
def test_equals_numpy_with_every_option(option, rng):
    run_and_check(OPTIMIZERS["adam"](**OPTIONS[option]), rng)


@pytest.mark.parametrize(
    "how",
    ["run_eagerly", pytest.param("jit_compile", marks=pytest.mark.slow)],
)
def test_equals_numpy_however_compiled(how, rng):
    if (BACKEND, how) == ("torch", "jit_compile") and not shutil.which("g++"):
        pytest.skip("torch's compiler needs a C++ compiler")
    run_and_check(OPTIMIZERS["adam"](), rng, **COMPILE[how])


def run_and_check(optimizer, rng, **compile_arguments):
    model, layer, x, y = linear_model(rng)
    model.compile(optimizer, "mse", **compile_arguments)
    recorder = Recorder(layer)
    fit(model, x, y, recorder)
    assert len(recorder.weights) == STEPS
    check(
        layer,
        [
            (w, gradients_of(w, batch(x, i), batch(y, i), layer.scale))
            for i, w in enumerate(recorder.weights)
        ],
    )


def test_wrapped_optimizer_trains_as_the_plain_one(rng):
    results = []
    for scored in (True, False):
        keras.utils.set_random_seed(1)
        model, layer, x, y = linear_model(np.random.default_rng(0))
        keras_srlora.initialize_factors(model)
        model.compile(OPTIMIZERS["adamw"](use_ema=True, clipnorm=0.5), "mse")
        if scored:
            fit(model, x, y)
        else:
            model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
        results.append([to_numpy(v) for v in model.variables])
    for with_scores, without in zip(*results):
        np.testing.assert_allclose(with_scores, without, atol=1e-6)


def test_accumulated_gradients_are_one_step(rng):
    steps = 2
    model, layer, x, y = linear_model(rng)
    model.compile(OPTIMIZERS["sgd"](gradient_accumulation_steps=steps), "mse")
    recorder = Recorder(layer)
    fit(model, x, y, recorder)
    pairs = []
    for i in range(0, STEPS, steps):
        w = recorder.weights[i]
        parts = [
            gradients_of(w, batch(x, i + j), batch(y, i + j), layer.scale)
            for j in range(steps)
        ]
        mean = {k: sum(p[k] for p in parts) / steps for k in parts[0]}
        pairs.append((w, mean))
    check(layer, pairs)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras on torch refuses it")
def test_steps_per_execution(rng):
    # The weights inside an execution are out of sight: an SGD by hand.
    model, layer, x, y = linear_model(rng)
    keras_srlora.initialize_factors(model)
    weights = {v.name: to_numpy(v) for v in layer.variables}
    learning_rate = 0.05
    model.compile(
        keras.optimizers.SGD(learning_rate), "mse", steps_per_execution=3
    )
    fit(model, x, y)
    steps = []
    for i in range(STEPS):
        g = gradients_of(weights, batch(x, i), batch(y, i), layer.scale)
        steps.append((weights, g))
        weights = {
            "kernel": weights["kernel"],
            "bias": weights["bias"] - learning_rate * g["bias"],
            "lora_kernel_a": weights["lora_kernel_a"]
            - learning_rate * g["a"].T,
            "lora_kernel_b": weights["lora_kernel_b"] - learning_rate * g["b"],
        }
    check(layer, steps)


def test_importance_equals_numpy(rng):
    model, layer, x, y = linear_model(rng)
    model.compile("adam", "mse")
    fit(model, x, y)
    sensitivity = keras_srlora.Sensitivity([layer])
    s = statistics(layer)
    expected = reference.importance(
        to_numpy(s.average_a).T,
        to_numpy(s.uncertainty_a).T,
        to_numpy(s.average_b),
        to_numpy(s.uncertainty_b),
    )
    np.testing.assert_allclose(sensitivity.importance()[0], expected, rtol=1e-5)


def test_some_layers_have_the_scores_that_they_have_among_all(rng):
    model = converted_model("adam")
    keras_srlora.initialize_factors(model)
    optimizer = keras_srlora.SensitivityOptimizer(model.optimizer, model)
    model.compile(optimizer, "mse")
    model.fit(*regression_data(rng), verbose=0)
    sensitivity = optimizer.sensitivity
    first, second = sensitivity.importance()
    for layers, expected in (
        (sensitivity.layers[1:], [second]),
        (sensitivity.layers[::-1], [second, first]),
    ):
        found = sensitivity.importance(layers=layers)
        for scores, of_layer in zip(found, expected, strict=True):
            assert of_layer.max() > 0
            np.testing.assert_array_equal(scores, of_layer)
    assert sensitivity.importance(layers=[]) == []
    assert keras_srlora.recompose(sensitivity, optimizer, layers=[]) == []
    # A layer that is named twice is recomposed once.
    layers = 2 * sensitivity.layers[:1]
    events = keras_srlora.recompose(sensitivity, optimizer, layers=layers)
    assert [event.layer for event in events] == [layers[0].path]


def test_recomposing_a_layer_without_scores_is_refused(rng):
    layers = [
        dense_layer(matrix("gaussian", 10, 6, rng), rank=2) for _ in range(2)
    ]
    sensitivity = keras_srlora.Sensitivity(layers[:1])
    before = [to_numpy(v) for layer in layers for v in layer.weights]
    with pytest.raises(ValueError, match="has no scores"):
        sensitivity.importance(layers=layers)
    with pytest.raises(ValueError, match="has no scores"):
        keras_srlora.recompose(sensitivity, layers=layers)
    after = [to_numpy(v) for layer in layers for v in layer.weights]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_leaves_no_mark(value, rng):
    model, layer, x, y = linear_model(rng)
    # A learning rate of zero: the weights survive the bad step.
    model.compile(keras.optimizers.SGD(0.0), "mse")
    bad = 7
    x[bad * BATCH] = value
    keras_srlora.initialize_factors(model)
    weights = {v.name: to_numpy(v) for v in layer.variables}
    optimizer = keras_srlora.SensitivityOptimizer(model.optimizer, model)
    optimizer.build(model.trainable_variables)
    for i in range(STEPS):
        apply_one_step(optimizer, model, batch(x, i), batch(y, i))
        for v in layer.variables:
            v.assign(weights[v.name])
    steps = [
        (weights, gradients_of(weights, batch(x, i), batch(y, i), layer.scale))
        for i in range(STEPS)
        if i != bad
    ]
    check(layer, steps)


def apply_one_step(optimizer, model, x, y):
    """Gradients by hand, handed to the optimizer as a loop would."""
    (layer,) = optimizer.sensitivity.layers
    weights = {v.name: to_numpy(v) for v in layer.variables}
    with np.errstate(invalid="ignore"):
        g = gradients_of(weights, x, y, layer.scale)
    by_name = {
        "lora_kernel_a": g["a"].T,
        "lora_kernel_b": g["b"],
        "bias": g["bias"],
    }
    variables = model.trainable_variables
    optimizer.apply(
        [
            ops.convert_to_tensor(by_name[v.name].astype("float32"))
            for v in variables
        ],
        variables,
    )


@pytest.mark.skipif(BACKEND == "jax", reason="no float16 product on a CPU")
def test_overflow_under_loss_scaling_leaves_no_mark(rng):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, layer, x, y = linear_model(rng)
        model.compile("sgd", "mse")
        # 2^15 is the first scale; this one overflows float16 in each step.
        model.optimizer.initial_scale = 1e30
        fit(model, x, y)
        assert all(np.abs(v).max() == 0 for v in statistics(layer))
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        model.compile("sgd", "mse")
        fit(model, x, y)
        assert all(np.isfinite(v).all() for v in statistics(layer))
        assert statistics(layer).average_b.max() > 0
    finally:
        keras.config.set_dtype_policy(policy)


def test_a_wrapper_in_compile_is_built_in_the_first_step(rng):
    """On TensorFlow inside of the traced function, where nothing computes."""
    model = two_layer_model(rng)
    keras_srlora.initialize_factors(model)
    optimizer = keras_srlora.SensitivityOptimizer(
        keras.optimizers.Adam(), model
    )
    model.compile(optimizer, "mse")
    model.fit(*regression_data(rng), verbose=0)
    (scores,) = optimizer.sensitivity.importance()
    assert (scores > 0).all()


def test_recomposing_what_was_not_decomposed_is_refused(rng):
    kernel = matrix("gaussian", 10, 6, rng)
    layers = [dense_layer(kernel, rank=2, initialize=i) for i in (True, False)]
    sensitivity = keras_srlora.Sensitivity(layers)
    before = [to_numpy(v) for layer in layers for v in layer.weights]
    with pytest.raises(ValueError, match="initialize_factors"):
        keras_srlora.recompose(sensitivity)
    after = [to_numpy(v) for layer in layers for v in layer.weights]
    for old, new in zip(before, after):
        np.testing.assert_array_equal(old, new)


def test_statistics_of_a_recomposed_layer_restart_from_zero(rng):
    layer = dense_layer(matrix("gaussian", 10, 6, rng), rank=2)
    other = dense_layer(matrix("gaussian", 10, 6, rng), rank=2)
    sensitivity = keras_srlora.Sensitivity([layer, other])
    for variable in sensitivity.variables:
        variable.assign(rng.random(variable.shape))
    kept = [to_numpy(v) for v in statistics(other)]
    sensitivity.reset([layer])
    assert all(np.abs(to_numpy(v)).max() == 0 for v in statistics(layer))
    for old, new in zip(kept, statistics(other)):
        np.testing.assert_array_equal(old, to_numpy(new))


def test_a_layer_without_gradient_keeps_its_statistics(rng):
    """Whatever its weights are; those of the other layer go on."""
    layer = dense_layer(matrix("gaussian", 10, 6, rng), rank=2)
    other = dense_layer(matrix("gaussian", 10, 6, rng), rank=2)
    sensitivity = keras_srlora.Sensitivity([layer, other])
    for variable in sensitivity.variables:
        variable.assign(rng.random(variable.shape))
    other.lora_kernel_b.assign(np.full((2, 6), np.nan))
    kept = statistics(other)
    before = statistics(layer)
    gradients = [ops.ones(v.shape) for v in layer.factors]
    sensitivity.update(
        [*gradients, None, None], [*layer.factors, *other.factors]
    )
    for old, new in zip(kept, statistics(other)):
        np.testing.assert_array_equal(old, new)
    for old, new in zip(before, statistics(layer)):
        assert (old != new).all()


def test_a_gradient_of_another_variable_that_is_not_finite_leaves_no_mark(rng):
    layer = dense_layer(matrix("gaussian", 10, 6, rng), rank=2)
    sensitivity = keras_srlora.Sensitivity([layer])
    head = keras.Variable(np.ones((3, 3), "float32"))
    gradients = [ops.ones(v.shape) for v in layer.factors]
    bad = np.ones((3, 3), "float32")
    bad[1, 1] = np.nan
    sensitivity.update(
        [*gradients, ops.convert_to_tensor(bad)], [*layer.factors, head]
    )
    for value in statistics(layer):
        assert not value.any()


def test_nothing_to_score_is_refused():
    with pytest.raises(ValueError, match="nothing to score"):
        keras_srlora.Sensitivity([])


@pytest.mark.parametrize("name", ["beta1", "beta2"])
@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan"), "0.5", None])
def test_bad_betas_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a number in"):
        keras_srlora.Sensitivity([], **{name: value})
