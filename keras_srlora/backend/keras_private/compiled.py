"""Finds and drops functions that were compiled before a layer changed.

TensorFlow and JAX keep what they traced; a change that only Python sees (a
class, an attribute, another variable) does not reach it. This module touches
private API of TensorFlow as well: there is no public way to let a `tf.function`
trace anew. Where TensorFlow has no such attribute, only the functions that
models keep are dropped.
"""

import functools

import keras

from keras_srlora.backend.keras_private.fit_state import keep_training


def kinds_of_functions() -> tuple:
    """The classes of functions that keep what they traced."""
    if keras.backend.backend() == "jax":
        import jax

        return (type(jax.jit(len)),)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return (tf.types.experimental.PolymorphicFunction,)
    return ()


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


def functions_that_read(variables, functions) -> list:
    """Those of some functions whose traces read one of some variables.

    Three things are out of reach: a concrete function, an exported model, and
    the program that `lower().compile()` returns. JAX does not tell which
    variables a trace reads: on JAX these are all functions that no library
    made.
    """
    if keras.backend.backend() == "jax":
        return [x for x in functions if not _is_of_a_library(x)]
    if not functions:
        return []
    wanted = {id(handle) for v in variables for handle in _handles(v)}
    return [
        function
        for function in functions
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


def _traces(function):
    cache = getattr(function, "_function_cache", None)
    return [] if cache is None else cache.values()


def _handles(variable):
    value = variable.value
    # One on each replica of a strategy.
    parts = getattr(value, "values", None) or [value]
    return [part.handle for part in parts]
