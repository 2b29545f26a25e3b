"""Building an optimizer a second time.

Keras cannot build an optimizer for other variables. A new optimizer from its
config would lose schedules, and the arguments of a user's class.
"""

import contextlib

import keras
import numpy as np
from keras import ops

from keras_srlora.backend import devices
from keras_srlora.backend.living import living


def trains_exactly(optimizer, variables) -> bool:
    """Whether a built optimizer was built for these variables.

    Private: `Optimizer._trainable_variables`.
    """
    known = set(map(id, optimizer._trainable_variables))
    return known == set(map(id, variables))


def build_again(optimizer, variables):
    """Builds a built optimizer for other variables, in place, at step 0.

    Its settings, its schedule and attributes of a subclass stay; the state of
    the old variables goes. If it raises, the optimizer is as before. Private:
    `Optimizer._variables`, `_tracker`, `_iterations`,
    `_trainable_variables_indices`.
    """
    parts = [optimizer]
    if hasattr(optimizer, "inner_optimizer"):  # a `LossScaleOptimizer`
        parts.append(optimizer.inner_optimizer)
    before = [(part, dict(vars(part)), list(part._variables)) for part in parts]
    try:
        for part in parts:
            _set_variables(part, [])
            part._trainable_variables_indices = {}
            part.built = False
        optimizer.build(variables)
    except Exception:
        for part, attributes, _ in before:
            vars(part).clear()
            vars(part).update(attributes)
            _set_variables(part, part._variables)
        raise
    for part, _, own in before:
        # Made with the optimizer, not when it was built, such as the learning
        # rate.
        held = set(map(id, vars(part).values()))
        own = [v for v in own if id(v) in held]
        _set_variables(part, [*own, *part._variables])
        part._iterations.assign(0)


def living_optimizers(variables) -> list:
    """The optimizers of Keras that were built for one of some variables.

    Whatever holds them, a model or a loop; what wraps another one is left out.
    """
    wanted = set(map(id, variables))
    (found,) = living(keras.optimizers.Optimizer)
    return [
        optimizer
        for optimizer in found
        if not hasattr(optimizer, "unwrap")
        and not hasattr(optimizer, "inner_optimizer")
        and getattr(optimizer, "built", False)
        and not wanted.isdisjoint(map(id, optimizer._trainable_variables))
    ]


def state_of(optimizer) -> list:
    """Copies of the steps and slots of a built optimizer, on the host.

    Its learning rate is left out, which a user or a callback has set. Private:
    `Optimizer._variables`, `Optimizer._learning_rate`.
    """
    tensors = map(ops.convert_to_tensor, _state(optimizer))
    return [np.array(devices.to_numpy(x)) for x in tensors]


def set_state(optimizer, state) -> None:
    """Gives an optimizer the state that `state_of` returned."""
    for variable, value in zip(_state(optimizer), state, strict=True):
        variable.assign(value)


def initial_state(optimizer) -> list:
    """The state of an optimizer as it is when it has just been built.

    It is built again, and is as it was afterwards but for the step.
    """
    attributes = dict(vars(optimizer))
    strategy = getattr(optimizer, "_distribution_strategy", None)
    try:
        with strategy.scope() if strategy else contextlib.nullcontext():
            build_again(optimizer, list(optimizer._trainable_variables))
        return state_of(optimizer)
    finally:
        vars(optimizer).clear()
        vars(optimizer).update(attributes)
        _set_variables(optimizer, optimizer._variables)


def _state(optimizer):
    rate = optimizer._learning_rate
    return [v for v in optimizer._variables if v is not rate]


def _set_variables(optimizer, variables):
    # As in `Optimizer.__init__`, where the list is made before the tracker: it
    # would be tracked itself. A new list, because TensorFlow counts removals.
    tracker = vars(optimizer).pop("_tracker")
    optimizer._variables = list(variables)
    optimizer._tracker = tracker
    is_variable, _ = tracker.config["variables"]
    tracker.config["variables"] = is_variable, optimizer._variables
    tracker.stored_ids["variables"] = set(map(id, variables))
