"""Recomposition of a model: scores → pairs → directions → kernels and slots."""

import dataclasses
import warnings

import numpy as np

from keras_srlora import _devices
from keras_srlora import _keras
from keras_srlora import _slots
from keras_srlora._recipes import Pairs


@dataclasses.dataclass(frozen=True)
class Recomposition:
    """What happened to one layer at one recomposition.

    Attributes:
        step: int. Training steps done before it.
        layer: str. Path of the layer.
        slots: tuple of ints. Slots whose pairs were fused.
        scores: tuple of floats. Importance of the fused pairs.
        directions: tuple of ints. Singular directions that the slots restarted
            along, 0 being that of the largest singular value.
        drift: float. Largest change of an entry of the layer's effective
            kernel, as a part of its largest entry.
    """

    step: int
    layer: str
    slots: tuple
    scores: tuple
    directions: tuple
    drift: float

    def to_dict(self):
        """As plain Python, for JSON."""
        return {
            field.name: list(value) if isinstance(value, tuple) else value
            for field in dataclasses.fields(self)
            for value in [getattr(self, field.name)]
        }


def recompose(sensitivity, optimizer=None, step=0):
    """Fuses some pairs of each layer and restarts their slots.

    Which pairs, along which directions, is said by the recipe of the layer. The
    function that each layer computes does not change. A layer whose
    directions have run out, or whose factors or scores are not finite, is left
    as it is, with a warning in the latter case.

    Args:
        sensitivity: the `Sensitivity` that scored the layers.
        optimizer: the built Keras optimizer whose slots of the restarted pairs
            are treated as the recipe says; a `SensitivityOptimizer` may be
            passed as it is. `None` where there is none: treat the slots of the
            returned `Recomposition`s yourself.
        step: int. Training steps done, which the age of a pair and the record
            are counted in.

    Returns:
        List of `Recomposition`, one for each layer that was recomposed.

    Raises:
        ValueError: before anything is changed, if a layer was not decomposed.
        RuntimeError: likewise, if the processes of `torch.distributed` have
            scored different gradients.

    Example:

    ```python
    adam = keras.optimizers.Adam()
    optimizer = keras_srlora.SensitivityOptimizer(adam, model)
    ...
    if step % 100 == 0:
        keras_srlora.recompose(optimizer.sensitivity, optimizer, step)
    ```
    """
    for layer in sensitivity.layers:
        if not layer.initialized:
            raise ValueError(
                f"The kernel of layer {layer.path!r} was not decomposed yet: "
                "there are no directions to restart along. Call "
                "`keras_srlora.initialize_factors(model)` before training."
            )
    slots = {}
    if optimizer is not None:
        optimizer = getattr(optimizer, "unwrap", lambda: optimizer)()
        slots, unknown = _slots.find_slots(
            optimizer, _keras.optimizer_trainable_variables(optimizer)
        )
        _slots.warn_of_unknown(optimizer, unknown)
    importance = _devices.agree(
        sensitivity.importance(),
        [layer.path for layer in sensitivity.layers],
        "scores: each has scored the gradient of its own examples, or another "
        "model. Average the gradients over the processes before they are "
        "scored, as `DistributedDataParallel` does in a loop, and hooks of the "
        "variables in `fit` (the documentation, 'From one machine to many', "
        "has them).",
    )
    events, recomposed = [], []
    for layer, scores in zip(sensitivity.layers, importance):
        event = _recompose_layer(layer, scores, step)
        if event is None:
            continue
        events.append(event)
        recomposed.append(layer)
        restarted = _slots.row_mask(layer.rank, list(event.slots))
        for factor in layer.factors:
            _slots.restart_slots(
                slots.get(id(factor), []),
                factor,
                restarted,
                layer.recipe["slots"],
            )
    sensitivity.reset(recomposed)
    return events


def pairs_per_recomposition(layer):
    """`n = γ · r`, at least one (arXiv 2505.12433, section 3)."""
    return max(1, int(layer.recipe.fusion_ratio * layer.rank))


def remaining_recompositions(layer):
    """How many recompositions a layer's unused directions are good for."""
    count = pairs_per_recomposition(layer)
    return -(-len(layer.adapter_state.unused) // count)


def _recompose_layer(layer, scores, step):
    state = layer.adapter_state
    unused = state.unused
    if len(unused) == 0:
        return None
    if not layer.trains_factors:
        _skip(layer, step, "it was frozen")
        return None
    finite = all(np.isfinite(x).all() for x in layer.factors_to_numpy())
    if not finite or not np.isfinite(scores).all():
        _skip(layer, step, "its factors or its scores are not finite")
        return None
    if not scores.any():
        _skip(
            layer,
            step,
            "all its scores are zero: no gradient reached it since the last "
            "recomposition",
        )
        return None
    recipe = layer.recipe
    count = min(pairs_per_recomposition(layer), len(unused))
    slots = recipe["selection"](Pairs(scores, state.slot_started), count)
    values = state.directions.singular_values
    directions = recipe["order"](values, unused, count)
    drift = layer.fuse_and_restart(
        slots, directions, scores[slots], recipe["scale"], step
    )
    return Recomposition(
        step=step,
        layer=layer.path,
        slots=tuple(map(int, slots)),
        scores=tuple(map(float, scores[slots])),
        directions=tuple(map(int, directions)),
        drift=drift,
    )


def _skip(layer, step, reason):
    warnings.warn(
        f"Layer {layer.path!r} was not recomposed at step {step}: {reason}. "
        "Training goes on with its pairs as they are.",
        stacklevel=2,
    )
