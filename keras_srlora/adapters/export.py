"""`export_lora` and `export_peft`: adapters as plain LoRA, for other tools."""

from __future__ import annotations

import io
import json
import pathlib
import re
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_srlora.backend.arguments import is_integer
from keras_srlora.backend.keras_private.kernels import kernel_shape
from keras_srlora.backend.keras_private.nesting import flatten_layers
from keras_srlora.files.atomic import written_whole
from keras_srlora.files.tensors import write_tensors
from keras_srlora.functional.contraction import as_kernel
from keras_srlora.functional.low_rank import balanced
from keras_srlora.functional.low_rank import largest_cut
from keras_srlora.functional.low_rank import thin_svd
from keras_srlora.functional.low_rank import without_rounding
from keras_srlora.layers import pairs
from keras_srlora.layers.embedding import SRLoRAEmbedding
from keras_srlora.layers.find import require_records
from keras_srlora.layers.find import srlora_layers
from keras_srlora.layers.finite import check_finite_update
from keras_srlora.layers.paths import layer_paths


class Export(NamedTuple):
    """Rank, layers and error of an exported adapter.

    Attributes:
        rank: int. Rank of the exported LoRA.
        target_layer_names: list of strings: the layers that have it, by name
            (`export_lora`, as KerasHub's `enable_lora` takes them) or by their
            names in the other model (`export_peft`).
        error: float. Largest part of an update, in Frobenius norm, that the
            rank cut off; 0.0 but for rounding where no rank was given.
    """

    rank: int
    target_layer_names: list
    error: float


def export_lora(
    backbone: keras.Model, filepath, rank: int | None = None
) -> Export:
    """Writes a backbone's adapter as KerasHub's own LoRA weights.

    However often pairs were fused, the total update of a kernel is a product of
    two factors. KerasHub reads factors of one rank for all layers. Its LoRA of
    an `EinsumDense` layer splits the last axis of the kernel from the rest, so
    the rank there is at most the size of that axis.

    ```python
    exported = keras_srlora.export_lora(backbone, "reviews.lora.h5")
    stock = keras_hub.models.BertBackbone.from_preset("bert_base_en")
    stock.enable_lora(
        exported.rank, target_layer_names=exported.target_layer_names
    )
    stock.load_lora_weights("reviews.lora.h5")
    ```

    Biases, a head and other trained variables are not in such a file.

    Args:
        backbone: the KerasHub backbone that `enable_srlora` converted.
        filepath: path that ends in `.lora.h5`.
        rank: int, or `None` for the rank that the updates need. A smaller one
            keeps the best approximation of each update.

    Returns:
        An `Export`: `rank` and `target_layer_names`, which `enable_lora` needs,
        and `error`.

    Raises:
        ValueError: if there is no SRLoRA layer, one is an `SRLoRAEmbedding`,
            which such a file cannot hold, factors or their product are not
            finite, the name does not end in `.lora.h5`, or `rank` is not
            positive.
    """
    if not str(filepath).endswith(".lora.h5"):
        raise ValueError(
            "The name of the file must end in `.lora.h5`, which KerasHub "
            f"requires. Received: filepath={str(filepath)!r}"
        )
    rank = _check_rank(rank)
    adapted = srlora_layers(backbone)
    require_records(adapted)
    _refuse_tables(adapted)
    check_finite_update(adapted)
    factored = {id(layer): _unfolded_factors(layer) for layer in adapted}
    needed = max(1, *(len(s) for _, s, _ in factored.values()))
    rank = needed if rank is None else rank
    names = sorted({layer.name for layer in adapted})
    # As KerasHub counts: by index among the layers that have weights.
    layers = [
        layer
        for layer in flatten_layers(backbone)
        if layer is not backbone and layer.weights
    ]
    arrays = {}
    for index, layer in enumerate(layers):
        if layer.name not in names or not hasattr(layer, "enable_lora"):
            continue
        shape = kernel_shape(layer)
        a = np.zeros((*shape[:-1], rank), "float32")
        b = np.zeros((rank, shape[-1]), "float32")
        # A layer of the same name that was not adapted gets an update of zero.
        if id(layer) in factored:
            left, values, right = factored[id(layer)]
            left, right = balanced(left, values, right, rank)
            a[:] = left.reshape(a.shape)
            b[:] = right
        arrays[index] = a, b
    _write(filepath, rank, arrays)
    return Export(rank, names, largest_cut(factored.values(), rank))


def export_peft(
    model: keras.Model,
    directory,
    rank: int | None = None,
    modules: dict[str, str] | None = None,
    prefix: str = "",
) -> Export:
    """Writes an adapter as the LoRA that Hugging Face's PEFT reads.

    ```python
    keras_srlora.export_peft(backbone, "reviews")
    bert = transformers.AutoModel.from_pretrained("google-bert/bert-base-cased")
    bert = peft.PeftModel.from_pretrained(bert, "reviews")
    ```

    The names of modules are known for KerasHub's BERT and ViT backbones (for
    ViT those of transformers 5). For another model pass the module of each
    layer.

    Args:
        model: a `keras.Model` with SRLoRA layers.
        directory: folder for `adapter_config.json` and
            `adapter_model.safetensors`. It is created if it does not exist.
        rank: int, or `None` for the rank that the updates need. A smaller one
            keeps the best approximation of each update.
        modules: dict from the path of a layer to the name of a
            `torch.nn.Linear`, or of a `torch.nn.Embedding` for an
            `SRLoRAEmbedding`. Needed for models other than BERT and ViT.
        prefix: str. Prefix of each name, such as `"bert."` for a
            `BertForSequenceClassification`.

    Returns:
        An `Export`; its `target_layer_names` are the modules.

    Raises:
        ValueError: if there is no SRLoRA layer, a layer's module is not known,
            two layers have the same, factors or their product are not finite,
            or `rank` is not positive. Nothing is written then.
        ImportError: if safetensors is not installed.
    """
    rank = _check_rank(rank)
    _check_modules(modules)
    layers = srlora_layers(model)
    require_records(layers)
    check_finite_update(layers)
    paths = layer_paths(model)
    names = [
        prefix + _module_name(paths[id(layer)], modules or {})
        for layer in layers
    ]
    if len(set(names)) < len(names):
        raise ValueError(
            "Each layer needs a module of its own. Received: the modules "
            f"{sorted({n for n in names if names.count(n) > 1})} for several"
        )
    factored = [thin_svd(*pairs.update_factors(layer)) for layer in layers]
    needed = max(1, *(len(values) for _, values, _ in factored))
    rank = needed if rank is None else rank
    tensors = {}
    for layer, name, factors in zip(layers, names, factored):
        left, right = balanced(*factors, rank)
        name_a, name_b = _factor_names(layer)
        # A `torch.nn.Linear` has its weight as (out, in); a table's factors
        # are stored as these are.
        tensors[f"base_model.model.{name}.{name_a}"] = left.T
        tensors[f"base_model.model.{name}.{name_b}"] = right.T
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": names,
        "base_model_name_or_path": None,
    }
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # Both or none: the first takes its name when the second has.
    with written_whole(directory / "adapter_model.safetensors") as tensor_file:
        write_tensors(tensor_file, tensors)
        with written_whole(directory / "adapter_config.json") as config_file:
            pathlib.Path(config_file).write_text(json.dumps(config, indent=2))
    return Export(rank, names, largest_cut(factored, rank))


# Paths in KerasHub, names in transformers, and the index of the first block.

_BERT = r"transformer_layer_(\d+)/"
# KerasHub's spelling until 0.26 has an s less.
_VIT = r"vit_encoder/trans?former_block_(\d+)/"
MODULES = {
    _BERT + "self_attention_layer/query": (
        "encoder.layer.{}.attention.self.query",
        0,
    ),
    _BERT + "self_attention_layer/key": (
        "encoder.layer.{}.attention.self.key",
        0,
    ),
    _BERT + "self_attention_layer/value": (
        "encoder.layer.{}.attention.self.value",
        0,
    ),
    _BERT + "self_attention_layer/attention_output": (
        "encoder.layer.{}.attention.output.dense",
        0,
    ),
    _BERT + "feedforward_intermediate_dense": (
        "encoder.layer.{}.intermediate.dense",
        0,
    ),
    _BERT + "feedforward_output_dense": ("encoder.layer.{}.output.dense", 0),
    "pooled_dense": ("pooler.dense", 0),
    "segment_embedding": ("embeddings.token_type_embeddings", 0),
    _VIT + "mha/query": ("layers.{}.attention.q_proj", 1),
    _VIT + "mha/key": ("layers.{}.attention.k_proj", 1),
    _VIT + "mha/value": ("layers.{}.attention.v_proj", 1),
    _VIT + "mha/attention_output": ("layers.{}.attention.o_proj", 1),
    _VIT + "mlp/dense_1": ("layers.{}.mlp.fc1", 1),
    _VIT + "mlp/dense_2": ("layers.{}.mlp.fc2", 1),
}


def _check_modules(modules):
    if modules is None:
        return
    if not isinstance(modules, dict) or not all(
        isinstance(path, str) and isinstance(name, str)
        for path, name in modules.items()
    ):
        raise ValueError(
            "`modules` must be a dict from paths of layers to names of "
            f"modules, both strings. Received: modules={modules!r}"
        )


def _module_name(path, modules):
    if path in modules:
        return modules[path]
    for pattern, (name, first) in MODULES.items():
        found = re.fullmatch(pattern, path)
        if found:
            return name.format(*(int(i) - first for i in found.groups()))
    raise ValueError(
        f"It is not known which module of a Hugging Face model {path!r} is. "
        "Pass it in `modules={path: name}`. "
        f"Received: modules for {sorted(modules)[:4]}"
    )


def _check_rank(rank):
    if rank is None:
        return None
    if not is_integer(rank) or rank < 1:
        raise ValueError(
            f"`rank` must be a positive integer or `None`. Received: {rank=}"
        )
    return int(rank)


def _refuse_tables(layers):
    tables = [x.path for x in layers if isinstance(x, SRLoRAEmbedding)]
    if tables:
        raise ValueError(
            "KerasHub's LoRA files hold the factors of projections and none of "
            "embedding tables. Use `export_peft` or `save_adapter`, or "
            "`merge_srlora` and save the whole model. "
            f"Received: SRLoRAEmbedding layers {tables}"
        )


def _factor_names(layer):
    """PEFT's names of the two factors of a layer."""
    if isinstance(layer, SRLoRAEmbedding):
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


# Factors of an update.


def _unfolded_factors(layer):
    """SVD of a layer's update with its kernel's last axis against the rest."""
    a, b = pairs.update_factors(layer)
    plan = layer.plan()
    if plan.kernel_is_a_matrix and len(plan.out_shape) == 1:
        return thin_svd(a, b)
    update = ops.convert_to_numpy(as_kernel(a.T @ b, plan))
    update = update.reshape(-1, update.shape[-1])
    return without_rounding(*np.linalg.svd(update, full_matrices=False))


def _write(filepath, rank, arrays):
    import h5py  # Keras needs it too, but imports it only when it saves.

    # In memory first: where the disk is full, h5py ends the whole process.
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file["lora/vars/rank"] = rank
        for index, (a, b) in arrays.items():
            file[f"lora/{index}/vars/lora_kernel_a"] = a
            file[f"lora/{index}/vars/lora_kernel_b"] = b
    with written_whole(filepath) as unfinished:
        pathlib.Path(unfinished).write_bytes(content.getvalue())
