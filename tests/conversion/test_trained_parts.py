"""What `modules_to_save`, `bias` and heads leave trainable; scales."""

import warnings

import keras
import numpy as np
import pytest
from support import to_numpy

import keras_srlora
from keras_srlora.conversion.freezing import saved_variables

layers = keras.layers
WIDTH = 8
NAMES = ["first", "second"]


def classifier(seed=7):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((WIDTH,))
    x = layers.LayerNormalization(name="norm")(inputs)
    for name in NAMES:
        x = layers.Dense(WIDTH, "tanh", name=name)(x)
    x = layers.LayerNormalization(name="last_norm")(x)
    x = layers.Dense(WIDTH, name="third")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def convert(model, names=NAMES, **arguments):
    return keras_srlora.enable_srlora(
        model, 2, target_layer_names=names, **arguments
    )


def others(model):
    paths = sorted(v.path for v in model.trainable_variables)
    return [path for path in paths if "/lora_" not in path]


# Scales.


def test_the_scale_of_each_layer_is_that_of_the_first_pattern_that_matches():
    first, second = convert(
        classifier(),
        lora_alpha=3,
        alpha_pattern={"sec.*": 8, "second": 5},
    )
    assert (first.scale, second.scale) == (1.5, 4.0)


def test_a_pattern_of_ranks_and_one_of_scales_are_independent():
    first, second = convert(
        classifier(), rank_pattern={"first": 4}, alpha_pattern={"first": 2}
    )
    assert (first.rank, first.scale) == (4, 0.5)
    assert (second.rank, second.scale) == (2, 1.0)


@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("alpha", [None, 3])
def test_the_scale_of_rslora_is_alpha_by_the_root_of_the_rank(rank, alpha):
    (layer,) = keras_srlora.enable_srlora(
        classifier(),
        rank,
        target_layer_names=["first"],
        lora_alpha=alpha,
        use_rslora=True,
    )
    assert layer.scale == pytest.approx((alpha or rank) / rank**0.5)
    expected = to_numpy(layer.effective_kernel())
    layer.lora_kernel_b.assign(np.ones((rank, WIDTH)))
    a = to_numpy(layer.lora_kernel_a)
    update = layer.scale * a.T @ np.ones((rank, WIDTH))
    found = to_numpy(layer.effective_kernel()) - expected
    np.testing.assert_allclose(found, update, atol=1e-5)
    x = np.eye(WIDTH, dtype="float32")
    np.testing.assert_allclose(
        to_numpy(layer(x)),
        np.tanh(expected + update + to_numpy(layer.bias)),
        atol=1e-5,
    )


@pytest.mark.parametrize("recipe", ["paper", "adaptive"])
def test_rslora_starts_where_the_pretrained_model_is(recipe, rng):
    model, x = classifier(), rng.standard_normal((4, WIDTH))
    before = to_numpy(model(x))
    convert(model, recipe=recipe, use_rslora=True, lora_alpha=5)
    np.testing.assert_allclose(to_numpy(model(x)), before, atol=1e-5)


def test_scales_come_back_from_a_file(tmp_path):
    model = classifier()
    convert(
        model, use_rslora=True, alpha_pattern={"first": 3}, modules_to_save=[]
    )
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for name in NAMES:
        layer, other = model.get_layer(name), loaded.get_layer(name)
        assert other.use_rslora is True
        assert other.scale == layer.scale
    layer = keras_srlora.SRLoRADense(4, rank=4, use_rslora=True)
    assert layer.scale == 2.0
    again = keras_srlora.SRLoRADense.from_config(layer.get_config())
    assert again.scale == 2.0


# Layers that are trained whole.


def test_modules_to_save_are_trained_whole():
    model = classifier()
    convert(model, modules_to_save=["norm", "third"])
    assert others(model) == [
        "head/bias",
        "head/kernel",
        "norm/beta",
        "norm/gamma",
        "third/bias",
        "third/kernel",
    ]
    found = [v.path for v in saved_variables(model)]
    assert found == ["norm/gamma", "norm/beta", "third/kernel", "third/bias"]


def test_modules_to_save_are_trained_whatever_was_frozen():
    model = classifier()
    model.trainable = False
    convert(model, modules_to_save=["norm"])
    assert others(model) == ["norm/beta", "norm/gamma"]
    model.trainable = False
    model.get_layer("norm").trainable = True
    model.trainable = True
    assert {"norm/beta", "norm/gamma"} <= set(others(model))


def test_modules_to_save_are_left_out_of_the_default_targets():
    model = classifier()
    converted = keras_srlora.enable_srlora(model, 2, modules_to_save=["third"])
    assert {layer.name for layer in converted} == set(NAMES)


def test_modules_to_save_of_two_calls_add_up():
    model = classifier()
    convert(model, ["first"], modules_to_save=["norm"])
    convert(model, ["second"], modules_to_save=["last_norm"])
    assert {"norm/gamma", "last_norm/gamma"} <= set(others(model))
    paths = {v.path for v in saved_variables(model)}
    assert paths == {
        f"{name}/{weight}"
        for name in ("norm", "last_norm")
        for weight in ("gamma", "beta")
    }


def test_modules_to_save_come_back_from_a_file(tmp_path):
    model = classifier()
    convert(model, modules_to_save=["norm"])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [v.path for v in saved_variables(loaded)] == [
        "norm/gamma",
        "norm/beta",
    ]
    assert others(loaded) == others(model)


@pytest.mark.parametrize("names", [["first"], ["head", "first"]])
def test_a_layer_is_not_converted_and_trained_whole(names):
    model = classifier()
    before = len(model.variables)
    with pytest.raises(ValueError, match="first"):
        convert(model, modules_to_save=names)
    assert len(model.variables) == before


def test_a_converted_layer_is_not_trained_whole():
    model = classifier()
    convert(model, ["first"])
    with pytest.raises(ValueError, match="modules_to_save.*first"):
        convert(model, ["second"], modules_to_save=["first"])


def test_modules_of_an_outer_model_are_not_saved_with_the_inner():
    inner = classifier()
    outer = keras.Sequential([inner, layers.Dense(2, name="top")])
    outer.build((None, WIDTH))
    convert(outer, modules_to_save=["top"])
    assert len(saved_variables(outer)) == 2
    with pytest.raises(ValueError, match="top"):
        saved_variables(inner)


# Files of weights, where some variables of a plain layer are frozen.


@pytest.mark.parametrize("bias", ["none", "all"])
def test_weights_of_plain_layers_keep_their_order(bias, tmp_path):
    """`gamma` and `beta` have one shape: nothing would tell them apart."""
    plain = classifier()
    for name in ("norm", "last_norm"):
        gamma, beta = plain.get_layer(name).variables
        gamma.assign(np.full(WIDTH, 2.0))
        beta.assign(np.full(WIDTH, 3.0))
    plain.save_weights(tmp_path / "plain.weights.h5")
    model = classifier(seed=8)
    convert(model, bias=bias)
    keras_srlora.load_plain_weights(model, tmp_path / "plain.weights.h5")
    for name in ("norm", "last_norm"):
        gamma, beta = map(to_numpy, model.get_layer(name).get_weights())
        assert (gamma == 2.0).all() and (beta == 3.0).all()
    keras_srlora.merge_srlora(model)
    model.save_weights(tmp_path / "merged.weights.h5")
    other = classifier(seed=9)
    other.load_weights(tmp_path / "merged.weights.h5")
    for a, b in zip(plain.variables, other.variables):
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), atol=1e-5)


# Heads.


class ClassificationHead(layers.Layer):
    """Composite, as a block is; only its name tells."""

    def __init__(self, tied=None, **kwargs):
        super().__init__(**kwargs)
        self.hidden = layers.Dense(WIDTH, "relu", name="hidden")
        self.classes = layers.Dense(3, name="classes")
        self.tied = tied

    def build(self, input_shape):
        self.hidden.build(input_shape)
        self.classes.build((*input_shape[:-1], WIDTH))
        self.built = True

    def call(self, x):
        return self.classes(self.hidden(x))


class Block(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(2 * WIDTH, "relu", name="inner")
        self.outer = layers.Dense(WIDTH, name="outer")

    def build(self, input_shape):
        self.inner.build(input_shape)
        self.outer.build((*input_shape[:-1], 2 * WIDTH))
        self.built = True

    def call(self, x):
        return x + self.outer(self.inner(x))


@pytest.mark.parametrize("tied", [False, True])
def test_a_composite_layer_that_is_called_a_head_is_one(tied):
    inputs = keras.Input((WIDTH,))
    stem = layers.Dense(WIDTH, name="stem")
    x = Block(name="block")(stem(inputs))
    head = ClassificationHead(stem if tied else None, name="top")
    model = keras.Model(inputs, head(x))
    names = ["stem", "inner", "outer"] if tied else None
    converted = keras_srlora.enable_srlora(model, 2, target_layer_names=names)
    assert {x.name for x in converted} == {*(names or ["inner", "outer"])}
    left = {path.split("/")[-2] for path in others(model)}
    assert left == {"hidden", "classes"}


def test_a_head_of_kerashub_with_a_tied_table(rng):
    """`MaskedLMHead` has `Dense` inside, and a layer of the pretrained part."""
    hub = pytest.importorskip("keras_hub")
    keras.utils.set_random_seed(7)
    tokens = keras.Input((5,), dtype="int32")
    positions = keras.Input((2,), dtype="int32")
    table = hub.layers.ReversibleEmbedding(20, WIDTH, name="table")
    x = Block(name="block")(table(tokens))
    head = hub.layers.MaskedLMHead(token_embedding=table, name="words")
    model = keras.Model([tokens, positions], head(x, positions))
    data = [
        rng.integers(0, 20, (3, 5)).astype("int32"),
        rng.integers(0, 5, (3, 2)).astype("int32"),
    ]
    before = to_numpy(model(data))
    converted = keras_srlora.enable_srlora(model, 2, recipe="paper")
    assert {layer.name for layer in converted} == {"inner", "outer"}
    assert {p.split("/")[0] for p in others(model)} == {"words"}
    np.testing.assert_allclose(to_numpy(model(data)), before, atol=1e-5)


class TiedDecoder(layers.Layer):
    """Multiplies by a table that it does not own."""

    def __init__(self, table, **kwargs):
        super().__init__(**kwargs)
        self.table = table

    def call(self, x):
        return keras.ops.matmul(x, keras.ops.transpose(self.table.embeddings))


def test_a_tied_decoder_reads_the_tuned_table(rng):
    keras.utils.set_random_seed(7)
    tokens = keras.Input((5,), dtype="int32")
    table = layers.Embedding(20, WIDTH, name="table")
    x = Block(name="block")(table(tokens))
    model = keras.Model(tokens, TiedDecoder(table, name="decoder")(x))
    data = rng.integers(0, 20, (3, 5)).astype("int32")
    before = to_numpy(model(data))
    converted = keras_srlora.enable_srlora(
        model,
        2,
        recipe="paper",
        target_layer_names=["table", "inner", "outer"],
    )
    assert others(model) == []
    np.testing.assert_allclose(to_numpy(model(data)), before, atol=1e-5)
    for layer in converted:
        for factor in layer.factors:
            factor.assign_add(0.3 * rng.standard_normal(factor.shape))
    tuned = to_numpy(model(data))
    assert np.max(np.abs(tuned - before)) > 1e-2
    keras_srlora.merge_srlora(model)
    np.testing.assert_allclose(to_numpy(model(data)), tuned, atol=1e-4)


def test_a_backbone_of_kerashub_with_tied_embeddings_reads_what_is_tuned(rng):
    """GPT-2's head is its table, transposed: `ReversibleEmbedding`."""
    hub = pytest.importorskip("keras_hub")
    keras.utils.set_random_seed(7)
    backbone = hub.models.GPT2Backbone(
        vocabulary_size=20,
        num_layers=1,
        num_heads=2,
        hidden_dim=WIDTH,
        intermediate_dim=16,
        max_sequence_length=6,
    )
    task = hub.models.GPT2CausalLM(backbone=backbone)
    data = {
        "token_ids": rng.integers(0, 20, (2, 6)).astype("int32"),
        "padding_mask": np.ones((2, 6), "int32"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = to_numpy(task(data))
        converted = keras_srlora.enable_srlora(task, 2, recipe="paper")
        np.testing.assert_allclose(to_numpy(task(data)), before, atol=1e-4)
        for layer in converted:
            layer.lora_kernel_b.assign_add(
                0.3 * rng.standard_normal(layer.lora_kernel_b.shape)
            )
        tuned = to_numpy(task(data))
        keras_srlora.merge_srlora(task)
        np.testing.assert_allclose(to_numpy(task(data)), tuned, atol=1e-4)
    # A subclass of `Embedding` is refused, not half converted.
    with pytest.raises(ValueError, match="token_embedding"):
        keras_srlora.enable_srlora(
            task, 2, target_layer_names=["token_embedding"]
        )
