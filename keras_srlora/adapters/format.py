"""The contents of an adapter file, and whether they fit a model."""

from typing import Any

import numpy as np
from keras import ops

from keras_srlora.adapters.names import find_by_path
from keras_srlora.backend.keras_private.kernels import kernel_shape
from keras_srlora.backend.keras_private.nesting import flatten_layers
from keras_srlora.conversion.enable import check_convertible
from keras_srlora.conversion.enable import plain_matrix
from keras_srlora.files import tensors as tensors_file
from keras_srlora.functional.fingerprint import fingerprint
from keras_srlora.functional.fingerprint import is_fingerprint
from keras_srlora.layers import pairs
from keras_srlora.layers.kinds import PLAIN
from keras_srlora.layers.kinds import plain_class
from keras_srlora.layers.kinds import plain_kind
from keras_srlora.layers.paths import layer_paths
from keras_srlora.layers.paths import variable_paths
from keras_srlora.layers.record import EVENT
from keras_srlora.layers.record import FORMAT
from keras_srlora.layers.record import FORMAT_NAME
from keras_srlora.layers.record import Record
from keras_srlora.layers.requirements import check_arguments
from keras_srlora.layers.requirements import check_recipe
from keras_srlora.recipes.definition import get_recipe

KIND = tensors_file.Kind(
    name="adapter",
    version=3,
    writer="`keras_srlora.save_adapter`",
    remedy="Copy it again, or write it with `keras_srlora.save_adapter`.",
)
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
# Fields that are written only where they differ from these values, so that
# older versions can read all other files.
ADDED = {"use_rslora": False, "modules_to_save": []}
TYPES: dict[str, Any] = {
    **DESCRIPTION,
    "use_rslora": bool,
    "modules_to_save": list,
}
TRAINABLE = "trainable"
# Names of the factors in a file, whatever the layer calls them.
FACTORS = ("lora_kernel_a", "lora_kernel_b")


def layer_arrays(layer):
    """The arrays of a layer's part of a file, `{name: array}`."""
    record = layer.record
    arrays = record.to_arrays()
    # A used direction that was not subtracted has no further purpose, unless
    # directions come again.
    again = layer.recipe.reuse_directions
    kept = np.flatnonzero(~record.used | (record.anchors != 0) | again)
    arrays["kept"] = kept
    for name in ("left", "right"):
        arrays[name] = arrays[name][kept]
    for name, value in zip(FACTORS, pairs.factors_to_numpy(layer)):
        arrays[name] = value
    return {
        name: array
        for name, array in arrays.items()
        # A run of its own starts with statistics and schedule of its own.
        if name in ARRAYS
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
        "visits": ((directions,), "i"),
        "slot_direction": ((rank,), "i"),
        "events": ((fused, len(EVENT)), "f"),
    }


# The names of the arrays.
ARRAYS = frozenset(_shapes(1, 1, 1, 1, 1, 1))


def record_of(arrays):
    """The `Record` of a layer's arrays."""
    kept, count = arrays["kept"], len(arrays["singular_values"])
    arrays = {k: v for k, v in arrays.items() if k not in (*FACTORS, "kept")}
    for name in ("left", "right"):
        rows = np.zeros((count, arrays[name].shape[1]), arrays[name].dtype)
        rows[kept] = arrays[name]
        arrays[name] = rows
    # A direction that was not kept has length zero.
    values = np.zeros(count, arrays["singular_values"].dtype)
    values[kept] = arrays["singular_values"][kept]
    arrays["singular_values"] = values
    return Record.from_arrays({**arrays, FORMAT_NAME: FORMAT})


def describe(layer, path, modules):
    """The metadata of a layer, with the paths in its model."""
    added = {"use_rslora": layer.use_rslora, "modules_to_save": modules}
    return {
        "path": path,
        "class": plain_kind(layer).__name__,
        "equation": getattr(layer, "equation", None),
        "kernel_shape": list(kernel_shape(layer)),
        "rank": layer.rank,
        "target_rank": layer.direction_count,
        "lora_alpha": layer.lora_alpha,
        "recipe": layer.recipe.to_dict(),
        "fingerprint": fingerprint(pairs.pretrained_matrix(layer)),
        **{k: value for k, value in added.items() if value != ADDED[k]},
    }


def arguments_of(saved):
    """The arguments that a layer of a file is converted with."""
    arguments = {
        **adapter_arguments(saved),
        "rank": saved["rank"],
        "decomposition": "auto",
    }
    for name in ADDED:
        # `convert_plain` fills in defaults.
        if not arguments[name]:
            del arguments[name]
    return arguments


def adapter_arguments(saved):
    """Those arguments of a layer that an adapter brings along."""
    return {
        "target_rank": saved["target_rank"],
        "lora_alpha": saved["lora_alpha"],
        "use_rslora": saved["use_rslora"],
        "modules_to_save": tuple(saved["modules_to_save"]),
        "recipe": get_recipe(saved["recipe"]),
    }


def open_adapter(filepath):
    """Each layer of an adapter file, for any model.

    Returns:
        List of `(description, arrays, record, scale)`.
    """
    with tensors_file.opened(filepath, KIND) as (opened, metadata):
        tensors = dict(opened)
    found = []
    for saved in _descriptions(metadata, filepath):
        arrays = _take(tensors, f"{saved['path']}/")
        found.append((saved, arrays, record_of(arrays), scale_of(saved)))
    return found


def scale_of(saved):
    """The scale of the factors' product in a layer of a file."""
    rank = saved["rank"]
    divisor = rank**0.5 if saved["use_rslora"] else rank
    return (saved["lora_alpha"] or rank) / divisor


def read_checked(model, filepath, any_rank=False):
    """Reads an adapter file, and checks all of it against a model.

    Args:
        model: a built `keras.Model`.
        filepath: path of a file.
        any_rank: bool. Whether an SRLoRA layer may have another rank.

    Returns:
        `(plans, others)`: a list of `(layer, description, arrays)`, and one of
        `(variable, array)`.
    """
    with tensors_file.opened(filepath, KIND) as (opened, metadata):
        tensors = dict(opened)
    by_path: dict = {}
    paths = layer_paths(model)
    for layer in flatten_layers(model):
        by_path.setdefault(paths[id(layer)], []).append(layer)
    plans = []
    for saved in _descriptions(metadata, filepath):
        layer = find_by_path(saved["path"], by_path, "layer", filepath)
        arrays = _take(tensors, f"{saved['path']}/")
        _check_fits(layer, saved, arrays, filepath, any_rank)
        plans.append((layer, saved, arrays))
    variables: dict = {}
    paths = variable_paths(model)
    for variable in model.variables:
        variables.setdefault(paths[id(variable)], []).append(variable)
    others = []
    # A layer may have the path `trainable`.
    of_layers = {
        f"{saved['path']}/{name}" for _, saved, _ in plans for name in ARRAYS
    }
    tensors = {k: v for k, v in tensors.items() if k not in of_layers}
    for path, array in _take(tensors, f"{TRAINABLE}/").items():
        variable = find_by_path(path, variables, "variable", filepath)
        _check_variable(variable, path, array, filepath)
        others.append((variable, array))
    return plans, others


# Checks, all of them before the first change.


def _descriptions(metadata, filepath):
    """The checked descriptions of a file's layers.

    A file with a right checksum may make no sense.
    """

    def refuse(what):
        raise ValueError(
            f"The metadata of {str(filepath)!r} make no sense: {what}. Write "
            "it again with `keras_srlora.save_adapter`."
        )

    layers: Any = None
    if isinstance(metadata, dict):
        layers = metadata.get("layers")
    if not isinstance(layers, list) or not layers:
        refuse("they name no layers")
    for saved in layers:
        if not isinstance(saved, dict) or not (
            set(DESCRIPTION) <= set(saved) <= set(TYPES)
        ):
            refuse(f"a layer must have the fields {sorted(DESCRIPTION)}")
        saved |= {**ADDED, **saved}
        for name, types in TYPES.items():
            if not isinstance(saved[name], types):
                refuse(f"{name}={saved[name]!r}")
        if not all(isinstance(x, str) for x in saved["modules_to_save"]):
            refuse(f"modules_to_save={saved['modules_to_save']!r}")
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


def is_plain(layer):
    """Whether a layer is one that an adapter can be loaded into."""
    return plain_class(layer) in PLAIN.values()


def _check_fits(layer, saved, arrays, filepath, any_rank):
    path, file = saved["path"], str(filepath)
    kind = plain_class(layer)
    plain = kind if is_plain(layer) else plain_kind(layer)
    if plain is None or plain.__name__ != saved["class"]:
        raise ValueError(
            f"{file!r} is for a {saved['class']} at {path!r}. "
            f"Received: {type(layer).__name__}"
        )
    if not layer.built:
        raise ValueError(f"Layer {path!r} is not built: build the model first.")
    here = {
        "equation": getattr(layer, "equation", None),
        "kernel_shape": list(kernel_shape(layer)),
        "rank": getattr(layer, "rank", saved["rank"]),
    }
    if any_rank:
        del here["rank"]
    for name, value in here.items():
        if value != saved[name]:
            raise ValueError(
                f"{file!r} does not fit layer {path!r}: its {name} is "
                f"{saved[name]} and that of the layer is {value}."
            )
    if is_plain(layer):
        check_convertible(layer, saved["rank"])
    else:
        check_recipe(layer, get_recipe(saved["recipe"]), saved["target_rank"])
    matrix = _pretrained_matrix(layer)
    _check_arrays(matrix.shape, saved, arrays, file)
    if not has_fingerprint(matrix, saved["fingerprint"]):
        actual = np.array(fingerprint(matrix))
        expected = np.array(saved["fingerprint"])
        raise ValueError(
            f"{file!r} was trained on other pretrained weights than those of "
            f"layer {path!r}: load the preset that it was trained on. "
            f"Received: fingerprint {np.round(actual[:4], 4).tolist()}..., "
            f"expected {np.round(expected[:4], 4).tolist()}..."
        )


def has_fingerprint(matrix, expected):
    """Whether a kernel is the one of a fingerprint, but for rounding."""
    actual = np.array(fingerprint(matrix))
    size = float(ops.convert_to_numpy(ops.norm(ops.cast(matrix, "float32"))))
    # Entries are as large as the norm; a bfloat16 kernel is off by 0.004.
    difference = np.max(np.abs(actual - np.array(expected)))
    return bool(difference <= 2e-2 * max(size, 1e-12))


def _pretrained_matrix(layer):
    plain = is_plain(layer)
    return plain_matrix(layer) if plain else pairs.pretrained_matrix(layer)


def _check_arrays(shape, saved, arrays, file):
    if saved["target_rank"] > min(shape):
        raise ValueError(
            f"{file!r} does not fit layer {saved['path']!r}: its target_rank "
            f"is {saved['target_rank']}, above the smaller side of the kernel, "
            f"which is {shape[0]} x {shape[1]} as a matrix."
        )
    kept, fused = (_row_count(arrays.get(x)) for x in ("kept", "fused_a"))
    again = get_recipe(saved["recipe"]).reuse_directions
    if fused > saved["target_rank"] and not again:
        raise ValueError(
            f"{file!r} is damaged: in layer {saved['path']!r} more pairs were "
            f"fused ({fused}) than its {saved['target_rank']} directions are "
            "good for."
        )
    rows, columns = shape
    expected = _shapes(
        saved["rank"],
        rows,
        columns,
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
                f"{file!r} does not fit its own metadata: `{name}` of "
                f"layer {saved['path']!r} must be finite numbers of shape "
                f"{shape}. Received: {received}"
            )
    # A slot without a direction has -1.
    for name, lowest in {"kept": 0, "slot_direction": -1}.items():
        indices = np.append(arrays[name], lowest)
        if not lowest <= indices.min() <= indices.max() < saved["target_rank"]:
            raise ValueError(
                f"{file!r} does not fit its own metadata: `{name}` of "
                f"layer {saved['path']!r} names directions that do not exist."
            )


def _row_count(array):
    return 0 if array is None or array.ndim == 0 else len(array)


def _check_variable(variable, path, array, filepath):
    if tuple(variable.shape) != array.shape:
        raise ValueError(
            f"{str(filepath)!r} holds the trainable variable {path!r} of shape "
            f"{array.shape}; the model has a shape of {tuple(variable.shape)}."
        )


def _take(tensors, prefix):
    """Those whose name begins with a prefix, without it."""
    return {
        name[len(prefix) :]: array
        for name, array in tensors.items()
        if name.startswith(prefix)
    }
