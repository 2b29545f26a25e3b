"""Files know layers by paths that loading and building again do not change."""

import keras
import numpy as np
import pytest
from pieces import batch
from pieces import called
from support import to_numpy

import keras_srlora
from keras_srlora import Recipe
from keras_srlora import RecompositionCallback
from keras_srlora.layers.find import srlora_layers
from keras_srlora.recipes.definition import RECIPES

ONE_GROUP = Recipe(
    **{
        **RECIPES["lora_restarts"].to_dict(),
        "steps_per_pair": 8,
        "stop": 1.0,
    }
)
IN_TURN = Recipe(
    **{
        **RECIPES["adaptive"].to_dict(),
        "turns": 3,
        "steps_per_pair": 9,
        "lives_per_run": 1,
        "predictions_per_pair": 1,
        "pair_life": 0.0,
    }
)


def nested(recipe=ONE_GROUP):
    """A `Sequential` inside of a functional model; paths sort otherwise."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((8,))
    inner = keras.Sequential(
        [keras.layers.Dense(8, name="a"), keras.layers.Dense(6, name="b")],
        name="in1",
    )
    x = keras.layers.Dense(7, name="c")(inner(inputs))
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    keras_srlora.enable_srlora(
        model,
        rank=2,
        target_rank=6,
        recipe=recipe,
        target_layer_names=["a", "b", "c"],
    )
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def automatic(recipe=ONE_GROUP):
    """Automatic names; `dense_10` sorts before `dense_9`."""
    keras.utils.set_random_seed(1)
    inputs = x = keras.Input((8,))
    for _ in range(3):
        x = keras.layers.Dense(8)(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    names = [layer.name for layer in model.layers[1:4]]
    keras_srlora.enable_srlora(
        model, 2, target_rank=6, recipe=recipe, target_layer_names=names
    )
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def train(model, path=None, epochs=6, **kwargs):
    """8 steps an epoch, the same batches; the steps of recompositions."""
    rng = np.random.default_rng(0)
    callbacks = [RecompositionCallback()]
    if path is not None:
        checkpoint = keras.callbacks.ModelCheckpoint(
            path, save_weights_only=str(path).endswith("weights.h5")
        )
        callbacks.insert(0, checkpoint)
    model.fit(
        batch(rng, 64),
        rng.standard_normal((64, 3)).astype("float32"),
        batch_size=8,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
        **kwargs,
    )
    events = callbacks[-1].events
    return [
        (event.step, event.layer.split("/")[-1])
        for event in events
        if event.step >= 24
    ]


def assert_same_weights(model, other):
    for value, expected in zip(model.get_weights(), other.get_weights()):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("recipe", [ONE_GROUP, IN_TURN])
def test_a_loaded_model_goes_on_with_the_run(recipe, tmp_path):
    whole = nested(recipe)
    expected = train(whole, tmp_path / "{epoch}.keras")
    assert expected
    loaded = keras.saving.load_model(tmp_path / "3.keras")
    assert train(loaded, initial_epoch=3) == expected
    assert_same_weights(loaded, whole)


@pytest.mark.parametrize("recipe", [ONE_GROUP, IN_TURN])
def test_automatic_names_do_not_change_a_run(recipe, tmp_path):
    keras.utils.clear_session()
    whole = automatic(recipe)
    expected = train(whole, tmp_path / "{epoch}.weights.h5")
    assert expected
    keras.utils.clear_session()
    for _ in range(8):
        keras.layers.Dense(1)
    other = automatic(recipe)
    paths = [layer.path for layer in srlora_layers(other)]
    assert paths != sorted(paths)
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "3.weights.h5")
    steps = [step for step, _ in train(other, initial_epoch=3)]
    assert steps == [step for step, _ in expected]


def test_a_run_that_is_missing_is_told():
    with pytest.warns(UserWarning, match="hold no run that could go on"):
        train(nested(), initial_epoch=3)


# A plain `Sequential`: its layers have its name in their paths, until it is
# loaded from a `.keras` file.


def sequential(name=None):
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(8, name="a"),
            keras.layers.LayerNormalization(name="norm"),
            keras.layers.Dense(8, name="b"),
            keras.layers.Dense(3, name="head"),
        ],
        name=name,
    )


def converted(name=None):
    model = sequential(name)
    keras_srlora.enable_srlora(
        model, 2, target_layer_names=["a"], modules_to_save=["norm"]
    )
    for layer in srlora_layers(model):
        layer.factors[1].assign(np.ones((2, 8)))
    return model


def reloaded(model, tmp_path):
    model.save(tmp_path / "model.keras")
    return keras.saving.load_model(tmp_path / "model.keras")


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize("onto_file", [False, True])
def test_an_adapter_fits_a_loaded_model(from_file, onto_file, rng, tmp_path):
    model = converted()
    if from_file:
        model = reloaded(model, tmp_path)
    path = tmp_path / "adapter.safetensors"
    keras_srlora.save_adapter(model, path, include_trainable=True)
    other = sequential("another")
    if onto_file:
        other = reloaded(other, tmp_path)
    keras_srlora.load_adapter(other, path)
    x = batch(rng)
    np.testing.assert_allclose(called(other, x), called(model, x), atol=1e-5)


def test_modules_to_save_outlive_a_file(tmp_path):
    model = reloaded(converted(), tmp_path)
    path = tmp_path / "adapter.safetensors"
    model.get_layer("norm").gamma.assign(np.full(8, 3.0))
    with pytest.warns(UserWarning, match="not saved"):
        keras_srlora.save_adapter(model, path)
    other = sequential()
    keras_srlora.load_adapter(other, path)
    assert (to_numpy(other.get_layer("norm").gamma) == 3).all()
    keras_srlora.enable_srlora(model, 2, target_layer_names=["b"])
    assert model.get_layer("norm").trainable_variables


def test_a_layer_may_be_called_trainable(rng, tmp_path):
    def build():
        keras.utils.set_random_seed(1)
        layers = [keras.Input((8,)), keras.layers.Dense(8, name="trainable")]
        return keras.Sequential([*layers, keras.layers.Dense(3, name="head")])

    model, path = build(), tmp_path / "adapter.safetensors"
    keras_srlora.enable_srlora(model, 2, target_layer_names=["trainable"])
    srlora_layers(model)[0].factors[1].assign(np.ones((2, 8)))
    model.get_layer("head").bias.assign(np.ones(3))
    keras_srlora.save_adapter(model, path, include_trainable=True)
    other = build()
    keras_srlora.load_adapter(other, path)
    x = batch(rng)
    np.testing.assert_allclose(called(other, x), called(model, x), atol=1e-5)


# Configs that a wrapper or a user has written into.


@keras.saving.register_keras_serializable("tests")
class DenseCell(keras.layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = self.state_size = units
        self.seen = keras.layers.Dense(units, name="seen")
        self.remembered = keras.layers.Dense(
            units, use_bias=False, name="remembered"
        )

    def build(self, shape):
        self.seen.build(shape)
        self.remembered.build((None, self.units))

    def call(self, x, states):
        y = keras.ops.tanh(self.seen(x) + self.remembered(states[0]))
        return y, [y]

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def bidirectional():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((5, 6))
    rnn = keras.layers.RNN(DenseCell(4, name="cell"), name="rnn")
    x = keras.layers.Bidirectional(rnn, name="bi")(inputs)
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(x))


def test_a_bidirectional_of_a_converted_cell_is_loaded(rng, tmp_path):
    model = bidirectional()
    names = ["seen", "remembered"]
    keras_srlora.enable_srlora(model, 2, target_layer_names=names)
    assert len(srlora_layers(model)) == 4
    for layer in srlora_layers(model):
        layer.factors[1].assign(rng.standard_normal((2, 4)))
    x = rng.standard_normal((3, 5, 6)).astype("float32")
    loaded = reloaded(model, tmp_path)
    np.testing.assert_allclose(called(loaded, x), called(model, x), atol=1e-6)


def test_a_config_can_be_changed():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4, 8))
    attention = keras.layers.MultiHeadAttention(2, 4, name="attention")
    model = keras.Model(inputs, attention(inputs, inputs))
    keras_srlora.enable_srlora(model, 2, target_layer_names=["query"])
    config = attention.get_config()
    config["name"] = "other"
    assert type(attention).from_config(config).name == "other"
