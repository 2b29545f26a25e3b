"""Pinned variables keep their place, and no layer thaws them."""

import keras
import numpy as np
import pytest
from support import to_numpy

from keras_srlora.backend.keras_private.graph import read_graph
from keras_srlora.backend.keras_private.pinned import has_pins
from keras_srlora.backend.keras_private.pinned import own_variables
from keras_srlora.backend.keras_private.pinned import pin
from keras_srlora.backend.keras_private.pinned import trainable_before
from keras_srlora.backend.keras_private.pinned import unpin

layers = keras.layers

MAKERS = {
    "norm": layers.LayerNormalization,
    "batch_norm": layers.BatchNormalization,
    "dense": lambda: layers.Dense(4),
    "convolution": lambda: layers.Conv1D(4, 1),
}


def made(kind):
    layer = MAKERS[kind]()
    layer.build((None, 3, 4))
    for i, variable in enumerate(layer.variables):
        variable.assign(np.full(variable.shape, i + 1.0))
    return layer


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_pinned_variables_keep_their_place_and_stay_frozen(kind, count):
    layer = made(kind)
    before, own = layer.variables, own_variables(layer)
    pin(layer, own[:count])
    assert has_pins(layer)
    assert [v is w for v, w in zip(layer.variables, before)] == [True] * len(
        before
    )
    assert all(v is w for v, w in zip(layer.weights, before))
    assert all(v is w for v, w in zip(own_variables(layer), own))
    for trainable in (True, False, True):
        layer.trainable = trainable
    assert len(layer.trainable_variables) == len(own) - count
    assert not any(v.trainable for v in own[:count])
    unpin(layer)
    assert not has_pins(layer)
    # On TensorFlow Keras ignores what is set already.
    layer.trainable = False
    layer.trainable = True
    assert all(v is w for v, w in zip(layer.trainable_variables, own))
    assert all(v is w for v, w in zip(layer.variables, before))


def test_another_variable_is_pinned_instead():
    layer = made("norm")
    gamma, beta = layer.variables
    pin(layer, [beta])
    pin(layer, [gamma])
    layer.trainable = True
    beta.trainable = True
    assert [v.name for v in layer.trainable_variables] == ["beta"]
    assert [v.name for v in layer.variables] == ["gamma", "beta"]
    # Of the time before the first of them.
    before = trainable_before(layer)
    assert before == {id(layer), id(gamma), id(beta)}


@pytest.mark.parametrize("kind", MAKERS)
def test_weights_of_a_layer_with_pins_are_those_of_the_plain_one(
    kind, tmp_path
):
    """Either way: in memory, and as a file."""
    plain, pinned = made(kind), made(kind)
    pin(pinned, own_variables(pinned)[:1])
    for variable in pinned.variables:
        variable.assign(np.zeros(variable.shape))
    pinned.set_weights(plain.get_weights())
    for a, b in zip(plain.variables, pinned.variables):
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b))
    stored = {}
    pinned.save_own_variables(stored)
    other = made(kind)
    other.load_own_variables(stored)
    for a, b in zip(plain.variables, other.variables):
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b))


def test_a_layer_with_pins_gets_another_variable():
    layer = made("norm")
    pin(layer, [layer.gamma])
    before = layer.variables
    layer._tracker.unlock()
    added = layer.add_weight(shape=(1,), name="added")
    layer._tracker.lock()
    assert layer.variables[: len(before)] == before or all(
        a is b for a, b in zip(layer.variables, before)
    )
    assert layer.variables[-1] is added
    assert [v.name for v in layer.trainable_variables] == ["beta", "added"]


def test_a_graph_says_what_follows_on_what():
    inputs = keras.Input((4,))
    first = layers.Dense(4, name="first")
    x = first(inputs)
    shortcut = layers.Dense(4, name="bypassed")(x)
    x = keras.ops.add(x, shortcut)
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    graph = read_graph(model)
    names = [operation.name for operation in graph.operations]
    i, j = names.index("first"), names.index("bypassed")
    assert {names[k] for k in graph.after([i])} == {*names[2:]} - {"first"}
    assert j in graph.before(graph.outputs)
    assert set(graph.outputs) <= graph.after([i], without=j)
    assert not graph.after([i], without=names.index("head")) & {*graph.outputs}


def test_the_graph_of_a_sequential_model_is_a_chain():
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4), *[layers.Dense(2, name="head")]]
    )
    graph = read_graph(model)
    assert graph.parents == [[], [0]] and graph.outputs == [1]


def test_a_subclassed_model_has_no_graph():
    class Subclassed(keras.Model):
        def call(self, x):
            return x

    assert read_graph(Subclassed()) is None
