"""Quantized kernels: trained beside, never quantized again."""

import keras
import numpy as np
import pytest
from support import assert_same_variables
from support import bert_outputs
from support import effective
from support import recomposing_fit
from support import regression_data
from support import tiny_bert
from support import to_numpy

import keras_srlora
from keras_srlora.backend.arguments import keras_version
from keras_srlora.backend.keras_private.kernels import stored_kernel
from keras_srlora.backend.keras_private.kernels import stored_variables
from keras_srlora.conversion.enable import plain_matrix
from keras_srlora.layers import frozen
from keras_srlora.layers import pairs
from keras_srlora.layers.requirements import QUANTIZED_SINCE
from keras_srlora.recipes.definition import get_recipe

if keras_version() < QUANTIZED_SINCE:
    pytest.skip("needs a newer Keras", allow_module_level=True)

# Of the weights alone, so that a float layer computes the same.
WEIGHT_ONLY = {
    "int8": lambda: keras.quantizers.Int8QuantizationConfig(
        activation_quantizer=None
    ),
    "int4": lambda: keras.quantizers.Int4QuantizationConfig(block_size=None),
    "int4_blocks": lambda: keras.quantizers.Int4QuantizationConfig(
        block_size=4
    ),
}
MODES = ("int8", "int4", "float8")
# `Model.quantize` warns of every layer that it cannot quantize.
OF_OTHER_LAYERS = pytest.mark.filterwarnings(
    "ignore:.*does not have a `quantize` method",
    "ignore:Invalid quantization mode",
)
LAYERS = {
    "dense": lambda: keras.layers.Dense(6),
    "einsum": lambda: keras.layers.EinsumDense("abc,cd->abd", (None, 6)),
    "heads": lambda: keras.layers.EinsumDense("abc,cde->abde", (None, 3, 5)),
    "heads_first": lambda: keras.layers.EinsumDense(
        "btd,ndh->btnh", (None, 3, 5)
    ),
}


def plain_model(seed=0):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((4, 12))
    x = keras.layers.EinsumDense(
        "btd,ndh->btnh", (4, 3, 6), "tanh", "nh", name="heads"
    )(inputs)
    x = keras.layers.EinsumDense(
        "btnh,nhd->btd", (4, 12), "tanh", "d", name="output"
    )(x)
    x = keras.layers.Dense(16, "tanh", name="hidden")(x)
    x = keras.layers.Flatten()(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


TARGETS = ["heads", "output", "hidden"]


def quantized_model(mode=None, config=None, recipe="paper"):
    """Converted and compiled; without a mode only that."""
    model = plain_model()
    if mode or config:
        for name in TARGETS:
            # Under a wrapper that takes a mode or a config.
            layer = model.get_layer(name)
            layer.quantize(config=config) if config else layer.quantize(mode)
    keras_srlora.enable_srlora(
        model, 2, target_rank=8, target_layer_names=TARGETS, recipe=recipe
    )
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


@pytest.fixture
def data(rng):
    x, y = regression_data(rng, 64, 48)
    return x.reshape(64, 4, 12), y


def fit(model, data, epochs=4, **kwargs):
    """8 steps an epoch."""
    return recomposing_fit(model, data, epochs=epochs, **kwargs)


def adapted(model):
    return [model.get_layer(name) for name in TARGETS]


def stored(model):
    """All that quantizing made."""
    return [
        to_numpy(v)
        for layer in adapted(model)
        for v in stored_variables(layer)
        if v is not layer.bias and not v.trainable
    ]


@pytest.mark.parametrize("config", WEIGHT_ONLY.values(), ids=WEIGHT_ONLY)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_dequantized_kernel_is_what_the_layer_multiplies_by(make, config):
    layer = make()
    layer.build((2, 8, 8))
    layer.quantize(config=config())
    images = to_numpy(layer(np.eye(8, dtype="float32")[None]))[0]
    matrix = to_numpy(plain_matrix(layer))
    # Products with one and zeros: exact but for the scale's rounding.
    np.testing.assert_allclose(matrix, images.reshape(8, -1), rtol=1e-6)


@pytest.mark.parametrize("recipe", ["paper", "adaptive"])
@pytest.mark.parametrize("mode", MODES)
def test_conversion_leaves_the_outputs(mode, recipe, data):
    model = plain_model()
    for name in TARGETS:
        model.get_layer(name).quantize(mode)
    before = to_numpy(model(data[0]))
    kernels = [to_numpy(v) for v in model.variables]
    keras_srlora.enable_srlora(
        model, 2, target_layer_names=TARGETS, recipe=recipe
    )
    after = to_numpy(model(data[0]))
    if recipe == "adaptive":
        np.testing.assert_array_equal(after, before)
    # Where inputs are rounded, a difference in the last place may become one of
    # a whole step.
    np.testing.assert_allclose(after, before, atol=0.05)
    for layer in adapted(model):
        assert layer.quantization_mode == mode
    remaining = {v.path: to_numpy(v) for v in model.variables}
    for variable in plain_variables(model):
        assert any(
            np.array_equal(remaining[variable.path], kernel)
            for kernel in kernels
        )


def plain_variables(model):
    return [v for layer in adapted(model) for v in stored_variables(layer)]


@pytest.mark.parametrize("config", WEIGHT_ONLY.values(), ids=WEIGHT_ONLY)
@pytest.mark.parametrize("recipe", ["paper", "lora_restarts"])
def test_training_equals_that_on_the_dequantized_kernel(recipe, config, data):
    """Fused beside the kernel is as good as fused into a float one."""
    quantized = quantized_model(config=config(), recipe=recipe)
    plain = plain_model()
    reference = plain_model()
    for name in TARGETS:
        layer = reference.get_layer(name)
        layer.quantize(config=config())
        plain.get_layer(name).kernel.assign(frozen.float_kernel(layer))
    keras_srlora.enable_srlora(
        plain, 2, target_rank=8, target_layer_names=TARGETS, recipe=recipe
    )
    plain.compile(keras.optimizers.Adam(0.01), "mse")
    for a, b in zip(adapted(quantized), adapted(plain)):
        for x, y in zip(a.factors, b.factors):
            y.assign(to_numpy(x))
    # Nothing is rounded on the way, so that conversion is exact here.
    np.testing.assert_allclose(
        to_numpy(quantized(data[0])), to_numpy(reference(data[0])), atol=1e-5
    )
    integers = stored(quantized)
    runs = [fit(quantized, data), fit(plain, data)]
    assert len(runs[0].events) == len(runs[1].events) >= 9
    assert [e.directions for e in runs[0].events] == [
        e.directions for e in runs[1].events
    ]
    assert_same_variables(stored(quantized), integers)
    # 32 steps of Adam, whose division lets rounding grow.
    np.testing.assert_allclose(
        to_numpy(quantized(data[0])), to_numpy(plain(data[0])), atol=1e-4
    )
    for a, b in zip(adapted(quantized), adapted(plain)):
        np.testing.assert_allclose(effective(a), effective(b), atol=1e-4)


@pytest.mark.parametrize("recipe", ["paper", "lora_restarts"])
@pytest.mark.parametrize("mode", MODES)
def test_twenty_recompositions_lose_nothing(mode, recipe, rng):
    """Against an account in float64 of all that the pairs ever moved."""
    layer = keras.layers.Dense(48)
    layer.build((None, 40))
    layer.quantize(mode)
    model = keras.Sequential([keras.Input((40,)), layer])
    keras_srlora.enable_srlora(
        model, 2, target_rank=40, target_layer_names=[layer.name], recipe=recipe
    )
    pretrained = np.float64(to_numpy(frozen.float_kernel(layer)))
    account = pretrained.copy()
    recipe = get_recipe(recipe)
    for step in range(20):
        moved = [
            x + 1e-3 * rng.standard_normal(x.shape).astype("float32")
            for x in pairs.factors_to_numpy(layer)
        ]
        (a, b), (new_a, new_b) = (
            map(np.float64, x) for x in (pairs.factors_to_numpy(layer), moved)
        )
        account += new_a.T @ new_b - a.T @ b
        for factor, value in zip(layer.factors, moved):
            factor.assign(value)
        drift = pairs.fuse_and_restart(
            layer,
            np.array([step % 2]),
            layer.record.unused[:1],
            np.ones(1),
            recipe.scale_restarted,
            step,
        )
        assert drift <= 2e-6
    error = np.abs(effective(layer) - account).max()
    # Sums of 60 float32 products; a step of int8 is 4e-3 of the largest entry.
    assert error <= 5e-6 * np.abs(account).max()
    assert np.abs(account - pretrained).max() > 1e-4
    np.testing.assert_allclose(
        to_numpy(pairs.pretrained_matrix(layer)),
        pretrained,
        atol=5e-6 * np.abs(pretrained).max(),
    )


@pytest.mark.parametrize("mode", MODES)
def test_fit_recomposes_and_resumes_to_the_bit(mode, data, tmp_path):
    whole, first = quantized_model(mode), quantized_model(mode)
    integers = stored(whole)
    before = to_numpy(whole(data[0]))
    callback = fit(whole, data)
    assert len({event.step for event in callback.events}) >= 3
    assert_same_variables(stored(whole), integers)
    assert np.abs(to_numpy(whole(data[0])) - before).max() > 0.05
    fit(first, data, epochs=2)
    first.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    assert [x.quantization_mode for x in adapted(resumed)] == [mode] * 3
    fit(resumed, data, initial_epoch=2)
    # The same interval and origin: the callback counts from the first step.
    assert_same_variables(
        [v for x in adapted(first) for v in stored_variables(x)][:1],
        [v for x in adapted(resumed) for v in stored_variables(x)][:1],
    )
    assert_same_variables(whole.variables, resumed.variables)


@OF_OTHER_LAYERS
@pytest.mark.parametrize("config", WEIGHT_ONLY.values(), ids=WEIGHT_ONLY)
def test_merging_makes_plain_float_layers(config, data):
    model = quantized_model(config=config())
    fit(model, data)
    before = to_numpy(model(data[0]))
    keras_srlora.merge_srlora(model)
    for layer in adapted(model):
        assert layer.quantization_mode is None
        assert len(layer.variables) == 2
        assert layer.kernel.dtype == "float32"
        assert layer.kernel.trainable
    # Two orders of the same sums.
    np.testing.assert_allclose(to_numpy(model(data[0])), before, atol=1e-5)
    model.compile("adam", "mse")
    model.fit(*data, verbose=0)
    model.quantize(mode="int8")
    assert model.get_layer("hidden").quantization_mode == "int8"
    assert np.isfinite(to_numpy(model(data[0]))).all()


def test_a_float8_layer_stays_one_when_merged(data):
    model = quantized_model("float8")
    fit(model, data)
    kernels = [effective(layer) for layer in adapted(model)]
    keras_srlora.merge_srlora(model)
    for layer, kernel in zip(adapted(model), kernels):
        assert type(layer) in (keras.layers.Dense, keras.layers.EinsumDense)
        assert layer.quantization_mode == "float8"
        np.testing.assert_array_equal(to_numpy(layer.kernel), kernel)


@pytest.mark.parametrize("kind", ["dense", "einsum"])
def test_a_merged_float8_kernel_is_rounded_and_not_cut_off(kind, rng):
    """Its largest entry is several times the one that the scale was for."""
    layer = {
        "dense": keras.layers.Dense(6, use_bias=False),
        "einsum": keras.layers.EinsumDense("ab,bc->ac", 6),
    }[kind]
    model = keras.Sequential([keras.Input((12,)), layer])
    layer.quantize("float8")
    keras_srlora.enable_srlora(model, 2, target_layer_names=[layer.name])
    model.compile("adam", "mse")
    x = rng.standard_normal((16, 12)).astype("float32")
    model.fit(x, x[:, :6], epochs=2, verbose=0)
    for factor in layer.factors:
        factor.assign(2 * rng.standard_normal(factor.shape))
    kernel = effective(layer)
    keras_srlora.merge_srlora(model)
    computed = to_numpy(model(np.eye(12, dtype="float32")))
    # Inputs and kernels have three bits of a fraction each.
    np.testing.assert_allclose(computed, kernel, rtol=2**-3, atol=1e-2)


def test_float8_scales_are_trained_on(data):
    """Keras hands them to the optimizer in the place of gradients."""
    model = quantized_model("float8")
    layer = model.get_layer("hidden")
    fit(model, data)
    for history in (layer.inputs_amax_history, layer.kernel_amax_history):
        assert to_numpy(history).max() > 0
    assert not stored_kernel(layer).trainable


@pytest.mark.parametrize("mode", MODES)
def test_adapter_files_and_disabling(mode, data, tmp_path):
    model = quantized_model(mode)
    fit(model, data)
    layer = model.get_layer("heads")
    pretrained = to_numpy(frozen.float_kernel(layer))
    with keras_srlora.adapter_disabled(model):
        inside = effective(layer)
        np.testing.assert_allclose(inside, pretrained, atol=1e-6)
    assert np.abs(effective(layer) - pretrained).max() > 1e-3
    keras_srlora.save_adapter(
        model, tmp_path / "a.safetensors", include_trainable=True
    )
    fresh = plain_model()
    for name in TARGETS:
        fresh.get_layer(name).quantize(mode)
    keras_srlora.load_adapter(fresh, tmp_path / "a.safetensors")
    for a, b in zip(adapted(model), adapted(fresh)):
        np.testing.assert_allclose(effective(a), effective(b), atol=1e-6)
    if mode != "float8":
        np.testing.assert_allclose(
            to_numpy(fresh(data[0])), to_numpy(model(data[0])), atol=1e-5
        )


def test_an_adapter_that_needs_more_room_is_refused(data, tmp_path):
    path = tmp_path / "a.safetensors"
    keras_srlora.save_adapter(
        quantized_model("int8"), path, include_trainable=True
    )
    small = quantized_model("int8", recipe="adaptive")
    before = [to_numpy(v) for v in small.variables]
    with pytest.raises(ValueError, match="there is room for 8"):
        keras_srlora.load_adapter(small, path)
    assert_same_variables(small.variables, before)


def test_a_recipe_that_needs_more_room_is_refused(data):
    model = quantized_model("int8", recipe="lora_restarts")
    recipe = keras_srlora.Recipe(start="lora")
    with pytest.raises(ValueError, match="there is room for 8"):
        model.fit(
            *data,
            verbose=0,
            callbacks=[keras_srlora.RecompositionCallback(recipe=recipe)],
        )


def test_decomposing_again_is_refused_once_pairs_were_fused(data):
    model = quantized_model("int4")
    fit(model, data)
    with pytest.raises(ValueError, match="cannot take up the pairs"):
        model.get_layer("hidden").initialize_factors()


def test_other_modes_are_refused():
    layer = keras.layers.Dense(8, name="hidden")
    model = keras.Sequential([keras.Input((8,)), layer])
    config = keras.quantizers.GPTQConfig(None, None)
    layer.quantize(config=config)
    with pytest.raises(ValueError, match="'gptq'"):
        keras_srlora.enable_srlora(model, 2, target_layer_names=["hidden"])
    assert type(layer) is keras.layers.Dense


def test_an_older_keras_is_refused(monkeypatch):
    layer = keras.layers.Dense(8, name="hidden")
    model = keras.Sequential([keras.Input((8,)), layer])
    layer.quantize("int8")
    monkeypatch.setattr(keras, "__version__", "3.14.2")
    with pytest.raises(ValueError, match="Keras 3.15 or newer.*3.14.2"):
        keras_srlora.enable_srlora(model, 2, target_layer_names=["hidden"])


def test_a_layer_is_built_quantized(data):
    inputs = keras.Input((12,))
    layer = keras_srlora.SRLoRADense(6, rank=2, dtype="int8_from_float32")
    model = keras.Model(inputs, layer(inputs))
    assert stored_kernel(layer).dtype == "int8"
    assert len(model.trainable_variables) == 3


@OF_OTHER_LAYERS
@pytest.mark.parametrize("mode", MODES)
def test_a_quantized_backbone(mode, tmp_path):
    """`quantize` of a KerasHub model, its file, and its loss."""
    bert = tiny_bert(num_layers=1)
    bert.quantize(mode)
    before = bert_outputs(bert)
    layers = keras_srlora.enable_srlora(bert, 2)
    assert {layer.quantization_mode for layer in layers} == {mode}
    np.testing.assert_array_equal(bert_outputs(bert), before)
    bert.save(tmp_path / "bert.keras")
    loaded = keras.models.load_model(tmp_path / "bert.keras")
    np.testing.assert_array_equal(bert_outputs(loaded), before)
    assert [v.path for v in loaded.trainable_variables] == [
        v.path for v in bert.trainable_variables
    ]
