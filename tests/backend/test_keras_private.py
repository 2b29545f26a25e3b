"""The private Keras API that `keras_private` uses is what it was.

Where one of these fails after an update of Keras, the function of that name in
`keras_srlora/backend/keras_private/` has to be written anew.
"""

import re

import keras
import numpy as np
import pytest
from support import assert_same_variables
from support import to_numpy

from keras_srlora.backend.arguments import keras_version
from keras_srlora.backend.keras_private.fit_state import accumulated_gradient
from keras_srlora.backend.keras_private.fit_state import around_update
from keras_srlora.backend.keras_private.fit_state import get_initial_epoch
from keras_srlora.backend.keras_private.fit_state import is_stock_optimizer
from keras_srlora.backend.keras_private.fit_state import loss_metric
from keras_srlora.backend.keras_private.fit_state import micro_batches_seen
from keras_srlora.backend.keras_private.fit_state import (
    optimizer_trainable_variables,
)
from keras_srlora.backend.keras_private.fit_state import set_initial_epoch
from keras_srlora.backend.keras_private.kernels import call_quantized
from keras_srlora.backend.keras_private.kernels import kernel_shape
from keras_srlora.backend.keras_private.kernels import replace_quantized_kernel
from keras_srlora.backend.keras_private.kernels import stored_kernel
from keras_srlora.backend.keras_private.kernels import stored_variables
from keras_srlora.backend.keras_private.nesting import automatic_name
from keras_srlora.backend.keras_private.nesting import builds_when_called
from keras_srlora.backend.keras_private.nesting import classes_named_as
from keras_srlora.backend.keras_private.nesting import config_lists_layers
from keras_srlora.backend.keras_private.nesting import flatten_layers
from keras_srlora.backend.keras_private.nesting import in_symbolic_call
from keras_srlora.backend.keras_private.nesting import remove_variable
from keras_srlora.backend.keras_private.nesting import seed_states
from keras_srlora.backend.keras_private.nesting import set_variable_trainable
from keras_srlora.backend.keras_private.nesting import unique_name
from keras_srlora.backend.keras_private.nesting import unlocked
from keras_srlora.layers.frozen import INTEGER_MODES
from keras_srlora.layers.frozen import MODES
from keras_srlora.layers.requirements import QUANTIZED_SINCE


@pytest.fixture
def model():
    inputs = keras.Input((4,))
    x = keras.layers.Dense(5, name="hidden")(inputs)
    x = keras.layers.Dropout(0.5, seed=3, name="dropout")(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    model.compile(
        keras.optimizers.Adam(0.1, gradient_accumulation_steps=3), "mse"
    )
    return model


def fit(model, steps):
    x = np.ones((2 * steps, 4), "float32")
    model.fit(x, x[:, :2], batch_size=2, epochs=1, verbose=0)


def two_layers():
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3, name="a"),
            keras.layers.Dense(2, name="b"),
        ],
        name="inner",
    )


def test_config_lists_layers(model):
    assert config_lists_layers(model)
    assert config_lists_layers(two_layers())
    attention = keras.layers.MultiHeadAttention(2, 3)
    assert not config_lists_layers(attention)

    class Mine(keras.Model):
        def get_config(self):
            return {}

    assert not config_lists_layers(Mine())


def test_seeds_of_dropout(model):
    (state,) = seed_states(model)
    held = to_numpy(state)
    fit(model, steps=2)
    if keras.backend.backend() != "torch":  # which draws from its own
        assert not np.array_equal(held, to_numpy(state))
    assert held.shape == (2,)


def test_mean_of_the_training_loss(model):
    fit(model, steps=3)
    loss = loss_metric(model)
    assert loss is model.metrics[0]
    # Six examples in three batches.
    assert float(to_numpy(loss.count)) == 6
    mean = float(to_numpy(loss.total)) / 6
    assert mean == pytest.approx(model.history.history["loss"][0], rel=1e-5)


def test_epoch_of_a_restored_run(model, tmp_path):
    assert get_initial_epoch(model) is None

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    class Seen(keras.callbacks.Callback):
        epochs = []

        def on_train_begin(self, logs=None):
            assert get_initial_epoch(self.model) == 2
            set_initial_epoch(self.model, 3)

        def on_epoch_begin(self, epoch, logs=None):
            self.epochs.append(epoch)

    x = np.ones((4, 4), "float32")
    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
    for other in (Stop(), Seen()):
        try:
            model.fit(
                x, x[:, :2], epochs=5, verbose=0, callbacks=[backup, other]
            )
        except KeyboardInterrupt:
            pass
    assert Seen.epochs == [3, 4]


@pytest.fixture
def layer():
    layer = keras.layers.Dense(3)
    layer.build((None, 4))
    return layer


def test_flatten_layers_reaches_attributes_of_attributes():
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    inputs = keras.Input((4,))
    model = keras.Model(inputs, inner(inputs))
    names = {type(x).__name__ for x in flatten_layers(model)}
    assert {"Functional", "Sequential", "Dense"} <= names


def test_weights_can_be_added_and_removed_when_unlocked(layer):
    with pytest.raises(ValueError):
        layer.extra = layer.add_weight(shape=(2,), name="extra")
    with unlocked(layer):
        layer.extra = layer.add_weight(shape=(2,), name="extra")
    assert [v.name for v in layer.trainable_variables][-1] == "extra"
    with pytest.raises(ValueError):
        layer.more = layer.add_weight(shape=(2,), name="more")
    remove_variable(layer, layer.extra)
    assert len(layer.variables) == 2


def test_a_frozen_variable_stays_frozen(layer):
    kernel = stored_kernel(layer)
    set_variable_trainable(layer, kernel, False)
    layer.trainable = True
    assert [v.name for v in layer.trainable_variables] == ["bias"]
    set_variable_trainable(layer, kernel, True)
    assert len(layer.trainable_variables) == 2


def test_optimizer_internals(layer):
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=3)
    optimizer.build(layer.trainable_variables)
    variables = optimizer_trainable_variables(optimizer)
    assert [id(v) for v in variables] == [
        id(v) for v in layer.trainable_variables
    ]
    gradients = [keras.ops.ones(v.shape) for v in variables]
    optimizer.apply(gradients, variables)
    assert int(micro_batches_seen(optimizer)) == 1
    accumulated = accumulated_gradient(optimizer, variables[0])
    assert float(keras.ops.convert_to_numpy(accumulated).mean()) == 1.0
    assert is_stock_optimizer(optimizer)


def test_a_function_goes_around_the_update_alone(layer):
    """Not around weight decay, nor the moving average of the weights."""
    optimizer = keras.optimizers.SGD(0.5, weight_decay=0.5, use_ema=True)
    variables = layer.trainable_variables
    optimizer.build(variables)
    kernel = variables[0]
    kernel.assign(keras.ops.ones(kernel.shape))
    gradients = [keras.ops.ones(v.shape) for v in variables]
    seen = []

    def around(update):
        seen.append(to_numpy(kernel).mean())
        update()
        seen.append(to_numpy(kernel).mean())
        kernel.assign(keras.ops.zeros(kernel.shape))

    with around_update(optimizer, around):
        optimizer.apply(gradients, variables)
    assert seen == [0.75, 0.25]
    (average,) = [
        to_numpy(v)
        for v in optimizer.variables
        if v.path.endswith("kernel_average")
    ]
    np.testing.assert_array_equal(average, 0.0)
    # Afterwards it is as before.
    optimizer.apply(gradients, variables)
    assert len(seen) == 2


def test_a_layer_without_build_is_known(layer):
    class Composite(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.inside = keras.layers.Dense(3)
            self.symbolic = []

        def call(self, inputs):
            self.symbolic.append(in_symbolic_call())
            return self.inside(inputs)

    composite = Composite()
    assert builds_when_called(composite)
    assert not builds_when_called(layer)
    assert not builds_when_called(keras.Sequential([layer]))
    composite(keras.Input((4,)))
    assert all(composite.symbolic) and composite.inside.built
    assert not in_symbolic_call()


def test_automatic_names():
    class BigBirdBackbone(keras.layers.Layer):
        pass

    for make in (
        BigBirdBackbone,
        keras.Sequential,
        lambda: keras.layers.Dense(2),
    ):
        first, second = make(), make()
        name = automatic_name(first)
        assert first.name.startswith(name) and second.name.startswith(name)
        assert automatic_name(second) == name
    assert automatic_name(keras.layers.Dense(2, name="q")) is None


def test_files_name_layers_after_their_classes(tmp_path):
    class Renamed(keras.layers.Dense):
        pass

    def model(cls):
        return keras.Sequential([keras.Input((4,)), cls(3)])

    path = str(tmp_path / "a.weights.h5")
    model(keras.layers.Dense).save_weights(path)
    with classes_named_as({Renamed: "Dense"}):
        model(Renamed).load_weights(path)
    assert Renamed.__name__ == "Renamed"


def test_unique_names():
    first = unique_name("SRLoRAEinsumDense")
    assert re.fullmatch(r"srlora_einsum_dense(_\d+)?", first)
    assert first != unique_name("SRLoRAEinsumDense")


QUANTIZED = pytest.mark.skipif(
    keras_version() < QUANTIZED_SINCE, reason="needs a newer Keras"
)
PROJECTIONS = {
    "dense": lambda: keras.layers.Dense(6),
    "einsum": lambda: keras.layers.EinsumDense(
        "btd,ndh->btnh", (None, 3, 4), bias_axes="nh"
    ),
}


@pytest.mark.parametrize(
    "mode",
    [None, *(pytest.param(m, marks=QUANTIZED) for m in sorted(MODES))],
)
@pytest.mark.parametrize("make", PROJECTIONS.values(), ids=PROJECTIONS)
def test_what_a_quantized_layer_stores(make, mode):
    layer = make()
    layer.build((2, 5, 8))
    shape = tuple(layer.kernel.shape)
    if mode:
        layer.quantize(mode)
    saved = {}
    layer.save_own_variables(saved)
    assert_same_variables(stored_variables(layer), saved.values())
    assert kernel_shape(layer) == shape


@QUANTIZED
@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("make", PROJECTIONS.values(), ids=PROJECTIONS)
def test_calling_a_quantized_layer_with_another_activation(make, mode, rng):
    layer = make()
    x = keras.ops.convert_to_tensor(
        rng.standard_normal((2, 5, 8)).astype("float32")
    )
    layer.build(x.shape)
    layer.quantize(mode)
    doubled = call_quantized(layer, x, False, lambda y: 2 * y)
    np.testing.assert_array_equal(to_numpy(doubled), 2 * to_numpy(layer(x)))


@QUANTIZED
@pytest.mark.parametrize("mode", sorted(INTEGER_MODES))
@pytest.mark.parametrize("make", PROJECTIONS.values(), ids=PROJECTIONS)
def test_a_quantized_layer_is_made_a_plain_one(make, mode, rng):
    layer = make()
    x = rng.standard_normal((2, 5, 8)).astype("float32")
    layer.build(x.shape)
    before, kernel = to_numpy(layer(x)), to_numpy(layer.kernel)
    layer.quantize(mode)
    replace_quantized_kernel(layer, kernel)
    np.testing.assert_array_equal(to_numpy(layer(x)), before)
    assert layer.dtype_policy.name == "float32"
    assert sorted(v.name for v in layer.variables) == ["bias", "kernel"]
