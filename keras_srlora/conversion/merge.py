"""`merge_srlora`: SRLoRA layers to plain ones, with their updates."""

import keras

from keras_srlora.backend.interrupts import held_interrupts
from keras_srlora.conversion.containers import restore_plain_classes
from keras_srlora.conversion.freezing import release
from keras_srlora.conversion.holders import Holders
from keras_srlora.layers import pairs
from keras_srlora.layers.factors import remove_factors
from keras_srlora.layers.find import srlora_layers
from keras_srlora.layers.finite import check_finite_update
from keras_srlora.layers.kinds import plain_kind
from keras_srlora.layers.requirements import check_initializable
from keras_srlora.layers.switched_off import check_switched_on


def merge_srlora(model: keras.Model) -> list:
    """Turns every SRLoRA layer back into a plain one, in place.

    The update is added to the kernel, so the outputs stay the same. Factors,
    directions and record are deleted. Variables that `enable_srlora` froze are
    trainable again, and so are the kernels and biases of these layers.
    `unload_srlora` restores the pretrained kernels instead.

    Other models that hold these layers use the merged layers, too. The
    optimizers of all these models, if built, start anew at step 0, without
    moments.

    Args:
        model: a `keras.Model` with SRLoRA layers.

    Returns:
        List of the merged layers, plain `Dense` and `EinsumDense`.

    Raises:
        ValueError: before anything is changed, if there is no SRLoRA layer, one
            is not built, factors or their product are not finite, or inside of
            `adapter_disabled`.

    Example:

    ```python
    keras_srlora.merge_srlora(model)
    model.save("finetuned.keras")
    ```
    """
    layers = srlora_layers(model)
    for layer in layers:
        if not layer.built:
            check_initializable(layer)
    check_switched_on(layers)
    check_finite_update(layers)
    holders = Holders(model, layers)
    holders.refuse_shared_kernels()
    with held_interrupts():
        for layer in layers:
            layer.frozen.merge(layer, pairs.effective_matrix(layer))
            pairs.forget_update(layer)
        make_plain(holders, layers)
    return layers


def make_plain(holders, layers):
    """Makes plain layers of those whose kernels have their final values."""
    for layer in layers:
        remove_factors(layer)
        layer.__class__ = plain_kind(layer)
    release(holders.models)
    restore_plain_classes(holders.containers())
    holders.follow()
