"""Paths by which files know the layers and variables of a model."""

import collections

import keras

from keras_srlora.backend import keras_private


def layer_paths(model: keras.Model) -> dict:
    """The path of each layer inside a model, `{id(layer): path}`.

    That is `layer.path`. Two KerasHub backbones in one model have layers of the
    same paths: these begin with the names of the models that they are inside
    of, as in `"bert_backbone_1/transformer_layer_0/..."`. Automatic names are
    counted within the model, so that the same code makes the same paths.
    """
    layers = keras_private.flatten_layers(model)
    paths = {id(layer): layer.path or layer.name for layer in layers}
    repeated = _repeated(paths)
    if repeated:
        # An outer model comes before those inside of it.
        holding = [
            (name, keras_private.inside(inner) - {id(inner)})
            for inner, name in _inner_models(model, layers)
        ]
        for key in repeated:
            names = [name for name, held in holding if key in held]
            paths[key] = "/".join([*names, paths[key]])
    return paths


def variable_paths(model: keras.Model) -> dict:
    """The path of each variable of a model, `{id(variable): path}`.

    That is `variable.path`, or begins as that of its layer in `layer_paths`
    where several have the same.
    """
    paths = {id(v): v.path for v in model.variables}
    repeated = _repeated(paths)
    if repeated:
        of_layers = layer_paths(model)
        # A layer comes before those inside of it, whose variables they are.
        for layer in keras_private.flatten_layers(model):
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
            automatic = keras_private.automatic_name(inner)
            if automatic is not None:
                count = counts[automatic]
                counts[automatic] += 1
                name = f"{automatic}_{count}" if count else automatic
            found.append((inner, name))
    return found


def _repeated(paths):
    """The keys whose path is that of another one, too."""
    counts = collections.Counter(paths.values())
    return {key for key, path in paths.items() if counts[path] > 1}
