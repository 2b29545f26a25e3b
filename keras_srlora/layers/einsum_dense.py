"""`SRLoRAEinsumDense`."""

import keras

from keras_srlora.backend.keras_private.kernels import kernel_shape
from keras_srlora.functional import contraction
from keras_srlora.layers.base import SRLoRALayer
from keras_srlora.layers.pairs import kernel_in_step


@keras.saving.register_keras_serializable("keras_srlora")
class SRLoRAEinsumDense(SRLoRALayer, keras.layers.EinsumDense):
    """A `keras.layers.EinsumDense` with a frozen kernel adapted by SRLoRA.

    The kernel, of any number of dimensions, is read as one matrix of shape
    `(in, out)`. Its rows are the dimensions that are contracted with the
    inputs, its columns the other dimensions. In `"btd,ndh->btnh"` it is
    `d × (n·h)`, in `"bquh,uhm->bqm"` it is `(u·h) × m`. `lora_kernel_a` has
    shape `(rank, in)`, and `lora_kernel_b` has shape `(rank, out)`.

    Args:
        equation: String, an einsum equation with one contraction.
        output_shape: As in `keras.layers.EinsumDense`. All other arguments of
            `EinsumDense` are accepted, too.
        rank: Positive integer. Number of pairs. Defaults to `8`.
        target_rank: Integer of at least `rank`, or `None` for `8 * rank`. How
            many singular directions a run may visit.
        lora_alpha: Positive number, or `None` for `rank`. The low-rank part is
            scaled by `lora_alpha / rank`.
        recipe: as in `SRLoRADense`. Defaults to `"adaptive"`.
        decomposition: `"exact"`, `"randomized"` or `"auto"`. Defaults to
            `"auto"`.
        train_bias: Bool. Whether the bias is trained. Defaults to `True`.

    `SRLoRADense` describes these arguments in full, and the time at which the
    kernel is decomposed.

    Raises:
        ValueError: when the layer is built, if the equation is not one
            contraction (a batch of kernels, a dimension that is summed in one
            operand alone); otherwise as in `SRLoRADense`.

    Example:

    ```python
    layer = keras_srlora.SRLoRAEinsumDense(
        "abc,cde->abde", output_shape=(None, 12, 64), bias_axes="de", rank=8
    )
    ```

    References:
        - [SRLoRA](https://arxiv.org/abs/2505.12433)
    """

    @staticmethod
    def read_plan(layer, input_ndim=None):
        # `EinsumDense` fixes the number of input dimensions when it is built.
        shape = kernel_shape(layer)
        return contraction.analyze(layer.equation, layer.input_spec.ndim, shape)

    @property
    def kernel(self):
        """The effective kernel, for layers that read it (tied weights).

        The frozen one alone is `layer.frozen.variable`.
        """
        return kernel_in_step(self)
