"""Models, optimizers and functions that follow a change of layers.

A layer may be a part of many models, and each of them has compiled functions
and an optimizer of its own.
"""

import gc
import warnings
from typing import Any

import keras

from keras_srlora.backend import devices
from keras_srlora.backend.keras_private.compiled import drop_compiled_functions
from keras_srlora.backend.keras_private.compiled import functions_that_read
from keras_srlora.backend.keras_private.compiled import kinds_of_functions
from keras_srlora.backend.keras_private.compiled import trace_anew
from keras_srlora.backend.keras_private.kernels import stored_kernel
from keras_srlora.backend.keras_private.nesting import flatten_layers
from keras_srlora.backend.keras_private.nesting import layers_that_hold
from keras_srlora.backend.keras_private.nesting import models_that_hold
from keras_srlora.backend.keras_private.nesting import refresh_torch_parameters
from keras_srlora.backend.keras_private.nesting import variables_held
from keras_srlora.backend.keras_private.rebuilding import build_again
from keras_srlora.backend.keras_private.rebuilding import trains_exactly
from keras_srlora.backend.living import living


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
        self._model, self._changed = model, layers
        self._look()

    def _look(self):
        everything, *functions = living(
            keras.layers.Layer, *kinds_of_functions()
        )
        found = models_that_hold(self._changed, everything)
        others = [x for x in found if x is not self._model]
        self.models = [self._model, *others]
        self._functions = functions_that_read(
            [v for layer in self._changed for v in layer.variables],
            [function for kind in functions for function in kind],
        )
        kernels = {id(stored_kernel(x)): x for x in self._changed}
        self._shared = [
            (kernels[id(variable)], layer, variable)
            for layer in layers_that_hold(kernels, everything)
            for variable in variables_held(layer)
            if kernels.get(id(variable), layer) is not layer
        ]

    def refuse_shared_kernels(self):
        """Raises where another layer holds the kernel variable of a layer.

        It would read the frozen kernel alone, and a kernel that it writes is
        not the one that was decomposed. It may be a part of another model.
        """
        if self._shared:
            # What only garbage holds is no holder.
            self.models = self._functions = self._shared = []
            gc.collect()
            self._look()
        for target, layer, variable in self._shared:
            raise ValueError(
                f"Layers {target.path!r} and {layer.path!r} "
                f"({type(layer).__name__}) hold the same kernel variable; "
                "an SRLoRA layer must be the only one that does, in other "
                f"models, too. Name {target.path!r} in "
                "`exclude_layer_names`, or let the other layer read "
                "`layer.kernel` when it is called. "
                f"Received: the variable {variable.path!r}"
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
