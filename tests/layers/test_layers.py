"""The two layers as Keras layers."""

import warnings

import keras
import numpy as np
import pytest
from support import dense_layer
from support import effective
from support import matrix
from support import to_numpy
from support import two_layer_model

import keras_srlora
from keras_srlora import SRLoRADense
from keras_srlora import SRLoRAEinsumDense
from keras_srlora.layers import pairs

LAYERS = [
    (SRLoRADense, {"units": 6}, (2, 8)),
    (
        SRLoRADense,
        {
            "units": 6,
            "activation": "relu",
            "use_bias": False,
            "lora_alpha": 4,
            "recipe": "lora_restarts",
        },
        (2, 3, 8),
    ),
    (
        SRLoRAEinsumDense,
        {"equation": "abc,cde->abde", "output_shape": (None, 2, 3)},
        (2, 5, 8),
    ),
    (
        SRLoRAEinsumDense,
        {
            "equation": "btd,ndh->btnh",
            "output_shape": (None, 2, 3),
            "bias_axes": "nh",
            "activation": "relu",
        },
        (2, 5, 8),
    ),
]


@pytest.mark.parametrize("cls, kwargs, shape", LAYERS)
def test_passes_the_layer_checks_of_keras(cls, kwargs, shape):
    testing = pytest.importorskip("keras.src.testing")
    bias = kwargs.get("use_bias", cls is SRLoRADense) or "bias_axes" in kwargs
    # JAX on a CPU has no float16 product; the check is Keras's, not ours.
    testing.TestCase("run_layer_test").run_layer_test(
        cls,
        init_kwargs={**kwargs, "rank": 2},
        input_shape=shape,
        expected_num_trainable_weights=3 if bias else 2,
        expected_num_non_trainable_weights=1,
        expected_num_seed_generators=0,
        expected_num_losses=0,
        supports_masking=cls is SRLoRADense,
        run_mixed_precision_check=keras.backend.backend() != "jax",
    )


@pytest.mark.parametrize("cls, kwargs, shape", LAYERS)
def test_config_round_trip(cls, kwargs, shape):
    layer = cls(**kwargs, rank=3, target_rank=5, name="some_name")
    config = layer.get_config()
    assert config["rank"] == 3 and config["target_rank"] == 5
    copy = cls.from_config(config)
    assert copy.get_config() == config


def test_arguments_of_dense_keep_their_meaning(rng):
    x = rng.standard_normal((4, 8)).astype("float32")
    arguments = dict(
        units=6,
        activation="tanh",
        kernel_initializer=keras.initializers.RandomNormal(seed=1),
        bias_initializer=keras.initializers.RandomNormal(seed=2),
        bias_regularizer="l2",
        bias_constraint="non_neg",
        activity_regularizer="l1",
    )
    ours, plain = (
        SRLoRADense(**arguments, rank=2),
        keras.layers.Dense(**arguments),
    )
    np.testing.assert_allclose(to_numpy(ours(x)), to_numpy(plain(x)), atol=1e-6)
    np.testing.assert_allclose(
        to_numpy(sum(ours.losses)), to_numpy(sum(plain.losses)), rtol=1e-6
    )
    assert ours.bias.constraint is not None


def test_kernel_regularizer_acts_on_the_factors():
    layer = SRLoRADense(6, rank=2, kernel_regularizer="l2")
    layer.build((None, 8))
    a, b = pairs.factors_to_numpy(layer)
    expected = 0.01 * (np.sum(a**2) + np.sum(b**2))
    np.testing.assert_allclose(to_numpy(sum(layer.losses)), expected, rtol=1e-5)


def test_default_names_are_readable():
    first, second = SRLoRADense(3), SRLoRADense(3)
    assert first.name.startswith("srlora_dense")
    assert first.name != second.name
    assert SRLoRAEinsumDense("ab,bc->ac", 3).name.startswith(
        "srlora_einsum_dense"
    )


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"rank": 0}, "`rank` must be a positive integer"),
        ({"rank": -1}, "`rank` must be a positive integer"),
        ({"rank": 1.5}, "`rank` must be a positive integer"),
        ({"rank": True}, "`rank` must be a positive integer"),
        ({"rank": 4, "target_rank": 3}, "`target_rank`"),
        ({"target_rank": 8.5}, "`target_rank`"),
        ({"lora_alpha": 0}, "`lora_alpha`"),
        ({"lora_alpha": float("nan")}, "`lora_alpha`"),
        ({"lora_alpha": "8"}, "`lora_alpha`"),
        ({"recipe": "zero"}, "`recipe` must be one of"),
        ({"recipe": None}, "`recipe` must be one of"),
        ({"decomposition": "qr"}, "`decomposition` must be one of"),
        ({"lora_rank": 4}, "takes `rank`"),
        ({"kernel_constraint": "non_neg"}, "kernel_constraint"),
    ],
)
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        SRLoRADense(16, **kwargs)
    assert "Received" in str(error.value)


def test_rank_above_the_kernel_is_refused_when_built():
    layer = SRLoRADense(3, rank=4, name="small")
    with pytest.raises(ValueError, match="small.*8 x 3.*at most 3"):
        layer.build((None, 8))


def test_target_rank_is_capped_by_the_kernel():
    layer = SRLoRADense(20, rank=2, target_rank=50)
    layer.build((None, 9))
    assert layer.direction_count == 9
    layer = SRLoRADense(20, rank=2)
    layer.build((None, 90))
    assert layer.direction_count == 16


@pytest.mark.parametrize("switch", ["layer", "model"])
def test_trainable_does_not_unfreeze_the_kernel(switch, rng):
    model = two_layer_model(rng)
    layer = model.get_layer("hidden")
    part = {"layer": layer, "model": model}[switch]
    part.trainable = False
    assert not layer.trainable_variables
    part.trainable = True
    names = sorted(v.name for v in layer.trainable_variables)
    assert names == ["bias", "lora_kernel_a", "lora_kernel_b"]


def test_quantizing_and_keras_lora_are_refused():
    layer = dense_layer(np.eye(8, dtype="float32"), rank=2)
    with pytest.raises(ValueError, match="cannot be quantized"):
        layer.quantize("int8")
    with pytest.raises(ValueError, match="factors of its own"):
        layer.enable_lora(2)


# Initialisation waits for the weights.


def pretrained_model(rng):
    inputs = keras.Input((12,))
    x = keras.layers.Dense(16, activation="tanh", name="hidden")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    model.get_layer("hidden").kernel.assign(matrix("gaussian", 12, 16, rng))
    return model


def by_load_weights(model, pretrained, folder):
    path = str(folder / "pretrained.weights.h5")
    pretrained.save_weights(path)
    keras_srlora.load_plain_weights(model, path)


def by_load_weights_of_an_equal_model(model, pretrained, folder):
    equal = two_layer_model(np.random.default_rng(1))
    by_assign(equal, pretrained, folder)
    path = str(folder / "equal.weights.h5")
    equal.save_weights(path)
    model.load_weights(path)


def by_layer_set_weights(model, pretrained, folder):
    for name in ("hidden", "head"):
        model.get_layer(name).set_weights(
            pretrained.get_layer(name).get_weights()
        )


def by_assign(model, pretrained, folder):
    for name in ("hidden", "head"):
        for attribute in ("kernel", "bias"):
            source = getattr(pretrained.get_layer(name), attribute)
            target = getattr(model.get_layer(name), attribute)
            if (name, attribute) == ("hidden", "kernel"):
                target = model.get_layer(name).frozen.variable
            target.assign(to_numpy(source))


def by_model_set_weights(model, pretrained, folder):
    values = {v.path: to_numpy(v) for v in pretrained.weights}
    model.set_weights([values.get(v.path, to_numpy(v)) for v in model.weights])


@pytest.mark.parametrize("already_initialized", [False, True])
@pytest.mark.parametrize(
    "load",
    [
        by_load_weights,
        by_load_weights_of_an_equal_model,
        by_layer_set_weights,
        by_assign,
        by_model_set_weights,
    ],
)
def test_the_weights_that_were_loaded_are_decomposed(
    load, already_initialized, tmp_path, rng
):
    pretrained = pretrained_model(rng)
    model = two_layer_model(rng)
    if already_initialized:
        if load in (by_assign, by_model_set_weights):
            pytest.skip("noticed by find_record, see below")
        keras_srlora.initialize_factors(model)
    load(model, pretrained, tmp_path)
    x = rng.standard_normal((5, 12)).astype("float32")
    expected = to_numpy(pretrained(x))
    np.testing.assert_allclose(to_numpy(model(x)), expected, atol=1e-5)
    layer = model.get_layer("hidden")
    assert not layer.initialized
    keras_srlora.initialize_factors(model)
    np.testing.assert_allclose(to_numpy(model(x)), expected, atol=1e-5)
    s = np.linalg.svd(
        to_numpy(pretrained.get_layer("hidden").kernel), compute_uv=False
    )
    found = layer.record.directions
    np.testing.assert_allclose(found.singular_values, s, rtol=1e-4)


def test_fit_decomposes_what_was_loaded(tmp_path, rng):
    pretrained = pretrained_model(rng)
    model = two_layer_model(rng)
    by_load_weights(model, pretrained, tmp_path)
    model.compile("sgd", "mse")
    x = rng.standard_normal((8, 12)).astype("float32")
    model.fit(
        x,
        np.zeros((8, 3)),
        verbose=0,
        callbacks=[keras_srlora.RecompositionCallback()],
        batch_size=1,
        epochs=2,
    )
    found = model.get_layer("hidden").record.directions
    s = np.linalg.svd(
        to_numpy(pretrained.get_layer("hidden").kernel), compute_uv=False
    )
    np.testing.assert_allclose(found.singular_values, s, rtol=1e-4)


def test_weights_of_another_rank_are_refused(tmp_path, rng):
    path = str(tmp_path / "a.weights.h5")
    two_layer_model(rng, rank=4).save_weights(path)
    model = two_layer_model(rng, rank=2)
    # Keras goes on to the other layers before it raises; ours is untouched.
    variables = model.get_layer("hidden").variables
    before = [to_numpy(v) for v in variables]
    with (
        pytest.raises(ValueError, match="has rank 2"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # Keras: "Skipping nested container"
        model.load_weights(path)
    for old, new in zip(before, variables):
        np.testing.assert_array_equal(old, to_numpy(new))


def test_merging_weights_into_a_plain_layer_says_what_is_wrong(tmp_path, rng):
    path = str(tmp_path / "a.weights.h5")
    two_layer_model(rng).save_weights(path)
    with (
        pytest.raises(ValueError, match="could not be loaded"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # Keras: "Skipping nested container"
        pretrained_model(rng).load_weights(path)


def test_a_plain_file_says_how_it_is_loaded(tmp_path, rng):
    path = str(tmp_path / "a.weights.h5")
    pretrained_model(rng).save_weights(path)
    with (
        pytest.raises(ValueError, match="load_plain_weights"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # Keras: "Skipping nested container"
        two_layer_model(rng).load_weights(path)


# Kinds of models.


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = SRLoRADense(16, rank=4)
        self.head = keras.layers.Dense(3)

    def call(self, x):
        return self.head(self.hidden(x))


def sequential():
    return keras.Sequential(
        [keras.Input((12,)), SRLoRADense(16, rank=4), keras.layers.Dense(3)]
    )


@pytest.mark.parametrize("make", ["functional", "sequential", "subclassed"])
def test_trains_in_every_kind_of_model(make, rng):
    model = {
        "functional": lambda: two_layer_model(rng),
        "sequential": sequential,
        "subclassed": Subclassed,
    }[make]()
    x = rng.standard_normal((32, 12)).astype("float32")
    model(x)
    model.compile("adam", "mse")
    callback = keras_srlora.RecompositionCallback(interval=3)
    history = model.fit(
        x, x[:, :3], batch_size=8, epochs=3, verbose=0, callbacks=[callback]
    )
    assert history.history["loss"][-1] < history.history["loss"][0]
    assert {event.step for event in callback.events} == {3, 6, 9}


def test_clone_model_has_the_layer_and_its_arguments(rng):
    model = two_layer_model(rng, target_rank=6)
    clone = keras.models.clone_model(model)
    layer = clone.get_layer("hidden")
    assert isinstance(layer, SRLoRADense) and layer.target_rank == 6
    clone.set_weights(model.get_weights())
    x = rng.standard_normal((5, 12)).astype("float32")
    np.testing.assert_allclose(
        to_numpy(clone(x)), to_numpy(model(x)), atol=1e-6
    )


def test_effective_kernel_has_the_kernels_shape(rng):
    layer = SRLoRAEinsumDense("btd,ndh->btnh", (None, 2, 3), rank=2)
    layer.build((2, 5, 8))
    assert effective(layer).shape == (2, 8, 3)
