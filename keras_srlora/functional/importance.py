"""Sensitivity of a weight and importance of a pair, as pure functions.

Source: SRLoRA, arXiv 2505.12433, section 3; the score is AdaLoRA's
(arXiv 2303.10512, equations 8 to 10). Factors are stored with one pair a row:
`a` as `(rank, in)`, `b` as `(rank, out)`.
"""

from keras import ops


def sensitivity(weight, gradient):
    """`I = |w · g|`, elementwise, in float32: the cost of removing `w`.

    Shapes: `weight` and `gradient` are equal; so is the result.
    """
    weight = ops.stop_gradient(ops.convert_to_tensor(weight))
    weight = ops.cast(weight, "float32")
    return ops.abs(ops.multiply(weight, ops.cast(gradient, "float32")))


def update_averages(average, uncertainty, observed, beta1, beta2):
    """One step of the two running averages.

    ```
    Ī ← β₁ Ī + (1 - β₁) I
    Ū ← β₂ Ū + (1 - β₂) |I - Ī|        with the new Ī
    ```

    Args:
        average: `Ī`, float32.
        uncertainty: `Ū`, float32, of the same shape.
        observed: `I` of this step, float32, of the same shape.
        beta1: float in [0, 1).
        beta2: float in [0, 1).

    Returns:
        The new `(average, uncertainty)`.
    """
    average = beta1 * average + (1.0 - beta1) * observed
    deviation = ops.abs(observed - average)
    uncertainty = beta2 * uncertainty + (1.0 - beta2) * deviation
    return average, uncertainty


def pair_importance(average_a, uncertainty_a, average_b, uncertainty_b):
    """Importance of each pair: mean of `Ī·Ū` over `a` plus that over `b`.

    Args:
        average_a: tensor of shape `(rank, in)`.
        uncertainty_a: tensor of shape `(rank, in)`.
        average_b: tensor of shape `(rank, out)`.
        uncertainty_b: tensor of shape `(rank, out)`.

    Returns:
        Tensor of shape `(rank,)`.
    """
    return ops.mean(average_a * uncertainty_a, axis=1) + ops.mean(
        average_b * uncertainty_b, axis=1
    )
