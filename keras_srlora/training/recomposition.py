"""Recomposition of a model: scores → pairs → directions → kernels and slots."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from typing import Any
from typing import NamedTuple

import numpy as np

from keras_srlora.backend import devices
from keras_srlora.backend.interrupts import held_interrupts
from keras_srlora.backend.keras_private.fit_state import (
    optimizer_trainable_variables,
)
from keras_srlora.layers import pairs
from keras_srlora.recipes.choices import Pairs
from keras_srlora.recipes.definition import Recipe
from keras_srlora.recipes.definition import get_recipe
from keras_srlora.training import slots as slots_of
from keras_srlora.training.optimizer import is_torch_optimizer
from keras_srlora.training.scoring import find_corrections
from keras_srlora.training.sensitivity import Sensitivity


@dataclasses.dataclass(frozen=True)
class Recomposition:
    """One recomposition of one layer.

    Attributes:
        step: int. Training steps done before it.
        layer: str. Path of the layer.
        slots: tuple of ints. Slots whose pairs were fused.
        scores: tuple of floats. Importance of the fused pairs.
        directions: tuple of ints. Singular directions that the slots restarted
            along, 0 being that of the largest singular value.
        drift: float. Largest change of an entry of the layer's effective
            kernel, as a part of its largest entry.
        importance: tuple of floats. Importance of all pairs before it.
    """

    step: int
    layer: str
    slots: tuple
    scores: tuple
    directions: tuple
    drift: float
    importance: tuple = ()

    def to_dict(self) -> dict:
        """As plain Python, for JSON."""
        return {
            field.name: list(value) if isinstance(value, tuple) else value
            for field in dataclasses.fields(self)
            for value in [getattr(self, field.name)]
        }


def recompose(
    sensitivity: Sensitivity,
    optimizer: Any = None,
    step: int = 0,
    recipe: Recipe | str | None = None,
    layers: list | None = None,
) -> list[Recomposition]:
    """Fuses some pairs of each layer and restarts their slots, now.

    `Recomposer` calls it at the scheduled steps. The function that each layer
    computes does not change. A layer whose directions are used up keeps its
    pairs. So does a layer whose factors or scores are not finite, with a
    warning.

    Args:
        sensitivity: the `Sensitivity` that scored the layers.
        optimizer: the built optimizer, whose moments of the restarted pairs are
            treated by the recipe: a Keras optimizer, a `SensitivityOptimizer`
            or a `torch.optim` optimizer. With `None`, treat the slots of the
            returned `Recomposition`s yourself.
        step: int. Number of training steps done, for the record.
        recipe: a `Recipe` or the name of one. Defaults to `None`: each layer
            follows its own.
        layers: list of the layers to recompose. Defaults to `None`: all layers
            of `sensitivity`.

    Returns:
        List of `Recomposition`, one for each layer that was recomposed.

    Raises:
        ValueError: before anything changes, if a layer was not decomposed, or
            not scored.
        RuntimeError: before anything changes, if the processes of
            `torch.distributed` have scored different gradients.

    Example:

    ```python
    adam = keras.optimizers.Adam()
    optimizer = keras_srlora.SensitivityOptimizer(adam, model)
    ...
    if step % 100 == 0:
        keras_srlora.recompose(optimizer.sensitivity, optimizer, step)
    ```
    """
    step = int(step)
    layers = sensitivity.layers if layers is None else layers
    # Each of them once.
    layers = list({id(layer): layer for layer in layers}.values())
    for layer in layers:
        if not layer.initialized:
            raise ValueError(
                f"The kernel of layer {layer.path!r} was not decomposed yet: "
                "there are no directions to restart along. Call "
                "`keras_srlora.initialize_factors(model)` before training."
            )
    if not layers:
        # More groups of layers than layers: it is the turn of none.
        return []
    recipe = None if recipe is None else get_recipe(recipe)
    slots = _find_slots(optimizer, layers)
    corrections = find_corrections(optimizer)
    importance = devices.agree(
        sensitivity.importance(recipe, layers),
        [layer.path for layer in layers],
        "scores: each has scored the gradient of its own examples, or another "
        "model. Average the gradients over the processes before they are "
        "scored, as `DistributedDataParallel` does in a loop, and hooks of the "
        "variables in `fit` (the documentation, 'From one machine to many', "
        "has them).",
    )
    events, recomposed = [], []
    # No layer has a new kernel and old factors, or new pairs and old moments.
    with held_interrupts():
        for layer, scores in zip(layers, importance):
            of_layer = recipe or layer.recipe
            path = sensitivity.paths[id(layer)]
            event = _recompose_layer(layer, path, of_layer, scores, step)
            if event is None:
                continue
            events.append(event)
            recomposed.append(layer)
            correction = corrections.get(layer)
            _restart_moments(layer, event, of_layer, slots, correction)
        sensitivity.reset(recomposed)
    return events


def pairs_per_recomposition(layer, recipe: Recipe) -> int:
    """`n = γ · r`, at least one (arXiv 2505.12433, section 3)."""
    return max(1, int(recipe.fusion_ratio * layer.rank))


def remaining_recompositions(layer, recipe: Recipe) -> float:
    """How many recompositions a layer is good for; `inf`: any number."""
    left = _pairs_left(layer, recipe)
    if left == math.inf:
        return left
    return math.ceil(left / pairs_per_recomposition(layer, recipe))


def _pairs_left(layer, recipe):
    """How many pairs can restart still.

    Directions that come again never run out; room beside a quantized kernel
    does.
    """
    if not recipe.reuse_directions:
        return len(layer.record.unused)
    room = layer.frozen.room
    if room is None:
        return math.inf
    return room - len(pairs.frozen_rows(layer, layer.record)[0])


def choose_directions(record, recipe: Recipe, count: int, kept) -> np.ndarray:
    """The directions that slots restart along; fewer where none is left.

    Args:
        record: `Record` of the layer.
        recipe: gives the order. Where its directions come again, those that
            the fewest pairs started along come first.
        count: int.
        kept: int array. Slots whose pairs stay, and with them their directions.
    """
    values = record.directions.singular_values
    chosen = np.zeros(0, "int64")
    for visits in np.unique(record.visits):
        found = np.flatnonzero(record.visits == visits)
        if visits:
            found = np.setdiff1d(found, record.slot_direction[kept])
            if not recipe.reuse_directions:
                break
        number = min(count - len(chosen), len(found))
        if number:
            of_level = recipe.select_directions(values, found, number)
            _check_choice("order", of_level, found, number)
            chosen = np.concatenate([chosen, of_level])
    return chosen


def _check_choice(name, chosen, allowed, count):
    """Raises where a function of the user chose what it must not choose."""
    array = np.asarray(chosen)
    valid = array.shape == (count,) and np.isin(array, allowed).all()
    if not valid or len(np.unique(array)) < count:
        raise ValueError(
            f"The function for `{name}` in the recipe must return {count} "
            f"different numbers out of {allowed.tolist()}. "
            f"Received: {chosen!r}"
        )


class Work(NamedTuple):
    """The recompositions that are left.

    Attributes:
        recompositions: how many use up the directions of the layer that has
            the most left.
        shortest_interval: steps between two of them that leave a pair its time.
    """

    recompositions: float
    shortest_interval: float


def work_left(layers, recipe: Recipe, life: float) -> Work:
    """The `Work` that is left in some layers; `life`: steps of a pair."""
    return Work(
        max(remaining_recompositions(layer, recipe) for layer in layers),
        max(
            life * pairs_per_recomposition(layer, recipe) / layer.rank
            for layer in layers
        ),
    )


def describe(events: list[Recomposition], layer_count: int) -> str:
    """One line about the recomposition of a model at one step."""
    fused = sum(len(event.slots) for event in events)
    directions = [index for event in events for index in event.directions]
    drift = max(event.drift for event in events)
    return (
        f"step {events[0].step}: recomposed {len(events)} of {layer_count} "
        f"layers, {fused} pairs fused and restarted along directions "
        f"{min(directions)} to {max(directions)}; rounding changed a kernel by "
        f"at most {drift:.1e} of its largest entry"
    )


def _find_slots(optimizer, layers):
    """`{id(factor): [(kind, slot)]}`; warns of slots that are not known."""
    if optimizer is None:
        return {}
    if is_torch_optimizer(optimizer):
        factors = [factor for layer in layers for factor in layer.factors]
        slots, unknown = slots_of.find_torch_slots(optimizer, factors)
    else:
        optimizer = getattr(optimizer, "unwrap", lambda: optimizer)()
        slots, unknown = slots_of.find_slots(
            optimizer, optimizer_trainable_variables(optimizer)
        )
    slots_of.warn_of_unknown(optimizer, unknown)
    return slots


def _recompose_layer(layer, path, recipe, scores, step):
    record = layer.record
    if not remaining_recompositions(layer, recipe):
        return None
    if not layer.trains_factors:
        _skip(layer, step, "it was frozen")
        return None
    finite = all(np.isfinite(x).all() for x in pairs.factors_to_numpy(layer))
    if not finite or not np.isfinite(scores).all():
        _skip(layer, step, "its factors or its scores are not finite")
        return None
    if not scores.any():
        _skip(
            layer,
            step,
            "all its scores are zero: no gradient reached it since the last "
            "recomposition, or it was trained for a single step, which began "
            "with a factor of zeros",
        )
        return None
    count = min(
        pairs_per_recomposition(layer, recipe), _pairs_left(layer, recipe)
    )
    slots = recipe.select_pairs(Pairs(scores, record.slot_started), count)
    _check_choice("selection", slots, np.arange(layer.rank), count)
    kept = np.setdiff1d(np.arange(layer.rank), slots)
    directions = choose_directions(record, recipe, count, kept)
    slots = slots[: len(directions)]
    if not len(slots):
        return None
    drift = pairs.fuse_and_restart(
        layer, slots, directions, scores[slots], recipe.scale_restarted, step
    )
    return Recomposition(
        step=step,
        layer=path,
        slots=tuple(map(int, slots)),
        scores=tuple(map(float, scores[slots])),
        directions=tuple(map(int, directions)),
        drift=drift,
        importance=tuple(map(float, scores)),
    )


def _restart_moments(layer, event, recipe, slots, correction):
    """Restarts what an optimizer remembers of pairs that were fused."""
    if correction and recipe.scales_steps:
        correction.ages.restart(layer, event.slots, correction.steps)
    treatment = functools.partial(
        recipe.treat_slots, corrected=correction is not None
    )
    restarted = pairs.row_mask(layer.rank, list(event.slots))
    for factor in layer.factors:
        slots_of.restart_slots(
            slots.get(id(factor), []), factor, restarted, treatment
        )


def _skip(layer, step, reason):
    warnings.warn(
        f"Layer {layer.path!r} was not recomposed at step {step}: {reason}. "
        "Training goes on with its pairs as they are.",
        stacklevel=2,
    )
