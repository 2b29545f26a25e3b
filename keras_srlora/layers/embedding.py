"""`SRLoRAEmbedding`."""

import keras
from keras import ops

from keras_srlora.backend.keras_private.kernels import stored_kernel
from keras_srlora.functional import contraction
from keras_srlora.layers.base import SRLoRALayer
from keras_srlora.layers.pairs import kernel_in_step


@keras.saving.register_keras_serializable("keras_srlora")
class SRLoRAEmbedding(SRLoRALayer, keras.layers.Embedding):
    """A `keras.layers.Embedding` with a frozen table adapted by SRLoRA.

    ```
    y = table[ids] + s · a[:, ids]ᵀ @ b
    s = lora_alpha / rank
    ```

    The table is a matrix of shape `(input_dim, output_dim)`, and a step never
    forms another one of that size. `lora_embeddings_a` has shape
    `(rank, input_dim)`, and `lora_embeddings_b` has shape `(rank, output_dim)`.
    `enable_srlora` converts an embedding only if `target_layer_names` names it.

    Args:
        input_dim: Positive integer, as in `keras.layers.Embedding`. All other
            arguments of `Embedding` are accepted, too. A quantized table and an
            `embeddings_constraint` raise an error.
        output_dim: Positive integer.
        rank: Positive integer. Number of pairs. Defaults to `8`.
        target_rank: Integer of at least `rank`, or `None` for `8 * rank`. How
            many singular directions a run may visit.
        lora_alpha: Positive number, or `None` for `rank`. The low-rank part is
            scaled by `lora_alpha / rank`.
        recipe: as in `SRLoRADense`. Defaults to `"adaptive"`.
        decomposition: `"exact"`, `"randomized"` or `"auto"`. Defaults to
            `"auto"`.

    `SRLoRADense` describes these arguments in full, and the time at which the
    table is decomposed.

    Input shape:
        N-D tensor of integers.

    Output shape:
        (N+1)-D tensor with shape `(..., output_dim)`.

    Example:

    ```python
    embedding = keras_srlora.SRLoRAEmbedding(30522, 384, rank=8)
    ```

    References:
        - [SRLoRA](https://arxiv.org/abs/2505.12433)
    """

    factor_names = "lora_embeddings_a", "lora_embeddings_b"
    # As in Keras's and KerasHub's LoRA, which adapt projections.
    converted_by_default = False
    # Attributes that the shared code reads and an embedding lacks.
    bias = None
    activation = None

    @staticmethod
    def read_plan(layer, input_ndim=None):
        if layer.quantization_mode is not None:
            raise ValueError(
                f"The table of layer {layer.path!r} is quantized; tables of "
                "floats can be adapted. "
                f"Received: quantization_mode={layer.quantization_mode!r}"
            )
        rows, columns = stored_kernel(layer).shape
        return contraction.dense(2, rows, columns)

    def build(self, input_shape=None):
        if not self.built:
            super().build(input_shape)

    def call(self, inputs, training=None):
        if inputs.dtype not in ("int32", "int64"):
            inputs = ops.cast(inputs, "int32")
        ids = ops.reshape(inputs, (-1,))
        a, b = self.factors
        # Columns, so that a pair is a row here as everywhere.
        hidden = ops.transpose(ops.take(a, ids, axis=1))
        if self.scale != 1.0:
            hidden = ops.multiply(hidden, self.scale)
        y = ops.add(
            ops.take(self.frozen.variable, ids, axis=0),
            contraction.matmul(hidden, b),
        )
        y = ops.reshape(y, (*ops.shape(inputs), self.output_dim))
        return ops.cast(y, self.compute_dtype)

    @property
    def embeddings(self):
        """The effective table, for layers that read it (tied weights)."""
        return kernel_in_step(self)

    def get_config(self):
        config = super().get_config()
        config.pop("train_bias")
        return config
