"""`SRLoRAEinsumDense`."""

import keras

from keras_srlora.backend.keras_private.kernels import kernel_shape
from keras_srlora.functional import contraction
from keras_srlora.layers.base import SRLoRALayer
from keras_srlora.layers.pairs import kernel_in_step


@keras.saving.register_keras_serializable("keras_srlora")
class SRLoRAEinsumDense(SRLoRALayer, keras.layers.EinsumDense):
    """A `keras.layers.EinsumDense` with a frozen kernel adapted by SRLoRA.

    The kernel, of any number of dimensions, is read as one matrix: contracted
    dimensions × dimensions of the kernel alone, wherever they lie in it. In
    `"btd,ndh->btnh"` it is `d × (n·h)`, in `"bquh,uhm->bqm"` it is
    `(u·h) × m`. `lora_kernel_a` then has shape `(rank, in)` and
    `lora_kernel_b` `(rank, out)` with the flattened sizes.

    Args:
        equation: String, an einsum equation with one contraction.
        output_shape: As in `keras.layers.EinsumDense`, like every other
            argument that is not listed here.
        rank: Positive integer. Number of pairs. Defaults to `8`.
        target_rank: Integer of at least `rank`, or `None` for `8 * rank`. How
            many singular directions a run may visit.
        lora_alpha: Positive number, or `None` for `rank`. The low-rank part is
            scaled by `lora_alpha / rank`.
        recipe: as in `SRLoRADense`. Defaults to `"adaptive"`.
        decomposition: `"exact"`, `"randomized"` or `"auto"`. Defaults to
            `"auto"`.
        train_bias: Bool. Whether the bias is trained. Defaults to `True`.

    `SRLoRADense` describes them in full, and when the kernel is decomposed.

    Raises:
        ValueError: on building, for an equation that is not one contraction
            (a batch of kernels, a dimension summed in one operand alone);
            otherwise as `SRLoRADense`.

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
