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

    The layer trains `rank` pairs, each a row of `a` with a row of `b`. During
    training, a `RecompositionCallback` scores the pairs, fuses some of them
    into the kernel and restarts their slots along singular directions of the
    pretrained kernel, as the recipe defines.

    The kernel is decomposed **when training starts** (by the callback, or by
    `initialize_factors`), not when the layer is built. The weights at that time
    count as pretrained, whether they come from an initializer, `set_weights`,
    `assign`, or a file (use `load_plain_weights` for a file of the plain
    model). If you load a plain layer's weights later, from a file or with
    `layer.set_weights`, they are decomposed anew. If you assign to the kernel
    directly, call `layer.initialize_factors()`: training raises an error until
    then. Before the first decomposition `a` is random and `b` zero, as in
    Keras's LoRA, so the layer computes the same as a plain one.

    Args:
        units: Positive integer, as in `keras.layers.Dense`. All other arguments
            of `Dense` are accepted, too (`activation`, `use_bias`,
            initializers, regularizers, `bias_constraint`, `dtype`, ...). As in
            Keras's own LoRA, a `kernel_regularizer` acts on the two factors,
            and a `kernel_constraint` raises an error.
        rank: Positive integer. Number of pairs, at most the smaller side of
            the kernel. Defaults to `8`.
        target_rank: Integer of at least `rank`. How many singular directions a
            run may visit, at most the smaller side of the kernel. Defaults to
            `None`: `8 * rank`.
        lora_alpha: Positive number. The low-rank part is scaled by
            `lora_alpha / rank`. Defaults to `None`: `rank`, so the scale is 1,
            as in the paper.
        recipe: `"adaptive"` (LoRA that recomposes in long runs),
            `"lora_restarts"` (recomposes in short runs, too), `"paper"` (SRLoRA
            as published) or a `Recipe`. Defaults to `"adaptive"`.
        decomposition: `"exact"`, `"randomized"` or `"auto"` (by size).
            Defaults to `"auto"`.
        train_bias: Bool. Whether the bias is trained. Defaults to `True`;
            `enable_srlora` freezes it.

    Input shape:
        N-D tensor with shape `(batch_size, ..., in)`.

    Output shape:
        N-D tensor with shape `(batch_size, ..., units)`.

    Raises:
        ValueError: if `rank` is not positive or, when the layer is built, above
            the kernel's smaller side, `target_rank` is below `rank`,
            `lora_alpha` is not positive, or there is a `kernel_constraint`.

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
