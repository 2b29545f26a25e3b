"""Finds and drops functions that were compiled before a layer changed.

TensorFlow and JAX keep what they traced; a change that only Python sees (a
class, an attribute, another variable) does not reach it. Private API of Keras,
beside `keras_private`, and the one module that touches TensorFlow's: there is
no public way to let a `tf.function` trace anew. Where TensorFlow has no such
attribute, only the functions that models keep are dropped.
"""

import gc

import keras

from keras_srlora.backend.keras_private import inside
from keras_srlora.backend.keras_private import keep_training


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
    """The living `tf.function`s whose traces read one of some variables.

    Those of the user, too, whatever they are attributes of. A concrete function
    or an exported model is beyond reach: it has nothing to trace.
    """
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
    """Lets a `tf.function` trace again the next time that it is called."""
    function._function_cache.clear()


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
