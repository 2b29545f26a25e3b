"""`print_trainable_parameters`."""

import math

import keras

from keras_srlora.layers.find import srlora_layers
from keras_srlora.layers.requirements import check_built


def print_trainable_parameters(model: keras.Model) -> None:
    """Prints how many parameters train, in one line, as in PEFT.

    ```
    trainable params: 332,546 || all params: 23,045,762 || trainable%: 1.4430
    || SRLoRA factors: 331,776 in 36 layers
    ```

    Args:
        model: a `keras.Model` with SRLoRA layers.

    Raises:
        ValueError: if there is no SRLoRA layer, or one is not built.

    Example:

    ```python
    keras_srlora.enable_srlora(backbone, rank=8)
    keras_srlora.print_trainable_parameters(backbone)
    ```
    """
    layers = srlora_layers(model)
    for layer in layers:
        check_built(layer)
    trainable = _count(model.trainable_variables)
    everything = _count(model.variables)
    factors = _count(v for layer in layers for v in layer.factors)
    print(
        f"trainable params: {trainable:,} || all params: {everything:,} || "
        f"trainable%: {100 * trainable / everything:.4f} || "
        f"SRLoRA factors: {factors:,} in {len(layers)} layers"
    )


def _count(variables):
    return sum(math.prod(v.shape) for v in variables)
