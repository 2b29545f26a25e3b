"""Functions that were compiled before a layer changed, and read it still.

TensorFlow keeps what it traced; a change that only Python sees (a class, an
attribute, another variable) does not reach it. The one module that touches
TensorFlow's private API: there is no public way to let a `tf.function` trace
anew. Where TensorFlow has no such attribute, only the functions that models
keep are dropped (`keras_private.drop_compiled_functions`).
"""

import gc

import keras


def functions_that_read(variables) -> list:
    """The living `tf.function`s whose traces read one of some variables.

    Those of the user, too, whatever they are attributes of. A concrete function
    or an exported model is beyond reach: it has nothing to trace.
    """
    if keras.backend.backend() != "tensorflow":
        return []
    import tensorflow as tf

    wanted = {id(handle) for v in variables for handle in _handles(v)}
    kind = tf.types.experimental.PolymorphicFunction
    return [
        function
        for function in gc.get_objects()
        if issubclass(type(function), kind)
        and any(
            id(captured) in wanted
            for trace in _traces(function)
            for captured in trace.captured_inputs
        )
    ]


def trace_anew(function):
    """Lets a `tf.function` trace again the next time that it is called."""
    function._function_cache.clear()


def _traces(function):
    cache = getattr(function, "_function_cache", None)
    return [] if cache is None else cache.values()


def _handles(variable):
    value = variable.value
    # One on each replica of a strategy.
    parts = getattr(value, "values", None) or [value]
    return [part.handle for part in parts]
