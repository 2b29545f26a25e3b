"""`SRLoRAEmbedding`: as Keras's embedding with LoRA, and as the others here."""

import keras
import numpy as np
import pytest
from keras import ops
from support import assert_same_variables
from support import effective
from support import frozen_kernel
from support import state_arrays
from support import tiny_bert
from support import to_numpy

import keras_srlora
from keras_srlora import SRLoRAEmbedding
from keras_srlora.layers import pairs

ROWS, COLUMNS, RANK = 20, 12, 2
IDS = np.random.default_rng(0).integers(0, ROWS, (16, 5)).astype("int32")
TARGETS = np.random.default_rng(1).standard_normal((16, 3)).astype("float32")


def built(initialize=True, **kwargs):
    layer = SRLoRAEmbedding(
        ROWS, COLUMNS, rank=RANK, **{"recipe": "paper", **kwargs}
    )
    layer.build()
    layer.frozen.variable.assign(
        np.random.default_rng(2).standard_normal((ROWS, COLUMNS))
    )
    if initialize:
        layer.initialize_factors()
    return layer


def randomize(layer, seed=3):
    rng = np.random.default_rng(seed)
    for factor in layer.factors:
        factor.assign(rng.standard_normal(factor.shape))


# The layer.


@pytest.mark.parametrize("lora_alpha", [None, 6])
@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 4)])
def test_equals_numpy(shape, lora_alpha, rng):
    layer = built(lora_alpha=lora_alpha)
    randomize(layer)
    ids = rng.integers(0, ROWS, shape)
    a, b = map(to_numpy, layer.factors)
    assert a.shape == (RANK, ROWS) and b.shape == (RANK, COLUMNS)
    scale = 1.0 if lora_alpha is None else lora_alpha / RANK
    expected = frozen_kernel(layer)[ids] + scale * (a.T @ b)[ids]
    found = to_numpy(layer(np.asarray(ids)))
    assert found.shape == (*shape, COLUMNS)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_equals_keras_own_lora():
    ours = built(lora_alpha=6)
    randomize(ours)
    theirs = keras.layers.Embedding(ROWS, COLUMNS)
    theirs.build()
    theirs.embeddings.assign(frozen_kernel(ours))
    # Keras of before has no `lora_alpha` here.
    theirs.enable_lora(RANK)
    a, b = map(to_numpy, ours.factors)
    theirs.lora_embeddings_a.assign(ours.scale * a.T)
    theirs.lora_embeddings_b.assign(b)
    np.testing.assert_allclose(
        to_numpy(ours(IDS)), to_numpy(theirs(IDS)), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        to_numpy(ours.embeddings), to_numpy(theirs.embeddings), atol=1e-5
    )
    assert len(ours.trainable_variables) == len(theirs.trainable_variables)


@pytest.mark.parametrize("dtype", ["int64", "uint8", "float32"])
def test_ids_may_be_of_any_type(dtype):
    layer = built()
    expected = to_numpy(layer(IDS))
    ids = ops.convert_to_tensor(IDS.astype(dtype))
    np.testing.assert_array_equal(to_numpy(layer(ids)), expected)


def test_computes_in_the_dtype_of_its_policy():
    layer = built(dtype="mixed_bfloat16")
    assert keras.backend.standardize_dtype(layer(IDS).dtype) == "bfloat16"
    assert {v.dtype for v in layer.variables} == {"float32"}


def test_passes_the_layer_checks_of_keras():
    testing = pytest.importorskip("keras.src.testing")
    testing.TestCase("run_layer_test").run_layer_test(
        SRLoRAEmbedding,
        init_kwargs={"input_dim": 4, "output_dim": 3, "rank": 2},
        input_shape=(2,),
        input_dtype="int32",
        expected_output_shape=(2, 3),
        expected_num_trainable_weights=2,
        expected_num_non_trainable_weights=1,
        expected_num_seed_generators=0,
        expected_num_losses=0,
        supports_masking=False,
    )


def test_config_round_trip():
    layer = SRLoRAEmbedding(
        ROWS, COLUMNS, rank=3, target_rank=5, mask_zero=True, name="words"
    )
    config = layer.get_config()
    assert "train_bias" not in config and "lora_rank" not in config
    assert SRLoRAEmbedding.from_config(config).get_config() == config


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rank": 0}, "`rank` must be a positive integer"),
        ({"lora_rank": 4}, "takes `rank`"),
        ({"embeddings_constraint": "non_neg"}, "cannot be constrained"),
    ],
)
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SRLoRAEmbedding(ROWS, COLUMNS, **kwargs)


def test_a_rank_above_the_table_is_refused():
    with pytest.raises(ValueError, match="20 x 3.*at most 3"):
        SRLoRAEmbedding(20, 3, rank=4, name="words").build()


def test_padding_is_masked_as_before():
    ids = np.array([[3, 0, 5], [0, 0, 1]], "int32")
    ours, plain = (
        cls(ROWS, COLUMNS, mask_zero=True, **kwargs)
        for cls, kwargs in (
            (SRLoRAEmbedding, {"rank": RANK}),
            (keras.layers.Embedding, {}),
        )
    )
    ours.build()
    plain.build()
    plain.embeddings.assign(frozen_kernel(ours))
    np.testing.assert_array_equal(to_numpy(ours.compute_mask(ids)), ids != 0)
    # A layer behind it sees the mask.
    pooled = [
        keras.Sequential(
            [
                keras.Input((3,), dtype="int32"),
                layer,
                keras.layers.GlobalAveragePooling1D(),
            ]
        )(ids)
        for layer in (ours, plain)
    ]
    np.testing.assert_allclose(*map(to_numpy, pooled), atol=1e-6)


# Training.


def plain_model(mask_zero=False, names=("words", "head")):
    keras.utils.set_random_seed(4)
    ids = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(
        ROWS, COLUMNS, mask_zero=mask_zero, name=names[0]
    )(ids)
    x = keras.layers.GlobalAveragePooling1D(name="pool")(x)
    return keras.Model(ids, keras.layers.Dense(3, name=names[1])(x))


def converted(optimizer="adam", recipe="paper"):
    model = plain_model()
    (layer,) = keras_srlora.enable_srlora(
        model, RANK, target_rank=8, target_layer_names=["words"], recipe=recipe
    )
    model.compile(optimizer, "mse")
    return model, layer


def fit(model, interval=2, epochs=2, **kwargs):
    callback = keras_srlora.RecompositionCallback(interval=interval)
    model.fit(
        IDS,
        TARGETS,
        batch_size=4,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[callback],
        **kwargs,
    )
    return callback


def test_the_gradient_reaches_the_factors_and_is_that_of_numpy():
    """One step of SGD; the table stays as it is."""
    rate = 0.5
    model, layer = converted(keras.optimizers.SGD(rate))
    randomize(layer)
    table = frozen_kernel(layer)
    a, b = map(to_numpy, layer.factors)
    head = to_numpy(model.get_layer("head").kernel)
    error = to_numpy(model(IDS)) - TARGETS
    model.train_on_batch(IDS, TARGETS)
    # Of mean((mean over positions of y[ids]) @ head - targets)².
    upstream = 2 * error / error.size @ head.T / IDS.shape[1]
    of_table = np.zeros((ROWS, COLUMNS))
    for ids, row in zip(IDS, upstream):
        for index in ids:
            of_table[index] += row
    expected = {0: a - rate * (b @ of_table.T), 1: b - rate * (a @ of_table)}
    for i, factor in enumerate(layer.factors):
        assert np.abs(expected[i] - (a, b)[i]).max() > 1e-3
        np.testing.assert_allclose(
            to_numpy(factor), expected[i], rtol=1e-4, atol=1e-6
        )
    np.testing.assert_array_equal(frozen_kernel(layer), table)
    names = {v.name for v in layer.trainable_variables}
    assert names == {"lora_embeddings_a", "lora_embeddings_b"}


def test_a_recomposition_preserves_the_function():
    layer = built()
    randomize(layer)
    before, kernel = effective(layer), frozen_kernel(layer)
    drift = pairs.fuse_and_restart(
        layer,
        np.array([1]),
        np.array([5]),
        np.ones(1),
        layer.recipe.scale_restarted,
        step=3,
    )
    error = np.abs(effective(layer) - before).max() / np.abs(before).max()
    assert drift <= 1e-5 and error <= 1e-5
    assert np.abs(frozen_kernel(layer) - kernel).max() > 0.1
    np.testing.assert_allclose(
        to_numpy(layer(np.arange(ROWS))), before, atol=1e-4
    )


@pytest.mark.parametrize(
    "recipe", ["paper", keras_srlora.Recipe(start="lora", scale="as_lora")]
)
def test_fit_recomposes_it(recipe):
    model, layer = converted(recipe=recipe)
    callback = fit(model)
    assert [event.step for event in callback.events] == [2, 4, 6]
    assert {event.layer for event in callback.events} == {"words"}
    assert max(event.drift for event in callback.events) <= 1e-5
    # The scores are of ids that occurred.
    assert all(min(event.scores) > 0 for event in callback.events)
    values = np.linalg.svd(
        to_numpy(plain_model().get_layer("words").embeddings),
        compute_uv=False,
    )
    np.testing.assert_allclose(
        layer.record.directions.singular_values, values[:8], rtol=1e-4
    )


# Conversion.


def test_it_is_converted_by_name_alone():
    layers = keras_srlora.enable_srlora(bert := tiny_bert(), 2)
    assert not any(isinstance(x, SRLoRAEmbedding) for x in layers)
    segments = bert.get_layer("segment_embedding")
    assert type(segments) is keras.layers.Embedding and not segments.trainable
    model, layer = converted()
    assert type(layer) is SRLoRAEmbedding
    assert {v.path for v in model.trainable_variables} == {
        "words/lora_embeddings_a",
        "words/lora_embeddings_b",
        "head/kernel",
        "head/bias",
    }


def test_an_expression_for_projections_does_not_take_embeddings_along():
    layers = keras_srlora.enable_srlora(
        tiny_bert(), 2, target_layer_names=[".*"]
    )
    assert layers and not any(isinstance(x, SRLoRAEmbedding) for x in layers)


def test_conversion_and_merging_leave_the_outputs():
    model, layer = converted()
    plain = plain_model()
    np.testing.assert_allclose(
        to_numpy(model(IDS)), to_numpy(plain(IDS)), atol=1e-6
    )
    fit(model)
    trained = to_numpy(model(IDS))
    assert np.abs(trained - to_numpy(plain(IDS))).max() > 1e-3
    (merged,) = keras_srlora.merge_srlora(model)
    assert merged is layer and type(layer) is keras.layers.Embedding
    np.testing.assert_allclose(to_numpy(model(IDS)), trained, atol=1e-6)
    assert [v.path for v in layer.variables] == ["words/embeddings"]
    assert layer.trainable_variables and layer.lora_rank is None
    # It is one of the stock, whose weights load into another.
    plain.set_weights(model.get_weights())
    np.testing.assert_array_equal(to_numpy(plain(IDS)), to_numpy(model(IDS)))


def test_what_cannot_be_adapted_is_refused():
    class Mine(keras.layers.Embedding):
        pass

    for make, message in (
        (lambda: Mine(ROWS, COLUMNS, name="words"), "themselves can"),
        (
            lambda: keras.layers.Embedding(
                ROWS, COLUMNS, embeddings_constraint="non_neg", name="words"
            ),
            "constraint",
        ),
    ):
        ids = keras.Input((5,), dtype="int32")
        model = keras.Model(ids, keras.layers.Dense(2)(make()(ids)))
        with pytest.raises(ValueError, match=message):
            keras_srlora.enable_srlora(model, 2, target_layer_names=["words"])
        assert "SRLoRA" not in type(model.layers[1]).__name__


def test_a_quantized_table_is_refused():
    ids = keras.Input((5,), dtype="int32")
    layer = keras.layers.Embedding(ROWS, COLUMNS, name="words")
    model = keras.Model(ids, keras.layers.Dense(2)(layer(ids)))
    layer.quantize("int8")
    before = to_numpy(model(IDS))
    with pytest.raises(ValueError, match="'words.* quantized"):
        keras_srlora.enable_srlora(model, 2, target_layer_names=["words"])
    assert type(layer) is keras.layers.Embedding
    np.testing.assert_array_equal(to_numpy(model(IDS)), before)


# Files.


def test_a_keras_file_is_read_and_trains_on(tmp_path):
    model, layer = converted()
    fit(model, interval=3)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    other = loaded.get_layer("words")
    assert type(other) is SRLoRAEmbedding
    for m in (model, loaded):
        fit(m, interval=3, epochs=4, initial_epoch=2)
    assert_same_variables(model.variables, loaded.variables)
    assert len(other.record.events) > 3
    expected, found = state_arrays(layer), state_arrays(other)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, name)


def test_weights_files_of_its_kind_and_of_the_plain_model(tmp_path):
    model, layer = converted()
    fit(model)
    model.save_weights(tmp_path / "a.weights.h5")
    other, other_layer = converted()
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "a.weights.h5")
    assert_same_variables(model.variables, other.variables)
    assert len(other_layer.record.events) == len(layer.record.events) == 3
    plain = plain_model()
    table = 2 * to_numpy(plain.get_layer("words").embeddings)
    plain.get_layer("words").embeddings.assign(table)
    plain.save_weights(tmp_path / "plain.weights.h5")
    # Not compiled, so that Keras misses no state of an optimizer.
    other = keras.Model(other.inputs, other.outputs)
    keras_srlora.load_plain_weights(other, tmp_path / "plain.weights.h5")
    assert not other_layer.initialized
    np.testing.assert_array_equal(effective(other_layer), table)
    keras_srlora.initialize_factors(other)
    np.testing.assert_allclose(effective(other_layer), table, atol=1e-5)


def test_inside_of_a_class_that_makes_it(tmp_path):
    """A backbone of KerasHub makes its embedding by itself."""
    bert = tiny_bert()
    (layer,) = keras_srlora.enable_srlora(
        bert, 1, target_layer_names=["segment_embedding"]
    )
    randomize(layer)
    expected = effective(layer)
    bert.save(tmp_path / "bert.keras")
    loaded = keras.saving.load_model(tmp_path / "bert.keras")
    other = loaded.get_layer("segment_embedding")
    assert type(other) is SRLoRAEmbedding
    np.testing.assert_array_equal(effective(other), expected)


def test_adapter_files(tmp_path):
    pytest.importorskip("safetensors")
    model, layer = converted()
    fit(model)
    path = tmp_path / "adapter.safetensors"
    keras_srlora.save_adapter(model, path, include_trainable=True)
    fresh = plain_model()
    (other,) = keras_srlora.load_adapter(fresh, path)
    assert type(other) is SRLoRAEmbedding
    np.testing.assert_allclose(
        to_numpy(fresh(IDS)), to_numpy(model(IDS)), atol=1e-5
    )
    np.testing.assert_array_equal(other.record.events, layer.record.events)
    with keras_srlora.adapter_disabled(model):
        np.testing.assert_allclose(
            effective(layer),
            to_numpy(plain_model().get_layer("words").embeddings),
            atol=1e-6,
        )
    wrong = plain_model()
    wrong.get_layer("words").embeddings.assign(np.ones((ROWS, COLUMNS)))
    with pytest.raises(ValueError, match="other pretrained weights.*'words'"):
        keras_srlora.load_adapter(wrong, path)
    assert type(wrong.get_layer("words")) is keras.layers.Embedding


def test_a_tied_table_is_read_as_the_layer_computes():
    """And gradients reach the factors through either use."""
    layer = built(initialize=False)
    randomize(layer)
    np.testing.assert_allclose(
        to_numpy(layer.embeddings), effective(layer), atol=1e-5
    )

    class Tied(keras.layers.Layer):
        def call(self, x):
            return ops.matmul(x, ops.transpose(layer.embeddings))

    ids = keras.Input((5,), dtype="int32")
    tied = Tied()
    tied.embedding = layer
    x = ops.one_hot(ids, COLUMNS)
    model = keras.Model(ids, tied(x))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = [to_numpy(v) for v in layer.factors]
    table = frozen_kernel(layer)
    model.train_on_batch(IDS % COLUMNS, np.zeros((16, 5, ROWS), "float32"))
    for old, factor in zip(before, layer.factors):
        assert np.abs(to_numpy(factor) - old).max() > 0
    np.testing.assert_array_equal(frozen_kernel(layer), table)
