"""Models, optimizers and functions that follow a change of layers.

A layer may be a part of many models, and each of them has compiled functions
and an optimizer of its own.
"""

import warnings
from typing import Any

from keras_srlora.backend import devices
from keras_srlora.backend.keras_private.compiled import drop_compiled_functions
from keras_srlora.backend.keras_private.compiled import functions_that_read
from keras_srlora.backend.keras_private.compiled import living_models
from keras_srlora.backend.keras_private.compiled import trace_anew
from keras_srlora.backend.keras_private.nesting import flatten_layers
from keras_srlora.backend.keras_private.nesting import refresh_torch_parameters
from keras_srlora.backend.keras_private.rebuilding import build_again
from keras_srlora.backend.keras_private.rebuilding import trains_exactly


class Holders:
    """The models that hold some layers, and the functions that read them.

    Make it before the layers change, and call `follow` afterwards.

    Args:
        model: the model that was passed to the function that changes them.
        layers: list of layers inside of it.

    Attributes:
        models: list of all living models that hold one of the layers.
    """

    def __init__(self, model, layers):
        found = living_models(layers)
        others = [x for x in found if x is not model]
        self.models = [model, *others]
        self._functions = functions_that_read(
            [v for layer in layers for v in layer.variables]
        )

    def containers(self):
        """The models, and all layers inside of them, each once."""
        everything = {
            id(layer): layer
            for model in self.models
            for layer in flatten_layers(model)
        }
        return list(everything.values())

    def follow(self):
        """Lets the models compute and train the layers as they are now.

        Compiled functions are traced again. An optimizer that was built for
        other variables than those that its model trains now starts anew, at
        step 0; one that cannot is taken off its model, with a warning.
        """
        for function in self._functions:
            trace_anew(function)
        failed = []
        for model in self.models:
            refresh_torch_parameters(model)
            drop_compiled_functions(model)
            failed += _renew_optimizer(model)
        if failed:
            warnings.warn(
                "An optimizer could not be built for the variables that its "
                "model trains now, and was taken off: call `model.compile` "
                f"again. Received: {'; '.join(failed)}",
                stacklevel=4,
            )


def _renew_optimizer(model):
    """Returns a warning for each optimizer that could not follow."""
    optimizer = getattr(model, "optimizer", None)
    if not getattr(optimizer, "built", False):
        return []
    variables = model.trainable_variables
    if trains_exactly(optimizer, variables):
        return []
    try:
        model.optimizer = _without_wrapper(optimizer)
        with devices.strategy_scope(model):
            build_again(model.optimizer, variables)
    except Exception as error:
        model.optimizer = None
        return [f"model {model.name!r}, {type(error).__name__}: {error}"]
    return []


def _without_wrapper(optimizer):
    """Removes the wrapper of an interrupted run; see `training.wrapping`.

    It scores the pairs of layers that are gone.
    """
    if hasattr(optimizer, "unwrap"):
        return optimizer.unwrap()
    inner: Any = getattr(optimizer, "inner_optimizer", None)
    if hasattr(inner, "unwrap"):
        optimizer.inner_optimizer = inner.unwrap()
        for name in ("save_own_variables", "load_own_variables"):
            vars(optimizer).pop(name, None)
    return optimizer
