"""The table of the layers that can be adapted, and the classes for them."""

import keras

from keras_srlora.layers.dense import SRLoRADense
from keras_srlora.layers.einsum_dense import SRLoRAEinsumDense
from keras_srlora.layers.embedding import SRLoRAEmbedding

# Keras's class: the class that adapts it. Another kind of layer is a row here
# and a class of its own, in a file of its own.
ADAPTED = {
    keras.layers.Dense: SRLoRADense,
    keras.layers.EinsumDense: SRLoRAEinsumDense,
    keras.layers.Embedding: SRLoRAEmbedding,
}
PLAIN = {adapted: plain for plain, adapted in ADAPTED.items()}


def plain_kind(layer):
    """Keras's class of an SRLoRA layer, or of one of a subclass."""
    kinds = [PLAIN[x] for x in type(layer).__mro__ if x in PLAIN]
    return kinds[0] if kinds else None


def plain_class(layer):
    """The class of a layer, or that of which conversion made a `Converted`."""
    return getattr(type(layer), "plain_class", type(layer))
