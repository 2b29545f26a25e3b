"""Which layers are converted, with which ranks; which biases are trained."""

import difflib
import re

import keras

from keras_srlora.backend.keras_private.graph import read_graph
from keras_srlora.backend.keras_private.nesting import flatten_layers
from keras_srlora.backend.keras_private.nesting import inside
from keras_srlora.conversion.blocks import DEFAULT
from keras_srlora.conversion.blocks import pretrained_projections
from keras_srlora.layers.kinds import ADAPTED
from keras_srlora.layers.kinds import PLAIN
from keras_srlora.layers.kinds import plain_class
from keras_srlora.layers.paths import layer_paths


def find_targets(model, names, excluded=(), modules=()):
    """The layers to convert, in the order of the model.

    Args:
        model: the argument of `enable_srlora`, like the next two.
        names: `target_layer_names`.
        excluded: `exclude_layer_names`.
        modules: list of the layers that are trained whole.
    """
    everything = flatten_layers(model)
    whole = {i for layer in modules for i in inside(layer)}
    if names is None:
        targets = _default_targets(model, everything)
        targets = [x for x in targets if id(x) not in whole]
    else:
        targets = _named_targets(model, everything, names)
        _refuse_whole(targets, whole)
    _check_names("exclude_layer_names", excluded)
    left_out: set = set()
    for name in excluded:
        matched = _matched(model, everything, name)
        if not matched:
            _refuse_name("exclude_layer_names", model, everything, name)
        left_out.update(map(id, matched))
    kept = [layer for layer in targets if id(layer) not in left_out]
    if not kept:
        raise ValueError(
            "`exclude_layer_names` and `modules_to_save` leave "
            f"nothing of the {len(targets) or 'default'} layers to convert in "
            f"model {model.name!r}. Received: "
            f"exclude_layer_names={excluded!r}, "
            f"modules_to_save={[layer.path for layer in modules]}"
        )
    return kept


def check_model(model):
    """Raises where a model has no kernels yet."""
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"`model` must be a `keras.Model`. Received: {type(model)}"
        )
    if not model.built:
        raise ValueError(
            f"Model {model.name!r} is not built, so it has no kernels to "
            "decompose. Call it on a batch, or `model.build(input_shape)`."
        )


def find_modules(model, names):
    """The layers that `modules_to_save` names, to be trained whole."""
    _check_names("modules_to_save", names)
    everything = flatten_layers(model)
    found: dict = {}
    for name in names:
        matched = [x for x in _matched(model, everything, name) if x.weights]
        if not matched:
            _refuse_name("modules_to_save", model, everything, name)
        found.update((id(layer), layer) for layer in matched)
    for layer in found.values():
        for part in flatten_layers(layer):
            if type(part) in PLAIN:
                raise ValueError(
                    f"`modules_to_save` names layer {layer.path!r}, in which "
                    f"{part.path!r} is an SRLoRA layer: it cannot be trained "
                    "whole as well. Call `keras_srlora.merge_srlora` first, or "
                    f"name other layers. Received: modules_to_save={names!r}"
                )
    return list(found.values())


def _default_targets(model, everything):
    pretrained = pretrained_projections(model)
    targets = [x for x in pretrained if plain_class(x) in DEFAULT]
    if targets:
        return targets
    refuse_converted(everything)
    if read_graph(model) is None:
        raise ValueError(
            f"Model {model.name!r} is a subclassed model, which does not say "
            "which of its layers make its outputs. Name the layers to convert "
            "in `target_layer_names`."
        )
    classes = sorted({type(layer).__name__ for layer in everything})
    raise ValueError(
        f"Model {model.name!r} has no `Dense` or `EinsumDense` layer to "
        "convert: there is none inside of a composite layer and none but those "
        "that make its outputs. Name the layers to convert in "
        f"`target_layer_names`. Received: layers of the classes {classes}"
    )


def _refuse_whole(targets, whole):
    for layer in targets:
        if id(layer) in whole:
            raise ValueError(
                f"Layer {layer.path!r} is named to be converted and, in "
                "`modules_to_save`, to be trained whole: it can be one of both."
            )


def _named_targets(model, everything, names):
    _check_names("target_layer_names", names)
    if not list(names):
        raise ValueError(
            "`target_layer_names` is empty, so there is nothing to convert. "
            "Name layers, or pass `None` for all projections. "
            f"Received: target_layer_names={names!r}"
        )
    targets: dict = {}
    for name in names:
        matched = _matched(model, everything, name)
        if not matched:
            _refuse_name("target_layer_names", model, everything, name)
        # An expression may match norms and embeddings on its way; a name
        # alone may not.
        wanted = [x for x in matched if isinstance(x, DEFAULT)]
        wanted = wanted or [x for x in matched if isinstance(x, tuple(ADAPTED))]
        targets.update((id(x), x) for x in wanted or matched)
    return list(targets.values())


def _matched(model, layers, name):
    """The layers of a name, or whose whole path an expression matches.

    Layers that have their path in common with others have another one, too.
    """
    paths = layer_paths(model)
    return [
        layer
        for layer in layers
        if name == layer.name
        or re.fullmatch(name, layer.path or "")
        or re.fullmatch(name, paths[id(layer)])
    ]


def _check_names(argument, names):
    listed = isinstance(names, (list, tuple, set, frozenset, dict))
    if not listed or not all(isinstance(n, str) and n for n in names):
        raise ValueError(
            f"`{argument}` must be a list of strings. "
            f"Received: {argument}={names!r}"
        )
    for name in names:
        try:
            re.compile(name)
        except re.error as error:
            raise ValueError(
                f"`{argument}` has a string that is no regular expression: "
                f"{error}. A name is one, too; escape its special characters. "
                f"Received: {name!r}"
            ) from error


def _refuse_name(argument, model, everything, name):
    if argument == "modules_to_save":
        what, fits = "have weights", lambda x: bool(x.weights)
    else:
        what, fits = "could be converted", lambda x: plain_class(x) in ADAPTED
    known = {x.name: x.path for x in everything if fits(x)}
    near = difflib.get_close_matches(name, known) or sorted(known)
    raise ValueError(
        f"`{argument}` matches nothing in model {model.name!r}. There "
        f"are layers of {len(known)} names that {what}, such as "
        f"{[(x, known[x]) for x in near[:3]]} (name, path). Received: {name!r}"
    )


def find_by_pattern(model, layers, argument, pattern, default):
    """The value of each layer, by the first name or expression that matches."""
    if pattern is None:
        return [default] * len(layers)
    if not isinstance(pattern, dict):
        raise ValueError(
            f"`{argument}` must be a dict from names to numbers. "
            f"Received: {argument}={pattern!r}"
        )
    _check_names(argument, pattern)
    values: dict = {}
    for name, of_name in pattern.items():
        matched = _matched(model, layers, name)
        if not matched:
            _refuse_name(argument, model, layers, name)
        for layer in matched:
            values.setdefault(id(layer), of_name)
    return [values.get(id(layer), default) for layer in layers]


def find_biases(model, layers, bias):
    """The variables that `bias` names."""
    if bias == "none":
        return []
    if bias == "srlora_only":
        biases = map(bias_of, layers)
        return [bias for bias in biases if bias is not None]
    return [v for v in model.variables if is_bias(v)]


def bias_of(layer):
    """The bias of a layer; `None` of an embedding, which has no such name."""
    return getattr(layer, "bias", None)


def is_bias(variable):
    """Whether it is what PyTorch calls a bias, that of a norm included."""
    return variable.name.endswith("bias") or variable.name == "beta"


def refuse_converted(layers):
    """Raises where one of the layers is an SRLoRA layer already."""
    for layer in layers:
        if type(layer) in PLAIN:
            raise ValueError(
                f"Layer {layer.path!r} was already converted by "
                "`enable_srlora` (or is an SRLoRA layer). Call "
                "`keras_srlora.merge_srlora(model)` first to start anew."
            )
