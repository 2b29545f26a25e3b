"""Kernels that other layers read, share or wrap, and kernels in float64."""

import keras
import numpy as np
import pytest
from keras import ops
from pieces import NAMES
from pieces import WIDTH
from pieces import assert_close
from pieces import assert_unchanged
from pieces import batch
from pieces import called
from pieces import collected_warnings
from pieces import differ
from pieces import nudge
from pieces import predicted
from pieces import state_of
from support import to_numpy

import keras_srlora
from keras_srlora import enable_srlora

layers = keras.layers


# Layers that read the kernel of another one when they are called.


@keras.saving.register_keras_serializable("silent")
class Tied(layers.Layer):
    """The transposed kernel of another layer: a tied decoder."""

    def __init__(self, tied, **kwargs):
        super().__init__(**kwargs)
        self.read = lambda: tied.kernel

    def call(self, x):
        return ops.matmul(x, ops.transpose(self.read()))


class ReadsItsOwn(layers.Layer):
    """A composite layer that multiplies by the kernel inside of it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(WIDTH, name="first")

    def build(self, input_shape):
        self.inner.build(input_shape)
        self.built = True

    def call(self, x):
        return ops.matmul(x, self.inner.kernel) + self.inner.bias


class OfAnEinsum(layers.Layer):
    def __init__(self, tied, **kwargs):
        super().__init__(**kwargs)
        self.read = lambda: tied.kernel

    def call(self, x):
        return ops.einsum("bc,ac->ba", x, self.read())


class Penalty(layers.Layer):
    """A loss of the kernel of another layer."""

    def __init__(self, tied, **kwargs):
        super().__init__(**kwargs)
        self.read = lambda: tied.kernel

    def call(self, x):
        return x + 0.1 * ops.sum(ops.square(self.read()))


def tied():
    inputs = keras.Input((WIDTH,))
    first = layers.Dense(WIDTH, "tanh", name="first")
    x = layers.Dense(WIDTH, "tanh", name="second")(first(inputs))
    return keras.Model(inputs, Tied(first, name="decoder")(x))


def composite():
    inputs = keras.Input((WIDTH,))
    x = ReadsItsOwn(name="composite")(inputs)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def tied_einsum():
    inputs = keras.Input((WIDTH,))
    first = layers.EinsumDense("ab,bc->ac", WIDTH, name="first")
    x = ops.tanh(first(inputs))
    return keras.Model(inputs, OfAnEinsum(first, name="decoder")(x))


def penalized():
    inputs = keras.Input((WIDTH,))
    first = layers.Dense(WIDTH, "tanh", name="first")
    return keras.Model(inputs, Penalty(first)(first(inputs)))


READERS = {
    "tied": tied,
    "composite": composite,
    "einsum": tied_einsum,
    "penalty": penalized,
}


def made(kind):
    keras.utils.set_random_seed(7)
    return READERS[kind]()


@pytest.mark.parametrize("recipe", ["paper", "adaptive"])
@pytest.mark.parametrize("kind", READERS)
def test_a_kernel_that_is_read_is_the_effective_one(kind, recipe, rng):
    model, reference, x = made(kind), made(kind), batch(rng)
    expected = called(model, x)
    (layer,) = enable_srlora(
        model, 2, target_rank=6, recipe=recipe, target_layer_names=["first"]
    )
    assert_close(called(model, x), expected)
    assert_close(predicted(model, x), expected)
    nudge([layer])
    # The same with a plain kernel of the same numbers.
    plain = next(
        v for v in reference.variables if v.path.endswith("first/kernel")
    )
    plain.assign(to_numpy(layer.effective_kernel()))
    tuned = called(reference, x)
    assert differ(tuned, expected)
    assert_close(called(model, x), tuned)
    assert_close(predicted(model, x), tuned)
    assert_close(layer.kernel, layer.effective_kernel())
    with keras_srlora.adapter_disabled(model):
        assert_close(called(model, x), expected)
    keras_srlora.merge_srlora(model)
    assert_close(called(model, x), tuned)
    assert_close(predicted(model, x), tuned)


@pytest.mark.parametrize("kind", READERS)
def test_a_run_changes_what_is_read(kind, rng):
    """Trained, recomposed: the function does not change at a restart."""
    model, x = made(kind), batch(rng, 32)
    (layer,) = enable_srlora(
        model, 2, target_rank=6, recipe="paper", target_layer_names=["first"]
    )
    y = np.zeros((32, *model.output_shape[1:]), "float32")
    model.compile(keras.optimizers.Adam(0.02), "mse")
    callback = keras_srlora.RecompositionCallback(interval=1)
    model.fit(x, y, batch_size=16, verbose=0, callbacks=[callback])
    assert callback.events
    assert_close(predicted(model, x), called(model, x))
    expected = called(model, x)
    keras_srlora.merge_srlora(model)
    assert_close(called(model, x), expected)


def test_gradients_flow_through_a_kernel_that_is_read(rng):
    """Of a layer that is only read, as with Keras's LoRA."""
    model = made("composite")
    (layer,) = enable_srlora(model, 2, target_layer_names=["first"])
    before = to_numpy(layer.lora_kernel_b)
    model.compile(keras.optimizers.SGD(1.0), "mse")
    x = batch(rng, 16)
    model.fit(x, np.ones((16, 3), "float32"), batch_size=8, verbose=0)
    assert differ(layer.lora_kernel_b, before, 1e-5)


def test_a_kernel_that_is_read_keeps_its_shape_and_dtype():
    model = made("einsum")
    before = tuple(model.get_layer("first").kernel.shape)
    (layer,) = enable_srlora(model, 2, target_layer_names=["first"])
    assert tuple(layer.kernel.shape) == before
    assert keras.backend.standardize_dtype(layer.kernel.dtype) == "float32"


def test_an_adapter_of_a_tied_kernel_is_exported_and_loaded(rng, tmp_path):
    model, x = made("tied"), batch(rng)
    nudge(enable_srlora(model, 2, target_rank=6, target_layer_names=["first"]))
    with collected_warnings():
        keras_srlora.save_adapter(model, tmp_path / "a.safetensors")
    fresh = made("tied")
    with collected_warnings():
        keras_srlora.load_adapter(fresh, tmp_path / "a.safetensors")
    assert_close(called(fresh, x), called(model, x))


# Kernels that cannot be told from what else holds them: refused.


def shared_variable():
    """Two layers that hold one variable."""
    inputs = keras.Input((WIDTH,))
    x = layers.Dense(WIDTH, "tanh", name="first")(inputs)
    second = layers.Dense(WIDTH, "tanh", name="second")
    x = second(x)
    model = keras.Model(inputs, layers.Dense(3, name="head")(x))
    # Keras has no public way; people do it like this.
    second._tracker.unlock()
    second._kernel = model.get_layer("first").kernel
    second._tracker.lock()
    return model


class Holds(layers.Layer):
    """Keeps the variable itself, and reads it when called."""

    def __init__(self, tied, **kwargs):
        super().__init__(**kwargs)
        self.tied_kernel = tied.kernel

    def call(self, x):
        return ops.matmul(x, ops.transpose(self.tied_kernel))


def held_variable():
    inputs = keras.Input((WIDTH,))
    first = layers.Dense(WIDTH, "tanh", name="first")
    x = first(inputs)
    return keras.Model(inputs, Holds(first, name="second")(x))


class HoldsInAList(Holds):
    def __init__(self, tied, **kwargs):
        layers.Layer.__init__(self, **kwargs)
        self.kernels = [tied.kernel]

    @property
    def tied_kernel(self):
        return self.kernels[0]


def held_in_a_list():
    inputs = keras.Input((WIDTH,))
    first = layers.Dense(WIDTH, "tanh", name="first")
    x = first(inputs)
    return keras.Model(inputs, HoldsInAList(first, name="second")(x))


def spectral():
    inputs = keras.Input((WIDTH,))
    first = layers.Dense(WIDTH, name="first")
    x = layers.SpectralNormalization(first, name="second")(inputs)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def spectral_einsum():
    inputs = keras.Input((WIDTH,))
    first = layers.EinsumDense("ab,bc->ac", WIDTH, name="first")
    x = layers.SpectralNormalization(first, name="second")(inputs)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


SHARED = {
    "shared": shared_variable,
    "held": held_variable,
    "held_in_a_list": held_in_a_list,
    "spectral": spectral,
    "spectral_einsum": spectral_einsum,
}


@pytest.mark.parametrize("kind", SHARED)
def test_a_shared_kernel_is_refused_at_conversion(kind, rng):
    keras.utils.set_random_seed(7)
    model, x = SHARED[kind](), batch(rng)
    before, expected = state_of(model), called(model, x)
    with pytest.raises(ValueError, match="first") as caught:
        enable_srlora(model, 2, recipe="paper", target_layer_names=["first"])
    assert "second" in str(caught.value)
    assert_unchanged(model, before)
    assert_close(called(model, x), expected)
    assert type(model.get_layer("second")) is not keras_srlora.SRLoRADense


@pytest.mark.parametrize("kind", ["shared", "spectral"])
@pytest.mark.parametrize("names", [None, NAMES])
def test_a_shared_kernel_is_refused_whoever_is_named(kind, names, rng):
    keras.utils.set_random_seed(7)
    model = SHARED[kind]()
    if names and kind == "spectral":
        names = ["first"]
    before = state_of(model)
    with pytest.raises(ValueError, match="first"):
        enable_srlora(model, 2, target_layer_names=names)
    assert_unchanged(model, before)


def test_a_shared_kernel_is_refused_by_load_adapter(rng, tmp_path):
    keras.utils.set_random_seed(7)
    model = SHARED["shared"]()
    keras.utils.set_random_seed(7)
    inputs = keras.Input((WIDTH,))
    x = layers.Dense(WIDTH, "tanh", name="first")(inputs)
    x = layers.Dense(WIDTH, "tanh", name="second")(x)
    other = keras.Model(inputs, layers.Dense(3, name="head")(x))
    other.set_weights([to_numpy(v) for v in other.variables])
    other.get_layer("first").kernel.assign(
        to_numpy(model.get_layer("first").kernel)
    )
    enable_srlora(other, 2, target_layer_names=["first"])
    with collected_warnings():
        keras_srlora.save_adapter(other, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="second"):
        keras_srlora.load_adapter(model, tmp_path / "a.safetensors")


def two_models():
    return [
        keras.Sequential(
            [keras.Input((WIDTH,)), layers.Dense(WIDTH, name=name)]
        )
        for name in NAMES
    ]


def tie(first, second):
    """Lets the layer of a model hold the kernel of another's."""
    layer = second.layers[0]
    layer._tracker.unlock()
    layer._untrack_variable(layer._kernel)
    layer._kernel = first.layers[0]._kernel


def test_a_kernel_that_another_model_holds_is_refused(rng):
    (first, second), x = two_models(), batch(rng)
    tie(first, second)
    expected = called(second, x)
    before = state_of(first)
    with pytest.raises(ValueError, match="/second'.*exclude_layer_names"):
        enable_srlora(first, 2, target_layer_names=["first"])
    assert_unchanged(first, before)
    assert_close(called(second, x), expected)
    assert first.layers[0].trainable
    # A model that is gone holds nothing.
    (first, second), _ = two_models(), tie(*two_models())
    enable_srlora(first, 2, target_layer_names=["first"])


@pytest.mark.parametrize("back", ["merge_srlora", "unload_srlora"])
def test_a_kernel_that_was_tied_since_is_not_merged(back, rng):
    (first, second), x = two_models(), batch(rng)
    enable_srlora(first, 2, target_layer_names=["first"], recipe="paper")
    tie(first, second)
    expected = called(second, x)
    with pytest.raises(ValueError, match="/second'"):
        getattr(keras_srlora, back)(first)
    assert isinstance(first.layers[0], keras_srlora.SRLoRADense)
    assert_close(called(second, x), expected)


def test_a_layer_that_is_called_twice_is_no_shared_kernel(rng):
    """One layer, one kernel: converted as before."""
    inputs = keras.Input((WIDTH,))
    first = layers.Dense(WIDTH, "tanh", name="first")
    model = keras.Model(inputs, layers.Dense(3)(first(first(inputs))))
    x = batch(rng)
    before = called(model, x)
    enable_srlora(model, 2, recipe="paper", target_layer_names=["first"])
    assert_close(called(model, x), before)


# Kernels in float64.

no_float64 = pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="JAX truncates float64"
)


def in_float64(recipe="paper"):
    """The model, its SRLoRA layers, and the pretrained kernels."""
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [
            keras.Input((WIDTH,), dtype="float64"),
            layers.Dense(WIDTH, "tanh", name="first", dtype="float64"),
            layers.EinsumDense("ab,bc->ac", 6, name="second", dtype="float64"),
            layers.Dense(3, name="head", dtype="float64"),
        ],
        name="model",
    )
    plain = [to_numpy(model.get_layer(name).kernel) for name in NAMES]
    enable_srlora(
        model, 2, target_rank=6, recipe=recipe, target_layer_names=NAMES
    )
    return model, [model.get_layer(name) for name in NAMES], plain


def assert_exact(actual, expected, tolerance=1e-13):
    actual, expected = to_numpy(actual), to_numpy(expected)
    assert actual.dtype == expected.dtype == np.float64
    scale = np.max(np.abs(expected))
    assert np.max(np.abs(actual - expected)) <= tolerance * scale


def update(layer):
    """What the factors add, in NumPy's float64."""
    a, b = (to_numpy(v) for v in layer.factors)
    return layer.scale * a.T @ b


def effective(made):
    return [to_numpy(layer.effective_kernel()) for layer in made]


@no_float64
def test_an_effective_kernel_is_exact_in_float64():
    _, made, _ = in_float64()
    before = [
        kernel - update(layer) for kernel, layer in zip(effective(made), made)
    ]
    nudge(made)
    for layer, rest in zip(made, before):
        assert_exact(layer.effective_kernel(), rest + update(layer))


@no_float64
@pytest.mark.parametrize("recipe", ["paper", "adaptive"])
def test_merging_is_exact_in_float64(recipe):
    model, made, _ = in_float64(recipe)
    before = [
        kernel - update(layer) for kernel, layer in zip(effective(made), made)
    ]
    nudge(made)
    expected = [rest + update(layer) for rest, layer in zip(before, made)]
    keras_srlora.merge_srlora(model)
    for layer, kernel in zip(made, expected):
        assert_exact(layer.kernel, kernel)


@no_float64
@pytest.mark.parametrize("recipe", ["paper", "adaptive"])
def test_conversion_is_exact_in_float64(recipe):
    _, made, plain = in_float64(recipe)
    for kernel, expected in zip(effective(made), plain):
        assert_exact(kernel, expected)


@no_float64
def test_a_call_is_as_exact_as_the_plain_layers_in_float64(rng):
    """Of PyTorch, Keras's `matmul` is not; its `einsum` is."""
    _, (_, layer), _ = in_float64()
    x = rng.standard_normal((4, WIDTH))
    plain = layers.EinsumDense("ab,bc->ac", 6, dtype="float64")
    assert_exact(plain(x), x @ to_numpy(plain.kernel))
    rest = effective([layer])[0] - update(layer)
    nudge([layer])
    assert_exact(layer(x), x @ (rest + update(layer)))


@no_float64
@pytest.mark.parametrize("recipe", ["paper", "lora_restarts"])
def test_recomposing_is_exact_in_float64(recipe):
    model, made, _ = in_float64(recipe)
    rests = [
        kernel - update(layer) for kernel, layer in zip(effective(made), made)
    ]
    nudge(made)
    expected = [rest + update(layer) for rest, layer in zip(rests, made)]
    optimizer = keras_srlora.SensitivityOptimizer(
        keras.optimizers.SGD(0.0), model
    )
    variables = model.trainable_variables
    optimizer.build(variables)
    for step in range(1, 3):
        gradients = [ops.ones(v.shape, v.dtype) for v in variables]
        optimizer.apply(gradients, variables)
        events = keras_srlora.recompose(optimizer.sensitivity, optimizer, step)
        assert len(events) == 2
        for kernel, before in zip(effective(made), expected):
            assert_exact(kernel, before)
        assert max(event.drift for event in events) <= 1e-13


@no_float64
@pytest.mark.parametrize("recipe", ["paper", "adaptive"])
def test_switching_off_is_exact_in_float64(recipe):
    model, made, plain = in_float64(recipe)
    nudge(made)
    with keras_srlora.adapter_disabled(model):
        for kernel, expected in zip(effective(made), plain):
            assert_exact(kernel, expected)


@no_float64
@pytest.mark.parametrize("recipe", ["paper", "adaptive"])
def test_an_adapter_is_saved_and_loaded_exactly_in_float64(recipe, tmp_path):
    model, made, _ = in_float64(recipe)
    nudge(made)
    expected = effective(made)
    with collected_warnings():
        keras_srlora.save_adapter(model, tmp_path / "a.safetensors")
        fresh, other, _ = in_float64(recipe)
        keras_srlora.load_adapter(fresh, tmp_path / "a.safetensors")
    for kernel, before in zip(effective(other), expected):
        assert_exact(kernel, before)
