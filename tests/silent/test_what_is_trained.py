"""Exactly the factors and the head are trained, in models of many shapes."""

import keras
import numpy as np
import pytest
from pieces import LENGTH
from pieces import NAMES
from pieces import WIDTH
from pieces import UnbuiltBlock
from pieces import assert_close
from pieces import batch
from pieces import blocks
from pieces import called
from pieces import collected_warnings
from pieces import convert
from pieces import differ
from pieces import encoder
from pieces import ids
from pieces import others
from pieces import paths
from pieces import pooled
from pieces import tuned_encoder
from support import tiny_bert
from support import to_numpy

import keras_srlora
from keras_srlora import enable_srlora

layers = keras.layers

# Converted in a block of `pieces.blocks`.
IN_A_BLOCK = {"query", "key", "value", "attention_output", "inner", "outer"}


def names(converted):
    return {layer.name for layer in converted}


def weights_of(model, prefix):
    """Paths of all weights of the layers whose name starts with a prefix."""
    return paths(
        v
        for layer in model.layers
        if layer.name.startswith(prefix)
        for v in layer.weights
        if "seed" not in v.path and "moving" not in v.path
    )


def assert_torch_agrees(model):
    """On PyTorch a flag of its own says what `backward` reaches."""
    if keras.backend.backend() == "torch":
        for v in model.variables:
            if "float" in v.dtype:
                assert v.value.requires_grad == v.trainable, v.path


# Heads.


def dense(name="head_dense", units=3, **arguments):
    return layers.Dense(units, name=name, **arguments)


HEADS = {
    "dense": lambda x: dense()(pooled(x)),
    "dense_with_activation": lambda x: dense(activation="softmax")(pooled(x)),
    "float32_activation": lambda x: layers.Activation(
        "softmax", dtype="float32", name="head_activation"
    )(dense()(pooled(x))),
    "softmax": lambda x: layers.Softmax(name="head_softmax")(
        dense()(pooled(x))
    ),
    "two_dense": lambda x: dense()(
        dense("head_hidden", 6, activation="relu")(pooled(x))
    ),
    "three_dense_and_softmax": lambda x: layers.Softmax()(
        dense()(dense("head_2", 6)(dense("head_1", 6)(pooled(x))))
    ),
    "time_distributed": lambda x: layers.TimeDistributed(
        layers.Dense(3, name="head_dense"), name="head_distributed"
    )(x),
    "time_distributed_and_softmax": lambda x: layers.Softmax()(
        layers.TimeDistributed(layers.Dense(3), name="head_distributed")(x)
    ),
    "norm_dropout_dense_softmax": lambda x: layers.Softmax()(
        dense()(
            layers.Dropout(0.1)(
                layers.LayerNormalization(name="head_norm")(pooled(x))
            )
        )
    ),
    "batch_norm_behind": lambda x: layers.BatchNormalization(name="head_norm")(
        dense()(pooled(x))
    ),
    "reshape": lambda x: layers.Reshape((1, 3))(dense()(pooled(x))),
    "flatten": lambda x: layers.Softmax()(dense()(layers.Flatten()(x))),
    "operation": lambda x: keras.ops.softmax(dense()(pooled(x))),
    "slice": lambda x: dense()(pooled(x))[:, :2],
    "convolution": lambda x: layers.Softmax()(
        layers.Conv1D(3, 1, name="head_convolution")(x)
    ),
    "sequential": lambda x: keras.Sequential(
        [layers.Dense(6, "relu"), layers.Dense(3), layers.Softmax()],
        name="head_sequential",
    )(pooled(x)),
    "two_outputs": lambda x: [
        layers.Softmax(name="one")(dense("head_one")(pooled(x))),
        dense("head_two")(x),
    ],
    "outputs_in_a_row": lambda x: _in_a_row(x),
    "einsum_dense": lambda x: layers.Softmax()(
        layers.EinsumDense("bte,ek->btk", (None, 3), name="head_einsum")(x)
    ),
}


def _in_a_row(x):
    """The first output is on the way to the second."""
    first = dense("head_first", 4)(pooled(x))
    return {"first": first, "second": dense("head_second")(first)}


@pytest.mark.parametrize("head", HEADS)
def test_what_comes_behind_the_last_block_is_a_head(head):
    model = blocks(HEADS[head])
    expected = weights_of(model, "head")
    assert expected
    with collected_warnings():
        converted = enable_srlora(model, 2)
    assert names(converted) <= IN_A_BLOCK
    assert others(model) == expected
    assert_torch_agrees(model)


@pytest.mark.parametrize("head", ["softmax", "two_dense", "time_distributed"])
def test_a_head_learns_in_fit(head, rng):
    model = blocks(HEADS[head])
    with collected_warnings():
        enable_srlora(model, 2)
    x = ids(rng, 16)
    y = np.zeros((16, *model.output_shape[1:]), "float32")
    before = [to_numpy(v) for v in _weights(model, "head")]
    model.compile(keras.optimizers.SGD(0.5), "mse")
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    for variable, value in zip(_weights(model, "head"), before):
        assert differ(variable, value, 1e-6), variable.path


def _weights(model, prefix):
    return [
        v
        for layer in model.layers
        if layer.name.startswith(prefix)
        for v in layer.weights
        if "kernel" in v.path
    ]


@pytest.mark.parametrize("head", ["softmax", "time_distributed", "operation"])
def test_heads_on_the_layers_of_a_kerashub_backbone(head):
    """`backbone.output`, not `backbone(inputs)`: the blocks are its own."""
    pytest.importorskip("keras_hub")
    bert = tiny_bert(num_layers=1)
    tokens = bert.output["sequence_output"]
    model = keras.Model(bert.input, HEADS[head](tokens))
    expected = weights_of(model, "head")
    with collected_warnings():
        converted = enable_srlora(model, 2)
    assert len(converted) == 6
    assert others(model) == expected


@pytest.mark.parametrize("head", ["dense", "softmax", "two_dense", "operation"])
def test_heads_on_a_backbone_that_is_called(head):
    pytest.importorskip("keras_hub")
    bert = tiny_bert(num_layers=1)
    tokens = bert(bert.input)["sequence_output"]
    model = keras.Model(bert.input, HEADS[head](tokens))
    expected = weights_of(model, "head")
    with collected_warnings():
        converted = enable_srlora(model, 2)
    assert len(converted) == 6
    assert others(model) == expected


BEHIND = {
    "softmax": layers.Softmax(),
    "activation": layers.Activation("softmax", dtype="float32"),
    "dropout": layers.Dropout(0.1),
    "reshape": layers.Reshape((3, 1)),
    "operation": keras.ops.softmax,
    "slice": lambda x: x[:, :2],
}


@pytest.mark.parametrize("behind", BEHIND)
def test_without_blocks_the_last_projection_is_the_head(behind):
    """What has no weights behind it makes no other layer the head."""
    inputs = keras.Input((12,))
    x = layers.Dense(16, "relu", name="first")(inputs)
    x = layers.Dense(16, "relu", name="second")(x)
    outputs = BEHIND[behind](layers.Dense(3, name="head")(x))
    model = keras.Model(inputs, outputs)
    with collected_warnings():
        converted = enable_srlora(model, 2)
    assert names(converted) == {"first", "second"}
    assert others(model) == ["head/bias", "head/kernel"]


def test_a_sequential_model_with_a_softmax_keeps_its_head():
    model = keras.Sequential(
        [
            keras.Input((12,)),
            layers.Dense(16, "relu", name="first"),
            layers.Dense(16, "relu", name="second"),
            layers.Dense(3, name="head"),
            layers.Softmax(),
        ],
        name="classifier",
    )
    converted = enable_srlora(model, 2)
    assert names(converted) == {"first", "second"}
    assert [p.split("/")[-2] for p in others(model)] == ["head", "head"]


def test_a_branch_beside_the_blocks_is_trained_or_named():
    """Wide and deep: a path to the output that no block is on."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((LENGTH, WIDTH))
    numbers = keras.Input((4,))
    wide = layers.Dense(WIDTH, name="wide")(numbers)
    x = UnbuiltBlock(name="block")(inputs)
    x = layers.Concatenate()([pooled(x), wide])
    model = keras.Model([inputs, numbers], dense()(x))
    with collected_warnings() as messages:
        enable_srlora(model, 2)
    trained = "wide/kernel" in others(model)
    assert trained or any("wide" in text for text in messages)
    assert {"head_dense/kernel", "head_dense/bias"} <= set(others(model))


# Frozen before.


def freeze_whole(outer, inner):
    outer.trainable = False


def freeze_backbone(outer, inner):
    inner.trainable = False


def freeze_layers(outer, inner):
    for layer in inner.layers:
        layer.trainable = False


def freeze_variables(outer, inner):
    for variable in inner.variables:
        variable.trainable = False


FREEZES = {
    "whole": freeze_whole,
    "backbone": freeze_backbone,
    "layers": freeze_layers,
    "variables": freeze_variables,
}


def with_head(inner):
    inputs = keras.Input((WIDTH,))
    return keras.Model(inputs, dense("head")(inner(inputs)))


@pytest.mark.parametrize("back", ["merge_srlora", "unload_srlora"])
def test_the_head_first_then_factors_then_everything(back, rng):
    """What was frozen before is thawed at once, on TensorFlow, too."""
    model = blocks(lambda x: dense("head")(pooled(x)), count=1)
    everything = paths(model.trainable_variables)
    for layer in model.layers[:-1]:
        layer.trainable = False
    model.compile("adam", "mse")
    x, y = ids(rng, 8), batch(rng, 8, model.output_shape[-1])
    model.fit(x, y, verbose=0)
    enable_srlora(model, 2)
    assert others(model) == ["head/bias", "head/kernel"]
    getattr(keras_srlora, back)(model)
    for layer in model.layers:
        layer.trainable = True
    assert paths(model.trainable_variables) == everything


@pytest.mark.parametrize("target", ["backbone", "outer"])
@pytest.mark.parametrize("freeze", FREEZES)
def test_factors_are_trainable_whatever_was_frozen_before(freeze, target, rng):
    inner = encoder()
    outer = with_head(inner)
    FREEZES[freeze](outer, inner)
    with collected_warnings():
        converted = convert(
            inner if target == "backbone" else outer, "adaptive"
        )
    factors = paths(v for layer in converted for v in layer.factors)
    model = outer if freeze != "whole" else inner
    found = [p for p in paths(model.trainable_variables) if "lora" in p]
    assert found == factors and len(factors) == 4
    frozen = [p for p in others(inner)]
    assert frozen == []
    # Without the callback, too.
    model.compile("adam", "mse")
    y = batch(rng, 16, model.output_shape[-1])
    model.fit(batch(rng, 16), y, batch_size=8, verbose=0)
    for layer in converted:
        assert differ(layer.lora_kernel_b, 0.0, 1e-6)


@pytest.mark.parametrize("freeze", FREEZES)
def test_an_adapter_is_loaded_trainable_onto_a_frozen_backbone(
    freeze, tmp_path
):
    path, inner = tmp_path / "a.safetensors", encoder()
    keras_srlora.save_adapter(tuned_encoder(), path)
    FREEZES[freeze](with_head(inner) if freeze != "whole" else inner, inner)
    with collected_warnings():
        keras_srlora.load_adapter(inner, path)
    assert len(inner.trainable_variables) == 4


@pytest.mark.parametrize("frozen", [False, True])
def test_a_backbone_of_kerashub_trains_its_factors(frozen):
    pytest.importorskip("keras_hub")
    bert = tiny_bert()
    bert.trainable = not frozen
    enable_srlora(bert, 2)
    assert len(bert.trainable_variables) == 24
    assert others(bert) == []
    assert_torch_agrees(bert)


def test_a_model_is_converted_again_after_merging():
    """First one layer, merged, then all of them."""
    pytest.importorskip("keras_hub")
    bert = tiny_bert(num_layers=1)
    enable_srlora(bert, 2, target_layer_names=["query"])
    keras_srlora.merge_srlora(bert)
    enable_srlora(bert, 2)
    assert len(bert.trainable_variables) == 12
    assert others(bert) == []
    assert_torch_agrees(bert)


def test_layers_are_converted_by_several_calls(rng):
    pytest.importorskip("keras_hub")
    bert = tiny_bert(num_layers=1)
    enable_srlora(bert, 2, target_layer_names=["query"])
    enable_srlora(bert, 3, target_layer_names=["value", "key"])
    enable_srlora(bert, 4, target_layer_names=[".*feedforward.*dense"])
    assert len(bert.trainable_variables) == 10
    assert others(bert) == []
    ranks = {
        v.path.split("/")[-2]: v.shape[0] for v in bert.trainable_variables
    }
    assert ranks["query"] == 2 and ranks["key"] == ranks["value"] == 3
    assert ranks["feedforward_output_dense"] == 4


@pytest.mark.parametrize("first", ["enable", "load"])
@pytest.mark.parametrize("second", ["enable", "load"])
def test_a_second_conversion_leaves_the_first_one_trainable(
    first, second, rng, tmp_path
):
    for name in NAMES:
        other = tuned_encoder("adaptive", names=[name])
        with collected_warnings():
            keras_srlora.save_adapter(other, tmp_path / f"{name}.safetensors")
    model = with_head(encoder())
    for how, name, rank in zip((first, second), NAMES, (2, 3)):
        if how == "enable":
            convert(model, "adaptive", [name], rank=rank)
        else:
            file = tmp_path / f"{name}.safetensors"
            with collected_warnings():
                keras_srlora.load_adapter(model, file)
    trained = [p for p in paths(model.trainable_variables) if "lora" in p]
    # A loaded adapter is all there is: it takes the place of what was there.
    layers_left = ["second"] if second == "load" else NAMES
    assert {p.split("/")[0] for p in trained} >= set(layers_left)
    assert others(model) == ["head/bias", "head/kernel"]


def test_layers_of_several_calls_train_and_recompose(rng):
    model = with_head(encoder())
    for name, rank in zip(NAMES, (2, 3)):
        convert(model, names=[name], rank=rank)
    model.compile("adam", "mse")
    callback = keras_srlora.RecompositionCallback(interval=2)
    x, y = batch(rng, 48), batch(rng, 48, 3)
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[callback])
    recomposed = {event.layer.split("/")[-1] for event in callback.events}
    assert recomposed == set(NAMES)


def test_biases_of_the_first_call_stay_trained():
    model = with_head(encoder())
    convert(model, names=["first"], bias="srlora_only")
    convert(model, names=["second"])
    assert others(model) == ["first/bias", "head/bias", "head/kernel"]


# Frozen for a while.


def toggle(*parts):
    for part in parts:
        part.trainable = False
    for part in parts:
        part.trainable = True


TOGGLES = {
    "backbone": lambda outer, inner: toggle(inner),
    "outer": lambda outer, inner: toggle(outer),
    "twice": lambda outer, inner: (toggle(inner), toggle(inner)),
    "frozen_twice": lambda outer, inner: (
        setattr(inner, "trainable", False),
        setattr(inner, "trainable", False),
        setattr(inner, "trainable", True),
    ),
    "inner_then_outer": lambda outer, inner: (toggle(inner), toggle(outer)),
    "both_at_once": lambda outer, inner: toggle(inner, outer),
    "backbone_off_outer_on": lambda outer, inner: (
        setattr(inner, "trainable", False),
        setattr(outer, "trainable", True),
    ),
    "outer_off_parts_on": lambda outer, inner: (
        setattr(outer, "trainable", False),
        # The parts first, as a user who thaws in stages does.
        setattr(outer.layers[-1], "trainable", True),
        setattr(inner, "trainable", True),
        setattr(outer, "trainable", True),
    ),
    "layers": lambda outer, inner: toggle(*inner.layers),
    "layers_off_backbone_on": lambda outer, inner: (
        [setattr(layer, "trainable", False) for layer in inner.layers],
        setattr(inner, "trainable", True),
    ),
    "backbone_off_layers_on": lambda outer, inner: (
        setattr(inner, "trainable", False),
        [setattr(layer, "trainable", True) for layer in inner.layers],
        setattr(inner, "trainable", True),
    ),
}


if keras.backend.backend() == "tensorflow":
    # There Keras does nothing where the flag of the outer one is set already.
    for order in ("backbone_off_outer_on", "layers_off_backbone_on"):
        del TOGGLES[order]


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("order", TOGGLES)
def test_thawing_gives_back_what_was_trainable_before(order, bias):
    inner = _with_other_layers()
    outer = with_head(inner)
    with collected_warnings():
        convert(outer, bias=bias)
    before = paths(outer.trainable_variables)
    with collected_warnings():  # of layers that are thawed one by one
        TOGGLES[order](outer, inner)
    assert paths(outer.trainable_variables) == before
    assert_torch_agrees(outer)


def _with_other_layers():
    """An encoder with layers that stay frozen."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((WIDTH,))
    x = layers.LayerNormalization(name="norm_0")(inputs)
    for name in NAMES:
        x = layers.Dense(WIDTH, "tanh", name=name)(x)
        x = layers.LayerNormalization(name=f"norm_{name}")(x)
    x = layers.Dense(WIDTH, name="third")(x)
    return keras.Model(inputs, x, name="backbone")


@pytest.mark.parametrize("order", TOGGLES)
def test_thawing_a_backbone_of_blocks(order):
    backbone = blocks(lambda x: x, count=1)
    inputs = keras.Input((LENGTH,), dtype="int32")
    outer = keras.Model(inputs, dense("head")(pooled(backbone(inputs))))
    with collected_warnings():
        enable_srlora(outer, 2)
    before = paths(outer.trainable_variables)
    assert len(before) >= 10
    with collected_warnings():
        TOGGLES[order](outer, backbone)
    assert paths(outer.trainable_variables) == before


def test_the_head_first_and_then_the_rest(rng):
    """Two stages, as in Keras's guide to transfer learning."""
    pytest.importorskip("keras_hub")
    bert = tiny_bert(num_layers=1)
    enable_srlora(bert, 2)
    pooled_output = bert(bert.input)["pooled_output"]
    model = keras.Model(bert.input, dense("head")(pooled_output))
    before = paths(model.trainable_variables)
    bert.trainable = False
    assert others(model) == paths(model.trainable_variables)
    assert len(model.trainable_variables) == 2
    bert.trainable = True
    assert paths(model.trainable_variables) == before


def test_a_block_that_is_frozen_and_thawed():
    pytest.importorskip("keras_hub")
    bert = tiny_bert()
    enable_srlora(bert, 2)
    before = paths(bert.trainable_variables)
    toggle(bert.transformer_layers[0])
    assert paths(bert.trainable_variables) == before


def test_thawing_a_task_gives_back_what_was_trainable_before():
    hub = pytest.importorskip("keras_hub")
    bert = tiny_bert(num_layers=1)
    task = hub.models.BertTextClassifier(backbone=bert, num_classes=3)
    enable_srlora(task, 2)
    before = paths(task.trainable_variables)
    toggle(task)
    assert paths(task.trainable_variables) == before
    toggle(task.backbone)
    assert paths(task.trainable_variables) == before


def test_thawing_after_loading_a_file_gives_back_the_same(tmp_path):
    hub = pytest.importorskip("keras_hub")
    bert = tiny_bert(num_layers=1)
    task = hub.models.BertTextClassifier(
        backbone=bert, num_classes=3, name="task"
    )
    enable_srlora(task, 2)
    before = paths(task.trainable_variables)
    task.save(tmp_path / "task.keras")
    with collected_warnings():
        loaded = keras.models.load_model(tmp_path / "task.keras")
    assert paths(loaded.trainable_variables) == before
    toggle(loaded)
    assert paths(loaded.trainable_variables) == before


@pytest.mark.parametrize("back", ["merge_srlora", "unload_srlora"])
def test_after_merging_everything_can_be_thawed(back):
    outer = with_head(_with_other_layers())
    before = paths(outer.trainable_variables)
    with collected_warnings():
        convert(outer)
    toggle(outer)
    getattr(keras_srlora, back)(outer)
    outer.trainable = True
    assert paths(outer.trainable_variables) == before


# Subclassed models.


class Subclassed(keras.Model):
    """A small ViT: patches, positions, blocks, norm, head."""

    def __init__(self, traceable=True, head_first=False, **kwargs):
        super().__init__(**kwargs)
        self.traceable = traceable
        if head_first:
            self.head = layers.Dense(3, name="head")
        self.patches = layers.Dense(WIDTH, name="patches")
        self.positions = layers.Embedding(LENGTH, WIDTH, name="positions")
        self.blocks = [UnbuiltBlock(name=f"block_{i}") for i in range(2)]
        self.norm = layers.LayerNormalization(name="norm")
        if not head_first:
            self.head = layers.Dense(3, name="head")

    def call(self, inputs):
        if not self.traceable and not hasattr(inputs, "device"):
            # What Keras cannot do with symbols.
            if isinstance(inputs, keras.KerasTensor):
                raise TypeError("only tensors")
        x = self.patches(inputs)
        x = x + self.positions(keras.ops.arange(LENGTH))
        for block in self.blocks:
            x = block(x)
        return self.head(keras.ops.mean(self.norm(x), axis=1))


def subclassed(**arguments):
    keras.utils.set_random_seed(7)
    model = Subclassed(**arguments)
    model(np.zeros((1, LENGTH, 5), "float32"))
    return model


@pytest.mark.parametrize("traceable", [True, False])
def test_a_subclassed_model_trains_its_factors_and_its_head(traceable):
    model = subclassed(traceable=traceable)
    with collected_warnings() as messages:
        converted = enable_srlora(model, 2)
    assert names(converted) <= IN_A_BLOCK
    left = {path.split("/")[-2] for path in others(model)}
    # The norm behind the blocks is no block.
    assert {"head"} <= left <= {"head", "norm"}
    if not traceable:
        assert any("head" in text for text in messages)
    assert_torch_agrees(model)


@pytest.mark.parametrize("traceable", [True, False])
def test_a_head_that_was_made_first_is_trained_or_named(traceable):
    model = subclassed(traceable=traceable, head_first=True)
    with collected_warnings() as messages:
        enable_srlora(model, 2)
    left = {path.split("/")[-2] for path in others(model)}
    assert left <= {"head", "norm"}
    assert "head" in left or any("head" in text for text in messages)


class OneBlock(keras.Model):
    """Attention and feed-forward side by side, at the first level."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = layers.Dense(WIDTH, name="embedding")
        self.attention = layers.MultiHeadAttention(2, 4, name="attention")
        self.inner = layers.Dense(2 * WIDTH, "relu", name="inner")
        self.outer = layers.Dense(WIDTH, name="outer")
        self.norm = layers.LayerNormalization(name="norm")
        self.head = layers.Dense(3, name="head")

    def call(self, inputs):
        x = self.embedding(inputs)
        x = self.norm(x + self.attention(x, x))
        x = x + self.outer(self.inner(x))
        return self.head(keras.ops.mean(x, axis=1))


def test_a_subclassed_model_converts_dense_layers_beside_attention():
    keras.utils.set_random_seed(7)
    model = OneBlock()
    model(np.zeros((1, LENGTH, 5), "float32"))
    with collected_warnings():
        converted = enable_srlora(model, 2)
    assert IN_A_BLOCK <= names(converted)
    assert "head" not in names(converted)
    assert {p.split("/")[-2] for p in others(model)} >= {"head"}


def test_named_layers_of_a_subclassed_model_leave_the_rest_frozen():
    model = subclassed()
    with collected_warnings():
        enable_srlora(model, 2, target_layer_names=["query", "value"])
    left = {path.split("/")[-2] for path in others(model)}
    assert {"head"} <= left <= {"head", "norm"}


class AroundABackbone(keras.Model):
    """A functional model, held under another name than `backbone`."""

    def __init__(self):
        super().__init__()
        self.features = blocks(lambda x: x, count=1)
        self.dropout = layers.Dropout(0.1)
        self.classes = layers.Dense(3, name="head")

    def call(self, inputs, training=None):
        x = keras.ops.mean(self.features(inputs), axis=1)
        return self.classes(self.dropout(x, training=training))


def test_a_subclassed_model_around_a_functional_one(rng):
    model = AroundABackbone()
    model(ids(rng))
    with collected_warnings():
        converted = enable_srlora(model, 2)
    assert names(converted) <= IN_A_BLOCK
    assert {p.split("/")[-2] for p in others(model)} == {"head"}


# Default targets.


def test_the_default_targets_are_all_of_attention_and_feedforward():
    """The feed-forward is a `Sequential` inside of the block."""
    model = blocks(HEADS["dense"], count=1)
    assert names(enable_srlora(model, 2)) == IN_A_BLOCK


def test_dense_layers_between_attention_layers_are_converted(rng):
    """A functional ViT, as on keras.io: no block is a layer."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((LENGTH, 5))
    x = layers.Dense(WIDTH, name="patches")(inputs)
    for i in range(2):
        normed = layers.LayerNormalization(name=f"norm_{i}")(x)
        attention = layers.MultiHeadAttention(2, 4, name=f"attention_{i}")
        x = layers.Add()([x, attention(normed, normed)])
        hidden = layers.Dense(16, "gelu", name=f"inner_{i}")(x)
        x = layers.Add()([x, layers.Dense(WIDTH, name=f"outer_{i}")(hidden)])
    x = layers.Flatten()(x)
    model = keras.Model(inputs, layers.Dense(3, name="head")(x))
    x = rng.standard_normal((2, LENGTH, 5)).astype("float32")
    before = called(model, x)
    with collected_warnings():
        converted = enable_srlora(model, 2)
    found = names(converted)
    assert {"query", "key", "value", "attention_output"} <= found
    assert {"inner_0", "outer_0"} <= found
    assert {"inner_1", "outer_1"} <= found
    assert "head" not in found
    assert "head/kernel" in others(model)
    assert_close(called(model, x), before)


class DeepFeedforward(keras.layers.Layer):
    """A feed-forward in a `Sequential` in a `Sequential`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        inner = keras.Sequential([layers.Dense(16, "relu", name="inner")])
        self.net = keras.Sequential([inner, layers.Dense(WIDTH, name="outer")])

    def build(self, input_shape):
        self.net.build(input_shape)
        self.built = True

    def call(self, inputs):
        return inputs + self.net(inputs)


class FunctionalFeedforward(DeepFeedforward):
    """A feed-forward that is a functional model inside of a layer."""

    def __init__(self, **kwargs):
        keras.layers.Layer.__init__(self, **kwargs)
        inputs = keras.Input((WIDTH,))
        x = layers.Dense(16, "relu", name="inner")(inputs)
        outputs = layers.Dense(WIDTH, name="outer")(x)
        self.net = keras.Model(inputs, outputs)

    def build(self, input_shape):
        self.built = True


@pytest.mark.parametrize("block", [DeepFeedforward, FunctionalFeedforward])
def test_a_feedforward_that_is_a_model_inside_of_a_block(block):
    keras.utils.set_random_seed(7)
    inputs = keras.Input((WIDTH,))
    x = block(name="block")(inputs)
    model = keras.Model(inputs, layers.Dense(3, name="head")(x))
    assert names(enable_srlora(model, 2)) == {"inner", "outer"}
    assert others(model) == ["head/bias", "head/kernel"]
