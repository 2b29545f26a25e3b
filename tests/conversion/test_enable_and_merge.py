"""`enable_srlora` and `merge_srlora`, on a KerasHub BERT and other models."""

import keras
import numpy as np
import pytest
from support import bert_outputs
from support import dense_layer
from support import matrix
from support import regression_data
from support import tiny_bert
from support import to_numpy
from support import two_layer_model

import keras_srlora
from keras_srlora import SRLoRADense
from keras_srlora import SRLoRAEinsumDense
from keras_srlora import enable_srlora
from keras_srlora import merge_srlora

PROJECTIONS = {
    "query",
    "key",
    "value",
    "attention_output",
    "feedforward_intermediate_dense",
    "feedforward_output_dense",
}


@pytest.fixture
def bert():
    pytest.importorskip("keras_hub")
    return tiny_bert(
        num_layers=1, intermediate_dim=32, max_sequence_length=12, dropout=0.0
    )


def tokens(rng):
    return {
        "token_ids": rng.integers(0, 50, (4, 12)).astype("int32"),
        "segment_ids": np.zeros((4, 12), "int32"),
        "padding_mask": np.ones((4, 12), "int32"),
    }


def classifier(backbone):
    x = backbone(backbone.input)["sequence_output"]
    x = keras.layers.GlobalAveragePooling1D()(x)
    outputs = keras.layers.Dense(3, name="classes")(x)
    return keras.Model(backbone.input, outputs)


def mlp():
    inputs = keras.Input((12,))
    x = keras.layers.Dense(16, activation="relu", name="first")(inputs)
    x = keras.layers.LayerNormalization(name="norm")(x)
    x = keras.layers.Dense(16, activation="relu", name="second")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


def test_a_layer_that_is_used_twice(rng, tmp_path):
    """Converted once; its pairs are scored by the sum of both gradients."""
    inputs = keras.Input((12,))
    shared = keras.layers.Dense(12, activation="tanh", name="shared")
    outputs = keras.layers.Dense(3, name="head")(shared(shared(inputs)))
    model = keras.Model(inputs, outputs)
    x, y = regression_data(rng)
    before = to_numpy(model(x))
    (layer,) = enable_srlora(
        model, 2, target_rank=8, target_layer_names=["shared"], recipe="paper"
    )
    np.testing.assert_allclose(to_numpy(model(x)), before, atol=1e-6)
    model.compile("adam", "mse")
    callback = keras_srlora.RecompositionCallback(interval=2)
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[callback])
    assert [event.step for event in callback.events] == [2, 4, 6]
    trained = to_numpy(model(x))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(to_numpy(loaded(x)), trained)
    assert len({id(x) for x in loaded.layers}) == 3
    merge_srlora(model)
    np.testing.assert_allclose(to_numpy(model(x)), trained, atol=1e-6)


def test_bert_keeps_its_function_names_and_paths(bert, rng):
    x = tokens(rng)
    expected = to_numpy(bert(x)["sequence_output"])
    paths = [v.path for v in bert.variables]
    layers = enable_srlora(bert, rank=2, target_rank=8)
    np.testing.assert_allclose(
        to_numpy(bert(x)["sequence_output"]), expected, atol=1e-5
    )
    assert {layer.name for layer in layers} == PROJECTIONS
    assert len(layers) == 6
    assert {type(layer) for layer in layers} == {
        SRLoRADense,
        SRLoRAEinsumDense,
    }
    assert set(paths) <= {v.path for v in bert.variables}


def test_exactly_the_factors_are_trainable(bert):
    enable_srlora(bert, rank=2)
    assert {v.name for v in bert.trainable_variables} == {
        "lora_kernel_a",
        "lora_kernel_b",
    }
    bert.trainable = True
    kernels = [
        v.path
        for v in bert.trainable_variables
        if v.name == "kernel" and v.path.split("/")[-2] in PROJECTIONS
    ]
    assert kernels == []


def test_bert_trains_recomposes_and_merges(bert, rng):
    enable_srlora(bert, rank=2, target_rank=8, recipe="paper")
    model = classifier(bert)
    x, y = tokens(rng), np.arange(4) % 3
    model.compile("adam", "sparse_categorical_crossentropy")
    model.layers[-1].activation = keras.activations.softmax
    callback = keras_srlora.RecompositionCallback(interval=2)
    history = model.fit(
        x, y, batch_size=2, epochs=7, verbose=0, callbacks=[callback]
    ).history
    assert history["loss"][-1] < history["loss"][0]
    assert len(callback.events) == 6 * 6
    assert max(event.drift for event in callback.events) <= 1e-5
    expected = to_numpy(model(x))
    merged = merge_srlora(model)
    assert {type(layer) for layer in merged} == {
        keras.layers.Dense,
        keras.layers.EinsumDense,
    }
    np.testing.assert_allclose(to_numpy(model(x)), expected, atol=1e-6)
    assert not any("lora" in v.path for v in model.variables)


def test_merged_weights_load_into_the_stock_model(bert, tmp_path, rng):
    x = tokens(rng)
    layers = enable_srlora(bert, rank=2)
    for layer in layers:
        layer.lora_kernel_b.assign(
            rng.standard_normal(layer.lora_kernel_b.shape)
        )
    expected = to_numpy(bert(x)["sequence_output"])
    merge_srlora(bert)
    path = str(tmp_path / "merged.weights.h5")
    bert.save_weights(path)
    stock = type(bert).from_config(bert.get_config())
    stock.load_weights(path)
    np.testing.assert_allclose(
        to_numpy(stock(x)["sequence_output"]), expected, atol=1e-5
    )


def test_pretrained_weights_load_into_a_converted_bert(bert, tmp_path, rng):
    """`load_weights` of a plain file, as `from_preset` does it."""
    x = tokens(rng)
    path = str(tmp_path / "pretrained.weights.h5")
    bert.save_weights(path)
    expected = to_numpy(bert(x)["sequence_output"])
    other = type(bert).from_config(bert.get_config())
    layers = enable_srlora(other, rank=2)
    other.load_weights(path)
    assert not any(layer.initialized for layer in layers)
    np.testing.assert_allclose(
        to_numpy(other(x)["sequence_output"]), expected, atol=1e-5
    )
    keras_srlora.initialize_factors(other)
    np.testing.assert_allclose(
        to_numpy(other(x)["sequence_output"]), expected, atol=1e-5
    )


def test_a_weights_file_of_a_converted_bert_trains_on(bert, tmp_path, rng):
    """The same set-up, then `load_weights`: weights, directions, scores."""
    x, y = tokens(rng), np.arange(4) % 3

    def run(model):
        callback = keras_srlora.RecompositionCallback(interval=2)
        model.fit(
            x,
            y,
            batch_size=1,
            shuffle=False,
            verbose=0,
            callbacks=[callback],
        )
        return callback.to_dict()

    models = []
    for _ in range(2):
        backbone = type(bert).from_config(bert.get_config())
        enable_srlora(backbone, rank=2, target_layer_names=["query"])
        model = classifier(backbone)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss)
        model.optimizer.build(model.trainable_variables)
        models.append(model)
    run(models[0])
    path = str(tmp_path / "a.weights.h5")
    models[0].save_weights(path)
    models[1].load_weights(path)
    records = [run(model) for model in models]
    assert records[0]["events"] and records[0]["events"] == records[1]["events"]
    for first, second in zip(*(model.variables for model in models)):
        if "seed" not in first.path:
            np.testing.assert_array_equal(to_numpy(first), to_numpy(second))


def test_a_preset_folder_is_read_and_converted(bert, tmp_path, rng):
    folder = str(tmp_path / "preset")
    bert.save_to_preset(folder)
    loaded = type(bert).from_preset(folder)
    x = tokens(rng)
    expected = to_numpy(loaded(x)["sequence_output"])
    layers = enable_srlora(loaded, rank=2)
    query = next(layer for layer in layers if layer.name == "query")
    np.testing.assert_allclose(
        to_numpy(query.effective_kernel()),
        next(
            to_numpy(v)
            for v in bert.variables
            if v.path == query.path + "/kernel"
        ),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        to_numpy(loaded(x)["sequence_output"]), expected, atol=1e-5
    )


def test_a_task_keeps_its_head_trainable(bert):
    hub = pytest.importorskip("keras_hub")
    task = hub.models.BertTextClassifier(backbone=bert, num_classes=3)
    enable_srlora(task, rank=2)
    names = {v.path.split("/")[-1] for v in task.trainable_variables}
    assert names == {"lora_kernel_a", "lora_kernel_b", "kernel", "bias"}
    kernels = [v for v in task.trainable_variables if v.name == "kernel"]
    assert [v.path for v in kernels] == ["logits/kernel"]


def test_an_outer_model_keeps_its_head_trainable(bert):
    model = classifier(bert)
    enable_srlora(model, rank=2)
    others = [
        v.path for v in model.trainable_variables if "lora_kernel" not in v.name
    ]
    assert sorted(others) == ["classes/bias", "classes/kernel"]


def test_a_model_without_blocks_keeps_its_output_layer():
    model = mlp()
    layers = enable_srlora(model, rank=2)
    assert [layer.name for layer in layers] == ["first", "second"]
    assert {v.path for v in model.trainable_variables} == {
        "first/lora_kernel_a",
        "first/lora_kernel_b",
        "second/lora_kernel_a",
        "second/lora_kernel_b",
        "head/kernel",
        "head/bias",
    }


@pytest.mark.parametrize(
    "names, expected",
    [
        (["query", "value"], {"query", "value"}),
        ([".*layer_0/self_attention_layer/key"], {"key"}),
        ([".*feedforward.*"], {n for n in PROJECTIONS if "feed" in n}),
    ],
)
def test_targets_are_names_or_regular_expressions(bert, names, expected):
    layers = enable_srlora(bert, rank=2, target_layer_names=names)
    assert {layer.name for layer in layers} == expected


def test_excluded_layers_stay_as_they_are(bert):
    layers = enable_srlora(
        bert, rank=2, exclude_layer_names=["key", ".*feedforward_.*"]
    )
    assert {x.name for x in layers} == {"query", "value", "attention_output"}


def test_a_rank_pattern_gives_layers_their_own_rank(bert, rng):
    x = tokens(rng)
    expected = to_numpy(bert(x)["sequence_output"])
    layers = enable_srlora(
        bert,
        rank=2,
        lora_alpha=4,
        # The first that matches holds.
        rank_pattern={"query": 3, ".*self_attention_layer.*": 1},
    )
    ranks = {layer.name: layer.rank for layer in layers}
    assert ranks == {
        "query": 3,
        "key": 1,
        "value": 1,
        "attention_output": 1,
        "feedforward_intermediate_dense": 2,
        "feedforward_output_dense": 2,
    }
    by_name = {layer.name: layer for layer in layers}
    assert by_name["query"].scale == 4 / 3 and by_name["key"].scale == 4
    assert by_name["key"].direction_count == 8
    np.testing.assert_allclose(
        to_numpy(bert(x)["sequence_output"]), expected, atol=1e-5
    )


def test_layers_of_several_ranks_train_recompose_and_reload(
    bert, rng, tmp_path
):
    pattern = {"query": 3, "key": 1}
    enable_srlora(bert, 2, recipe="paper", rank_pattern=pattern)
    model = classifier(bert)
    x, y = tokens(rng), np.arange(4) % 3
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
    callback = keras_srlora.RecompositionCallback(interval=2)
    model.fit(x, y, batch_size=2, epochs=4, verbose=0, callbacks=[callback])
    recomposed = {record.layer.split("/")[-1] for record in callback.events}
    assert PROJECTIONS == recomposed
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    ranks = {x.name: x.rank for x in keras_srlora.initialize_factors(loaded)}
    assert ranks == {**dict.fromkeys(PROJECTIONS, 2), **pattern}
    np.testing.assert_allclose(
        loaded.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6
    )


BIASES = {"bias", "beta"}


@pytest.mark.parametrize(
    "bias, count", [("none", 0), ("srlora_only", 6), ("all", 10)]
)
def test_which_biases_are_trained(bert, bias, count):
    # Of the 10, two are `beta` of the block's norms, one that of the
    # embeddings, one the bias of the pooler.
    enable_srlora(bert, rank=2, bias=bias)
    trained = [v for v in bert.trainable_variables if v.name in BIASES]
    assert len(trained) == count
    assert len(bert.trainable_variables) == 12 + count


# Keras says it of the pooler's bias, whose output is not used.
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("bias", ["srlora_only", "all"])
def test_trained_biases_are_trained_on_after_a_reload(
    bert, rng, tmp_path, bias
):
    config, weights = bert.get_config(), bert.get_weights()
    plain = type(bert).from_config(config)
    plain.set_weights(weights)
    enable_srlora(bert, rank=2, bias=bias)
    task = classifier(bert)
    x, y = tokens(rng), np.arange(4) % 3
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    task.compile(keras.optimizers.SGD(0.1), loss)
    task.fit(x, y, verbose=0)
    trained = {v.path for v in bert.trainable_variables}
    path = tmp_path / "biases.safetensors"
    keras_srlora.save_adapter(bert, path, include_trainable=True)
    task.save(tmp_path / "task.keras")
    keras_srlora.load_adapter(plain, path)
    assert {v.path for v in plain.trainable_variables} == trained
    by_file = keras.models.load_model(tmp_path / "task.keras")
    assert len(by_file.trainable_variables) == len(task.trainable_variables)
    np.testing.assert_allclose(
        to_numpy(plain(x)["sequence_output"]),
        to_numpy(bert(x)["sequence_output"]),
        atol=1e-5,
    )
    # One more step of each ends at the same biases.
    task.fit(x, y, verbose=0)
    by_file.fit(x, y, verbose=0)
    for old, new in zip(task.trainable_variables, by_file.trainable_variables):
        np.testing.assert_allclose(to_numpy(old), to_numpy(new), atol=1e-6)


def test_trainable_parameters_are_printed(bert, capsys):
    enable_srlora(bert, rank=2, bias="srlora_only")
    keras_srlora.print_trainable_parameters(bert)
    # Six kernels between sides of 16 and 32; their biases.
    factors = 2 * (4 * (16 + 16) + 2 * (16 + 32))
    everything = bert.count_params()
    trainable = factors + 4 * 16 + 32 + 16
    assert capsys.readouterr().out == (
        f"trainable params: {trainable:,} || all params: {everything:,} || "
        f"trainable%: {100 * trainable / everything:.4f} || "
        f"SRLoRA factors: {factors:,} in 6 layers\n"
    )


def test_an_einsum_equation_in_the_middle_of_a_model(rng):
    inputs = keras.Input((5, 8))
    x = keras.layers.EinsumDense(
        "btd,ndh->btnh", (5, 2, 3), bias_axes="nh", name="middle"
    )(inputs)
    x = keras.layers.Flatten()(x)
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    data = rng.standard_normal((3, 5, 8)).astype("float32")
    expected = to_numpy(model(data))
    (layer,) = enable_srlora(model, rank=2)
    assert layer.name == "middle" and isinstance(layer, SRLoRAEinsumDense)
    np.testing.assert_allclose(to_numpy(model(data)), expected, atol=1e-5)
    merge_srlora(model)
    np.testing.assert_allclose(to_numpy(model(data)), expected, atol=1e-5)


def test_merge_gives_back_plain_layers_and_thaws_kernels(rng):
    model = two_layer_model(rng)
    keras_srlora.initialize_factors(model)
    x = rng.standard_normal((4, 12)).astype("float32")
    expected = to_numpy(model(x))
    (layer,) = merge_srlora(model)
    assert type(layer) is keras.layers.Dense
    assert layer.kernel.trainable and layer.get_config()["units"] == 16
    np.testing.assert_allclose(to_numpy(model(x)), expected, atol=1e-6)
    # It trains, saves and is converted again as a plain layer.
    model.compile("adam", "mse")
    model.fit(x, np.zeros((4, 3)), verbose=0)
    enable_srlora(model, rank=2)
    assert isinstance(layer, SRLoRADense)


def test_a_compiled_model_is_traced_anew(rng):
    model = mlp()
    x = rng.standard_normal((4, 12)).astype("float32")
    expected = model.predict(x, verbose=0)
    enable_srlora(model, rank=2)
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-5)
    merge_srlora(model)
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-5)


def test_an_outer_model_is_converted_with_its_inner_model(bert, tmp_path):
    """So that its file loads, too; see `tests/silent`."""
    outer = classifier(bert)
    layers = enable_srlora(bert, rank=2)
    for layer in layers:
        layer.lora_kernel_b.assign_add(0.1 * np.ones(layer.factors[1].shape))
    expected = bert_outputs(bert)
    outer.save(tmp_path / "outer.keras")
    loaded = keras.models.load_model(tmp_path / "outer.keras")
    inner = next(x for x in loaded.layers if type(x).__name__ == "BertBackbone")
    np.testing.assert_allclose(bert_outputs(inner), expected, atol=1e-5)


# Bad input is refused before anything is changed.


def refused(model, message, **kwargs):
    values = [to_numpy(v) for v in model.variables]
    flags = [v.trainable for v in model.variables]
    classes = [type(x) for x in model._flatten_layers()]
    with pytest.raises(ValueError, match=message) as error:
        enable_srlora(model, **{"rank": 2, **kwargs})
    assert classes == [type(x) for x in model._flatten_layers()]
    assert flags == [v.trainable for v in model.variables]
    for old, new in zip(values, model.variables):
        np.testing.assert_array_equal(old, to_numpy(new))
    return str(error.value)


def test_a_target_that_matches_nothing(bert):
    message = refused(
        bert, "matches nothing", target_layer_names=["query", "qury"]
    )
    assert "'qury'" in message and "'query'" in message


def test_target_names_of_a_wrong_type(bert):
    refused(bert, "must be a list of strings", target_layer_names="query")
    refused(bert, "must be a list of strings", target_layer_names=[1])


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"exclude_layer_names": ["qury"]}, "exclude_layer_names.*'qury'"),
        ({"exclude_layer_names": "query"}, "must be a list of strings"),
        ({"exclude_layer_names": [".*"]}, "leave nothing of the 6"),
        ({"rank_pattern": {"qury": 1}}, "rank_pattern.*'qury'"),
        ({"rank_pattern": ["query"]}, "must be a dict"),
        ({"rank_pattern": {"query": 0}}, "positive integer"),
        ({"rank_pattern": {"query": 17}}, "above the smaller side.*query"),
        ({"rank_pattern": {"key": 5}, "target_rank": 4}, "at least `rank`"),
        ({"bias": "lora_only"}, "srlora_only.*Received: bias='lora_only'"),
    ],
)
def test_bad_choices_of_layers_ranks_and_biases(bert, kwargs, message):
    refused(bert, message, **kwargs)


def test_a_target_of_another_class():
    refused(mlp(), "LayerNormalization", target_layer_names=["norm"])


def test_rank_above_a_kernel(bert):
    refused(bert, "above the smaller side.*at most 16", rank=17)


@pytest.mark.parametrize(
    "kwargs",
    [{"rank": 0}, {"rank": 4, "target_rank": 3}, {"lora_alpha": -1}],
)
def test_bad_arguments(kwargs):
    refused(mlp(), "Received", **kwargs)


def test_enabling_twice():
    model = mlp()
    enable_srlora(model, rank=2)
    for names in (None, ["first"]):
        with pytest.raises(ValueError, match="'first' was already converted"):
            enable_srlora(model, rank=2, target_layer_names=names)


def test_keras_lora_enabled(bert):
    bert.enable_lora(2)
    refused(bert, "has Keras's LoRA enabled")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_kernel_that_is_not_finite(value):
    model = mlp()
    kernel = to_numpy(model.get_layer("second").kernel)
    kernel[0, 0] = value
    model.get_layer("second").kernel.assign(kernel)
    refused(model, "'second' has entries that are NaN or infinite")


def test_a_model_that_is_not_built():
    refused(keras.Sequential([keras.layers.Dense(3)]), "is not built")


def test_a_kernel_with_a_constraint():
    inputs = keras.Input((8,))
    x = keras.layers.Dense(8, kernel_constraint="non_neg", name="held")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    refused(model, "'held' has a kernel constraint")


def test_an_equation_that_is_not_one_contraction():
    inputs = keras.Input((5, 8), batch_size=3)
    x = keras.layers.EinsumDense("eth,ehm->etm", (5, 6), name="experts")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    refused(model, "a batch of kernels", rank=1)


def test_nothing_to_convert():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3)(inputs)
    model = keras.Model(inputs, keras.layers.Flatten()(x))
    refused(model, "no `Dense` or `EinsumDense` layer")


def test_not_a_model():
    with pytest.raises(ValueError, match="must be a `keras.Model`"):
        enable_srlora(keras.layers.Dense(3))


def test_merging_a_model_without_srlora():
    with pytest.raises(ValueError, match="has no SRLoRA layer"):
        merge_srlora(mlp())


def test_a_subclassed_model_needs_names():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = keras.layers.Dense(8)
            self.head = keras.layers.Dense(2)

        def call(self, x):
            return self.head(self.hidden(x))

    model = Net()
    model(np.zeros((1, 4), "float32"))
    refused(model, "Name the layers to convert")
    name = model.hidden.name
    with pytest.warns(UserWarning, match=f"'{model.head.name}'.*trainable"):
        (layer,) = enable_srlora(model, rank=2, target_layer_names=[name])
    assert layer is model.hidden
    assert {v.path.split("/")[-2] for v in model.trainable_variables} == {
        name,
        model.head.name,
    }


def test_a_single_layer_can_be_used_alone(rng):
    layer = dense_layer(matrix("gaussian", 8, 6, rng), rank=2)
    model = keras.Sequential([keras.Input((8,)), layer])
    assert type(merge_srlora(model)[0]) is keras.layers.Dense


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch's own")
def test_parameters_lists_the_factors():
    model = mlp()
    enable_srlora(model, rank=2)
    ours = {id(v.value) for v in model.trainable_variables}
    torchs = {id(p) for p in model.parameters() if p.requires_grad}
    assert ours == torchs
    merge_srlora(model)
    assert len(list(model.parameters())) == len(model.variables)
