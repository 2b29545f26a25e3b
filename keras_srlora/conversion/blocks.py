"""Which projections of a model are pretrained ones, and what its head is.

Projections are `Dense` and `EinsumDense` layers. Blocks are layers that make
projections inside of them: attention, or a transformer layer; a layer that is
called a head, as KerasHub's `MaskedLMHead`, is none. Where a model has blocks,
they are its pretrained part and the layers behind them are the head; where it
has none, its last layer with a kernel is the head.
"""

import keras

from keras_srlora.backend.keras_private.graph import read_graph
from keras_srlora.backend.keras_private.kernels import kernel_shape
from keras_srlora.backend.keras_private.nesting import flatten_layers
from keras_srlora.backend.keras_private.nesting import inside
from keras_srlora.backend.keras_private.pinned import layers_directly_inside
from keras_srlora.layers.kinds import ADAPTED
from keras_srlora.layers.kinds import PLAIN
from keras_srlora.layers.kinds import plain_class

DEFAULT = tuple(
    plain for plain, adapted in ADAPTED.items() if adapted.converted_by_default
)


def pretrained_projections(model):
    """The projections that are converted where none are named.

    Those that are SRLoRA layers already are among them.
    """
    projections = [x for x in flatten_layers(model) if _is_projection(x)]
    models = _models_at_the_surface(model)
    surface = _at_the_surface(models)
    blocks = {id(x) for x in projections} - surface
    if blocks:
        for part in models:
            blocks = blocks | _between_attention(part, blocks, part is model)
        return [x for x in projections if id(x) in blocks]
    head = _last_kernels(model)
    if head is None:
        return []
    return [x for x in projections if id(x) not in head]


def find_head(model, pretrained):
    """The layers of a model that come behind its pretrained part.

    Args:
        model: a `keras.Model`.
        pretrained: ids of layers: the pretrained projections.

    Returns:
        `(head, unclear)`, lists of layers at the model's first level. `unclear`
        are those that may be new or not.
    """
    graph = read_graph(model)
    if graph is None:
        return _head_by_order(model, pretrained)
    holding = calls_holding(graph, pretrained)
    before = graph.before(holding) | holding
    behind = graph.after(holding)
    in_front = {id(graph.operations[i]) for i in before}
    candidates: dict = {}
    unclear: dict = {}
    for i, operation in enumerate(graph.operations):
        if id(operation) not in in_front and _has_weights(operation):
            kind = candidates if i in behind else unclear
            kind[id(operation)] = operation
    head = list(candidates.values())
    return head, [x for i, x in unclear.items() if i not in candidates]


def calls_holding(graph, targets):
    """The calls of layers that hold one of some layers (ids).

    A head may read a layer of the pretrained part, a tied embedding.
    """
    found: dict = {}
    by_heads: dict = {}
    for i, operation in enumerate(graph.operations):
        held = _inside_operation(operation) & targets
        if held:
            (by_heads if _is_head(operation) else found)[i] = held
    elsewhere = {x for held in found.values() for x in held}
    return set(found) | {i for i, x in by_heads.items() if x - elsewhere}


def _is_projection(layer):
    """Whether a layer has a kernel whose rank can be lowered.

    One that the model never calls has none at all.
    """
    kind = plain_class(layer)
    if kind not in DEFAULT and PLAIN.get(kind) not in DEFAULT:
        return False
    if not layer.built:
        return False
    shape = kernel_shape(layer)
    return not (isinstance(layer, keras.layers.Dense) and 1 in shape)


def _models_at_the_surface(model):
    """A model, and the models that are its layers, and theirs."""
    found = [model]
    for part in found:
        found += [x for x in part.layers if isinstance(x, keras.Model)]
    return found


def _at_the_surface(models):
    """Ids of the layers of some models, of wrappers and of heads."""
    found = [layer for part in models for layer in part.layers]
    for layer in found:
        if isinstance(layer, keras.layers.Wrapper) or _is_head(layer):
            found += layers_directly_inside(layer)
    return set(map(id, found))


def _between_attention(model, blocks, has_head):
    """Ids of projections in blocks that are spread over a model.

    A model may have attention as its layers, and the rest of its blocks beside
    it. A layer behind the last attention belongs to a block where a residual
    connection bypasses it; a head is not bypassed.
    """
    graph = read_graph(model)
    if graph is None:
        return _between_attention_by_order(model, blocks, has_head)
    attention = {
        i
        for i in calls_holding(graph, blocks)
        if _is_attention(graph.operations[i])
    }
    behind = graph.after(attention)
    leads_to_attention = graph.before(attention)
    found = set()
    for i in behind - attention:
        layers = _inside_operation(graph.operations[i])
        if layers and (
            i in leads_to_attention or _is_bypassed(graph, i, attention)
        ):
            found |= layers
    return found


def _is_bypassed(graph, i, attention):
    """Whether a way from attention to an output behind a call avoids it."""
    in_front = graph.before([i]) & attention
    outputs = graph.after([i]) & set(graph.outputs)
    return bool(graph.after(in_front, without=i) & outputs)


def _between_attention_by_order(model, blocks, has_head):
    layers = [x for x in model.layers if _has_kernel(x)]
    first = [
        i
        for i, layer in enumerate(layers)
        if _is_attention(layer) and inside(layer) & blocks
    ]
    if not first:
        return set()
    behind = layers[first[0] : -1] if has_head else layers[first[0] :]
    return {found for layer in behind for found in inside(layer)}


def _last_kernels(model):
    """Ids of the layers that make a model's outputs, if its graph shows them.

    Layers without a kernel (an activation, a norm) are passed by on the way.
    """
    graph = read_graph(model)
    if graph is None:
        return None
    found, passed = set(), list(graph.outputs)
    for i in passed:
        operation = graph.operations[i]
        if not _has_kernel(operation):
            passed += graph.parents[i]
        elif not isinstance(operation, keras.Model):
            found |= inside(operation)
        elif isinstance(operation, keras.Sequential) and any(
            _has_kernel(graph.operations[j]) for j in graph.before([i])
        ):
            found |= inside(operation)
        else:
            found |= _last_kernels(operation) or set()
    return found


def _head_by_order(model, pretrained):
    """Of a subclassed model, which has no graph of its calls."""
    holding = [
        i
        for i, layer in enumerate(model.layers)
        if inside(layer) & pretrained and not _is_head(layer)
    ]
    last = max(holding, default=len(model.layers))
    head = [x for x in model.layers[last + 1 :] if _has_weights(x)]
    unclear = [
        x
        for i, x in enumerate(model.layers[:last])
        if i not in holding and _has_weights(x)
    ]
    return head, unclear


def _is_attention(layer):
    return "Attention" in type(layer).__name__


def _is_head(layer):
    # KerasHub and its users call them so; no other mark exists.
    name = type(layer).__name__
    return name.endswith("Head") and "Attention" not in name


def _inside_operation(operation):
    is_layer = isinstance(operation, keras.layers.Layer)
    return inside(operation) if is_layer else set()


def _has_weights(operation):
    return bool(getattr(operation, "weights", None))


def _has_kernel(operation):
    return any(len(v.shape) > 1 for v in getattr(operation, "weights", ()))
