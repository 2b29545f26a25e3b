"""`load_plain_weights`: a plain model's weights into SRLoRA layers."""

import keras

from keras_srlora.backend.keras_private.nesting import classes_named_as
from keras_srlora.layers.find import srlora_layers
from keras_srlora.layers.kinds import PLAIN


def load_plain_weights(model: keras.Model, filepath) -> None:
    """Loads the weights file of the plain model into one with SRLoRA layers.

    `model.load_weights` cannot do this: it looks for layers under the names of
    their classes, and finds no `SRLoRADense` in a file that holds a `Dense`.
    The loaded kernels count as pretrained. Factors start anew, and the kernels
    are decomposed when training starts.

    Args:
        model: a built `keras.Model` with SRLoRA layers, of the plain model's
            structure.
        filepath: path of a `.weights.h5` file of the plain model.

    Raises:
        ValueError: if there is no SRLoRA layer, or the file does not fit.

    Example:

    ```python
    plain_model.save_weights("pretrained.weights.h5")
    keras_srlora.load_plain_weights(model, "pretrained.weights.h5")
    ```
    """
    srlora_layers(model)
    names = {adapted: plain.__name__ for adapted, plain in PLAIN.items()}
    with classes_named_as(names):
        model.load_weights(filepath)
