"""Freezing the pretrained part around the factors."""

from __future__ import annotations

import warnings

import keras

from keras_srlora.backend import keras_pinned
from keras_srlora.backend import keras_private
from keras_srlora.backend.keras_graph import read_graph
from keras_srlora.backend.keras_private import inside
from keras_srlora.conversion.blocks import calls_holding
from keras_srlora.conversion.blocks import find_head
from keras_srlora.conversion.blocks import pretrained_projections
from keras_srlora.layers.base import SRLoRALayer


def freeze_base(model, targets, trained=(), modules=()):
    """Freezes the pretrained part, but for the targets and named parts.

    Frozen variables stay so where the model is frozen and thawed. Variables
    that an earlier call let train still train, and so does the head, but for
    those of it that the user froze.

    Args:
        model: a built `keras.Model`.
        targets: list of the layers that are to be converted.
        trained: list of variables to be trained.
        modules: list of layers to be trained whole.
    """
    everything = keras_private.flatten_layers(model)
    adapted = [x for x in everything if isinstance(x, SRLoRALayer)]
    trained = {id(variable) for variable in trained}
    kept = {id(x) for x in [*targets, *adapted]}
    modules = [*modules, *_layers_at(everything, _saved_paths(everything))]
    whole = {i for layer in modules for i in inside(layer)}
    parts = _base_parts(model, kept)
    for layer in targets:
        keras_pinned.unpin(layer)
    for layer in adapted:
        if layer.bias is not None and id(layer.bias) in trained:
            keras_private.set_variable_trainable(layer, layer.bias, True)
            layer.train_bias = True
    for part in parts:
        for layer in keras_private.flatten_layers(part):
            if id(layer) not in kept | whole:
                _freeze(layer, trained)
            if not inside(layer) & (kept | whole) and not any(
                v.trainable for v in layer.variables
            ):
                keras_pinned.set_trainable(layer, False)
    for layer in modules:
        for part in keras_private.flatten_layers(layer):
            keras_pinned.unpin(part)
        keras_pinned.set_trainable(layer, True)
    learning = kept | whole | _holding(everything, trained)
    for layer in everything:
        if not layer.trainable and inside(layer) & learning:
            _open(layer, learning)
    for layer in everything:
        # Moving averages are never trained, whoever names them.
        for variable in keras_pinned.own_variables(layer):
            if id(variable) in trained:
                variable.trainable = True


def release(models):
    """Undoes `freeze_base`, but for variables frozen before or since.

    Args:
        models: list of models; those in which SRLoRA layers are left stay as
            they are, with all their sublayers.
    """
    inner = {id(x): keras_private.flatten_layers(x) for x in models}
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
                keras_pinned.unpin(layer)


def _thaw(layer, busy):
    """Thaws variables that were trainable before, in layers that are now."""
    if id(layer) not in busy and keras_pinned.has_pins(layer):
        before = keras_pinned.trainable_before(layer)
        if id(layer) in before:
            keras_pinned.set_own_trainable(layer, True)
        for variable in keras_pinned.pinned_variables(layer):
            variable.trainable = id(variable) in before
    for part in keras_pinned.layers_directly_inside(layer):
        if part.trainable or keras_pinned.has_pins(part):
            _thaw(part, busy)


def saved_variables(model: keras.Model) -> list:
    """The weights of the layers in the `modules_to_save` of a model.

    Raises:
        ValueError: if one of these layers is not inside of the model.
    """
    everything = keras_private.flatten_layers(model)
    paths = _saved_paths(everything)
    layers = _layers_at(everything, paths)
    missing = set(paths) - {layer.path for layer in layers}
    if missing:
        raise ValueError(
            f"`modules_to_save` names layers that are not inside of model "
            f"{model.name!r}. Pass the model that `enable_srlora` converted. "
            f"Received: {sorted(missing)}"
        )
    found = {id(v) for layer in layers for v in layer.weights}
    return [v for v in model.weights if id(v) in found]


def pretrained_variables(model: keras.Model) -> list:
    """The variables of a converted model that are no part of a head."""
    everything = keras_private.flatten_layers(model)
    adapted = {id(x) for x in everything if isinstance(x, SRLoRALayer)}
    with warnings.catch_warnings():
        # The conversion has warned of unclear ones.
        warnings.simplefilter("ignore")
        parts = _base_parts(model, adapted)
    return [variable for part in parts for variable in part.variables]


def _saved_paths(layers):
    """The `modules_to_save` of the SRLoRA layers among some layers."""
    return {
        path: None
        for layer in layers
        if isinstance(layer, SRLoRALayer)
        for path in layer.modules_to_save
    }


def _layers_at(layers, paths):
    return [layer for layer in layers if layer.path in paths]


def trainable_flags(container) -> list:
    """`[[of the layer, [of its own variables]], ...]`, for a config.

    0 and 1; -1 of a variable that stays frozen where the layer is thawed.
    """
    flags = []
    for layer in keras_private.flatten_layers(container):
        pinned = set(map(id, keras_pinned.pinned_variables(layer)))
        own = keras_pinned.own_variables(layer)
        flags.append(
            [
                int(layer.trainable),
                [-1 if id(v) in pinned else int(v.trainable) for v in own],
            ]
        )
    return flags


def set_trainable_flags(container, flags) -> None:
    """Sets the flags of `trainable_flags`."""
    layers = keras_private.flatten_layers(container)
    # An outer layer comes first, and sets those inside of it.
    for layer, (flag, _) in zip(layers, flags):
        if layer.trainable != bool(flag):
            layer.trainable = bool(flag)
    for layer, (_, own) in zip(layers, flags):
        variables = list(zip(keras_pinned.own_variables(layer), own))
        pinned = [v for v, flag in variables if flag < 0]
        if pinned:
            keras_pinned.pin(layer, pinned)
        for variable, flag in variables:
            if variable.trainable != (flag > 0):
                variable.trainable = flag > 0


def _freeze(layer, trained):
    """Freezes the variables of a layer itself, for good.

    Variables that an earlier call let train still train.
    """
    if keras_pinned.has_pins(layer):
        frozen = keras_pinned.pinned_variables(layer)
    else:
        frozen = keras_pinned.own_variables(layer)
    keras_pinned.pin(layer, [v for v in frozen if id(v) not in trained])


def _open(layer, learning):
    """Makes a frozen layer trainable, and nothing that was frozen with it."""
    for variable in keras_pinned.own_variables(layer):
        variable.trainable = False
    for part in keras_pinned.layers_directly_inside(layer):
        if not inside(part) & learning:
            keras_pinned.set_trainable(part, False)
    keras_pinned.set_own_trainable(layer, True)


def _holding(layers, variables):
    """Ids of the layers that have some variables (ids) of their own."""
    return {
        id(layer)
        for layer in layers
        if any(id(v) in variables for v in keras_pinned.own_variables(layer))
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
