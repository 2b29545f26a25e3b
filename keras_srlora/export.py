"""`export_lora`: an adapter as the plain LoRA that stock KerasHub reads."""

import numpy as np
from keras import ops

from keras_srlora import _keras
from keras_srlora._files import written_whole
from keras_srlora._layers import srlora_layers


def export_lora(backbone, filepath, rank=None):
    """Writes a backbone's adapter as KerasHub's own LoRA weights.

    Whatever the run fused and restarted, the total update of a kernel is a
    product of two factors, of rank `2 · target_rank` at most; KerasHub reads
    factors of one rank for all layers. Its LoRA of an `EinsumDense` layer
    unfolds the last axis of the kernel against the rest, so that there the rank
    is at most the size of that axis.

    ```python
    rank, names, _ = keras_srlora.export_lora(backbone, "reviews.lora.h5")
    stock = keras_hub.models.BertBackbone.from_preset("bert_base_en")
    stock.enable_lora(rank, target_layer_names=names)
    stock.load_lora_weights("reviews.lora.h5")
    ```

    Biases, a head and other trained variables are not in such a file.

    Args:
        backbone: the KerasHub backbone that `enable_srlora` converted.
        filepath: path that ends in `.lora.h5`.
        rank: int, or `None` for the rank that the updates need. A smaller one
            keeps the best approximation of each update.

    Returns:
        `(rank, target_layer_names, error)`: what `enable_lora` needs, and the
        largest part of an update, in Frobenius norm, that was cut off; 0.0 but
        for rounding where `rank` is `None`.

    Raises:
        ValueError: if there is no SRLoRA layer, the name does not end in
            `.lora.h5`, or `rank` is not positive.
    """
    if not str(filepath).endswith(".lora.h5"):
        raise ValueError(
            "The name of the file must end in `.lora.h5`, as KerasHub wants "
            f"it. Received: filepath={str(filepath)!r}"
        )
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ValueError(
            f"`rank` must be a positive integer or `None`. Received: {rank=}"
        )
    adapted = srlora_layers(backbone)
    factored = {id(layer): _unfolded_factors(layer) for layer in adapted}
    needed = max(1, *(len(s) for _, s, _ in factored.values()))
    rank = needed if rank is None else rank
    names = sorted({layer.name for layer in adapted})
    # As KerasHub counts: by index among the layers that have weights.
    layers = [
        layer
        for layer in _keras.flatten_layers(backbone)
        if layer is not backbone and layer.weights
    ]
    arrays, error = {}, 0.0
    for index, layer in enumerate(layers):
        if layer.name not in names or not hasattr(layer, "enable_lora"):
            continue
        shape = tuple(_keras.stored_kernel(layer).shape)
        a = np.zeros((*shape[:-1], rank), "float32")
        b = np.zeros((rank, shape[-1]), "float32")
        # A layer of the same name that was not adapted gets an update of zero.
        if id(layer) in factored:
            left, values, right = factored[id(layer)]
            root = np.sqrt(values[:rank])
            count = len(root)
            a[..., :count] = (left[:, :rank] * root).reshape(*shape[:-1], -1)
            b[:count] = root[:, None] * right[:rank]
            total = np.linalg.norm(values)
            if total > 0:
                error = max(error, np.linalg.norm(values[rank:]) / total)
        arrays[index] = a, b
    _write(filepath, rank, arrays)
    return rank, names, float(error)


def _unfolded_factors(layer):
    """SVD of a layer's update with its last axis against the rest.

    Returns:
        `(left, values, right)` of shapes `(rows, k)`, `(k,)`, `(k, last)`,
        without the singular values that are rounding errors.
    """
    a, b = layer.update_factors()
    shape = tuple(_keras.stored_kernel(layer).shape)
    if layer.keeps_last_axis_apart:
        # Two thin factorizations: nothing of the kernel's size.
        q_a, r_a = np.linalg.qr(a.T)
        q_b, r_b = np.linalg.qr(b.T)
        left, values, right = np.linalg.svd(r_a @ r_b.T, full_matrices=False)
        left, right = q_a @ left, right @ q_b.T
    else:
        update = ops.convert_to_numpy(layer.shape_as_kernel(a.T @ b))
        update = update.reshape(-1, shape[-1])
        left, values, right = np.linalg.svd(update, full_matrices=False)
    tolerance = values[0] * max(shape) * np.finfo("float32").eps
    count = int(np.sum(values > tolerance))
    return left[:, :count], values[:count], right[:count]


def _write(filepath, rank, arrays):
    import h5py  # Keras needs it too, but imports it only when it saves.

    with written_whole(filepath) as unfinished:
        with h5py.File(unfinished, "w") as file:
            file["lora/vars/rank"] = rank
            for index, (a, b) in arrays.items():
                file[f"lora/{index}/vars/lora_kernel_a"] = a
                file[f"lora/{index}/vars/lora_kernel_b"] = b
