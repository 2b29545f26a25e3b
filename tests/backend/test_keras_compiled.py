"""What was compiled before a layer changed is found.

Where one of these fails after an update of Keras or TensorFlow,
`keras_srlora/backend/keras_private/compiled.py` has to be written anew.
"""

import keras
import numpy as np
import pytest
from support import functions_reading
from support import models_holding

from keras_srlora.backend.keras_private.compiled import drop_compiled_functions
from keras_srlora.backend.keras_private.compiled import trace_anew

tensorflow_only = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="`tf.function`"
)


@pytest.fixture
def layer():
    layer = keras.layers.Dense(3)
    layer.build((None, 4))
    return layer


def test_all_living_models_that_hold_a_layer_are_found(layer):
    first = keras.Sequential([keras.Input((4,)), layer])
    inputs = keras.Input((4,))
    second = keras.Model(inputs, first(inputs))
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    found = models_holding([layer])
    assert {id(first), id(second)} <= set(map(id, found))
    assert id(other) not in set(map(id, found))


def test_a_model_without_its_beginning_is_passed_over(layer):
    class Broken(keras.Model):
        def __init__(self):
            self.kept.append(self)
            raise KeyError

        kept = []

    with pytest.raises(KeyError):
        Broken()
    assert Broken.kept
    model = keras.Sequential([keras.Input((4,)), layer])
    assert id(model) in set(map(id, models_holding([layer])))


def test_every_function_that_a_model_makes_is_dropped(layer):
    class Sampler(keras.Sequential):
        generate_function = None
        loss_function = "mse"

        def make_generate_function(self):
            self.generate_function = lambda: 1
            return self.generate_function

    model = Sampler([keras.Input((4,)), layer])
    model.compile("sgd", "mse")
    model.make_train_function()
    model.make_test_function()
    model.make_predict_function()
    model.make_generate_function()
    model.user_function = "kept"
    drop_compiled_functions(model)
    assert model.train_function is None and model.test_function is None
    assert model.predict_function is None and model.generate_function is None
    assert (model.user_function, model.loss_function) == ("kept", "mse")


@tensorflow_only
def test_a_function_that_reads_a_variable_traces_anew(layer):
    import tensorflow as tf

    traced = []

    @tf.function
    def outer(x):
        return inner(x)

    @tf.function
    def inner(x):
        traced.append("inner")
        return layer(x)

    @tf.function
    def other(x):
        traced.append("other")
        return 2 * x

    x = np.ones((2, 4), "float32")
    for function in (outer, other):
        function(x)
        function(x)
    assert traced == ["inner", "other"]
    found = functions_reading([layer.kernel])
    assert {id(outer), id(inner)} <= set(map(id, found))
    assert id(other) not in set(map(id, found))
    for function in found:
        trace_anew(function)
    outer(x)
    other(x)
    assert traced == ["inner", "other", "inner"]


@tensorflow_only
def test_a_function_that_made_variables_keeps_them(layer):
    import tensorflow as tf

    class Module(tf.Module):
        made = None

        @tf.function
        def __call__(self, x):
            if self.made is None:
                self.made = tf.Variable(2.0)
            return self.made * layer(x)

    module, x = Module(), np.ones((2, 4), "float32")
    before, made = module(x), module.made
    for function in functions_reading([layer.kernel]):
        trace_anew(function)
    np.testing.assert_array_equal(module(x), before)
    assert module.made is made


def test_nothing_is_found_on_other_backends(layer):
    if keras.backend.backend() != "tensorflow":
        assert functions_reading(layer.variables) == []
