"""Adapter files, and the adapter switched off."""

import json
import os
import tracemalloc
import warnings

import keras
import numpy as np
import pytest
from support import bert_outputs
from support import effective
from support import read_adapter
from support import regression_data
from support import tiny_bert
from support import to_numpy
from support import write_adapter

import keras_srlora
from keras_srlora import RecompositionCallback
from keras_srlora.adapters import save_load
from keras_srlora.layers import pairs
from keras_srlora.recipes.definition import RECIPES
from keras_srlora.recipes.definition import get_recipe

pytest.importorskip("safetensors")


def plain_model(width=16):
    """Pretrained, so to speak; of the same names and weights each time."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((12,))
    x = keras.layers.Dense(width, activation="tanh", name="hidden")(inputs)
    x = keras.layers.Reshape((4, width // 4), name="reshape")(x)
    x = keras.layers.EinsumDense(
        "btd,ndh->btnh", (4, 2, 3), bias_axes="nh", name="projection"
    )(x)
    x = keras.layers.Flatten(name="flatten")(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    for variable in model.variables:
        if variable.name == "bias":
            variable.assign(
                np.linspace(-0.1, 0.1, variable.shape[-1])
                + (np.zeros(variable.shape))
            )
    return model


def fit(model, rng, epochs=3):
    optimizer = keras.optimizers.Adam(1e-2)
    model.compile(optimizer, "mse")
    callback = RecompositionCallback(interval=5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*have used all their directions")
        history = model.fit(
            *regression_data(rng),
            batch_size=8,
            epochs=epochs,
            verbose=0,
            shuffle=False,
            callbacks=[callback],
        )
    return callback, history.history["loss"]


def trained_model(recipe="paper", **kwargs):
    model = plain_model()
    keras_srlora.enable_srlora(model, rank=2, recipe=recipe, **kwargs)
    callback, _ = fit(model, np.random.default_rng(0))
    assert len({event.step for event in callback.events}) > 2
    return model


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


def predictions(model):
    x = np.random.default_rng(3).standard_normal((9, 12)).astype("float32")
    return to_numpy(model(x))


def snapshot(model):
    return [to_numpy(v) for v in model.variables]


# Saving and loading.


@pytest.mark.parametrize(
    "recipe", ["paper", keras_srlora.Recipe(start="lora", scale="as_lora")]
)
@pytest.mark.parametrize("alpha", [None, 6])
def test_a_fresh_model_computes_the_same(recipe, alpha, path):
    model = trained_model(recipe, lora_alpha=alpha)
    keras_srlora.save_adapter(model, path, include_trainable=True)
    fresh = plain_model()
    layers = keras_srlora.load_adapter(fresh, path)
    assert [layer.path for layer in layers] == ["hidden", "projection"]
    assert np.abs(predictions(plain_model()) - predictions(model)).max() > 0.1
    # Rounding of the kernel, once out of the record and once into it.
    np.testing.assert_allclose(
        predictions(fresh), predictions(model), atol=1e-5
    )
    for layer, other in zip(layers, [model.get_layer(x.name) for x in layers]):
        for factor, saved in zip(layer.factors, other.factors):
            np.testing.assert_array_equal(to_numpy(factor), to_numpy(saved))
        state, expected = layer.record, other.record
        for name in ("anchors", "used", "slot_direction", "slot_started"):
            np.testing.assert_array_equal(
                getattr(state, name), getattr(expected, name)
            )
        np.testing.assert_array_equal(state.events, expected.events)
        assert layer.recipe == other.recipe and layer.scale == other.scale


@pytest.mark.parametrize("recipe", ["paper", RECIPES["lora_restarts"]])
def test_training_goes_on_as_the_original_would(recipe, path):
    model = plain_model()
    recipe = keras_srlora.Recipe(
        **{**get_recipe(recipe).to_dict(), "stop": 1.0} | {"steps_per_pair": 1}
    )
    keras_srlora.enable_srlora(model, rank=2, recipe=recipe)
    fit(model, np.random.default_rng(0), epochs=1)
    keras_srlora.save_adapter(model, path, include_trainable=True)
    fresh = plain_model()
    keras_srlora.load_adapter(fresh, path)
    first, losses = fit(model, np.random.default_rng(1), epochs=2)
    second, others = fit(fresh, np.random.default_rng(1), epochs=2)
    assert first.events
    key = [(e.step, e.layer, e.directions) for e in first.events]
    assert key == [(e.step, e.layer, e.directions) for e in second.events]
    # Statistics start anew with an adapter and went on in the original: which
    # pairs are fused may differ in the first recomposition, the losses less.
    np.testing.assert_allclose(losses, others, rtol=2e-2)


def test_exactly_the_factors_and_the_head_are_trainable(path):
    keras_srlora.save_adapter(trained_model(), path, include_trainable=True)
    fresh = plain_model()
    layers = keras_srlora.load_adapter(fresh, path)
    names = {v.path for v in fresh.trainable_variables}
    factors = {v.path for layer in layers for v in layer.factors}
    assert names == factors | {"head/kernel", "head/bias"}


def test_an_adapter_replaces_another_of_the_same_model(path):
    model = trained_model()
    keras_srlora.save_adapter(model, path, include_trainable=True)
    expected = predictions(model)
    fit(model, np.random.default_rng(5))
    assert np.abs(predictions(model) - expected).max() > 1e-2
    keras_srlora.load_adapter(model, path)
    np.testing.assert_allclose(predictions(model), expected, atol=1e-5)


def test_the_size_does_not_grow_with_the_recompositions(path):
    model = trained_model()
    keras_srlora.save_adapter(model, path, include_trainable=True)
    tensors, metadata = read_adapter(path)
    for layer in metadata["layers"]:
        of_layer = {
            name.removeprefix(layer["path"] + "/"): array
            for name, array in tensors.items()
        }
        pairs = len(of_layer["lora_kernel_a"]) + len(of_layer["fused_a"])
        assert pairs + len(of_layer["left"]) <= 2 * layer["target_rank"]


def test_what_was_left_out_is_said(path):
    model = trained_model()
    with pytest.warns(UserWarning, match="2 trainable.*'head/kernel'"):
        keras_srlora.save_adapter(model, path)
    tensors, _ = read_adapter(path)
    assert not [name for name in tensors if name.startswith("trainable/")]
    # The head stays as it was.
    fresh = plain_model()
    keras_srlora.load_adapter(fresh, path)
    np.testing.assert_array_equal(
        to_numpy(fresh.get_layer("head").kernel),
        to_numpy(plain_model().get_layer("head").kernel),
    )


def test_metadata_are_for_people(path):
    keras_srlora.save_adapter(trained_model(), path, include_trainable=True)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])["__metadata__"]
    adapter = json.loads(header["adapter"])
    assert adapter["keras_srlora"] == keras_srlora.__version__
    hidden, projection = adapter["layers"]
    assert hidden["kernel_shape"] == [12, 16] and hidden["rank"] == 2
    assert projection["equation"] == "btd,ndh->btnh"
    assert projection["target_rank"] == 4
    assert hidden["recipe"]["selection"] == "least_important"


def test_files_are_written_whole_or_not_at_all(path, monkeypatch):
    model = trained_model()
    keras_srlora.save_adapter(model, path, include_trainable=True)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        keras_srlora.save_adapter(model, path, include_trainable=True)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_keras_hub_backbone(path):
    pytest.importorskip("keras_hub")
    bert = tiny_bert()
    layers = keras_srlora.enable_srlora(bert, rank=2)
    rng = np.random.default_rng(0)
    for step, layer in enumerate(layers):
        for factor in layer.factors:
            factor.assign(rng.standard_normal(factor.shape) * 0.3)
        pairs.fuse_and_restart(
            layer,
            np.array([1]),
            np.array([2]),
            np.ones(1),
            layer.recipe.scale_restarted,
            step,
        )
    keras_srlora.save_adapter(bert, path)
    fresh = tiny_bert()
    assert np.abs(bert_outputs(fresh) - bert_outputs(bert)).max() > 1e-3
    assert len(keras_srlora.load_adapter(fresh, path)) == len(layers) == 12
    np.testing.assert_allclose(
        bert_outputs(fresh), bert_outputs(bert), atol=1e-5
    )
    assert len(fresh.trainable_variables) == 24


# What does not fit.


def refused(model, path, message, error=ValueError):
    before = snapshot(model)
    classes = [type(layer) for layer in model.layers]
    with pytest.raises(error, match=message):
        keras_srlora.load_adapter(model, path)
    assert classes == [type(layer) for layer in model.layers]
    for was, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(was, to_numpy(variable))


@pytest.fixture
def saved(path):
    keras_srlora.save_adapter(trained_model(), path, include_trainable=True)
    return path


def test_other_pretrained_weights(saved):
    model = plain_model()
    kernel = model.get_layer("hidden").kernel
    kernel.assign(to_numpy(kernel)[::-1])
    refused(model, saved, "other pretrained weights.*'hidden'")


def test_another_width(saved):
    refused(plain_model(width=24), saved, "'hidden'.*kernel_shape")


def test_another_rank(saved):
    model = plain_model()
    keras_srlora.enable_srlora(model, rank=4)
    refused(model, saved, "'hidden'.*rank is 2 and that of the layer is 4")


def test_a_missing_layer(saved):
    inputs = keras.Input((12,))
    layer = keras.layers.Dense(16, name="other")
    refused(
        keras.Model(inputs, layer(inputs)), saved, "'hidden'.*no such layer"
    )


def test_a_layer_of_another_class(saved):
    inputs = keras.Input((12,))
    layer = keras.layers.EinsumDense("ab,bc->ac", 16, name="hidden")
    refused(keras.Model(inputs, layer(inputs)), saved, "is for a Dense")


def test_another_head(saved):
    inputs = keras.Input((12,))
    model = plain_model()
    x = model.get_layer("flatten").output
    model = keras.Model(model.input, keras.layers.Dense(5, name="head")(x))
    del inputs
    refused(model, saved, "'head/.*a shape of")


def test_no_such_file(path):
    refused(plain_model(), path, "adapter", error=FileNotFoundError)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"text", b"\xff" * 400])
def test_a_file_of_another_kind(content, path):
    path.write_bytes(content)
    refused(plain_model(), path, "not a safetensors file, or is damaged")


def test_a_safetensors_file_of_another_kind(path):
    import safetensors.numpy

    path.write_bytes(safetensors.numpy.save({"x": np.zeros(3)}))
    refused(plain_model(), path, "no adapter.*format=None")


def test_a_truncated_file(saved):
    data = saved.read_bytes()
    saved.write_bytes(data[: len(data) // 2])
    refused(plain_model(), saved, "damaged")


def test_any_flipped_bit(saved, rng):
    data = saved.read_bytes()
    model = plain_model()
    for position in rng.integers(len(data), size=40):
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        saved.write_bytes(damaged)
        refused(model, saved, "damaged|no adapter|format")


def test_a_later_format(path, monkeypatch):
    later = save_load.KIND._replace(version=99)
    monkeypatch.setattr(save_load, "KIND", later)
    keras_srlora.save_adapter(trained_model(), path, include_trainable=True)
    monkeypatch.undo()
    refused(plain_model(), path, "format_version='99'")


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("hidden/lora_kernel_a", np.zeros((2, 13), "float32")),
        ("hidden/lora_kernel_b", np.zeros((2, 16), "int64")),
        ("hidden/left", np.full((16, 12), np.nan, "float32")),
        ("hidden/kept", np.full(12, 99)),
        ("hidden/kept", np.full(12, -1)),
        ("hidden/slot_direction", np.full(2, -2)),
        ("hidden/visits", None),
    ],
)
def test_a_file_that_lies(name, array, saved):
    tensors, metadata = read_adapter(saved)
    if array is None:
        del tensors[name]
    else:
        tensors[name] = array
    write_adapter(saved, tensors, metadata)
    refused(plain_model(), saved, "does not fit its own metadata")


@pytest.mark.parametrize(
    "name", ["../../hidden", "/etc/hidden", "", "hid\0den"]
)
def test_a_name_that_is_a_path_elsewhere(name, saved, tmp_path):
    """Names are looked up among the layers of the model, and nowhere else."""
    tensors, metadata = read_adapter(saved)
    for description in metadata["layers"]:
        if description["path"] == "hidden":
            description["path"] = name
    write_adapter(saved, tensors, metadata)
    refused(plain_model(), saved, "has no such layer")


@pytest.mark.parametrize(
    "header",
    [
        (2**60).to_bytes(8, "little") + b"{}",
        (61).to_bytes(8, "little")
        + b'{"x":{"dtype":"F32","shape":[1099511627776],'
        + b'"data_offsets":[0,4]}}'.ljust(18)
        + b"\0" * 4,
    ],
)
def test_a_file_that_asks_for_more_than_it_holds(header, path):
    path.write_bytes(header)
    tracemalloc.start()
    refused(plain_model(), path, "not a safetensors file, or is damaged")
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


def test_nothing_to_save(path):
    model = plain_model()
    with pytest.raises(ValueError, match="no SRLoRA layer"):
        keras_srlora.save_adapter(model, path)
    inputs = keras.Input((4,))
    x = keras_srlora.SRLoRADense(3, rank=2, name="fresh")(inputs)
    with pytest.raises(ValueError, match="'fresh' was not decomposed"):
        keras_srlora.save_adapter(keras.Model(inputs, x), path)
    assert not path.exists()


# Switching off.


def test_inside_the_block_the_model_is_the_pretrained_one():
    model, plain = trained_model(), plain_model()
    # The head was trained; only the adapters are switched off.
    plain.get_layer("head").set_weights(model.get_layer("head").get_weights())
    before, expected = snapshot(model), predictions(model)
    with keras_srlora.adapter_disabled(model) as disabled:
        assert disabled is model
        np.testing.assert_allclose(
            predictions(model), predictions(plain), atol=1e-5
        )
        np.testing.assert_allclose(
            effective(model.get_layer("hidden")),
            to_numpy(plain.get_layer("hidden").kernel),
            atol=1e-6,
        )
    np.testing.assert_array_equal(predictions(model), expected)
    for was, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(was, to_numpy(variable))


def test_an_exception_inside_the_block_puts_everything_back():
    model = trained_model()
    before = snapshot(model)
    with pytest.raises(KeyError), keras_srlora.adapter_disabled(model):
        raise KeyError("inside")
    for was, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(was, to_numpy(variable))
