"""A `.keras` file of a converted model, read where nobody converted it."""

import keras
import numpy as np
import pytest
from processes import Child
from processes import run_code
from support import OF_OTHERS
from support import tiny_bert
from support import to_numpy

import keras_srlora
from keras_srlora.conversion import containers

# The other process has this data and nothing else.
DATA = """
import numpy as np
ids = np.random.default_rng(0).integers(0, 50, (16, 6))
x = {"token_ids": ids, "segment_ids": 0 * ids, "padding_mask": 0 * ids + 1}
y = ids.sum(axis=1) % 2
"""
TRAIN_ON = (
    DATA
    + """
import sys
import keras
import keras_srlora
for path in sys.argv[1:]:
    model = keras.saving.load_model(path)
    callback = keras_srlora.RecompositionCallback(interval=3)
    model.fit(
        x, y, batch_size=2, epochs=2, initial_epoch=1, verbose=0,
        shuffle=False, callbacks=[callback],
    )
    assert len(callback.events) > 6, path
    variables = [*model.variables, *model.optimizer.variables]
    arrays = [keras.ops.convert_to_numpy(v) for v in variables]
    np.savez(path + ".npz", *arrays, names=[v.name for v in variables])
"""
)
LOAD_ONLY = """
import sys
import keras
keras.saving.load_model(sys.argv[1])
"""


WARNINGS_ARE_ERRORS = f"""
import warnings
warnings.simplefilter("error", UserWarning)
warnings.filterwarnings("ignore", {OF_OTHERS!r})
"""


def elsewhere(code, *arguments, folder):
    """Runs code in another process, which imported nothing of this package."""
    arguments = [str(argument) for argument in arguments]
    return Child(run_code, (code, arguments), folder / "log.txt")


def head(features):
    return keras.layers.Dense(2, name="head")(features)


def backbone_then_outer():
    """The outer model holds the composite layers themselves."""
    bert = tiny_bert()
    keras_srlora.enable_srlora(bert, rank=2, recipe="paper")
    return keras.Model(bert.input, head(bert.output["pooled_output"]))


def backbone_as_a_layer():
    bert = tiny_bert()
    keras_srlora.enable_srlora(bert, rank=2, recipe="paper")
    return keras.Model(bert.input, head(bert(bert.input)["pooled_output"]))


def outer_model():
    bert = tiny_bert()
    model = keras.Model(bert.input, head(bert.output["pooled_output"]))
    keras_srlora.enable_srlora(model, rank=2, lora_alpha=4, recipe="paper")
    return model


def task():
    """Whose `compile` is its own."""
    import keras_hub

    model = keras_hub.models.BertTextClassifier(
        tiny_bert(), num_classes=2, preprocessor=None
    )
    keras_srlora.enable_srlora(model, rank=2, recipe="paper")
    return model


def composite_of_keras():
    """Attention of Keras in a functional model; a norm thawed by hand."""
    ids = keras.Input((6,), name="token_ids", dtype="int32")
    others = {
        name: keras.Input((6,), name=name, dtype="int32")
        for name in ("segment_ids", "padding_mask")
    }
    x = keras.layers.Embedding(50, 16, name="embedding")(ids)
    segments = keras.layers.Embedding(2, 16, name="segment_embedding")
    x = keras.layers.Add()([x, segments(others["segment_ids"])])
    x = keras.layers.MultiHeadAttention(2, 8, name="attention")(x, x)
    x = keras.layers.LayerNormalization(name="norm")(x)
    # Keras 3.13 refuses inputs that are not used.
    pooling = keras.layers.GlobalAveragePooling1D()
    x = pooling(x, mask=others["padding_mask"])
    model = keras.Model({"token_ids": ids, **others}, head(x))
    keras_srlora.enable_srlora(model, rank=2, recipe="paper")
    model.get_layer("norm").trainable = True
    return model


def trained(make):
    keras.utils.set_random_seed(1)
    model = make()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss)
    fit(model, epochs=1)
    return model


def fit(model, **kwargs):
    names = {}
    exec(DATA, names)
    model.fit(
        names["x"],
        names["y"],
        batch_size=2,
        verbose=0,
        shuffle=False,
        callbacks=[keras_srlora.RecompositionCallback(interval=3)],
        **kwargs,
    )


WAYS = [
    backbone_then_outer,
    backbone_as_a_layer,
    outer_model,
    task,
    composite_of_keras,
]


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory):
    """`{make: (model, arrays)}`: trained on here, and from its file elsewhere.

    One process for all files: most of its time is imports.
    """
    folder = tmp_path_factory.mktemp("files")
    models, paths = {}, {}
    for make in WAYS:
        models[make] = trained(make)
        paths[make] = folder / f"{make.__name__}.keras"
        models[make].save(paths[make])
        # At once: on torch all draw from one generator.
        fit(models[make], epochs=2, initial_epoch=1)
    code = WARNINGS_ARE_ERRORS + TRAIN_ON
    elsewhere(code, *paths.values(), folder=folder).assert_ends()
    return {
        make: (model, np.load(f"{paths[make]}.npz"))
        for make, model in models.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("make", WAYS)
def test_trains_on_in_another_process(make, trained_on):
    model, loaded = trained_on[make]
    variables = [*model.variables, *model.optimizer.variables]
    assert list(loaded["names"]) == [v.name for v in variables]
    for i, variable in enumerate(variables):
        np.testing.assert_array_equal(
            loaded[f"arr_{i}"], to_numpy(variable), variable.path
        )


@pytest.mark.slow
def test_a_process_without_the_package_says_what_is_missing(tmp_path):
    trained(outer_model).save(tmp_path / "model.keras")
    code = WARNINGS_ARE_ERRORS + LOAD_ONLY
    child = elsewhere(code, tmp_path / "model.keras", folder=tmp_path)
    printed = child.assert_ends(1)
    assert "keras_srlora" in printed
    assert "make sure they are all imported" in printed


def test_everything_is_as_frozen_as_it_was(tmp_path):
    model = trained(composite_of_keras)
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    names = [v.path for v in model.trainable_variables]
    assert [v.path for v in loaded.trainable_variables] == names
    assert "norm/gamma" in names and "attention/query/kernel" not in names
    types = [type(layer).__name__ for layer in model._flatten_layers()]
    assert [type(x).__name__ for x in loaded._flatten_layers()] == types


@pytest.mark.slow
def test_a_merged_model_needs_no_package_to_be_read(tmp_path):
    model = trained(task)
    keras_srlora.merge_srlora(model)
    model.save(tmp_path / "model.keras")
    code = (
        f"import keras_hub{LOAD_ONLY}assert 'keras_srlora' not in sys.modules"
    )
    # Keras does not compile a task that it loads, and says so.
    child = elsewhere(code, tmp_path / "model.keras", folder=tmp_path)
    child.assert_ends()


def test_presets_are_read_as_before():
    """KerasHub looks for its classes among those that Keras knows."""
    import keras_hub

    trained(task)
    found = [
        cls
        for cls in keras.saving.get_custom_objects().values()
        if isinstance(cls, type) and issubclass(cls, keras_hub.models.Backbone)
    ]
    converted = containers.Converted
    name = "keras_srlora>Converted"
    assert keras.saving.get_registered_object(name) is converted
    assert found and not any(issubclass(cls, converted) for cls in found)


def test_a_class_that_has_changed_is_noticed(tmp_path):
    config = tiny_converted_config()
    config["adapted"].append({"place": 10**6, "arguments": {"rank": 2}})
    with pytest.raises(ValueError, match="the class is another one"):
        containers.Converted.from_config(config)


def tiny_converted_config():
    bert = tiny_bert()
    keras_srlora.enable_srlora(bert, rank=2)
    return bert.get_config()


@keras.saving.register_keras_serializable("keras_srlora_tests")
class MakesItsInside(keras.Model):
    """A subclassed model; its file does not list what is inside of it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.encoder = keras.Sequential(
            [
                keras.layers.Dense(8, "tanh", name="one"),
                keras.layers.Dense(8, "tanh", name="two"),
            ]
        )
        self.head = keras.layers.Dense(3, name="head")

    def call(self, inputs):
        return self.head(self.encoder(inputs))


def tuned_inside(x, recipe="paper"):
    """A model whose encoder alone was converted, and its layers."""
    model = MakesItsInside()
    pretrained = to_numpy(model(x))
    layers = keras_srlora.enable_srlora(
        model.encoder, 2, target_layer_names=["one", "two"], recipe=recipe
    )
    for layer in layers:
        layer.lora_kernel_b.assign_add(np.ones(layer.lora_kernel_b.shape))
    return model, layers, pretrained


def assert_computes(model, x, expected):
    np.testing.assert_allclose(to_numpy(model(x)), expected, atol=1e-5)


@pytest.fixture
def x(rng):
    return rng.standard_normal((4, 8)).astype("float32")


@pytest.mark.parametrize("back", ["merge_srlora", "unload_srlora"])
def test_what_is_around_a_converted_model_is_saved_with_it(back, x, tmp_path):
    model, _, _ = tuned_inside(x)
    model.save(tmp_path / "converted.keras")
    loaded = keras.models.load_model(tmp_path / "converted.keras")
    assert_computes(loaded, x, to_numpy(model(x)))
    getattr(keras_srlora, back)(model.encoder)
    assert type(model) is MakesItsInside
    model.save(tmp_path / "plain.keras")
    loaded = keras.models.load_model(tmp_path / "plain.keras")
    assert type(loaded) is MakesItsInside
    assert_computes(loaded, x, to_numpy(model(x)))


def test_a_file_saved_while_switched_off_holds_the_pretrained_model(
    x, tmp_path
):
    model, _, pretrained = tuned_inside(x)
    tuned = to_numpy(model(x))
    with keras_srlora.adapter_disabled(model):
        model.save(tmp_path / "model.keras")
        model.save_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(to_numpy(model(x)), tuned)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    model.load_weights(tmp_path / "model.weights.h5")
    for other in (loaded, model):
        assert_computes(other, x, pretrained)
        with keras_srlora.adapter_disabled(other):
            assert_computes(other, x, pretrained)


@pytest.mark.parametrize("recipe", ["adaptive", "paper"])
def test_a_kernel_is_decomposed_with_what_its_factors_learnt(recipe, x):
    """Afterwards that is the pretrained one, and nothing is learnt."""
    model, layers, _ = tuned_inside(x, recipe)
    tuned = to_numpy(model(x))
    for layer in layers:
        layer.initialize_factors()
    assert_computes(model, x, tuned)
    with keras_srlora.adapter_disabled(model):
        assert_computes(model, x, tuned)
    keras_srlora.unload_srlora(model)
    assert_computes(model, x, tuned)
