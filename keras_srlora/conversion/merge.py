"""`merge_srlora`: SRLoRA layers to plain ones, with what they learnt."""

import keras

from keras_srlora.backend import keras_private
from keras_srlora.conversion.containers import restore_plain_classes
from keras_srlora.layers.factors import remove_factors
from keras_srlora.layers.find import srlora_layers
from keras_srlora.layers.requirements import check_initializable


def merge_srlora(model: keras.Model) -> list:
    """Turns every SRLoRA layer back into a plain one, in place.

    The kernel becomes the effective kernel, so that the outputs stay; factors,
    directions and record are dropped. Kernel and bias of these layers are
    trainable again; what else `enable_srlora` froze stays so until
    `model.trainable = True`. A compiled model gets its optimizer anew, at step
    0 and without moments.

    Args:
        model: a `keras.Model` with SRLoRA layers.

    Returns:
        List of the merged layers, plain `Dense` and `EinsumDense`.

    Raises:
        ValueError: if there is no SRLoRA layer, or one is not built.

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
    for layer in layers:
        remove_factors(layer)
    restore_plain_classes(model, layers)
    keras_private.drop_compiled_functions(model)
    _renew_optimizer(model)
    return layers


def _renew_optimizer(model):
    """The old one has slots of variables that are gone, and would save them."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        config = keras.saving.serialize_keras_object(optimizer)
        model.optimizer = keras.saving.deserialize_keras_object(config)
        model.optimizer.build(model.trainable_variables)
