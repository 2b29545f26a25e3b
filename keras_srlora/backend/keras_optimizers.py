"""Building an optimizer a second time. Private API of Keras's optimizers.

Beside `keras_private`, for the same reasons. Keras has no way to build an
optimizer for other variables. A new one from its config would lose schedules
and arguments of the user's classes, which a config does not hold.
"""


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


def _set_variables(optimizer, variables):
    # As in `Optimizer.__init__`, where the list is made before the tracker: it
    # would be tracked itself. A new list, because TensorFlow counts removals.
    tracker = vars(optimizer).pop("_tracker")
    optimizer._variables = list(variables)
    optimizer._tracker = tracker
    is_variable, _ = tracker.config["variables"]
    tracker.config["variables"] = is_variable, optimizer._variables
    tracker.stored_ids["variables"] = set(map(id, variables))
