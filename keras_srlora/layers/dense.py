"""`SRLoRADense`."""

import keras

from keras_srlora.backend.keras_private.kernels import kernel_shape
from keras_srlora.functional import contraction
from keras_srlora.layers.base import SRLoRALayer
from keras_srlora.layers.pairs import kernel_in_step


@keras.saving.register_keras_serializable("keras_srlora")
class SRLoRADense(SRLoRALayer, keras.layers.Dense):
    """A `keras.layers.Dense` whose kernel is frozen and adapted by SRLoRA.

    ```
    y = activation(x @ kernel + s · (x @ aᵀ) @ b + bias)
    s = lora_alpha / rank
    ```

    `rank` pairs (a row of `a` with a row of `b`) are trained; a
    `RecompositionCallback` scores them while training, fuses some of them into
    the kernel, by the recipe, and restarts their slots along unused
    singular directions of the pretrained kernel.

    The kernel is decomposed **when training starts** (by the callback, or by
    `initialize_factors`), not when the layer is built. The weights that the
    layer has by then are the pretrained ones, be they from an initializer,
    `set_weights`, `assign`, or a file (`load_plain_weights` for one of the
    plain model).
    Weights that come later as the plain layer's, from a file or through
    `layer.set_weights`, are decomposed anew. Where a kernel was assigned
    directly, training refuses to start until `layer.initialize_factors()` was
    called again. Before the first decomposition `a` is random and `b` zero, as
    in Keras's LoRA, so the layer computes the same as a plain one.

    Args:
        units: Positive integer, as in `keras.layers.Dense`, like every other
            argument that is not listed here (`activation`, `use_bias`,
            initializers, regularizers, `bias_constraint`, `dtype`, ...). A
            `kernel_regularizer` acts on the two factors and a
            `kernel_constraint` is refused, as in Keras's own LoRA.
        rank: Positive integer. Number of pairs, at most the smaller side of
            the kernel. Defaults to `8`.
        target_rank: Integer of at least `rank`. How many singular directions a
            run may visit; capped by the smaller side of the kernel. Defaults to
            `None`: `8 * rank`.
        lora_alpha: Positive number. The low-rank part is scaled by
            `lora_alpha / rank`. Defaults to `None`: `rank`, so scale 1, as in
            the paper.
        recipe: `"adaptive"` (LoRA that recomposes in long runs),
            `"lora_restarts"` (in short ones too), `"paper"` (SRLoRA as
            published) or a `Recipe`: how pairs start, which are fused, along
            what they restart, and when. Defaults to `"adaptive"`.
        decomposition: `"exact"`, `"randomized"` or `"auto"` (by size).
            Defaults to `"auto"`.
        train_bias: Bool. Whether the bias is trained. Defaults to `True`;
            `enable_srlora` freezes it.

    Input shape:
        N-D tensor with shape `(batch_size, ..., in)`.

    Output shape:
        N-D tensor with shape `(batch_size, ..., units)`.

    Raises:
        ValueError: for a `rank` that is not positive or above the kernel's
            smaller side (on building), a `target_rank` below `rank`, a
            `lora_alpha` that is not positive, a `kernel_constraint`.

    Example:

    ```python
    inputs = keras.Input((64,))
    x = keras_srlora.SRLoRADense(256, rank=8, activation="gelu")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(10)(x))
    keras_srlora.load_plain_weights(model, "pretrained.weights.h5")
    model.compile("adamw", "mse")
    model.fit(x, y, callbacks=[keras_srlora.RecompositionCallback()])
    ```

    References:
        - [SRLoRA](https://arxiv.org/abs/2505.12433)
        - [PiSSA](https://arxiv.org/abs/2404.02948)
        - [LoRA](https://arxiv.org/abs/2106.09685)
    """

    @staticmethod
    def read_plan(layer, input_ndim=None):
        in_features, out_features = kernel_shape(layer)
        return contraction.dense(input_ndim or 2, in_features, out_features)

    @property
    def kernel(self):
        """The effective kernel, for layers that read it (tied weights).

        The frozen one alone is `layer.frozen.variable`.
        """
        return kernel_in_step(self)
