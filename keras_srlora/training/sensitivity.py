"""`Sensitivity`: the running statistics of a set of layers."""

import math
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_srlora.backend import devices
from keras_srlora.backend.arguments import check_fraction
from keras_srlora.functional.importance import sensitivity
from keras_srlora.functional.importance import update_averages
from keras_srlora.layers.companions import are_attached
from keras_srlora.recipes.choices import Evidence
from keras_srlora.recipes.definition import Recipe

# The name of the statistics among a layer's companions.
COMPANION = "sensitivity"


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

    `SensitivityOptimizer` calls `update` inside the compiled train step. A
    custom loop may call it itself, or use that optimizer.

    Args:
        layers: list of built SRLoRA layers.
        beta1: float in [0, 1). Decay of `Ī`. Defaults to `0.85`.
        beta2: float in [0, 1). Decay of `Ū`. Defaults to `0.85`.

    Attributes:
        variables: two float32 variables with `Ī` and `Ū` of all factors, one
            after the other, so that a step updates all layers in a few
            operations. A layer has `2 · rank · (in + out)` numbers.

    Example:

    ```python
    statistics = keras_srlora.Sensitivity(layers)
    loss.backward()  # torch
    factors = [v for layer in layers for v in layer.factors]
    statistics.update([v.value.grad for v in factors], factors)
    ```
    """

    def __init__(self, layers: list, beta1: float = 0.85, beta2: float = 0.85):
        beta1 = check_fraction("beta1", beta1, low_open=False, high_open=True)
        beta2 = check_fraction("beta2", beta2, low_open=False, high_open=True)
        self.layers = list(layers)
        # What events call them; a model may know better.
        self.paths = {id(layer): layer.path for layer in self.layers}
        if not self.layers:
            raise ValueError(
                "There is nothing to score. Pass at least one SRLoRA layer. "
                f"Received: layers={layers!r}"
            )
        self.beta1 = beta1
        self.beta2 = beta2
        self._places = _places(self.layers)
        parts = [LayerStatistics(self, layer) for layer in self.layers]
        held = [
            part.read(layer.companions.attach(COMPANION, part))
            for layer, part in zip(self.layers, parts)
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

    def update(self, gradients: list, variables: list, is_step=True) -> None:
        """Updates the averages with the gradients of one step.

        If a gradient of any variable is not finite, nothing changes.

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
        of_loss = set(map(id, scored))
        # In its place, weights and gradients of zero keep the lengths.
        zeros = {
            id(v): np.zeros(v.shape, "float32")
            for layer in self.layers
            if id(layer) not in of_loss
            for v in layer.factors
        }
        factors = [v for layer in self.layers for v in layer.factors]
        seen = {id(v) for layer in scored for v in layer.factors}
        rest = [g for k, g in gradient_of.items() if k not in seen]
        gradient, rest = devices.sum_over_replicas(
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
        average, uncertainty = map(ops.convert_to_tensor, self.variables)
        old = average, uncertainty
        new = update_averages(
            average, uncertainty, observed, self.beta1, self.beta2
        )
        devices.assign_on_replicas(
            self.variables,
            [
                ops.where(accepted, after, before)
                for after, before in zip(new, old)
            ],
        )

    def importance(
        self, recipe: Recipe | None = None, layers: list | None = None
    ) -> list:
        """Returns the importance of each pair of some layers.

        Args:
            recipe: the `Recipe` whose score is taken. Defaults to `None`: that
                of each layer.
            layers: list of the layers. Defaults to `None`: all of them.

        Returns:
            List of float32 NumPy arrays of shape `(rank,)`, one for each layer.
            They are read from the device in one transfer.

        Raises:
            ValueError: if a layer is not in `self.layers`.
        """
        layers = self.layers if layers is None else layers
        for layer in layers:
            if layer not in self._places:
                raise ValueError(
                    f"Layer {layer.path!r} has no scores. Pass layers that are "
                    "in `sensitivity.layers`."
                )
        if not layers:
            return []
        values = [ops.convert_to_tensor(v) for v in self.variables]
        scores = [
            ops.cast(
                (recipe or layer.recipe).score_pairs(
                    Evidence(
                        *map(ops.convert_to_tensor, layer.factors),
                        *_parts(values, self._places[layer]),
                    )
                ),
                "float32",
            )
            for layer in layers
        ]
        ends = np.cumsum([layer.rank for layer in layers])[:-1]
        scores = ops.stop_gradient(ops.concatenate(scores))
        return np.split(devices.to_numpy(scores), ends)

    def reset(self, layers: list) -> None:
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

    @property
    def is_attached(self) -> bool:
        """Whether the layers save these statistics, not others made since."""
        return are_attached(self.layers, COMPANION, self)


class LayerStatistics:
    """One layer's part of the variables of a `Sensitivity`, to be saved.

    float32 arrays, of shapes `(rank, in)` for `_a` and `(rank, out)` for `_b`.
    """

    NAMES = ("average_a", "uncertainty_a", "average_b", "uncertainty_b")

    def __init__(self, sensitivity, layer):
        self._sensitivity = sensitivity
        self._layer = layer

    def belongs_to(self, sensitivity) -> bool:
        return self._sensitivity is sensitivity

    @property
    def _places(self):
        return self._sensitivity._places[self._layer]

    def read(self, arrays):
        """The four arrays, in order; of zeros where there are none."""
        if arrays:
            return [arrays[name] for name in self.NAMES]
        return [
            np.zeros(place.shape, "float32")
            for place in self._places
            for _ in "IU"
        ]

    def to_arrays(self):
        """The values now."""
        # A process may save what the others do not.
        values = [
            devices.local(ops.convert_to_tensor(v))
            for v in self._sensitivity.variables
        ]
        parts = _parts(values, self._places)
        return {
            name: np.array(devices.to_numpy(part))
            for name, part in zip(self.NAMES, parts)
        }

    def restore(self, arrays):
        """Goes on from other values; from zero where there are none."""
        arrays = self.read(arrays)
        for index, variable in enumerate(self._sensitivity.variables):
            for place, array in zip(self._places, arrays[index::2]):
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
    """The four parts of a layer, in the order of `LayerStatistics.NAMES`."""
    return [
        ops.reshape(value[place.start : place.stop], place.shape)
        for place in places
        for value in values
    ]


def _flat(arrays):
    """All entries, in float32, one after the other.

    One operation for each array: in eager PyTorch more of them took a tenth of
    the step of a small model. The cast loses nothing by coming last.
    """
    joined = ops.concatenate([ops.reshape(x, (-1,)) for x in arrays])
    return ops.cast(joined, "float32")


def _total(arrays):
    """The sum of all entries of some tensors."""
    sums = [ops.sum(ops.cast(x, "float32")) for x in arrays]
    return sum(sums, ops.zeros((), "float32"))
