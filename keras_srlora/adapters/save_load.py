"""`save_adapter` and `load_adapter`."""

from __future__ import annotations

import warnings

import keras
import numpy as np

from keras_srlora.adapters import format as file_format
from keras_srlora.adapters.combine import combined
from keras_srlora.adapters.combine import part_of
from keras_srlora.adapters.combine import untouched
from keras_srlora.adapters.format import FACTORS
from keras_srlora.adapters.format import KIND
from keras_srlora.adapters.format import TRAINABLE
from keras_srlora.adapters.format import is_plain
from keras_srlora.adapters.moments import put_moments
from keras_srlora.adapters.others import check_finite_variables
from keras_srlora.adapters.others import to_numpy
from keras_srlora.adapters.others import trainable_beside
from keras_srlora.backend.arguments import check_paths
from keras_srlora.backend.interrupts import held_interrupts
from keras_srlora.backend.keras_private.nesting import flatten_layers
from keras_srlora.conversion.enable import convert_plain
from keras_srlora.conversion.freezing import module_paths
from keras_srlora.conversion.freezing import saved_variables
from keras_srlora.conversion.holders import Holders
from keras_srlora.conversion.targets import check_model
from keras_srlora.files import tensors as tensors_file
from keras_srlora.layers import pairs
from keras_srlora.layers.base import SRLoRALayer
from keras_srlora.layers.find import match_records
from keras_srlora.layers.find import require_records
from keras_srlora.layers.find import srlora_layers
from keras_srlora.layers.finite import check_finite_factors
from keras_srlora.layers.matching import check_record
from keras_srlora.layers.paths import layer_paths
from keras_srlora.layers.paths import variable_paths
from keras_srlora.layers.record import Record
from keras_srlora.layers.requirements import check_initializable
from keras_srlora.version import __version__


def save_adapter(
    model: keras.Model, filepath, include_trainable: bool = False
) -> None:
    """Writes the adapter, without the pretrained kernels.

    The file (safetensors) holds for each layer the factors, the fused pairs,
    the directions that are unused or were subtracted, and the record. If a
    recipe uses each direction once, these are at most `2 · target_rank` pairs
    in each kernel. Its metadata describe the model: paths, equations, shapes,
    rank, `target_rank`, `lora_alpha`, recipe, and a fingerprint of each
    pretrained kernel. It is written whole or not at all.

    If the model has several adapters (`add_adapter`), the current one is saved.
    Layers that were not decomposed yet have learned nothing, and are left out.

    Args:
        model: a `keras.Model` with SRLoRA layers whose kernels were decomposed.
        filepath: path of the file, such as `"film_reviews.safetensors"`.
        include_trainable: bool. Whether the other trainable variables (a head,
            biases, normalization layers) are saved, too. Layers in
            `modules_to_save` always are. Defaults to `False`: a warning names
            the variables that were left out.

    Raises:
        ValueError: if there is no SRLoRA layer, none was decomposed yet, one
            has trained factors and no record, two have the same path, or a
            number is not finite. Nothing is written then.
        ImportError: if safetensors is not installed.

    Example:

    ```python
    keras_srlora.save_adapter(model, "film_reviews.safetensors")
    ```
    """
    layers = srlora_layers(model)
    require_records(layers)
    learnt = [layer for layer in layers if layer.initialized]
    if not learnt:
        raise ValueError(
            f"The kernel of layer {layers[0].path!r} was not decomposed yet, "
            "nor any other: there is nothing to save. Train first, or call "
            "`keras_srlora.initialize_factors(model)`."
        )
    check_finite_factors(learnt)
    paths = layer_paths(model)
    check_paths([paths[id(layer)] for layer in learnt], "SRLoRA layers")
    always = saved_variables(model)
    known = {id(v) for v in always}
    others = [v for v in trainable_beside(model, layers) if id(v) not in known]
    saved = [*always, *others] if include_trainable else always
    check_finite_variables(saved)
    of_variables = variable_paths(model)
    check_paths([of_variables[id(v)] for v in saved], "trainable variables")
    tensors, described = {}, []
    for layer in learnt:
        for name, array in file_format.layer_arrays(layer).items():
            tensors[f"{paths[id(layer)]}/{name}"] = array
        described.append(
            file_format.describe(
                layer, paths[id(layer)], module_paths(model, layer)
            )
        )
    for variable in saved:
        path = of_variables[id(variable)]
        tensors[f"{TRAINABLE}/{path}"] = to_numpy(variable)
    metadata = {"keras_srlora": __version__, "layers": described}
    tensors_file.write(filepath, tensors, metadata, KIND)
    if others and not include_trainable:
        _warn_left_out(others)


def load_adapter(model: keras.Model, filepath) -> list:
    """Loads a saved adapter onto the pretrained model that it was trained on.

    Plain layers that the file names are converted, as in `enable_srlora`, so
    training can continue. The adapter of a model with SRLoRA layers is
    replaced: SRLoRA layers that are not in the file become pretrained ones
    again, and optimizers start anew at step 0. Everything is checked before
    anything changes.

    Args:
        model: a built `keras.Model` with the same pretrained weights. Its
            layers may be plain or SRLoRA layers of the same rank.
        filepath: path of a file that `save_adapter` wrote.

    Returns:
        List of the SRLoRA layers that the file names.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, is not an adapter, or does not fit:
            a layer is missing or has another class, equation, shape, rank or
            pretrained kernel. The message names the layer, and the model is
            unchanged.

    Example:

    ```python
    backbone = keras_hub.models.BertBackbone.from_preset("bert_base_en")
    keras_srlora.load_adapter(backbone, "film_reviews.safetensors")
    ```
    """
    checked = read_for(model, filepath)
    with held_interrupts():
        return put_on(model, *checked)


def read_for(model, filepath, any_rank=False):
    """Reads a file that fits a model, whose own adapter can be replaced.

    Args:
        model: a built `keras.Model`.
        filepath: path of a file.
        any_rank: bool. Whether an SRLoRA layer may have another rank.

    Returns:
        `(plans, others)`, as `read_checked` does.
    """
    check_model(model)
    adapted = _adapted(model)
    for layer in adapted:
        if not layer.built:
            check_initializable(layer)
    plans, others = file_format.read_checked(model, filepath, any_rank)
    match_records(adapted)
    named = {id(layer) for layer, _, _ in plans}
    for layer in adapted:
        if id(layer) not in named:
            # Its pretrained kernel comes back.
            check_record(layer)
    for layer, saved, arrays in plans:
        if not is_plain(layer) and layer.rank != saved["rank"]:
            _at_rank_of(layer, saved, arrays)
    return plans, others


def put_on(model, plans, others):
    """Makes a checked adapter that of a model, in place of the one it has.

    Returns:
        List of the SRLoRA layers that it names.
    """
    plain = [(layer, saved) for layer, saved, _ in plans if is_plain(layer)]
    convert_plain(
        model,
        [layer for layer, _ in plain],
        [file_format.arguments_of(saved) for _, saved in plain],
        # Variables that trained there train on here.
        trained=[variable for variable, _ in others],
    )
    named = [layer for layer, _, _ in plans]
    holders = Holders(model, named)
    for layer, saved, arrays in plans:
        if layer.rank == saved["rank"]:
            a, b = (arrays[name] for name in FACTORS)
            arguments = file_format.adapter_arguments(saved)
            record = file_format.record_of(arrays)
        else:
            a, b, record, arguments = _at_rank_of(layer, saved, arrays)
        pairs.restore_adapter(layer, a, b, arguments, record)
    known = set(map(id, named))
    for layer in _adapted(model):
        if id(layer) not in known:
            clear(layer)
    for variable, array in others:
        variable.assign(array)
    holders.follow()
    put_moments(_adapted(model), [])
    return named


def _at_rank_of(layer, saved, arrays):
    """The adapter of a file, with as many pairs as the layer has.

    Raises:
        ValueError: if there is no room for the update.
    """
    a, b = (arrays[name] for name in FACTORS)
    record = file_format.record_of(arrays)
    part = part_of(a, b, file_format.scale_of(saved), record)
    # At the scale that the layer has.
    arguments = file_format.adapter_arguments(saved)
    arguments["lora_alpha"] = layer.lora_alpha
    arguments["use_rslora"] = layer.use_rslora
    found = combined(layer, [part], [1.0])
    if found is None:
        a = np.array(pairs.a_initializer(layer)(layer.factors[0].shape))
        b = np.zeros(layer.factors[1].shape, a.dtype)
        found = a, b, Record.start(record.directions, layer.rank)
    return *found, arguments


def clear(layer):
    """Makes a layer compute its pretrained kernel, with nothing learnt.

    It keeps the directions of the kernel, so that it may be trained at once.
    """
    record = layer.record
    pairs.disable_adapter(layer)
    layer.companions.restore({})
    if record.initialized:
        layer.record = untouched(record, layer.rank)
        if len(layer.record.events) and not layer.recipe.starts_as_lora:
            # A file left directions out that this recipe starts along.
            layer.record = Record()


def _adapted(model):
    return [
        layer
        for layer in flatten_layers(model)
        if isinstance(layer, SRLoRALayer)
    ]


def _warn_left_out(variables):
    names = [v.path for v in variables]
    warnings.warn(
        f"{len(names)} trainable variables beside the SRLoRA factors were not "
        f"saved: {names[:4]}. Pass `include_trainable=True` to save them too.",
        stacklevel=3,
    )
