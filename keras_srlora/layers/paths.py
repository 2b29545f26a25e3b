"""Paths by which files know the layers and variables of a model."""

import collections
import weakref

import keras

from keras_srlora.backend.keras_private.nesting import automatic_name
from keras_srlora.backend.keras_private.nesting import flatten_layers
from keras_srlora.backend.keras_private.nesting import inside


def layer_paths(model: keras.Model) -> dict:
    """The path of each layer inside a model, `{id(layer): path}`.

    That is `layer.path`, without the names of `Sequential` models: these begin
    the paths in a model that code has built, and not in one that was loaded
    from a `.keras` file. Two KerasHub backbones in one model have layers of the
    same paths: these begin with the names of the models that they are inside
    of, as in `"bert_backbone_1/transformer_layer_0/..."`. Automatic names are
    counted within the model, so that the same code makes the same paths.
    """
    layers = flatten_layers(model)
    paths = {id(layer): layer.path or layer.name for layer in layers}
    for prefix, sequential in _sequentials(layers):
        _strip(prefix, flatten_layers(sequential), paths)
    repeated = _repeated(paths)
    if repeated:
        # An outer model comes before those inside of it.
        holding = [
            (name, inside(inner) - {id(inner)})
            for inner, name in _inner_models(model, layers)
        ]
        for key in repeated:
            names = [name for name, held in holding if key in held]
            paths[key] = "/".join([*names, paths[key]])
    return paths


class LayerPath(str):
    """The path of a layer, by which a file knows it, and the layer itself.

    Of two layers of one path, in a part of a model that is alone, the path does
    not say which one is meant.
    """

    _layer: weakref.ref

    def __new__(cls, path, layer):
        made = super().__new__(cls, path)
        made._layer = weakref.ref(layer)
        return made

    @property
    def layer(self):
        return self._layer()


def named_layers(path, holder, layers, paths) -> list:
    """The layers of a path that another layer names; more than one are equal.

    Args:
        path: str, a `LayerPath` or that of a file.
        holder: the layer that names it.
        layers: list of the layers of a model, outer ones first.
        paths: dict, the `layer_paths` of the model.
    """
    meant = getattr(path, "layer", None)
    if meant is not None:
        return [x for x in layers if x is meant]
    found = [x for x in layers if paths[id(x)] == path]
    found = found or [x for x in layers if x.path == path]
    if len(found) > 1:
        # Those of the innermost model in which there are any.
        for model in reversed(layers):
            if isinstance(model, keras.Model):
                held = inside(model)
                near = [x for x in found if id(x) in held]
                if near and id(holder) in held:
                    return near
    return found


def variable_paths(model: keras.Model) -> dict:
    """The path of each variable of a model, `{id(variable): path}`.

    That is `variable.path`, without the names of `Sequential` models. It begins
    as that of its layer in `layer_paths` where several have the same.
    """
    paths = {id(v): v.path for v in model.variables}
    for prefix, sequential in _sequentials(flatten_layers(model)):
        _strip(prefix, sequential.variables, paths)
    repeated = _repeated(paths)
    if repeated:
        of_layers = layer_paths(model)
        # A layer comes before those inside of it, whose variables they are.
        for layer in flatten_layers(model):
            for variable in layer.variables:
                if id(variable) in repeated:
                    path = f"{of_layers[id(layer)]}/{variable.name}"
                    paths[id(variable)] = path
    return paths


def _inner_models(model, layers):
    """`[(model, name)]` of the models inside of a model."""
    found = []
    counts: collections.Counter = collections.Counter()
    for inner in layers:
        if isinstance(inner, keras.Model) and inner is not model:
            name = inner.name
            automatic = automatic_name(inner)
            if automatic is not None:
                count = counts[automatic]
                counts[automatic] += 1
                name = f"{automatic}_{count}" if count else automatic
            found.append((inner, name))
    return found


def _sequentials(layers):
    """`[(prefix, model)]` of the `Sequential` models among some layers.

    An outer one comes before those inside of it.
    """
    return [
        (f"{layer.path or layer.name}/", layer)
        for layer in layers
        if isinstance(layer, keras.Sequential)
    ]


def _strip(prefix, inside_of_it, paths):
    """Takes a prefix off the paths of layers or variables in `paths`."""
    for item in inside_of_it:
        path = item.path or ""
        if id(item) in paths and path.startswith(prefix):
            paths[id(item)] = path[len(prefix) :]


def _repeated(paths):
    """The keys whose path is that of another one, too."""
    counts = collections.Counter(paths.values())
    return {key for key, path in paths.items() if counts[path] > 1}
