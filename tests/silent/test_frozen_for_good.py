"""Layers that the conversion froze stay frozen, whatever comes after it."""

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops
from pieces import LENGTH
from pieces import NAMES
from pieces import WIDTH
from pieces import UnbuiltBlock
from pieces import assert_close
from pieces import called
from pieces import collected_warnings
from pieces import convert
from pieces import encoder
from pieces import state_of

import keras_srlora


def toggle(layer):
    layer.trainable = False
    layer.trainable = True


def trained(model):
    """Ends of the paths of what is trainable; a loaded file has others."""
    paths = [v.path for v in model.trainable_variables]
    return sorted("/".join(path.split("/")[-2:]) for path in paths)


def functional(behind):
    """Layers of many kinds around the two that are converted, and a head."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((LENGTH, WIDTH))
    x = layers.LayerNormalization(name="norm")(inputs)
    for name in NAMES:
        x = layers.Dense(WIDTH, "tanh", name=name)(x)
    x = behind(x)
    inner = keras.Model(inputs, x, name="backbone")
    head = layers.Dense(3, name="head")
    return keras.Model(inputs, head(inner(inputs)), name="outer"), inner


def attention(x):
    return layers.MultiHeadAttention(2, 4, name="attention")(x, x)


BEHIND = {
    "dense": layers.Dense(WIDTH, name="third"),
    "attention": attention,
    "batch_norm": layers.BatchNormalization(name="batch_norm"),
    "wrapped": layers.TimeDistributed(layers.Dense(WIDTH, name="each")),
    "sequential": keras.Sequential(
        [layers.Dense(WIDTH, name="one"), layers.LayerNormalization(name="two")]
    ),
    "unbuilt": lambda x: UnbuiltBlock(name="block")(x),
}


def behind(kind):
    """A new layer of a kind each time."""
    layer = BEHIND[kind]
    if isinstance(layer, layers.Layer):
        return type(layer).from_config(layer.get_config())
    return layer


WAYS = {
    "file": lambda model, path: (
        model.save(path / "model.keras"),
        keras.models.load_model(path / "model.keras"),
    )[1],
    "clone": lambda model, path: keras.models.clone_model(model),
    "config": lambda model, path: keras.Model.from_config(model.get_config()),
    "json": lambda model, path: keras.models.model_from_json(model.to_json()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("kind", BEHIND)
def test_a_functional_model_is_made_again_as_frozen(kind, bias, way, tmp_path):
    outer, inner = functional(behind(kind))
    with collected_warnings():
        convert(outer, bias=bias)
    expected = trained(outer)
    toggle(inner)
    assert trained(outer) == expected
    again = WAYS[way](outer, tmp_path)
    assert trained(again) == expected
    # What stays frozen is known to the new model, too.
    toggle(again)
    toggle(again.get_layer("backbone"))
    assert trained(again) == expected


@pytest.mark.parametrize("kind", ["dense", "attention"])
def test_a_second_model_on_the_layers_is_saved_as_frozen(kind, tmp_path):
    outer, inner = functional(behind(kind))
    with collected_warnings():
        convert(outer, bias="all")
    features = keras.Model(inner.input, inner.layers[-1].output)
    expected = trained(features)
    loaded = WAYS["file"](features, tmp_path)
    toggle(loaded)
    assert trained(loaded) == expected


def test_a_sequential_model_is_loaded_as_frozen(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((WIDTH,)),
            *(layers.Dense(WIDTH, "tanh", name=name) for name in NAMES),
            layers.LayerNormalization(name="norm"),
            layers.Dense(WIDTH, name="third"),
            layers.Dense(3, name="head"),
        ]
    )
    with collected_warnings():
        convert(model, bias="all")
    expected = trained(model)
    toggle(model)
    loaded = WAYS["file"](model, tmp_path)
    toggle(loaded)
    assert trained(loaded) == expected


@pytest.mark.parametrize("back", ["merge_srlora", "unload_srlora"])
def test_after_merging_the_layers_are_kerass_own(back, tmp_path):
    outer, _ = functional(behind("attention"))
    before = trained(outer)
    with collected_warnings():
        convert(outer, bias="all")
    getattr(keras_srlora, back)(outer)
    assert trained(outer) == before
    for layer in outer._flatten_layers():
        assert type(layer).__module__.startswith("keras.")


def test_a_frozen_layer_can_be_converted_later(rng):
    outer, _ = functional(behind("dense"))
    with collected_warnings():
        convert(outer)
        convert(outer, names=["third"])
    third = outer.get_layer("backbone").get_layer("third")
    assert isinstance(third, keras_srlora.SRLoRADense)
    toggle(outer)
    assert trained(outer) == sorted(
        [f"{name}/lora_kernel_{x}" for name in (*NAMES, "third") for x in "ab"]
        + ["head/kernel", "head/bias"]
    )


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("how", ["inner", "outer", "never"])
def test_batch_normalization_stays_in_inference_mode(
    how, loaded, rng, tmp_path
):
    outer, inner = functional(behind("batch_norm"))
    with collected_warnings():
        convert(outer)
    if how != "never":
        toggle(inner if how == "inner" else outer)
    if loaded:
        outer = WAYS["file"](outer, tmp_path)
    norm = outer.get_layer("backbone").get_layer("batch_norm")
    assert not norm.trainable
    before = state_of(norm)
    x = rng.standard_normal((16, LENGTH, WIDTH)).astype("float32") + 3
    assert_close(outer(x, training=True), called(outer, x))
    outer.compile("adam", "mse")
    outer.fit(x, np.zeros((16, LENGTH, 3)), batch_size=8, verbose=0)
    for a, b in zip(state_of(norm), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_frozen_layer_that_is_thawed_by_itself_is_named():
    outer, inner = functional(behind("dense"))
    with collected_warnings():
        convert(outer)
    expected = trained(outer)
    with pytest.warns(UserWarning, match="'third'.*modules_to_save"):
        inner.get_layer("third").trainable = True
    assert not inner.get_layer("third").trainable
    assert trained(outer) == expected


# A model that was frozen whole, around the one that is converted.


def around(inner, head=True):
    inputs = keras.Input((WIDTH,))
    x = inner(inputs)
    return keras.Model(inputs, layers.Dense(3, name="new")(x) if head else x)


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_outer_model_that_was_frozen_trains_the_factors(wrapped, rng):
    inner = encoder(name="inner")
    if wrapped:
        inputs = keras.Input((LENGTH, WIDTH))
        outer = keras.Model(inputs, layers.TimeDistributed(inner)(inputs))
    else:
        outer = around(inner)
    outer.trainable = False
    layers_ = convert(inner)
    factors = sorted(v.path for layer in layers_ for v in layer.factors)
    assert sorted(v.path for v in outer.trainable_variables) == factors
    shape = (8, LENGTH, WIDTH) if wrapped else (8, WIDTH)
    x = rng.standard_normal(shape).astype("float32")
    before = called(outer, x)
    outer.compile(keras.optimizers.Adam(0.05), "mse")
    outer.fit(x, np.ones_like(before), epochs=2, verbose=0)
    assert float(ops.max(ops.abs(called(outer, x) - before))) > 1e-3


def test_an_outer_model_of_a_loaded_adapter_trains_the_factors(tmp_path):
    tuned = encoder()
    convert(tuned)
    keras_srlora.save_adapter(tuned, tmp_path / "a.safetensors")
    inner = encoder(name="inner")
    outer = around(inner)
    outer.trainable = False
    keras_srlora.load_adapter(inner, tmp_path / "a.safetensors")
    assert len(outer.trainable_variables) == 4
