"""`save_adapter`, `load_adapter` and `adapter_disabled`."""

import contextlib
import warnings

import numpy as np
from keras import ops

from keras_srlora import _adapter_file
from keras_srlora import _devices
from keras_srlora import _keras
from keras_srlora._checks import check_arguments
from keras_srlora._checks import check_paths
from keras_srlora._converted import PLAIN
from keras_srlora._fingerprint import fingerprint
from keras_srlora._fingerprint import is_fingerprint
from keras_srlora._layer import FACTORS
from keras_srlora._layers import match_records
from keras_srlora._layers import srlora_layers
from keras_srlora._recipes import get_recipe
from keras_srlora._state import AdapterState
from keras_srlora.convert import check_convertible
from keras_srlora.convert import convert_plain
from keras_srlora.convert import plain_matrix

# Fields of a layer's metadata, and their types in JSON.
DESCRIPTION = {
    "path": str,
    "class": str,
    "equation": (str, type(None)),
    "kernel_shape": list,
    "rank": int,
    "target_rank": int,
    "lora_alpha": (int, float, type(None)),
    "recipe": dict,
    "fingerprint": list,
}
TRAINABLE = "trainable"


def save_adapter(model, filepath, include_trainable=False):
    """Writes what SRLoRA learnt, without the pretrained kernels.

    The file (safetensors) holds for each layer, by its path, the factors, the
    pairs that were fused, the directions that are unused or were subtracted,
    and the record: at most `2 · target_rank` pairs a kernel however many
    recompositions there were. Its metadata say what it fits: paths, equations,
    shapes, rank, `target_rank`, `lora_alpha`, recipe, and a fingerprint of each
    pretrained kernel. It is written whole or not at all.

    Args:
        model: a `keras.Model` with SRLoRA layers whose kernels were decomposed.
        filepath: path of the file, such as `"film_reviews.safetensors"`.
        include_trainable: bool. Whether the other trainable variables (a head,
            biases, norms) are written too. Defaults to `False`: where there are
            any, a warning says which were left out.

    Raises:
        ValueError: if there is no SRLoRA layer, one was not decomposed yet, or
            two have the same path.
        ImportError: if safetensors is not installed.

    Example:

    ```python
    keras_srlora.save_adapter(model, "film_reviews.safetensors")
    ```
    """
    layers = srlora_layers(model)
    check_paths([layer.path for layer in layers], "SRLoRA layers")
    tensors, described = {}, []
    for layer in layers:
        if not layer.initialized:
            raise ValueError(
                f"The kernel of layer {layer.path!r} was not decomposed yet: "
                "there is nothing to save. Train first, or call "
                "`keras_srlora.initialize_factors(model)`."
            )
    match_records(layers)
    for layer in layers:
        for name, array in _layer_arrays(layer).items():
            tensors[f"{layer.path}/{name}"] = array
        described.append(_describe(layer))
    others = _other_trainable(model, layers)
    if include_trainable:
        check_paths([v.path for v in others], "trainable variables")
        for variable in others:
            tensors[f"{TRAINABLE}/{variable.path}"] = _to_numpy(variable)
    # Not at the top: the package imports this module before it has a version.
    from keras_srlora import __version__

    metadata = {"keras_srlora": __version__, "layers": described}
    _adapter_file.write(filepath, tensors, metadata)
    if others and not include_trainable:
        _warn_left_out(others)


def load_adapter(model, filepath):
    """Puts a saved adapter onto the pretrained model that it was trained on.

    The layers that the file names are converted where they are plain ones, as
    `enable_srlora` does; training can go on from there. Everything is checked
    before anything is changed.

    Args:
        model: a built `keras.Model` of the same pretrained weights: plain, or
            with SRLoRA layers of the same rank, whose adapter is replaced.
        filepath: path of a file that `save_adapter` wrote.

    Returns:
        List of the SRLoRA layers.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, is no adapter, or does not fit:
            a layer is missing or has another class, equation, shape or rank,
            or its pretrained kernel is another one. The message names the
            layer, and the model is unchanged.

    Example:

    ```python
    backbone = keras_hub.models.BertBackbone.from_preset("bert_base_en")
    keras_srlora.load_adapter(backbone, "film_reviews.safetensors")
    ```
    """
    plans, others = read_checked(model, filepath)
    plain = [(layer, saved) for layer, saved, _ in plans if _is_plain(layer)]
    match_records([x for x, _, _ in plans if not _is_plain(x)])
    convert_plain(
        model,
        [layer for layer, _ in plain],
        [_arguments(saved) for _, saved in plain],
        # What was trained there is trained on here.
        trained=[variable for variable, _ in others],
    )
    for layer, saved, arrays in plans:
        layer.recipe = get_recipe(saved["recipe"])
        a, b = (arrays[name] for name in FACTORS)
        layer.restore_adapter(a, b, saved["lora_alpha"], _state(arrays))
    for variable, array in others:
        variable.assign(array)
    _keras.drop_compiled_functions(model)
    return [layer for layer, _, _ in plans]


def read_checked(model, filepath):
    """Reads an adapter file, and checks all of it against a model.

    Returns:
        `(plans, others)`: a list of `(layer, description, arrays)`, and one of
        `(variable, array)`.
    """
    tensors, metadata = _adapter_file.read(filepath)
    by_path = {}
    for layer in _keras.flatten_layers(model):
        by_path.setdefault(layer.path, []).append(layer)
    plans = []
    for saved in _descriptions(metadata, filepath):
        layer = _find_layer(saved["path"], by_path, filepath)
        arrays = _take(tensors, f"{saved['path']}/")
        _check_fits(layer, saved, arrays, filepath)
        plans.append((layer, saved, arrays))
    variables = {v.path: v for v in model.variables}
    others = _take(tensors, f"{TRAINABLE}/")
    for path, array in others.items():
        _check_variable(variables.get(path), path, array, filepath)
    return plans, [(variables[path], array) for path, array in others.items()]


@contextlib.contextmanager
def adapter_disabled(model):
    """Inside the `with` block the SRLoRA layers compute what they did before.

    Their kernels are the pretrained ones, to rounding, and their low-rank part
    is zero; afterwards, also after an exception, everything is put back to the
    bit. Other trained variables (a head, biases) are left as they are. For
    inference: do not train inside.

    Args:
        model: a `keras.Model` with SRLoRA layers.

    Example:

    ```python
    with keras_srlora.adapter_disabled(model):
        pretrained_logits = model.predict(x)
    ```
    """
    layers = srlora_layers(model)
    match_records(layers)
    variables = [
        variable for layer in layers for variable in layer.adapted_variables
    ]
    # On the host: no second copy of the kernels on an accelerator.
    kept = [
        np.array(_devices.to_numpy(ops.convert_to_tensor(v))) for v in variables
    ]
    remainders = [layer.adapter_state.remainder for layer in layers]
    try:
        for layer in layers:
            layer.disable_adapter()
        yield model
    finally:
        for variable, value in zip(variables, kept):
            variable.assign(value)
        for layer, remainder in zip(layers, remainders):
            layer.adapter_state.remainder = remainder


# What a layer's part of a file is.


def _layer_arrays(layer):
    state = layer.adapter_state
    arrays = state.to_arrays()
    # A used direction that was not subtracted has no further purpose.
    kept = np.flatnonzero(~state.used | (state.anchors != 0))
    arrays["kept"] = kept
    for name in ("left", "right"):
        arrays[name] = arrays[name][kept]
    for name, value in zip(FACTORS, layer.factors_to_numpy()):
        arrays[name] = value
    return {
        name: array
        for name, array in arrays.items()
        # A run of its own starts with statistics and schedule of its own.
        if name in _shapes(1, 1, 1, 1, 1, 1)
    }


def _shapes(rank, in_features, out_features, directions, kept, fused):
    """Shape and kind of dtype of each array of a layer."""
    return {
        "lora_kernel_a": ((rank, in_features), "f"),
        "lora_kernel_b": ((rank, out_features), "f"),
        "fused_a": ((fused, in_features), "f"),
        "fused_b": ((fused, out_features), "f"),
        "left": ((kept, in_features), "f"),
        "right": ((kept, out_features), "f"),
        "kept": ((kept,), "i"),
        "singular_values": ((directions,), "f"),
        "anchors": ((directions,), "f"),
        "used": ((directions,), "i"),
        "slot_direction": ((rank,), "i"),
        "slot_started": ((rank,), "i"),
        "history": ((fused, 5), "f"),
    }


def _state(arrays):
    """The `AdapterState` of a layer's arrays."""
    kept, count = arrays["kept"], len(arrays["singular_values"])
    arrays = {k: v for k, v in arrays.items() if k not in (*FACTORS, "kept")}
    for name in ("left", "right"):
        rows = np.zeros((count, arrays[name].shape[1]), "float32")
        rows[kept] = arrays[name]
        arrays[name] = rows
    # What was not kept is a direction of length zero.
    values = np.zeros(count, "float32")
    values[kept] = arrays["singular_values"][kept]
    arrays["singular_values"] = values
    return AdapterState.from_arrays(arrays)


def _describe(layer):
    return {
        "path": layer.path,
        "class": PLAIN[type(layer)].__name__,
        "equation": getattr(layer, "equation", None),
        "kernel_shape": list(_keras.kernel_shape(layer)),
        "rank": layer.rank,
        "target_rank": layer.direction_count,
        "lora_alpha": layer.lora_alpha,
        "recipe": layer.recipe.to_dict(),
        "fingerprint": fingerprint(layer.pretrained_matrix()),
    }


def _arguments(saved):
    return {
        "rank": saved["rank"],
        "target_rank": saved["target_rank"],
        "lora_alpha": saved["lora_alpha"],
        "recipe": get_recipe(saved["recipe"]),
        "decomposition": "auto",
    }


def _to_numpy(variable):
    value = ops.cast(ops.convert_to_tensor(variable), "float32")
    return np.array(_devices.to_numpy(value))


def _other_trainable(model, layers):
    factors = {id(v) for layer in layers for v in layer.factors}
    return [v for v in model.trainable_variables if id(v) not in factors]


def _warn_left_out(variables):
    names = [v.path for v in variables]
    warnings.warn(
        f"{len(names)} trainable variables beside the SRLoRA factors were not "
        f"saved: {names[:4]}. Pass `include_trainable=True` to save them too.",
        stacklevel=3,
    )


# Checks, all of them before the first change.


def _descriptions(metadata, filepath):
    """What a file says of its layers; its checksum is no proof of sense."""

    def refuse(what):
        raise ValueError(
            f"The metadata of {str(filepath)!r} make no sense: {what}. Write "
            "it again with `keras_srlora.save_adapter`."
        )

    layers = metadata.get("layers") if isinstance(metadata, dict) else None
    if not isinstance(layers, list) or not layers:
        refuse("they name no layers")
    for saved in layers:
        if not isinstance(saved, dict) or set(saved) != set(DESCRIPTION):
            refuse(f"a layer must have the fields {sorted(DESCRIPTION)}")
        for name, types in DESCRIPTION.items():
            if not isinstance(saved[name], types):
                refuse(f"{name}={saved[name]!r}")
        if not is_fingerprint(saved["fingerprint"]):
            refuse(f"fingerprint={saved['fingerprint']!r}")
        try:
            get_recipe(saved["recipe"])
            check_arguments(
                saved["rank"], saved["target_rank"], saved["lora_alpha"], "auto"
            )
        except ValueError as error:
            refuse(str(error))
    paths = [saved["path"] for saved in layers]
    if len(set(paths)) < len(paths):
        refuse("a layer is named twice")
    return layers


def _find_layer(path, by_path, filepath):
    found = by_path.get(path, [])
    if len(found) != 1:
        raise ValueError(
            f"{str(filepath)!r} is for a layer {path!r}; the model has "
            f"{len(found)} of that path. Load it on the model that it was "
            "trained on, built with the same names."
        )
    return found[0]


def _is_plain(layer):
    return type(layer) in PLAIN.values()


def _check_fits(layer, saved, arrays, filepath):
    path, file = saved["path"], str(filepath)
    plain = type(layer) if _is_plain(layer) else PLAIN.get(type(layer))
    if plain is None or plain.__name__ != saved["class"]:
        raise ValueError(
            f"{file!r} is for a {saved['class']} at {path!r}. "
            f"Received: {type(layer).__name__}"
        )
    if not layer.built:
        raise ValueError(f"Layer {path!r} is not built: build the model first.")
    here = {
        "equation": getattr(layer, "equation", None),
        "kernel_shape": list(_keras.kernel_shape(layer)),
        "rank": getattr(layer, "rank", saved["rank"]),
    }
    for name, value in here.items():
        if value != saved[name]:
            raise ValueError(
                f"{file!r} does not fit layer {path!r}: its {name} is "
                f"{saved[name]} and that of the layer is {value}."
            )
    if _is_plain(layer):
        check_convertible(layer, saved["rank"])
    else:
        layer.check_recipe(get_recipe(saved["recipe"]), saved["target_rank"])
    matrix = _pretrained_matrix(layer)
    _check_arrays(matrix.shape, saved, arrays, file)
    actual = np.array(fingerprint(matrix))
    expected = np.array(saved["fingerprint"])
    size = float(ops.convert_to_numpy(ops.norm(ops.cast(matrix, "float32"))))
    # Entries are as large as the norm; a bfloat16 kernel is off by 0.004.
    if not np.max(np.abs(actual - expected)) <= 2e-2 * max(size, 1e-12):
        raise ValueError(
            f"{file!r} was trained on other pretrained weights than those of "
            f"layer {path!r}: load the preset that it was trained on. "
            f"Received: fingerprint {np.round(actual[:4], 4).tolist()}..., "
            f"expected {np.round(expected[:4], 4).tolist()}..."
        )


def _pretrained_matrix(layer):
    plain = _is_plain(layer)
    return plain_matrix(layer) if plain else layer.pretrained_matrix()


def _check_arrays(kernel_shape, saved, arrays, file):
    if saved["target_rank"] > min(kernel_shape):
        raise ValueError(
            f"{file!r} does not fit layer {saved['path']!r}: its target_rank "
            f"is {saved['target_rank']}, above the smaller side of the kernel, "
            f"which is {kernel_shape[0]} x {kernel_shape[1]} as a matrix."
        )
    kept, fused = (_row_count(arrays.get(x)) for x in ("kept", "fused_a"))
    if fused > saved["target_rank"]:
        raise ValueError(
            f"{file!r} is damaged: in layer {saved['path']!r} more pairs were "
            f"fused ({fused}) than its {saved['target_rank']} directions are "
            "good for."
        )
    expected = _shapes(
        saved["rank"],
        *kernel_shape,
        saved["target_rank"],
        kept,
        fused,
    )
    for name, (shape, kind) in expected.items():
        array = arrays.get(name)
        fits = (
            array is not None
            and array.shape == shape
            and array.dtype.kind == kind
            and np.isfinite(array).all()
        )
        if not fits:
            received = "nothing"
            if array is not None:
                received = f"{array.dtype} of shape {array.shape}"
            raise ValueError(
                f"{file!r} does not hold what its metadata say: `{name}` of "
                f"layer {saved['path']!r} must be finite numbers of shape "
                f"{shape}. Received: {received}"
            )
    # A slot without a direction has -1.
    for name, lowest in {"kept": 0, "slot_direction": -1}.items():
        indices = np.append(arrays[name], lowest)
        if not lowest <= indices.min() <= indices.max() < saved["target_rank"]:
            raise ValueError(
                f"{file!r} does not hold what its metadata say: `{name}` of "
                f"layer {saved['path']!r} names directions that do not exist."
            )


def _row_count(array):
    return 0 if array is None or array.ndim == 0 else len(array)


def _check_variable(variable, path, array, filepath):
    if variable is None or tuple(variable.shape) != array.shape:
        received = "no such variable"
        if variable is not None:
            received = f"a shape of {tuple(variable.shape)}"
        raise ValueError(
            f"{str(filepath)!r} holds the trainable variable {path!r} of shape "
            f"{array.shape}; the model has {received}."
        )


def _take(tensors, prefix):
    """Those whose name begins with a prefix, without it."""
    return {
        name[len(prefix) :]: array
        for name, array in tensors.items()
        if name.startswith(prefix)
    }
