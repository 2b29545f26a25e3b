"""Layers inside of layers, their variables and their names."""

import contextlib
import re

import keras


def flatten_layers(layer):
    """Returns `layer` and every layer inside it, each once.

    `Model.layers` lists only the first level of a model; the projections of a
    KerasHub backbone are attributes of attributes. Private:
    `Layer._flatten_layers`.
    """
    return layer._flatten_layers(include_self=True, recursive=True)


def inside(layer):
    """The ids of a layer and of all layers inside of it."""
    return set(map(id, flatten_layers(layer)))


def unique_name(class_name):
    """`"SRLoRADense"` → `"srlora_dense"`, `"srlora_dense_1"`, ...

    As Keras names layers, from an acronym. `keras.backend.get_uid` is public;
    it is here because its count starts at 1.
    """
    prefix = "srlora" + re.sub("([A-Z])", r"_\1", class_name[6:]).lower()
    count = keras.backend.get_uid(prefix)
    return prefix if count == 1 else f"{prefix}_{count - 1}"


def automatic_name(layer):
    """The name that Keras gives a layer without one, or `None`.

    For example `"bert_backbone"` for a layer `"bert_backbone_2"`.
    Keras's own function, `keras.src.utils.naming.to_snake_case`, is private.
    """
    name = re.sub(r"\W+", "", type(layer).__name__)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    name = re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
    return name if re.fullmatch(rf"{name}(_\d+)?", layer.name) else None


def config_lists_layers(layer):
    """Whether the config of a layer has those of all layers inside of it.

    That of a functional or sequential model has, unless a subclass overrides
    it. Keras exports no class for functional models.
    """
    own = type(layer).get_config
    return own is keras.Sequential.get_config or (
        own.__module__ == "keras.src.models.functional"
    )


def variables_held(layer):
    """The variables that a layer itself holds, without its sublayers'.

    Private: `Layer._trainable_variables`, `Layer._non_trainable_variables`.
    """
    return layer._trainable_variables + layer._non_trainable_variables


def models_that_hold(layers, everything) -> list:
    """The models, among all layers, that hold one of some layers.

    Keras does not know which models a layer is a part of: the layer of a
    functional, a sequential and a subclassed model is the same object in each
    of them.
    """
    wanted = set(map(id, layers))
    return [
        model
        for model in everything
        if isinstance(model, keras.Model)
        # One whose `__init__` raised has no layers yet.
        and hasattr(model, "_layers")
        and inside(model) & wanted
    ]


def layers_that_hold(variables, everything) -> list:
    """The layers, among all, that hold one of some variables (ids)."""
    return [
        layer
        for layer in everything
        if hasattr(layer, "_non_trainable_variables")
        and any(id(v) in variables for v in variables_held(layer))
    ]


@contextlib.contextmanager
def classes_named_as(names):
    """For a moment, gives classes other names: `{class: name}`.

    Keras names the groups of a weights file after the classes of the layers of
    a functional or sequential model (`saving_lib._load_container_state`), and
    has no argument for other names.
    """
    own = {cls: cls.__name__ for cls in names}
    try:
        for cls, name in names.items():
            cls.__name__ = name
        yield
    finally:
        for cls, name in own.items():
            cls.__name__ = name


class unlocked:
    """Lets weights be added to a layer that is already built.

    `Layer.enable_lora` does the same inside Keras. Private: `Layer._tracker`.
    """

    def __init__(self, layer):
        self.layer = layer

    def __enter__(self):
        self.was_locked = self.layer._tracker.locked
        self.layer._tracker.unlock()

    def __exit__(self, *exception):
        if self.was_locked:
            self.layer._tracker.lock()


def set_variable_trainable(layer, variable, trainable):
    """Moves a variable of a layer between its two lists of variables.

    `variable.trainable = False` alone does not last: `layer.trainable = True`
    sets the flag of every variable that was *tracked* as trainable, so that a
    frozen kernel would thaw. Private: `Layer._untrack_variable`,
    `Layer._track_variable`.
    """
    with unlocked(layer):
        layer._untrack_variable(variable)
        variable.trainable = trainable
        layer._track_variable(variable)


def remove_variable(layer, variable):
    """Takes a variable out of a built layer. Private: `_untrack_variable`."""
    with unlocked(layer):
        layer._untrack_variable(variable)


def seed_states(model):
    """The states of all seed generators inside a model, in order.

    `Layer.variables` has them, among all others. Private:
    `Layer._seed_generators`.
    """
    return [
        generator.state
        for layer in flatten_layers(model)
        for generator in layer._seed_generators
    ]


def refresh_torch_parameters(model):
    """Makes `model.parameters()` list the variables that the layers have now.

    On torch, Keras lists them once, when a layer is built. Private:
    `TorchLayer._track_variables`.
    """
    if keras.backend.backend() != "torch":
        return
    for layer in flatten_layers(model):
        layer._track_variables()


def builds_when_called(layer):
    """Whether a layer has no `build` that makes its sublayers.

    Keras then builds it by a symbolic call. A model is built from its config.
    Private: the mark that `keras.src.utils.python_utils.default` leaves.
    """
    default = getattr(layer.build, "_is_default", False)
    return default and not isinstance(layer, keras.Model)


def in_symbolic_call():
    """Whether the code runs in the symbolic call of a layer.

    Variables that are made in there have no values until it ends. Keras exports
    the scope, `keras.StatelessScope`, but not the question.
    """
    from keras.src.backend.common import stateless_scope

    return stateless_scope.in_stateless_scope()
