"""`adapter_disabled`."""

from __future__ import annotations

import contextlib

import keras

from keras_srlora.adapters.others import warn_of_trained
from keras_srlora.layers.find import require_records
from keras_srlora.layers.find import srlora_layers
from keras_srlora.layers.switched_off import check_untouched
from keras_srlora.layers.switched_off import is_switched_off
from keras_srlora.layers.switched_off import switch_off
from keras_srlora.layers.switched_off import switch_on


@contextlib.contextmanager
def adapter_disabled(model: keras.Model):
    """Computes with the pretrained kernels inside the `with` block.

    Inside, the SRLoRA layers have their pretrained kernels, up to rounding, and
    no update. After the block, also after an exception, every variable has its
    old value again, bit-identically. Other trained variables (a head, biases)
    keep their values; a warning names those that had a pretrained value. Blocks
    may be nested.

    The block is for inference. Training, merging, loading or exporting an
    adapter inside raises `ValueError`. If a custom loop trains the factors, or
    other code sets them, the end of the block raises it. A file that is saved
    inside holds the pretrained model.

    Args:
        model: a `keras.Model` with SRLoRA layers.

    Raises:
        ValueError: if there is no SRLoRA layer, or the record of one is missing
            or belongs to other weights.

    Example:

    ```python
    with keras_srlora.adapter_disabled(model):
        pretrained_logits = model.predict(x)
    ```
    """
    layers = srlora_layers(model)
    on = [layer for layer in layers if not is_switched_off(layer)]
    require_records(on)
    if on:
        warn_of_trained(model, layers, "are left as they are", stacklevel=4)
    with contextlib.ExitStack() as stack:
        for layer in layers:
            switch_off(layer)
            stack.callback(switch_on, layer)
        yield model
        check_untouched(layers)
