"""`Sensitivity`: the running statistics of a set of layers."""

import keras
import numpy as np
from keras import ops

from keras_srlora._checks import check_fraction
from keras_srlora._sensitivity import pair_importance
from keras_srlora._sensitivity import sensitivity
from keras_srlora._sensitivity import update_averages
from keras_srlora._state import Statistics


class Sensitivity:
    """Scores the pairs of SRLoRA layers from the gradients of each step.

    For each entry `w` of a factor with gradient `g` (SRLoRA, arXiv 2505.12433,
    section 3; AdaLoRA, arXiv 2303.10512, equations 8 to 10):

    ```
    I  = |w · g|
    Ī ← β₁ Ī + (1 - β₁) I
    Ū ← β₂ Ū + (1 - β₂) |I - Ī|
    importance of pair k = mean of Ī·Ū over a's row k + mean over b's row k
    ```

    `SensitivityOptimizer` calls `update` inside the compiled train step; a loop
    of your own may call it, or leave that to the optimizer.

    Args:
        layers: list of built SRLoRA layers.
        beta1: float in [0, 1). Decay of `Ī`. Defaults to `0.85`.
        beta2: float in [0, 1). Decay of `Ū`. Defaults to `0.85`.

    Attributes:
        variables: list of float32 variables, four a layer; memory
            `2 · rank · (in + out)` numbers a layer.

    Example:

    ```python
    statistics = keras_srlora.Sensitivity(layers)
    loss.backward()  # torch
    factors = [v for layer in layers for v in layer.factors]
    statistics.update([v.value.grad for v in factors], factors)
    ```
    """

    def __init__(self, layers, beta1=0.85, beta2=0.85):
        check_fraction("beta1", beta1, low_open=False, high_open=True)
        check_fraction("beta2", beta2, low_open=False, high_open=True)
        self.layers = list(layers)
        self.beta1 = beta1
        self.beta2 = beta2
        for layer in self.layers:
            layer.adapter_state.statistics = _make_variables(layer)

    @property
    def variables(self):
        return [
            variable
            for layer in self.layers
            for variable in layer.adapter_state.statistics
        ]

    def update(self, gradients, variables, is_step=True):
        """One step of the averages, from the gradients of this step.

        Leaves no mark where a gradient, of any variable, is not finite.

        Args:
            gradients: list of tensors, or `None` where a variable has none.
            variables: list of the variables that they belong to.
            is_step: bool or bool tensor. Where false, nothing is updated.
        """
        gradient_of = {
            id(v): g for v, g in zip(variables, gradients) if g is not None
        }
        scored = []
        for layer in self.layers:
            # A layer that took no part in the loss has no gradient.
            if all(id(v) in gradient_of for v in layer.factors):
                scored.append(layer)
        observed = [
            sensitivity(v, gradient_of[id(v)])
            for layer in scored
            for v in layer.factors
        ]
        # |w·g| can overflow where g does not.
        accepted = ops.all(
            ops.stack(
                [
                    ops.all(ops.isfinite(x))
                    for x in [*gradient_of.values(), *observed]
                ]
            )
        )
        accepted = ops.logical_and(accepted, is_step)
        observed = iter(observed)
        for layer in scored:
            statistics = layer.adapter_state.statistics
            for average, uncertainty in (statistics[:2], statistics[2:]):
                old = (
                    ops.convert_to_tensor(average),
                    ops.convert_to_tensor(uncertainty),
                )
                new = update_averages(
                    *old, next(observed), self.beta1, self.beta2
                )
                average.assign(ops.where(accepted, new[0], old[0]))
                uncertainty.assign(ops.where(accepted, new[1], old[1]))

    def importance(self):
        """Importance of each pair of each layer.

        Returns:
            List of float32 NumPy arrays, one a layer, of shape `(rank,)`. One
            transfer from the device for all of them.
        """
        scores = [
            pair_importance(
                *map(ops.convert_to_tensor, layer.adapter_state.statistics)
            )
            for layer in self.layers
        ]
        ends = np.cumsum([layer.rank for layer in self.layers])[:-1]
        return np.split(ops.convert_to_numpy(ops.concatenate(scores)), ends)

    def reset(self, layer):
        """Restarts the statistics of a layer from zero."""
        for variable in layer.adapter_state.statistics:
            variable.assign(ops.zeros(variable.shape, variable.dtype))

    def detach(self):
        """Leaves the values with the layers, as arrays, for the next run."""
        for layer in self.layers:
            layer.adapter_state.detach_statistics()


def _make_variables(layer):
    """Variables that go on from the values that the layer holds, if any."""
    layer.adapter_state.detach_statistics()
    held = layer.adapter_state.statistics

    def make(factor, name):
        value = getattr(held, name, np.zeros(factor.shape, "float32"))
        return keras.Variable(
            value,
            dtype="float32",
            trainable=False,
            name=f"{factor.name}_{name[:-2]}",
        )

    a, b = layer.factors
    return Statistics(
        average_a=make(a, "average_a"),
        uncertainty_a=make(a, "uncertainty_a"),
        average_b=make(b, "average_b"),
        uncertainty_b=make(b, "uncertainty_b"),
    )
