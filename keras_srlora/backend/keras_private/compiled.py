"""Finds and drops functions that were compiled before a layer changed.

TensorFlow and JAX keep what they traced; a change that only Python sees (a
class, an attribute, another variable) does not reach it. This module touches
private API of TensorFlow as well: there is no public way to let a `tf.function`
trace anew. Where TensorFlow has no such attribute, only the functions that
models keep are dropped.
"""

import functools
import gc

import keras

from keras_srlora.backend.keras_private.fit_state import keep_training
from keras_srlora.backend.keras_private.nesting import inside
from keras_srlora.backend.keras_private.nesting import variables_held


def living_models(layers):
    """All models of this process that hold one of some layers.

    Keras does not know which models a layer is a part of: the layer of a
    functional, a sequential and a subclassed model is the same object in each
    of them. The garbage collector knows all objects.
    """
    wanted = set(map(id, layers))
    return [
        model
        for model in _living(keras.Model)
        # One whose `__init__` raised has no layers yet.
        if hasattr(model, "_layers") and inside(model) & wanted
    ]


def living_holders(variables):
    """All layers of this process that hold one of some variables (ids).

    Whether they are a part of a model or not. What only garbage holds is gone.
    """
    found = _holders(variables)
    if len(found) > len(variables):
        gc.collect()
        found = _holders(variables)
    return found


def _holders(variables):
    return [
        layer
        for layer in gc.get_objects()
        if issubclass(type(layer), keras.layers.Layer)
        and hasattr(layer, "_non_trainable_variables")
        and any(id(v) in variables for v in variables_held(layer))
    ]


def drop_compiled_functions(model):
    """Makes the model trace its functions anew the next time.

    `Model.compile` sets the same three attributes to `None`. Their names are
    public (`Model.train_function`), setting them is not documented. Subclasses
    follow the same pattern: KerasHub keeps the result of
    `make_generate_function` as `generate_function`.
    """
    for name in list(vars(model)):
        if name.endswith("_function") and hasattr(model, f"make_{name}"):
            setattr(model, name, None)
    keep_training(model, None)


def functions_that_read(variables) -> list:
    """The living functions whose traces read one of some variables.

    The user's own functions are among them. Three things are out of reach: a
    concrete function, an exported model, and the program that
    `lower().compile()` returns. JAX does not tell which variables a trace
    reads: on JAX these are all `jax.jit` functions that no library made.
    """
    if keras.backend.backend() == "jax":
        return _jitted_functions()
    if keras.backend.backend() != "tensorflow":
        return []
    import tensorflow as tf

    wanted = {id(handle) for v in variables for handle in _handles(v)}
    return [
        function
        for function in _living(tf.types.experimental.PolymorphicFunction)
        if any(
            id(captured) in wanted
            for trace in _traces(function)
            for captured in trace.captured_inputs
        )
    ]


def trace_anew(function):
    """Lets a function trace again the next time that it is called."""
    if keras.backend.backend() == "jax":
        function.clear_cache()
    else:
        function._function_cache.clear()


def _jitted_functions():
    import jax

    kind = type(jax.jit(len))
    found = [x for x in gc.get_objects() if type(x) is kind]
    return [x for x in found if not _is_of_a_library(x)]


def _is_of_a_library(function):
    """Whether a function is one of JAX or Keras, and no method of a layer."""
    while True:
        if isinstance(getattr(function, "__self__", None), keras.layers.Layer):
            return False
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            module = str(getattr(function, "__module__", ""))
            return module.partition(".")[0] in ("jax", "jaxlib", "keras")


def _living(cls):
    """All objects of this process of a class, or of one derived from it.

    A process with TensorFlow has half a million objects of a thousand classes:
    each class is asked once, whether it is derived.
    """
    objects = gc.get_objects()
    classes = {c for c in set(map(type, objects)) if issubclass(c, cls)}
    return [x for x in objects if type(x) in classes]


def _traces(function):
    cache = getattr(function, "_function_cache", None)
    return [] if cache is None else cache.values()


def _handles(variable):
    value = variable.value
    # One on each replica of a strategy.
    parts = getattr(value, "values", None) or [value]
    return [part.handle for part in parts]
