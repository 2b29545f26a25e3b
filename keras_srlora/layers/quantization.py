"""Adapted layers, and models that hold any, refuse to be quantized."""

import keras

from keras_srlora.backend.keras_private.nesting import flatten_layers
from keras_srlora.backend.keras_private.quantizing import ask_before_quantizing
from keras_srlora.backend.keras_private.quantizing import set_dtype_policy
from keras_srlora.backend.mixins import KerasMixin


class RefusesQuantization(KerasMixin):
    """Mixin before a Keras layer, which then cannot be quantized.

    Keras would quantize the frozen kernel and leave the factors to a layer that
    does not know them. A plain layer that is quantized already can be adapted.
    """

    @property
    def dtype_policy(self):
        return super().dtype_policy

    @dtype_policy.setter
    def dtype_policy(self, policy):
        # Keras quantizes a built layer that gets the policy of a quantized one.
        if keras.dtype_policies.get(policy).quantization_mode is not None:
            if self.built and self.quantization_mode is None:
                refuse_to_quantize(self)
        set_dtype_policy(self, policy)


def refuse_to_quantize(layer):
    """Raises `ValueError` for such a layer, and for a model that holds one."""
    found = [
        x.path
        for x in flatten_layers(layer)
        if isinstance(x, RefusesQuantization) and x.built
    ]
    if found:
        raise ValueError(
            "SRLoRA layers cannot be quantized, nor can a model that holds "
            "any. Call `keras_srlora.merge_srlora(model)` first; or quantize "
            "the plain model and convert that. Received: "
            f"{type(layer).__name__} {layer.name!r} with {len(found)} SRLoRA "
            f"layers, such as {found[0]!r}"
        )


ask_before_quantizing(refuse_to_quantize)
