"""Converting layers, and the containers that hold them, for `.keras` files.

A `.keras` file has the config of each layer of a functional or sequential
model, so an SRLoRA layer is made again as one. A composite layer or a KerasHub
backbone makes its sublayers itself, as plain layers. While it holds converted
ones it is a `Converted`: its config then lists them, and the frozen variables.
"""

import copy
import functools
from typing import Any

import keras

from keras_srlora.backend.keras_private.nesting import builds_when_called
from keras_srlora.backend.keras_private.nesting import config_lists_layers
from keras_srlora.backend.keras_private.nesting import flatten_layers
from keras_srlora.backend.keras_private.nesting import in_symbolic_call
from keras_srlora.backend.keras_private.nesting import inside
from keras_srlora.backend.keras_private.nesting import refresh_torch_parameters
from keras_srlora.backend.keras_private.presets import saves_a_preset
from keras_srlora.backend.mixins import KerasMixin
from keras_srlora.conversion.freezing import have_places
from keras_srlora.conversion.freezing import is_frozen_for_good
from keras_srlora.conversion.freezing import set_trainable_flags
from keras_srlora.conversion.freezing import trainable_flags
from keras_srlora.layers.base import SRLoRALayer
from keras_srlora.layers.factors import add_factors
from keras_srlora.layers.kinds import ADAPTED
from keras_srlora.layers.kinds import PLAIN
from keras_srlora.layers.kinds import plain_class
from keras_srlora.recipes.definition import get_recipe


def convert_layers(containers, layers, arguments):
    """Converts plain layers, with a dict of arguments for each.

    Layers that are converted already stay as they are. The kernels are not
    decomposed yet.

    Args:
        containers: list of everything that one of the layers may be inside of.
        layers: list of layers.
        arguments: list of dicts, one for each layer.
    """
    for layer, of_layer in zip(layers, arguments):
        if plain_class(layer) in ADAPTED:
            layer.__class__ = ADAPTED[plain_class(layer)]
            layer.set_arguments(**of_layer)
            add_factors(layer)
    targets = set(map(id, layers))
    holding = [x for x in containers if inside(x) & targets]
    for container in [*holding, *_listed_frozen(containers)]:
        if _makes_its_layers(container):
            container.__class__ = _converted_class(_class_of(container))


def _listed_frozen(containers):
    """The layers in the configs of containers that say too little of them.

    A file that Keras writes does not say which variables of a layer are frozen,
    nor that those inside of a frozen composite layer are.
    """
    return [
        layer
        for container in containers
        if config_lists_layers(container)
        for layer in container.layers
        if is_frozen_for_good(layer)
    ]


def restore_plain_classes(containers):
    """Makes containers without SRLoRA and frozen layers plain again."""
    for container in containers:
        if (
            isinstance(container, Converted)
            and not _adapted(container)
            and not is_frozen_for_good(container)
        ):
            container.__class__ = container.plain_class


def _adapted(container):
    """`{place: layer}` of the SRLoRA layers inside, in Keras's own order."""
    return {
        place: layer
        for place, layer in enumerate(flatten_layers(container))
        if isinstance(layer, SRLoRALayer)
    }


def _makes_its_layers(layer):
    if isinstance(layer, (Converted, SRLoRALayer)):
        return False
    return not config_lists_layers(layer)


class Converted(KerasMixin):
    """Mixin of a container whose class makes the layers inside of it."""

    def get_config(self):
        if saves_a_preset():
            # That of a task which was made around it.
            _refuse_preset(self)
        converted = type(self)
        self.__class__ = self.plain_class
        try:
            plain = keras.saving.serialize_keras_object(self)
        finally:
            self.__class__ = converted
        # The converted object is compiled, by its own part of the file.
        plain.pop("compile_config", None)
        optimizer = getattr(self, "optimizer", None)
        if builds_when_called(self):
            plain.pop("build_config", None)
        # KerasHub looks here whether a text encoder has a dtype of its own, and
        # writes one else.
        dtype = {k: v for k, v in plain["config"].items() if k == "dtype"}
        return {
            **dtype,
            "plain": plain,
            "adapted": [
                {"place": place, "arguments": layer.get_arguments()}
                for place, layer in _adapted(self).items()
            ],
            "trainable": trainable_flags(self),
            # Whether its optimizer has state in the file.
            "trained": getattr(optimizer, "built", False),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Makes the plain object, and converts its sublayers.

        A layer without a `build` makes its sublayers when it is called: it is
        converted then.
        """
        # Keras's own `from_config` takes configs to pieces.
        plain = copy.deepcopy(config["plain"])
        # What a wrapper such as `Bidirectional`, or the user, has written into
        # the config is meant for the plain object.
        plain["config"].update(
            {k: v for k, v in config.items() if k not in OWN_CONFIG}
        )
        container = keras.saving.deserialize_keras_object(
            plain, custom_objects=custom_objects
        )
        vars(container)[TRAINED] = config.get("trained", True)
        is_built = isinstance(container, keras.Model) and container.built
        if is_built or _is_complete(container, config):
            _convert_as_saved(container, config)
        else:
            container.__class__ = _awaiting_class(_class_of(container))
            vars(container)[AWAITED] = config
        return container

    def get_build_config(self):
        """Nothing for a layer without a `build`, which Keras warns of."""
        if builds_when_called(self):
            return None
        return super().get_build_config()

    def save_to_preset(self, preset_dir, *args, **kwargs):
        """Not available: KerasHub reads no file of a converted model."""
        _refuse_preset(self)

    def compile_from_config(self, config):
        """Compiles and builds the optimizer, whose state comes next.

        Keras does not where a class overrides `compile`, as KerasHub's tasks
        do; these take the same arguments.
        """
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built and vars(self).get(TRAINED, True):
            self.optimizer.build(self.trainable_variables)


def _refuse_preset(model):
    raise ValueError(
        f"Model {model.name!r} holds SRLoRA layers, which `from_preset` cannot "
        "make: nothing was written. Keep the adapter with "
        "`keras_srlora.save_adapter(model, filepath)`, to be loaded onto the "
        "preset that it was trained on, or call "
        "`keras_srlora.merge_srlora(model)` first and save the whole model. "
        f"Received: {len(_adapted(model))} SRLoRA layers"
    )


class Awaiting(Converted):
    """Mixin of a container that is to be converted when it is first called."""

    def __call__(self, *args, **kwargs):
        outputs = super().__call__(*args, **kwargs)
        # Inside of the symbolic call of an outer layer nothing is built yet.
        if not in_symbolic_call():
            _convert_as_saved(self, vars(self)[AWAITED])
        return outputs

    def get_config(self):
        """That of the file: nothing that it lists has been made."""
        return vars(self)[AWAITED]


# Keys of the config of a `Converted`.
OWN_CONFIG = frozenset(("plain", "adapted", "trainable", "trained"))
AWAITED = "_srlora_awaited"
TRAINED = "_srlora_trained"


def _convert_as_saved(container, config):
    """Converts what the config of a `Converted` lists."""
    missing = _missing(container, config)
    if missing:
        raise ValueError(
            f"Layer {container.name!r} was saved with SRLoRA layers inside of "
            "it that it does not have now: the class is another one than at "
            "saving, or calling it does not build them. Make the "
            "model with its own code instead, from the pretrained weights, "
            "and load a file of `keras_srlora.save_adapter` into it: "
            "`keras_srlora.load_adapter(model, filepath)`. Received: "
            f"{missing} of the layers inside of a "
            f"{type(container).__name__}"
        )
    layers = flatten_layers(container)
    for layer in layers:
        if isinstance(layer, Awaiting):
            layer.__dict__.pop(AWAITED)
            layer.__class__ = _converted_class(layer.plain_class)
    # Sublayers may have been saved as converted themselves.
    convert_layers(
        layers,
        [layers[saved["place"]] for saved in config["adapted"]],
        [
            {
                **saved["arguments"],
                "recipe": get_recipe(saved["arguments"]["recipe"]),
            }
            for saved in config["adapted"]
        ],
    )
    refresh_torch_parameters(container)
    set_trainable_flags(container, config["trainable"])


def _is_complete(container, config):
    return not _missing(container, config) and have_places(
        container, config["trainable"]
    )


def _missing(container, config):
    """Descriptions of the layers in a config that a container has not."""
    layers = flatten_layers(container)
    return [
        f"number {saved['place']} of {len(layers)} ({saved['arguments']})"
        for saved in config["adapted"]
        if not (
            saved["place"] < len(layers)
            and plain_class(layers[saved["place"]]) in {**ADAPTED, **PLAIN}
            and layers[saved["place"]].built
        )
    ]


def _class_of(container) -> Any:
    return type(container)


@functools.cache
def _converted_class(plain: Any):
    return _subclass(Converted, plain)


@functools.cache
def _awaiting_class(plain: Any):
    return _subclass(Awaiting, getattr(plain, "plain_class", plain))


def _subclass(mixin, plain):
    converted = type(
        # Weights files name the layers of a functional model after classes.
        plain.__name__,
        (mixin, plain),
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
