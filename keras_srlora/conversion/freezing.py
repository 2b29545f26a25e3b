"""Freezing the pretrained part around the factors."""

from __future__ import annotations

import warnings

import keras

from keras_srlora.backend.keras_private.graph import read_graph
from keras_srlora.backend.keras_private.nesting import flatten_layers
from keras_srlora.backend.keras_private.nesting import inside
from keras_srlora.backend.keras_private.nesting import set_variable_trainable
from keras_srlora.backend.keras_private.pinned import has_pins
from keras_srlora.backend.keras_private.pinned import hold
from keras_srlora.backend.keras_private.pinned import is_held
from keras_srlora.backend.keras_private.pinned import layers_directly_inside
from keras_srlora.backend.keras_private.pinned import open_around
from keras_srlora.backend.keras_private.pinned import own_variables
from keras_srlora.backend.keras_private.pinned import pin
from keras_srlora.backend.keras_private.pinned import pinned_variables
from keras_srlora.backend.keras_private.pinned import set_own_trainable
from keras_srlora.backend.keras_private.pinned import set_trainable
from keras_srlora.backend.keras_private.pinned import trainable_before
from keras_srlora.backend.keras_private.pinned import unpin
from keras_srlora.conversion.blocks import calls_holding
from keras_srlora.conversion.blocks import find_head
from keras_srlora.conversion.blocks import pretrained_projections
from keras_srlora.layers.base import SRLoRALayer
from keras_srlora.layers.paths import layer_paths
from keras_srlora.layers.paths import named_layers


def freeze_base(model, targets, trained=(), modules=(), around=()):
    """Freezes the pretrained part, but for the targets and named parts.

    Frozen variables stay so where the model is frozen and thawed. Variables
    that an earlier call let train still train, and so does the head, but for
    those of it that the user froze.

    Args:
        model: a built `keras.Model`.
        targets: list of the layers that are to be converted.
        trained: list of variables to be trained.
        modules: list of layers to be trained whole.
        around: list of layers that the model may be inside of.
    """
    everything = flatten_layers(model)
    adapted = [x for x in everything if isinstance(x, SRLoRALayer)]
    trained = {id(variable) for variable in trained}
    kept = {id(x) for x in [*targets, *adapted]}
    saved = _saved_modules(model)
    modules = [*modules, *(x for found in saved.values() for x in found)]
    whole = {i for layer in modules for i in inside(layer)}
    parts = _base_parts(model, kept)
    for layer in targets:
        unpin(layer)
    for layer in adapted:
        if layer.bias is not None and id(layer.bias) in trained:
            set_variable_trainable(layer, layer.bias, True)
            layer.train_bias = True
    learning = kept | whole | _holding(everything, trained)
    for part in parts:
        for layer in flatten_layers(part):
            if id(layer) not in kept | whole:
                _freeze(layer, trained)
        for layer in flatten_layers(part):
            if not inside(layer) & learning and not any(
                v.trainable for v in layer.variables
            ):
                hold(layer)
    for layer in modules:
        for part in flatten_layers(layer):
            unpin(part)
        set_trainable(layer, True)
    for layer in [*around, *everything]:
        # A model that was frozen whole would train nothing of what is inside.
        if not layer.trainable and inside(layer) & learning:
            _open(layer, learning)
    for layer in everything:
        # Moving averages are never trained, whoever names them.
        for variable in own_variables(layer):
            if id(variable) in trained:
                variable.trainable = True


def release(models):
    """Undoes `freeze_base`, but for variables frozen before or since.

    Args:
        models: list of models; those in which SRLoRA layers are left stay as
            they are, with all their sublayers.
    """
    inner = {id(x): flatten_layers(x) for x in models}
    busy = {
        id(layer)
        for layers in inner.values()
        if any(isinstance(x, SRLoRALayer) for x in layers)
        for layer in layers
    }
    for model in models:
        if model.trainable:
            _thaw(model, busy)
    for layers in inner.values():
        for layer in layers:
            if id(layer) not in busy:
                unpin(layer)


def _thaw(layer, busy):
    """Thaws variables that were trainable before, in layers that are now."""
    if id(layer) not in busy and has_pins(layer):
        before = trainable_before(layer)
        if id(layer) in before:
            set_own_trainable(layer, True)
        for variable in pinned_variables(layer):
            variable.trainable = id(variable) in before
    for part in layers_directly_inside(layer):
        if part.trainable or has_pins(part):
            _thaw(part, busy)


def saved_variables(model: keras.Model) -> list:
    """The weights of the layers in the `modules_to_save` of a model.

    Raises:
        ValueError: if one of these layers is not inside of the model.
    """
    modules = _saved_modules(model)
    missing = {path for (path, *_), found in modules.items() if not found}
    if missing:
        raise ValueError(
            f"`modules_to_save` names layers that are not inside of model "
            f"{model.name!r}. Pass the model that `enable_srlora` converted. "
            f"Received: {sorted(missing)}"
        )
    layers = [layer for found in modules.values() for layer in found]
    held = {id(v) for layer in layers for v in layer.weights}
    return [v for v in model.weights if id(v) in held]


def module_paths(model, layer) -> list[str]:
    """The `modules_to_save` of a layer, by their paths in a model."""
    paths, everything = layer_paths(model), flatten_layers(model)
    return [
        paths[id(found)]
        for path in layer.modules_to_save
        for found in named_layers(path, layer, everything, paths)
    ]


def pretrained_variables(model: keras.Model) -> list:
    """The variables of a converted model that are no part of a head."""
    everything = flatten_layers(model)
    adapted = {id(x) for x in everything if isinstance(x, SRLoRALayer)}
    with warnings.catch_warnings():
        # The conversion has warned of unclear ones.
        warnings.simplefilter("ignore")
        parts = _base_parts(model, adapted)
    return [variable for part in parts for variable in part.variables]


def _saved_modules(model):
    """The layers that SRLoRA layers of a model name in `modules_to_save`.

    Returns:
        `{(path, *ids): layers}`.
    """
    paths, everything = layer_paths(model), flatten_layers(model)
    found: dict = {}
    for layer in everything:
        if isinstance(layer, SRLoRALayer):
            for path in layer.modules_to_save:
                named = named_layers(path, layer, everything, paths)
                found[path, *map(id, named)] = named
    return found


def trainable_flags(container) -> list:
    """`[[of the layer, [of its own variables]], ...]`, for a config.

    0 and 1; -1 of what stays frozen where the whole model is thawed.
    """
    flags = []
    for layer in flatten_layers(container):
        pinned = set(map(id, pinned_variables(layer)))
        own = own_variables(layer)
        flags.append(
            [
                -1 if is_held(layer) else int(layer.trainable),
                [-1 if id(v) in pinned else int(v.trainable) for v in own],
            ]
        )
    return flags


def have_places(container, flags) -> bool:
    """Whether a container has the layers and variables of some flags."""
    layers = flatten_layers(container)
    return [len(own) for _, own in flags] == [
        len(own_variables(layer)) for layer in layers
    ]


def is_frozen_for_good(layer) -> bool:
    """Whether a layer has variables, and stays frozen where others thaw."""
    return any(pinned_variables(part) for part in flatten_layers(layer))


def set_trainable_flags(container, flags) -> None:
    """Sets the flags of `trainable_flags`."""
    layers = flatten_layers(container)
    # An outer layer comes first, and sets those inside of it.
    for layer, (flag, _) in zip(layers, flags):
        if layer.trainable != (flag > 0):
            layer.trainable = flag > 0
    for layer, (of_layer, own) in zip(layers, flags):
        variables = list(zip(own_variables(layer), own))
        pinned = [v for v, flag in variables if flag < 0]
        if pinned or of_layer < 0:
            pin(layer, pinned)
        for variable, flag in variables:
            if variable.trainable != (flag > 0):
                variable.trainable = flag > 0
        if of_layer < 0:
            hold(layer)


def _freeze(layer, trained):
    """Freezes the variables of a layer itself, for good.

    Variables that an earlier call let train still train.
    """
    if has_pins(layer):
        frozen = pinned_variables(layer)
    else:
        frozen = own_variables(layer)
    pin(layer, [v for v in frozen if id(v) not in trained])


def _open(layer, learning):
    """Makes a frozen layer trainable, and nothing that was frozen with it."""
    for variable in own_variables(layer):
        variable.trainable = False
    for part in layers_directly_inside(layer):
        if not inside(part) & learning:
            set_trainable(part, False)
    open_around(layer)


def _holding(layers, variables):
    """Ids of the layers that have some variables (ids) of their own."""
    return {
        id(layer)
        for layer in layers
        if any(id(v) in variables for v in own_variables(layer))
    }


def _base_parts(model, targets):
    """The layers that hold the pretrained part, and nothing else."""
    base = getattr(model, "backbone", None)
    if isinstance(base, keras.Model):
        return [base]
    if _is_backbone(model):
        return [model]
    holding = [layer for layer in model.layers if inside(layer) & targets]
    pretrained = targets | set(map(id, pretrained_projections(model)))
    head, unclear = find_head(model, pretrained)
    if _are_backbones(model, holding):
        if head or len(holding) > 1 or _is_backbone(holding[0]):
            return holding
        # One model inside of another: its own head is the head.
        return _base_parts(holding[0], targets)
    _warn_of_head(model, head, unclear)
    left = {id(layer) for layer in head}
    return [layer for layer in model.layers if id(layer) not in left]


def _are_backbones(model, holding):
    """Whether the targets are in models side by side.

    Models that follow each other are blocks; layers around backbones are new.
    """
    graph = read_graph(model)
    if graph is None or not holding:
        return False
    if not all(isinstance(layer, keras.Model) for layer in holding):
        return False
    calls = calls_holding(graph, set(map(id, holding)))
    return len(holding) == 1 or not graph.after(calls) & calls


def _is_backbone(model):
    # By name, so that keras_hub need not be imported.
    return any(
        cls.__name__ == "Backbone" and cls.__module__.startswith("keras_hub")
        for cls in type(model).__mro__
    )


def _warn_of_head(model, head, unclear):
    """Warns, and names trainable and frozen layers, where it is unclear."""
    frozen = [layer.name for layer in unclear]
    trained = [layer.name for layer in head]
    if read_graph(model) is not None:
        if frozen:
            warnings.warn(
                f"Layers {frozen} of model {model.name!r} are neither in front "
                "of the converted layers nor behind them, and are frozen as "
                "pretrained ones. Where one is new, pass its name "
                "in `modules_to_save`.",
                stacklevel=6,
            )
        return
    if frozen or trained:
        warnings.warn(
            f"Model {model.name!r} is a subclassed model, which does not say "
            "in what order it calls its layers. By the order of its "
            f"attributes, {trained or 'no others'} come behind the converted "
            f"layers and stay trainable, and {frozen or 'no others'} are "
            "frozen. Where a frozen layer is new, pass its name in "
            "`modules_to_save`; set `layer.trainable = False` where a "
            "trainable one was pretrained.",
            stacklevel=6,
        )
