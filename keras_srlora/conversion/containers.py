"""What `enable_srlora` makes of plain layers, and of what they are inside of.

A `.keras` file says how each layer of a functional or sequential model is made,
so that an SRLoRA layer is made again as one. A composite layer or a KerasHub
backbone makes what is inside of it by itself, of plain layers. While it holds
converted ones it is a `Converted`: its part of the file then says which, and
what is frozen.
"""

import functools

import keras

from keras_srlora.backend import keras_private
from keras_srlora.backend.keras_private import inside
from keras_srlora.layers.base import SRLoRALayer
from keras_srlora.layers.factors import add_factors
from keras_srlora.layers.kinds import ADAPTED
from keras_srlora.layers.kinds import PLAIN
from keras_srlora.recipes.definition import get_recipe


def convert_layers(model, layers, arguments):
    """Converts plain layers inside a model, with a dict of arguments for each.

    Layers that are converted already stay as they are. The kernels are not
    decomposed yet.
    """
    for layer, of_layer in zip(layers, arguments):
        if type(layer) in ADAPTED:
            layer.__class__ = ADAPTED[type(layer)]
            layer.set_arguments(**of_layer)
            add_factors(layer)
    targets = set(map(id, layers))
    for container in keras_private.flatten_layers(model):
        if _makes_its_layers(container) and inside(container) & targets:
            container.__class__ = _converted_class(type(container))
    keras_private.refresh_torch_parameters(model)


def restore_plain_classes(model, layers):
    """Makes merged layers, and what they are inside of, plain again."""
    for layer in layers:
        layer.__class__ = PLAIN[type(layer)]
    for container in keras_private.flatten_layers(model):
        if isinstance(container, Converted) and not _adapted(container):
            container.__class__ = container.plain_class
    keras_private.refresh_torch_parameters(model)


def _adapted(container):
    """`{place: layer}` of the SRLoRA layers inside, in Keras's own order."""
    return {
        place: layer
        for place, layer in enumerate(keras_private.flatten_layers(container))
        if isinstance(layer, SRLoRALayer)
    }


def _makes_its_layers(layer):
    if isinstance(layer, (Converted, SRLoRALayer)):
        return False
    return not keras_private.config_lists_layers(layer)


class Converted:
    """Mixin of a container whose class makes the layers inside of it."""

    def get_config(self):
        converted = type(self)
        self.__class__ = self.plain_class
        try:
            plain = keras.saving.serialize_keras_object(self)
        finally:
            self.__class__ = converted
        # The converted object is compiled, by its own part of the file.
        plain.pop("compile_config", None)
        return {
            "plain": plain,
            "adapted": [
                {"place": place, "arguments": layer.get_arguments()}
                for place, layer in _adapted(self).items()
            ],
            "trainable": _trainable_flags(self),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Makes the plain object, and converts what is inside of it."""
        container = keras.saving.deserialize_keras_object(
            config["plain"], custom_objects=custom_objects
        )
        layers = keras_private.flatten_layers(container)
        found = {
            saved["place"]: saved["arguments"] for saved in config["adapted"]
        }
        for place in found:
            if not (
                place < len(layers)
                and type(layers[place]) in {**ADAPTED, **PLAIN}
                and layers[place].built
            ):
                raise ValueError(
                    f"Layer {container.name!r} ({type(container).__name__}) "
                    "was saved with SRLoRA layers inside of it that its class "
                    "does not make, or not before it is called: the class is "
                    f"another one than at saving. Received: {found[place]} for "
                    f"number {place} of {len(layers)} layers"
                )
        # What is inside may have been saved as converted by itself.
        convert_layers(
            container,
            [layers[place] for place in found],
            [
                {**arguments, "recipe": get_recipe(arguments["recipe"])}
                for arguments in found.values()
            ],
        )
        _set_trainable_flags(container, config["trainable"])
        return container

    def compile_from_config(self, config):
        """Compiles and builds the optimizer, whose state comes next.

        Keras does not where a class overrides `compile`, as KerasHub's tasks
        do; these take the same arguments.
        """
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)


@functools.cache
def _converted_class(plain):
    converted = type(
        # Weights files name the layers of a functional model after classes.
        plain.__name__,
        (Converted, plain),
        {"plain_class": plain, "__module__": __name__},
    )
    # All of them are read by the same function. The last to be registered is
    # the one that is found: it must be none of KerasHub's subclasses, which
    # KerasHub looks for in the registry.
    for cls in (converted, Converted):
        _register(cls)
    return converted


_register = keras.saving.register_keras_serializable(
    "keras_srlora", "Converted"
)
_register(Converted)


def _trainable_flags(container):
    """`[[of the layer, [of its own variables]], ...]`, as 0 and 1."""
    return [
        [
            int(layer.trainable),
            [int(v.trainable) for v in keras_private.own_variables(layer)],
        ]
        for layer in keras_private.flatten_layers(container)
    ]


def _set_trainable_flags(container, flags):
    layers = keras_private.flatten_layers(container)
    # An outer layer comes first, and sets those inside of it.
    for layer, (flag, _) in zip(layers, flags):
        if layer.trainable != bool(flag):
            layer.trainable = bool(flag)
    for layer, (_, own) in zip(layers, flags):
        for variable, flag in zip(keras_private.own_variables(layer), own):
            if variable.trainable != bool(flag):
                variable.trainable = bool(flag)
