"""`Sensitivity`: the running statistics of a set of layers."""

import math
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_srlora import _devices
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
        variables: two float32 variables, `Ī` and `Ū` of all factors one after
            the other, so that a step updates them in a few operations however
            many layers there are; `2 · rank · (in + out)` numbers a layer.

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
        if not self.layers:
            raise ValueError(
                "There is nothing to score. Pass at least one SRLoRA layer. "
                f"Received: layers={layers!r}"
            )
        self.beta1 = beta1
        self.beta2 = beta2
        self._places = _places(self.layers)
        held = [
            x.adapter_state.statistics_to_numpy() or _zeros(self._places[x])
            for x in self.layers
        ]
        self.variables = [
            keras.Variable(
                np.concatenate([x.reshape(-1) for s in held for x in s[i::2]]),
                dtype="float32",
                trainable=False,
                name=f"sensitivity_{name}",
            )
            for i, name in enumerate(("average", "uncertainty"))
        ]
        for layer in self.layers:
            layer.adapter_state.statistics = RunningStatistics(
                self.variables, self._places[layer]
            )

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
        # A layer that took no part in the loss has no gradient.
        scored = [
            layer
            for layer in self.layers
            if all(id(v) in gradient_of for v in layer.factors)
        ]
        # In its place, weights and gradients of zero keep the lengths.
        zeros = {
            id(v): np.zeros(v.shape, "float32")
            for layer in self.layers
            if layer not in scored
            for v in layer.factors
        }
        factors = [v for layer in self.layers for v in layer.factors]
        seen = {id(v) for layer in scored for v in layer.factors}
        rest = [g for k, g in gradient_of.items() if k not in seen]
        gradient, rest = _devices.sum_over_replicas(
            [
                _flat(
                    zeros.get(id(v), gradient_of.get(id(v))) for v in factors
                ),
                _total(rest),
            ]
        )
        observed = sensitivity(
            _flat(zeros.get(id(v), v) for v in factors), gradient
        )
        # A sum that is finite has only finite terms, and one pass is cheaper
        # than a test of each; |w·g| is finite only where g is.
        accepted = ops.isfinite(_total([observed]) + rest)
        accepted = ops.logical_and(accepted, is_step)
        if zeros:
            accepted = ops.logical_and(accepted, self._mask(scored))
        old = [ops.convert_to_tensor(v) for v in self.variables]
        new = update_averages(*old, observed, self.beta1, self.beta2)
        _devices.assign_on_replicas(
            self.variables,
            [
                ops.where(accepted, after, before)
                for after, before in zip(new, old)
            ],
        )

    def importance(self):
        """Importance of each pair of each layer.

        Returns:
            List of float32 NumPy arrays, one a layer, of shape `(rank,)`. One
            transfer from the device for all of them.
        """
        values = [ops.convert_to_tensor(v) for v in self.variables]
        scores = [
            pair_importance(*_parts(values, self._places[layer]))
            for layer in self.layers
        ]
        ends = np.cumsum([layer.rank for layer in self.layers])[:-1]
        return np.split(_devices.to_numpy(ops.concatenate(scores)), ends)

    def reset(self, layers):
        """Restarts the statistics of some layers from zero."""
        mask = self._mask(layers)
        for variable in self.variables:
            value = ops.convert_to_tensor(variable)
            variable.assign(ops.where(mask, 0.0, value))

    def _mask(self, layers):
        """True in the entries of some layers; bool array."""
        mask = np.zeros(self.variables[0].shape, "bool")
        for layer in layers:
            for place in self._places[layer]:
                mask[place.start : place.stop] = True
        return mask

    def detach(self):
        """Leaves the values with the layers, as arrays, for the next run."""
        for layer in self.layers:
            state = layer.adapter_state
            state.statistics = state.statistics_to_numpy()


class RunningStatistics:
    """One layer's part of the variables of a `Sensitivity`."""

    def __init__(self, variables, places):
        self._variables = variables
        self._places = places

    def to_numpy(self):
        """The values now, as `Statistics` of arrays."""
        # A process may save what the others do not.
        values = [
            _devices.local(ops.convert_to_tensor(v)) for v in self._variables
        ]
        return Statistics(
            *(
                np.array(_devices.to_numpy(part))
                for part in _parts(values, self._places)
            )
        )

    def assign(self, statistics):
        """Goes on from other values; from zero for `None`."""
        statistics = statistics or _zeros(self._places)
        for index, variable in enumerate(self._variables):
            for place, array in zip(self._places, statistics[index::2]):
                value = ops.convert_to_tensor(variable)
                flat = ops.convert_to_tensor(array.reshape(-1))
                variable.assign(ops.slice_update(value, [place.start], flat))


class _Place(NamedTuple):
    """Where a factor's entries lie in the flat variables."""

    start: int
    stop: int
    shape: tuple


def _places(layers):
    """`{layer: (place of a, place of b)}`."""
    places, start = {}, 0
    for layer in layers:
        pair = []
        for factor in layer.factors:
            stop = start + math.prod(factor.shape)
            pair.append(_Place(start, stop, tuple(factor.shape)))
            start = stop
        places[layer] = tuple(pair)
    return places


def _parts(values, places):
    """The arguments of `pair_importance` and of `Statistics`, in order."""
    return [
        ops.reshape(value[place.start : place.stop], place.shape)
        for place in places
        for value in values
    ]


def _flat(arrays):
    arrays = [ops.convert_to_tensor(x) for x in arrays]
    return ops.concatenate(
        [ops.cast(ops.reshape(x, (-1,)), "float32") for x in arrays]
    )


def _total(arrays):
    """The sum of all entries of some tensors."""
    sums = [ops.sum(ops.cast(x, "float32")) for x in arrays]
    return sum(sums, ops.zeros((), "float32"))


def _zeros(places):
    """The `Statistics` of a layer before its first step."""
    return Statistics(
        *(np.zeros(place.shape, "float32") for place in places for _ in "IU")
    )
