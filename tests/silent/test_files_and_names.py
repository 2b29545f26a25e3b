"""Files of converted models load, and layers are told apart by names."""

import contextlib
import copy
import json
import pickle

import keras
import numpy as np
import pytest
from pieces import LENGTH
from pieces import NAMES
from pieces import WIDTH
from pieces import UnbuiltBlock
from pieces import assert_close
from pieces import assert_unchanged
from pieces import batch
from pieces import blocks
from pieces import called
from pieces import collected_warnings
from pieces import convert
from pieces import differ
from pieces import encoder
from pieces import ids
from pieces import nudge
from pieces import paths
from pieces import pooled
from pieces import predicted
from pieces import state_of
from pieces import tuned_encoder
from safetensors import safe_open
from support import bert_outputs
from support import tiny_bert
from support import to_numpy

import keras_srlora
from keras_srlora import enable_srlora

layers = keras.layers

# Keras says so of plain models, too.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:`build\(\)` was called on layer:UserWarning"
)


def head(x):
    return layers.Dense(3, name="head")(pooled(x))


# Layers that are built when they are called first.


@keras.saving.register_keras_serializable("silent")
class Outer(layers.Layer):
    """A block without `build` inside of one without `build`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inside = UnbuiltBlock(name="inside")
        self.projection = layers.Dense(WIDTH, name="projection")

    def call(self, inputs):
        return self.projection(self.inside(inputs))


@keras.saving.register_keras_serializable("silent")
class OfEinsums(layers.Layer):
    """Two `EinsumDense`, and no `build`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.one = layers.EinsumDense("btd,df->btf", (None, 16), name="one")
        self.two = layers.EinsumDense("btf,fd->btd", (None, WIDTH), name="two")

    def call(self, inputs):
        return inputs + self.two(self.one(inputs))


@keras.saving.register_keras_serializable("silent")
class WholeModel(keras.Model):
    """A subclassed model that is built by a call."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = layers.Embedding(20, WIDTH, name="embedding")
        self.block = UnbuiltBlock(name="block")
        self.classes = layers.Dense(3, name="head")

    def call(self, inputs):
        x = self.block(self.embedding(inputs))
        return self.classes(keras.ops.mean(x, axis=1))


def of_layers(*made):
    def make():
        keras.utils.set_random_seed(7)
        inputs = keras.Input((LENGTH,), dtype="int32")
        x = layers.Embedding(20, WIDTH, name="embedding")(inputs)
        for layer in made:
            x = layer(name=f"made_{layer.__name__.lower()}")(x)
        return keras.Model(inputs, head(x))

    return make


def whole_model():
    keras.utils.set_random_seed(7)
    model = WholeModel()
    model(np.zeros((1, LENGTH), "int32"))
    return model


def in_a_sequential():
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32"),
            layers.Embedding(20, WIDTH),
            UnbuiltBlock(),
            layers.GlobalAveragePooling1D(),
            layers.Dense(3),
        ]
    )
    return model


def backbone_inside():
    backbone = blocks(lambda x: x, count=1)
    inputs = keras.Input((LENGTH,), dtype="int32")
    return keras.Model(inputs, head(backbone(inputs)))


UNBUILT = {
    "block": lambda: blocks(head),
    "nested": of_layers(Outer),
    "einsums": of_layers(OfEinsums),
    "several": of_layers(UnbuiltBlock, OfEinsums, Outer),
    "subclassed_model": whole_model,
    "sequential": in_a_sequential,
    "backbone": backbone_inside,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", UNBUILT)
def test_a_file_of_layers_without_build_loads(kind, rng, tmp_path):
    model, x = UNBUILT[kind](), ids(rng)
    with collected_warnings():
        nudge(enable_srlora(model, 2, target_rank=6, recipe="paper"))
    expected = called(model, x)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_close(called(loaded, x), expected)
    assert_close(predicted(loaded, x), expected)
    assert len(loaded.trainable_variables) == len(model.trainable_variables)
    # And again, from what was loaded.
    loaded.save(tmp_path / "again.keras")
    again = keras.models.load_model(tmp_path / "again.keras")
    assert_close(called(again, x), expected)
    with keras_srlora.adapter_disabled(model):
        pretrained = called(model, x)
    with keras_srlora.adapter_disabled(again):
        assert_close(called(again, x), pretrained)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["block", "several"])
def test_a_file_of_layers_without_build_trains_on(kind, rng, tmp_path):
    """As `ModelCheckpoint` writes it in `fit`."""
    model, x = UNBUILT[kind](), ids(rng, 32)
    y = rng.standard_normal((32, 3)).astype("float32")
    enable_srlora(model, 2, target_rank=6, recipe="paper")
    model.compile("adam", "mse")
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "model.keras")
    model.fit(
        x,
        y,
        batch_size=8,
        verbose=0,
        callbacks=[keras_srlora.RecompositionCallback(2), checkpoint],
    )
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_close(called(loaded, x), called(model, x))
    callback = keras_srlora.RecompositionCallback(2)
    loaded.fit(x, y, batch_size=8, verbose=0, callbacks=[callback])
    assert callback.events


@pytest.mark.parametrize("kind", ["block", "nested", "einsums", "backbone"])
def test_a_model_with_layers_without_build_is_cloned(kind, rng):
    model, x = UNBUILT[kind](), ids(rng)
    enable_srlora(model, 2, target_rank=6)
    clone = keras.models.clone_model(model)
    assert clone(x).shape == (4, 3)
    factors = [p for p in paths(model.trainable_variables) if "lora" in p]
    found = [p for p in paths(clone.trainable_variables) if "lora" in p]
    assert len(found) == len(factors)


def test_weights_of_layers_without_build_load(rng, tmp_path):
    models = []
    for _ in range(2):
        model = blocks(head)
        nudge(enable_srlora(model, 2, target_rank=6, recipe="paper"))
        models.append(model)
    nudge(keras_srlora.initialize_factors(models[0]), seed=5)
    models[0].save_weights(tmp_path / "a.weights.h5")
    models[1].load_weights(tmp_path / "a.weights.h5")
    x = ids(rng)
    assert_close(called(models[1], x), called(models[0], x))


def test_a_task_that_was_never_trained_loads_without_a_warning(tmp_path):
    hub = pytest.importorskip("keras_hub")
    task = hub.models.BertTextClassifier(
        backbone=tiny_bert(num_layers=1), num_classes=3
    )
    enable_srlora(task, 2)
    task.save(tmp_path / "task.keras")
    keras.models.load_model(tmp_path / "task.keras")


# Two parts of a model whose layers have the same paths.


def two_backbones(named=False):
    pytest.importorskip("keras_hub")
    inputs, outputs = {}, []
    for side in ("left", "right"):
        bert = tiny_bert(num_layers=1, dropout=0.0)
        if named:
            bert.name = side
        # Other weights than those of the first.
        if side == "right":
            for variable in bert.trainable_variables:
                variable.assign(0.9 * to_numpy(variable))
        mine = {
            name: keras.Input((6,), dtype="int32", name=f"{side}_{name}")
            for name in ("token_ids", "segment_ids", "padding_mask")
        }
        inputs |= {x.name: x for x in mine.values()}
        outputs.append(bert(mine)["pooled_output"])
    keras.utils.set_random_seed(8)
    x = layers.Concatenate()(outputs)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def two_encoders(named=True):
    inputs = keras.Input((WIDTH,))
    sides = [
        encoder(seed, name=side if named else None)
        for seed, side in enumerate(("left", "right"))
    ]
    keras.utils.set_random_seed(8)
    x = layers.Concatenate()([side(inputs) for side in sides])
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def two_sequentials(named=True):
    inputs = keras.Input((WIDTH,))
    keras.utils.set_random_seed(8)
    sides = [
        keras.Sequential(
            [layers.Dense(WIDTH, name=name) for name in NAMES], name=side
        )
        for side in ("left", "right")
    ]
    x = layers.Concatenate()([side(inputs) for side in sides])
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


TWINS = {
    "backbones": two_backbones,
    "named_backbones": lambda: two_backbones(named=True),
    "encoders": two_encoders,
    "sequentials": two_sequentials,
}


def inputs_of(model, rng):
    def fill(x):
        if "int" not in x.dtype:
            return batch(rng)
        if "mask" in x.name:
            return np.ones((4, 6), "int32")
        high = 2 if "segment" in x.name else 50
        return rng.integers(0, high, (4, 6)).astype("int32")

    return keras.tree.map_structure(fill, model.input)


def converted_twins(kind, **arguments):
    model = TWINS[kind]()
    with collected_warnings():
        made = enable_srlora(
            model, 2, target_rank=6, recipe="paper", **arguments
        )
    nudge(made)
    return model


@pytest.mark.parametrize("include_trainable", [False, True])
@pytest.mark.parametrize("kind", TWINS)
def test_an_adapter_of_two_equal_parts_is_saved_and_loaded(
    kind, include_trainable, rng, tmp_path
):
    model = converted_twins(kind)
    x = inputs_of(model, rng)
    with collected_warnings():
        keras_srlora.save_adapter(
            model, tmp_path / "a.safetensors", include_trainable
        )
        fresh = TWINS[kind]()
        assert differ(called(fresh, x), called(model, x), 1e-3)
        loaded = keras_srlora.load_adapter(fresh, tmp_path / "a.safetensors")
    assert len(loaded) == len(keras_srlora.initialize_factors(model))
    assert_close(called(fresh, x), called(model, x))


@pytest.mark.parametrize("kind", TWINS)
def test_directions_of_two_equal_parts_are_kept(
    kind, rng, tmp_path, monkeypatch
):
    path = tmp_path / "d.safetensors"
    first = converted_twins(kind, directions=path)
    size = path.stat().st_size
    written = path.read_bytes()
    second = converted_twins(kind, directions=path)
    # Read, and nothing added.
    assert path.stat().st_size == size and path.read_bytes() == written
    x = inputs_of(first, rng)
    assert_close(called(second, x), called(first, x))


def test_modules_of_two_equal_parts_are_told_apart(rng, tmp_path):
    model = converted_twins("encoders")
    found = {v.path for v in model.trainable_variables}
    modules = {
        f"{side}/{name}": f"{side}.{name}"
        for side in ("left", "right")
        for name in NAMES
    }
    assert found
    keras_srlora.export_peft(model, tmp_path / "peft", modules=modules)
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(modules.values())


# A layer of one of two equal parts that is trained whole.

SAVED = {
    "backbones": ("bert_backbone_1/.*position_embedding", "position_embedding"),
    "encoders": ("right/second", "second"),
}


def converted_with_module(kind, inner):
    """Twins, with a module of the second; converted alone or in a whole."""
    model = TWINS[kind]()
    names, wanted = SAVED[kind]
    part = [x for x in model.layers if isinstance(x, keras.Model)][1]
    with collected_warnings():
        enable_srlora(
            part if inner else model,
            2,
            target_layer_names=["first"] if kind == "encoders" else None,
            recipe="paper",
            modules_to_save=[wanted if inner else names],
        )
    return model, part


def modules_of(model):
    """The variables that are trained and no factors, but for the head's."""
    return [
        v
        for v in model.trainable_variables
        if "lora" not in v.path and "head" not in v.path
    ]


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("kind", SAVED)
def test_a_saved_module_of_two_equal_parts_is_one(kind, inner, rng, tmp_path):
    model, part = converted_with_module(kind, inner)
    held = {id(v) for v in part.variables}
    found = modules_of(part if inner else model)
    assert found and all(id(v) in held for v in found)
    path = tmp_path / "a.safetensors"
    with collected_warnings() as messages:
        keras_srlora.save_adapter(model, path)
    # Of the part beside it, which was left as it was, others are trained.
    left_out = any("embedding" in m or "second" in m for m in messages)
    assert inner or not left_out
    with safe_open(path, "np") as file:
        others = [k for k in file.keys() if k.startswith("trainable/")]
    assert len(others) == len(found)
    for variable in found:
        variable.assign(to_numpy(variable) + 0.5)
    x = inputs_of(model, rng)
    fresh = TWINS[kind]()
    with collected_warnings():
        keras_srlora.save_adapter(model, path)
        keras_srlora.load_adapter(fresh, path)
    assert_close(called(fresh, x), called(model, x))
    assert inner or len(modules_of(fresh)) == len(found)
    # A file, and an adapter of the second part alone.
    model.save(tmp_path / "model.keras")
    with collected_warnings():
        loaded = keras.models.load_model(tmp_path / "model.keras")
        keras_srlora.save_adapter(loaded, path)
        keras_srlora.save_adapter(part, path)
    with safe_open(path, "np") as file:
        others = [k for k in file.keys() if k.startswith("trainable/")]
    assert len(others) == len(found)


def test_one_of_two_equal_parts_is_converted(rng):
    model = two_encoders()
    converted = enable_srlora(
        model, 2, target_layer_names=["left/.*"], rank_pattern={"left/first": 3}
    )
    inside = {id(layer) for layer in model.get_layer("left").layers}
    assert len(converted) == 2
    assert all(id(layer) in inside for layer in converted)
    assert {layer.name: layer.rank for layer in converted} == {
        "first": 3,
        "second": 2,
    }


def test_an_adapter_of_a_model_without_twins_is_for_the_inner_model_too(
    rng, tmp_path
):
    """Saved from the whole, loaded into the backbone, and the other way."""
    x, inner = batch(rng), encoder(name="encoder")
    outer = keras.Sequential([inner, layers.Dense(3, name="head")])
    outer.build((None, WIDTH))
    nudge(convert(outer))
    with collected_warnings():
        keras_srlora.save_adapter(outer, tmp_path / "outer.safetensors")
        keras_srlora.save_adapter(inner, tmp_path / "inner.safetensors")
    for name in ("outer", "inner"):
        fresh = encoder(name="encoder")
        with collected_warnings():
            keras_srlora.load_adapter(fresh, tmp_path / f"{name}.safetensors")
        assert_close(called(fresh, x), called(inner, x))


def test_callbacks_record_twins_under_different_names(rng):
    model = converted_twins("encoders")
    model.compile("adam", "mse")
    callback = keras_srlora.RecompositionCallback(interval=1)
    x, y = batch(rng, 16), batch(rng, 16, 3)
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[callback])
    assert len({event.layer for event in callback.events}) == 4


# Presets.


def saves_without_preprocessor(hub, folder):
    """Older releases of KerasHub save no task without one."""
    plain = tiny_bert(num_layers=1, dropout=0.0)
    task = hub.models.BertTextClassifier(backbone=plain, num_classes=3)
    try:
        task.save_to_preset(str(folder))
    except AttributeError:
        return False
    return True


@pytest.mark.parametrize("part", ["backbone", "task", "backbone_of_task"])
def test_a_converted_model_writes_no_preset(part, rng, tmp_path):
    hub = pytest.importorskip("keras_hub")
    bert = tiny_bert(num_layers=1, dropout=0.0)
    model = bert
    if part != "backbone":
        task = hub.models.BertTextClassifier(backbone=bert, num_classes=3)
        model = task if part == "task" else task.backbone
    with collected_warnings():
        nudge(enable_srlora(task if part != "backbone" else bert, 2))
    folder = tmp_path / "preset"
    with pytest.raises(ValueError, match="merge_srlora") as caught:
        model.save_to_preset(str(folder))
    assert "save_adapter" in str(caught.value)
    assert not folder.exists() or list(folder.iterdir()) == []
    if part == "task" and not saves_without_preprocessor(
        hub, tmp_path / "plain"
    ):
        return
    # Afterwards it works, and stock KerasHub reads it.
    expected = bert_outputs(bert)
    with collected_warnings():
        keras_srlora.merge_srlora(task if part != "backbone" else bert)
    model.save_to_preset(str(folder))
    loaded = hub.models.BertBackbone.from_preset(str(folder))
    assert_close(bert_outputs(loaded), expected)


def test_a_task_around_a_converted_backbone_writes_no_preset(tmp_path):
    hub = pytest.importorskip("keras_hub")
    bert = tiny_bert(num_layers=1, dropout=0.0)
    enable_srlora(bert, 2)
    task = hub.models.BertTextClassifier(backbone=bert, num_classes=3)
    folder = tmp_path / "preset"
    with pytest.raises(ValueError, match="merge_srlora"):
        task.save_to_preset(str(folder))
    assert list(folder.iterdir()) == []
    # Its own file is another matter.
    task.save(tmp_path / "task.keras")
    if not saves_without_preprocessor(hub, tmp_path / "plain"):
        return
    keras_srlora.merge_srlora(task)
    task.save_to_preset(str(folder))
    loaded = hub.models.BertTextClassifier.from_preset(str(folder))
    assert_close(bert_outputs(loaded.backbone), bert_outputs(bert))


def test_kerashubs_own_lora_file_of_a_converted_backbone_is_refused(tmp_path):
    """It would hold nothing: the factors are not Keras's."""
    pytest.importorskip("keras_hub")
    bert = tiny_bert(num_layers=1)
    enable_srlora(bert, 2)
    path = tmp_path / "a.lora.h5"
    with pytest.raises(ValueError):
        bert.save_lora_weights(str(path))
    assert not path.exists()


# Weights without the record that belongs to them.


def cloned():
    model = tuned_encoder()
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    return model, clone


def layer_by_layer():
    model = tuned_encoder()
    clone = keras.models.clone_model(model)
    for name in NAMES:
        clone.get_layer(name).set_weights(model.get_layer(name).get_weights())
    return model, clone


def assigned():
    model = tuned_encoder()
    clone = keras.models.clone_model(model)
    for a, b in zip(clone.variables, model.variables):
        a.assign(to_numpy(b))
    return model, clone


def weights_of_another_model():
    """Converted in the same way, of other pretrained weights."""
    model, other = tuned_encoder(seed=8), tuned_encoder(seed=7)
    other.set_weights(model.get_weights())
    return model, other


def weights_of_another_recipe():
    """The kernel is another one: directions were subtracted from it."""
    model, other = tuned_encoder("paper"), tuned_encoder("adaptive")
    other.set_weights(model.get_weights())
    return model, other


WITHOUT_A_RECORD = {
    "cloned": cloned,
    "layer_by_layer": layer_by_layer,
    "assigned": assigned,
    "of_another_model": weights_of_another_model,
    "of_another_recipe": weights_of_another_recipe,
}


def disable(model, folder):
    with keras_srlora.adapter_disabled(model):
        pass


MODULES = {"first": "one", "second": "two"}
NEEDS_THE_RECORD = {
    "adapter_disabled": disable,
    "export_lora": lambda m, f: keras_srlora.export_lora(m, f / "a.lora.h5"),
    "export_peft": lambda m, f: keras_srlora.export_peft(
        m, f / "peft", modules=MODULES
    ),
    "save_adapter": lambda m, f: keras_srlora.save_adapter(
        m, f / "a.safetensors"
    ),
    "unload_srlora": lambda m, f: keras_srlora.unload_srlora(m),
}


@pytest.mark.parametrize("function", NEEDS_THE_RECORD)
@pytest.mark.parametrize("way", WITHOUT_A_RECORD)
def test_weights_without_their_record_are_refused(way, function, rng, tmp_path):
    model, other = WITHOUT_A_RECORD[way]()
    x = batch(rng)
    assert_close(called(other, x), called(model, x))
    before = state_of(other)
    with pytest.raises(ValueError, match="first"):
        NEEDS_THE_RECORD[function](other, tmp_path)
    assert_unchanged(other, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", WITHOUT_A_RECORD)
def test_weights_without_their_record_can_be_merged(way, rng):
    """What a layer computes needs no record."""
    model, other = WITHOUT_A_RECORD[way]()
    x = batch(rng)
    expected = called(model, x)
    with contextlib.suppress(ValueError):
        keras_srlora.merge_srlora(other)
    assert_close(called(other, x), expected)


@pytest.mark.parametrize("how", ["fit", "initialize_factors"])
def test_weights_without_their_record_that_are_decomposed_are_told(how, rng):
    """Their update goes into the kernel, which counts as pretrained then."""
    model, clone = cloned()
    x = batch(rng)
    with pytest.warns(UserWarning, match="trained factors and no record"):
        if how == "initialize_factors":
            keras_srlora.initialize_factors(clone)
        else:
            clone.compile(keras.optimizers.SGD(0.0), "mse")
            callback = keras_srlora.RecompositionCallback(interval=9)
            clone.fit(x, x, epochs=10, verbose=0, callbacks=[callback])
    assert_close(called(clone, x), called(model, x))
    with keras_srlora.adapter_disabled(clone):
        assert_close(called(clone, x), called(model, x))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_has_the_record(way, rng, tmp_path):
    model, x = tuned_encoder(), batch(rng)
    reference = encoder()
    other = (
        copy.deepcopy(model)
        if way == "deepcopy"
        else pickle.loads(pickle.dumps(model))
    )
    assert_close(called(other, x), called(model, x))
    with keras_srlora.adapter_disabled(other):
        assert_close(called(other, x), called(reference, x))
    keras_srlora.save_adapter(other, tmp_path / "a.safetensors")
    keras_srlora.load_adapter(reference, tmp_path / "a.safetensors")
    assert_close(called(reference, x), called(model, x))


# Automatic names.


def unnamed():
    keras.utils.set_random_seed(7)
    inputs = keras.Input((WIDTH,))
    x = layers.Dense(WIDTH, "tanh")(inputs)
    x = layers.Dense(WIDTH, "tanh")(x)
    return keras.Model(inputs, layers.Dense(3)(x))


@pytest.mark.parametrize("how", ["functional", "srlora_layers", "encoder"])
def test_automatic_names_of_a_rebuilt_model_are_explained(how, tmp_path):
    def make():
        if how == "functional":
            return unnamed()
        if how == "encoder":
            inner = unnamed()
            return keras.Model(inner.input, layers.Dense(3)(inner.output))
        keras.utils.set_random_seed(7)
        return keras.Sequential(
            [
                keras.Input((WIDTH,)),
                keras_srlora.SRLoRADense(WIDTH, rank=2),
                layers.Dense(3),
            ]
        )

    model = make()
    if how == "srlora_layers":
        keras_srlora.initialize_factors(model)
    else:
        enable_srlora(model, 2)
    with collected_warnings():
        keras_srlora.save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError) as caught:
        keras_srlora.load_adapter(make(), tmp_path / "a.safetensors")
    message = str(caught.value).replace(str(tmp_path), "")
    assert "automatic" in message
    assert "clear_session" in message or "name=" in message


def test_automatic_names_of_a_trained_head_are_explained(tmp_path):
    def make():
        return keras.Model(
            (inner := encoder()).input, layers.Dense(3)(inner.output)
        )

    model = make()
    convert(model)
    path = tmp_path / "a.safetensors"
    keras_srlora.save_adapter(model, path, include_trainable=True)
    with pytest.raises(ValueError) as caught:
        keras_srlora.load_adapter(make(), path)
    assert "automatic" in str(caught.value).replace(str(tmp_path), "")
