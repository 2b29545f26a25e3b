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
        for model in gc.get_objects()
        if issubclass(type(model), keras.Model)
        # One whose `__init__` raised has no layers yet.
        and hasattr(model, "_layers")
        and inside(model) & wanted
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


def watch_predictions(model, counter):
    """Lets `counter.note(y_pred)` see each call of a model's `compute_loss`.

    `compute_loss` is public, to be overridden by a subclass; an attribute of
    the instance does so for a while. It is set past Keras's `__setattr__`:
    neither tracked nor saved.
    """
    stop_watching_predictions(model)
    compute_loss = model.compute_loss

    def watched(*args, **kwargs):
        y_pred = kwargs.get("y_pred", args[2] if len(args) > 2 else None)
        if y_pred is not None:
            counter.note(y_pred)
        return compute_loss(*args, **kwargs)

    watched.before = vars(model).get("compute_loss")  # type: ignore[attr-defined]
    vars(model)["compute_loss"] = watched


def stop_watching_predictions(model):
    """Undoes `watch_predictions`, where it is in place."""
    watched = vars(model).get("compute_loss")
    if hasattr(watched, "before"):
        del vars(model)["compute_loss"]
        if watched.before is not None:
            vars(model)["compute_loss"] = watched.before
