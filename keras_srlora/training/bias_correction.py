"""`BiasCorrection`: Adam's bias correction for restarted pairs."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_srlora.backend import devices
from keras_srlora.layers.companions import are_attached

# The name of the pairs' ages among a layer's companions.
COMPANION = "bias_correction"

# Of the usual decays, which make the pace of a new pair.
USUAL_BETAS = 0.9, 0.999
# How much smaller than without a new correction a new pair's steps are.
PACE = 0.5

# Optimizers that divide their moments by `1 - β^t`, by the names of their
# classes, and how many of the two moments they divide.
CORRECTED_MOMENTS = {"Adam": 2, "AdamW": 2, "Adamax": 1}


class BiasCorrection:
    """Scales the steps of restarted pairs.

    Moments that start from zero are too small at first. Adam corrects this in
    step `t` by the factor (arXiv 1412.6980, section 3)

    ```
    c(t) = √(1 - β₂ᵗ) / (1 - β₁ᵗ)
    ```

    It counts the steps from the start of training. If a pair restarts later
    with moments of zero, `n` steps ago, it is corrected by `c(t)` in place of
    `c(n)`. Its steps are then up to 6.6 times as large as those of a new
    optimizer, and shrink with its age. Half of that is a good pace for a new
    pair (docs/recipes.md). So with the usual decays, 0.9 and 0.999, this class
    halves the steps of restarted pairs. With others, it multiplies them by

    ```
    ½ · c(n) / c(t) · c₀(t) / c₀(n)
    ```

    where `c₀` is `c` with the usual decays, so that the pace is the same.
    Pairs that never restarted are left alone, to the last bit.

    Args:
        layers: list of built SRLoRA layers.

    Attributes:
        layers: the list.
        began: float32 variable with the optimizer's step at which each pair
            restarted, 0 for first pairs; the layers one after the other.
    """

    def __init__(self, layers: list):
        self.layers = list(layers)
        ends = np.cumsum([layer.rank for layer in self.layers])
        self._places = {
            layer: slice(int(end) - layer.rank, int(end))
            for layer, end in zip(self.layers, ends)
        }
        parts = [LayerAges(self, layer) for layer in self.layers]
        values = [
            part.read(layer.companions.attach(COMPANION, part))
            for layer, part in zip(self.layers, parts)
        ]
        self.began = keras.Variable(
            np.concatenate(values),
            dtype="float32",
            trainable=False,
            name="bias_correction_began",
        )
        self._any = any(map(np.any, values))

    @property
    def is_attached(self) -> bool:
        """Whether the layers save these ages, not others made since."""
        return are_attached(self.layers, COMPANION, self)

    def restart(self, layer, slots, step: int) -> None:
        """Some pairs of a layer restart after `step` steps of the optimizer."""
        values = self.of_layer(layer)
        values[list(slots)] = step
        self.assign(layer, values)

    def of_layer(self, layer) -> np.ndarray:
        """A layer's part of `began`, on the host."""
        # A process may save what the others do not.
        value = devices.local(ops.convert_to_tensor(self.began))
        return np.array(devices.to_numpy(value))[self._places[layer]]

    def assign(self, layer, values) -> None:
        """The inverse of `of_layer`."""
        self._any = self._any or bool(np.any(values))
        old = ops.convert_to_tensor(self.began)
        new = ops.convert_to_tensor(values, "float32")
        start = self._places[layer].start
        self.began.assign(ops.slice_update(old, [start], new))

    def copy_factors(self) -> list | None:
        """Copies of the factors before a step; `None` if none will be scaled.

        What is compiled before the first restart runs after it, too.
        """
        if keras.backend.backend() == "torch" and not self._any:
            return None
        return [ops.copy(_value(v)) for v in self._factors()]

    def scale_step(self, old: list, steps: Any, betas: tuple) -> None:
        """Scales the step that the factors have made since `copy_factors`.

        Args:
            old: list that `copy_factors` returned.
            steps: scalar tensor. The optimizer's steps with this one.
            betas: `β₁` and `β₂`; see `corrected_betas`.
        """
        steps = ops.cast(steps, "float32")
        began = ops.convert_to_tensor(self.began)
        # Restarts that this optimizer has not seen were those of another one;
        # to a new one all pairs are new.
        began = ops.where(began < steps, began, 0.0)
        part = _pace(steps - began, steps, *betas)
        # First pairs stay as they are; a vector's powers may be rounded in
        # another way than a number's.
        excess = ops.expand_dims(ops.where(began > 0, 1.0 - part, 0.0), 1)
        new = [began]
        for layer, *pair in zip(self.layers, old[::2], old[1::2]):
            of_layer = excess[self._places[layer]]
            for factor, before in zip(layer.factors, pair):
                after = _value(factor)
                part = ops.cast(of_layer, after.dtype)
                new.append(after - part * (after - before))
        devices.assign_on_replicas([self.began, *self._factors()], new)

    def _factors(self):
        return [factor for layer in self.layers for factor in layer.factors]


class LayerAges:
    """One layer's part of a `BiasCorrection`, to be saved: `(rank,)`."""

    def __init__(self, correction, layer):
        self._correction = correction
        self._layer = layer

    def belongs_to(self, correction) -> bool:
        return self._correction is correction

    def read(self, arrays):
        """The array; of zeros where there is none."""
        return arrays.get("began", np.zeros(self._layer.rank, "float32"))

    def to_arrays(self):
        """The values now; nothing where no pair restarted."""
        values = self._correction.of_layer(self._layer)
        return {"began": values} if values.any() else {}

    def restore(self, arrays):
        """Goes on from other values; without them all pairs are first ones."""
        self._correction.assign(self._layer, self.read(arrays))


def _value(variable):
    return ops.stop_gradient(ops.convert_to_tensor(variable))


def correction(n, beta_1, beta_2):
    """`c(n)` of a tensor."""
    return ops.sqrt(1.0 - beta_2**n) / (1.0 - beta_1**n)


def _pace(n, t, *betas):
    """Scales the step `t` of pairs that restarted `n` steps ago."""
    new = correction(n, *betas) / correction(n, *USUAL_BETAS)
    old = correction(t, *betas) / correction(t, *USUAL_BETAS)
    return PACE * new / old


def corrected_betas(optimizer: Any, factors: list | None = None):
    """Returns `(β₁, β₂)` of an optimizer that corrects its moments, or `None`.

    `β₂` is 0 where the second moment is not corrected.

    Args:
        optimizer: of Keras or of `torch.optim`.
        factors: list of variables that it trains, for one of `torch.optim`.
    """
    classes = [cls.__name__ for cls in type(optimizer).__mro__]
    moments = [CORRECTED_MOMENTS[c] for c in classes if c in CORRECTED_MOMENTS]
    if not moments:
        return None
    if factors is None:
        betas = {(optimizer.beta_1, optimizer.beta_2)}
    else:
        wanted = {id(v.value) for v in factors}
        betas = {
            tuple(group["betas"])
            for group in optimizer.param_groups
            if not wanted.isdisjoint(map(id, group["params"]))
        }
    if len(betas) != 1:
        # One correction cannot serve them all.
        return None
    ((beta_1, beta_2),) = betas
    return beta_1, beta_2 if moments[0] == 2 else 0.0
