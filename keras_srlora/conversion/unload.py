"""`unload_srlora`: SRLoRA layers to plain ones, as they were pretrained."""

import keras

from keras_srlora.backend.interrupts import held_interrupts
from keras_srlora.conversion.holders import Holders
from keras_srlora.conversion.merge import make_plain
from keras_srlora.layers import pairs
from keras_srlora.layers.find import require_records
from keras_srlora.layers.find import srlora_layers
from keras_srlora.layers.requirements import check_finite_kernel


def unload_srlora(model: keras.Model) -> list:
    """Turns every SRLoRA layer back into the plain pretrained one, in place.

    Like PEFT's `unload`, it deletes the adapter. The kernels are the pretrained
    ones again, up to rounding; a quantized kernel stays quantized. Other
    variables (a head, biases) keep their values. `merge_srlora` keeps the
    adapter's update instead, and does the same in all other respects.

    Args:
        model: a `keras.Model` with SRLoRA layers.

    Returns:
        List of the layers, plain `Dense` and `EinsumDense`.

    Raises:
        ValueError: before anything is changed, if there is no SRLoRA layer, one
            is not built, has a record of other weights or none, or inside of
            `adapter_disabled`.

    Example:

    ```python
    keras_srlora.save_adapter(model, "film_reviews.safetensors")
    keras_srlora.unload_srlora(model)
    keras_srlora.load_adapter(model, "questions.safetensors")
    ```
    """
    layers = srlora_layers(model)
    require_records(layers)
    for layer in layers:
        check_finite_kernel(pairs.pretrained_matrix(layer), layer.path)
    holders = Holders(model, layers)
    holders.refuse_shared_kernels()
    with held_interrupts():
        for layer in layers:
            layer.frozen.unload(layer, pairs.pretrained_matrix(layer))
            pairs.forget_update(layer)
        make_plain(holders, layers)
    return layers
