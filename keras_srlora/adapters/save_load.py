"""`save_adapter`, `load_adapter` and `adapter_disabled`."""

from __future__ import annotations

import contextlib
import warnings

import keras
import numpy as np
from keras import ops

from keras_srlora.adapters import format as file_format
from keras_srlora.adapters.format import FACTORS
from keras_srlora.adapters.format import KIND
from keras_srlora.adapters.format import TRAINABLE
from keras_srlora.adapters.format import is_plain
from keras_srlora.backend import devices
from keras_srlora.backend import keras_private
from keras_srlora.backend.arguments import check_paths
from keras_srlora.conversion.enable import convert_plain
from keras_srlora.files import tensors as tensors_file
from keras_srlora.layers import pairs
from keras_srlora.layers.find import match_records
from keras_srlora.layers.find import srlora_layers
from keras_srlora.recipes.definition import get_recipe
from keras_srlora.version import __version__


def save_adapter(
    model: keras.Model, filepath, include_trainable: bool = False
) -> None:
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
        for name, array in file_format.layer_arrays(layer).items():
            tensors[f"{layer.path}/{name}"] = array
        described.append(file_format.describe(layer))
    others = _other_trainable(model, layers)
    if include_trainable:
        check_paths([v.path for v in others], "trainable variables")
        for variable in others:
            tensors[f"{TRAINABLE}/{variable.path}"] = _to_numpy(variable)
    metadata = {"keras_srlora": __version__, "layers": described}
    tensors_file.write(filepath, tensors, metadata, KIND)
    if others and not include_trainable:
        _warn_left_out(others)


def load_adapter(model: keras.Model, filepath) -> list:
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
    plans, others = file_format.read_checked(model, filepath)
    plain = [(layer, saved) for layer, saved, _ in plans if is_plain(layer)]
    match_records([x for x, _, _ in plans if not is_plain(x)])
    convert_plain(
        model,
        [layer for layer, _ in plain],
        [file_format.arguments_of(saved) for _, saved in plain],
        # What was trained there is trained on here.
        trained=[variable for variable, _ in others],
    )
    for layer, saved, arrays in plans:
        layer.recipe = get_recipe(saved["recipe"])
        a, b = (arrays[name] for name in FACTORS)
        record = file_format.record_of(arrays)
        pairs.restore_adapter(layer, a, b, saved["lora_alpha"], record)
    for variable, array in others:
        variable.assign(array)
    keras_private.drop_compiled_functions(model)
    return [layer for layer, _, _ in plans]


@contextlib.contextmanager
def adapter_disabled(model: keras.Model):
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
        variable
        for layer in layers
        for variable in (*layer.frozen.variables, *layer.factors)
    ]
    # On the host: no second copy of the kernels on an accelerator.
    kept = [
        np.array(devices.to_numpy(ops.convert_to_tensor(v))) for v in variables
    ]
    stored = [layer.frozen.to_arrays() for layer in layers]
    try:
        for layer in layers:
            pairs.disable_adapter(layer)
        yield model
    finally:
        for variable, value in zip(variables, kept):
            variable.assign(value)
        for layer, arrays in zip(layers, stored):
            layer.frozen.from_arrays(arrays)


def _to_numpy(variable):
    value = ops.cast(ops.convert_to_tensor(variable), "float32")
    return np.array(devices.to_numpy(value))


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
