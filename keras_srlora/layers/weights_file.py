"""A layer's part of a weights file, and of a `.keras` file.

Kernel and bias have the keys of the plain layer, "0" and "1", so that a file of
the plain model can be read; everything else has a name.
"""

from keras_srlora.backend.keras_private.kernels import stored_variables
from keras_srlora.layers import pairs
from keras_srlora.layers.record import Record


def save(layer, store):
    """Writes the variables, the record and the companions."""
    if not layer.built:
        return
    for index, variable in enumerate(stored_variables(layer)):
        store[str(index)] = variable
    for name, factor in zip(layer.factor_names, layer.factors):
        store[name] = factor
    arrays = {
        **layer.record.to_arrays(),
        **layer.frozen.to_arrays(),
        **layer.companions.to_arrays(),
    }
    for name, array in arrays.items():
        store[name] = array


def load(layer, store):
    """Reads weights that `save` wrote, or a plain layer's.

    Weights of the plain layer (a pretrained model) replace the kernel; the
    factors start anew and the kernel is decomposed when training starts.

    Raises:
        ValueError: before anything is changed, if these are the weights of
            another kind of layer, or of another rank.
    """
    if not layer.built:
        return
    plain = stored_variables(layer)
    keys = set(store.keys())
    names = layer.factor_names
    expected = {str(index) for index in range(len(plain))}
    if not expected <= keys or (keys - expected and names[0] not in keys):
        raise ValueError(
            f"Layer {layer.path!r} cannot load these weights: expected "
            f"{sorted(expected)} of a plain layer, or those with the "
            f"factors {names}. A file of the plain model is read by "
            "`keras_srlora.load_plain_weights(model, filepath)`. "
            f"Received: {sorted(keys)}"
        )
    weights = [store[str(index)] for index in range(len(plain))]
    if names[0] not in keys:
        load_plain(layer, weights)
        return
    for name, factor in zip(names, layer.factors):
        if tuple(store[name].shape) != tuple(factor.shape):
            raise ValueError(
                f"Layer {layer.path!r} has rank {layer.rank}, the saved "
                f"weights have another: `{name}` is "
                f"{tuple(factor.shape)} here. "
                f"Received: shape {tuple(store[name].shape)}. Build the "
                "model with the same `rank`."
            )
    arrays = {key: store[key] for key in keys - expected}
    record = Record.from_arrays(arrays)
    if record.initialized:
        layer.frozen.check_room(pairs.frozen_rows(layer, record), layer.path)
    for variable, value in zip(plain, weights):
        variable.assign(value)
    for name, factor in zip(names, layer.factors):
        factor.assign(store[name])
    _adopt(layer, record)
    layer.frozen.from_arrays(arrays)
    layer.companions.restore(arrays)


def load_plain(layer, weights):
    """Takes the plain layer's weights; the pairs start anew."""
    for variable, value in zip(stored_variables(layer), weights):
        variable.assign(value)
    pairs.draw_factors(layer)
    _adopt(layer, Record())
    layer.frozen.from_arrays({})
    layer.companions.restore({})


def _adopt(layer, record):
    """Adopts the record saved with a loaded kernel."""
    layer.record = record
    layer.frozen.adopt(pairs.frozen_rows(layer, record))
