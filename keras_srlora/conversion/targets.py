"""Which layers are converted, with which ranks; which biases are trained."""

import difflib
import re

import keras

from keras_srlora.backend import keras_private
from keras_srlora.layers.kinds import ADAPTED
from keras_srlora.layers.kinds import PLAIN

DEFAULT = tuple(
    plain for plain, adapted in ADAPTED.items() if adapted.converted_by_default
)


def find_targets(model, names, excluded=()):
    """The layers to convert, ordered by their paths."""
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"`model` must be a `keras.Model`. Received: {type(model)}"
        )
    if not model.built:
        raise ValueError(
            f"Model {model.name!r} is not built, so it has no kernels to "
            "decompose. Call it on a batch, or `model.build(input_shape)`."
        )
    everything = keras_private.flatten_layers(model)
    if names is None:
        targets = _default_targets(model, everything)
        if not targets:
            refuse_converted(everything)
            classes = sorted({type(layer).__name__ for layer in everything})
            raise ValueError(
                f"Model {model.name!r} has no `Dense` or `EinsumDense` layer "
                "to convert: there is none inside of a composite layer and "
                "none but those that make its outputs. Name the layers to "
                "convert in `target_layer_names`. Received: layers of the "
                f"classes {classes}"
            )
    else:
        targets = _named_targets(model, everything, names)
    _check_names("exclude_layer_names", excluded)
    left_out = set()
    for name in excluded:
        matched = _matched(everything, name)
        if not matched:
            _refuse_name("exclude_layer_names", model, everything, name)
        left_out.update(map(id, matched))
    kept = [layer for layer in targets if id(layer) not in left_out]
    if not kept:
        raise ValueError(
            f"`exclude_layer_names` leaves nothing of the {len(targets)} "
            f"layers to convert in model {model.name!r}. "
            f"Received: exclude_layer_names={excluded!r}"
        )
    _refuse_read_kernels(everything, kept)
    return sorted(kept, key=lambda layer: layer.path or layer.name)


def _default_targets(model, everything):
    projections = [
        x for x in everything if type(x) in DEFAULT and _is_matrix(x)
    ]
    first_level = {
        id(layer)
        for container in everything
        if isinstance(container, keras.Model)
        for layer in container.layers
    }
    deeper = [x for x in projections if id(x) not in first_level]
    if deeper:
        return deeper
    head = {id(layer) for layer in keras_private.output_layers(model)}
    if not head:
        raise ValueError(
            f"Model {model.name!r} is a subclassed model, which does not say "
            "which of its layers make its outputs. Name the layers to convert "
            "in `target_layer_names`."
        )
    return [x for x in projections if id(x) not in head]


def _is_matrix(layer):
    """Whether a plain layer has a kernel whose rank can be lowered.

    One that the model never calls has none at all.
    """
    if not layer.built:
        return False
    shape = keras_private.kernel_shape(layer)
    return not (type(layer) is keras.layers.Dense and 1 in shape)


def _refuse_read_kernels(everything, targets):
    """KerasHub's Gemma 4 multiplies by some kernels itself, not by a call."""
    names = ("gating_ffw", "gating_ffw_2", "ffw_linear", "dense")
    read = {
        id(getattr(container, name, None))
        for container in everything
        if ".gemma4." in type(container).__module__
        for name in names
    }
    found = sorted({x.name for x in targets if id(x) in read})
    if found:
        raise ValueError(
            "KerasHub's Gemma 4 multiplies by the kernels of some layers "
            "itself, where the factors would be left out. Pass "
            f"`exclude_layer_names={found}`."
        )


def _named_targets(model, everything, names):
    _check_names("target_layer_names", names)
    targets = {}
    for name in names:
        matched = _matched(everything, name)
        if not matched:
            _refuse_name("target_layer_names", model, everything, name)
        # An expression may match norms and embeddings on its way; a name
        # alone may not.
        wanted = [x for x in matched if isinstance(x, DEFAULT)]
        wanted = wanted or [x for x in matched if isinstance(x, tuple(ADAPTED))]
        targets.update((id(x), x) for x in wanted or matched)
    return list(targets.values())


def _matched(layers, name):
    """The layers of a name, or whose whole path an expression matches."""
    return [
        layer
        for layer in layers
        if name == layer.name or re.fullmatch(name, layer.path or "")
    ]


def _check_names(argument, names):
    if isinstance(names, str) or not all(isinstance(n, str) for n in names):
        raise ValueError(
            f"`{argument}` must be a list of strings. "
            f"Received: {argument}={names!r}"
        )


def _refuse_name(argument, model, everything, name):
    known = {x.name: x.path for x in everything if type(x) in ADAPTED}
    near = difflib.get_close_matches(name, known) or sorted(known)
    raise ValueError(
        f"`{argument}` matches nothing in model {model.name!r}. There "
        f"are layers of {len(known)} names that could be converted, such as "
        f"{[(x, known[x]) for x in near[:3]]} (name, path). Received: {name!r}"
    )


def find_ranks(model, layers, rank, pattern):
    """The rank of each layer, by the first name or expression that matches."""
    if pattern is None:
        return [rank] * len(layers)
    if not isinstance(pattern, dict):
        raise ValueError(
            "`rank_pattern` must be a dict from names to ranks. "
            f"Received: rank_pattern={pattern!r}"
        )
    _check_names("rank_pattern", pattern)
    ranks = {}
    for name, of_name in pattern.items():
        matched = _matched(layers, name)
        if not matched:
            _refuse_name("rank_pattern", model, layers, name)
        for layer in matched:
            ranks.setdefault(id(layer), of_name)
    return [ranks.get(id(layer), rank) for layer in layers]


def find_biases(model, layers, bias):
    """The variables that `bias` names."""
    if bias == "none":
        return []
    if bias == "srlora_only":
        return [layer.bias for layer in layers if layer.bias is not None]
    return [v for v in model.variables if is_bias(v)]


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
