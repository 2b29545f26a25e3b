"""The optimizer's slots of restarted pairs, by public means.

A slot of a variable is an optimizer variable whose path is
`<optimizer>/<path of the variable with _ for />_<name of the slot>`.
"""

import collections
import warnings

import numpy as np
from keras import ops

from keras_srlora import _keras

FIRST_MOMENT, SECOND_MOMENT = "first_moment", "second_moment"
WEIGHT_AVERAGE, GRADIENT_SUM = "weight_average", "gradient_sum"

# What Keras's own optimizers call their slots (keras 3.13 to 3.15).
KINDS = {
    "momentum": FIRST_MOMENT,
    "average_gradient": FIRST_MOMENT,
    "velocity": SECOND_MOMENT,
    "velocity_hat": SECOND_MOMENT,
    "norm": SECOND_MOMENT,
    "accumulator": SECOND_MOMENT,
    "accumulated_grad": SECOND_MOMENT,
    "accumulated_delta_var": SECOND_MOMENT,
    "average": WEIGHT_AVERAGE,
    "gradient_accumulator": GRADIENT_SUM,
}
# Where a class gives such a name another meaning: the `momentum` of
# `ScheduleFreeAdamW` is a copy of the weights that the gradient moves.
EXCEPTIONS = {("ScheduleFreeAdamW", "momentum"): WEIGHT_AVERAGE}


def find_slots(optimizer, variables):
    """Finds the optimizer's slots of its trainable variables.

    Args:
        optimizer: a built `keras.optimizers.Optimizer`.
        variables: its trainable variables, in order.

    Returns:
        `(slots, unknown)`: a dict from `id(variable)` to a list of
        `(kind, slot)`, and the list of optimizer variables of more than one
        entry that belong to no variable or have a name that is not in `KINDS`.
    """
    by_key = collections.defaultdict(list)
    for variable in variables:
        by_key[variable.path.replace("/", "_")].append(variable)
    slots = collections.defaultdict(list)
    unknown = []
    seen = collections.Counter()
    for slot in optimizer.variables:
        name = slot.path.split("/")[-1]
        # The longest key: `kernel` is the beginning of `kernel_b`.
        keys = [key for key in by_key if name.startswith(key + "_")]
        key = max(keys, key=len, default=None)
        slot_name = None if key is None else name[len(key) + 1 :]
        if slot_name in KINDS:
            # Layers of equal names have equal paths; an optimizer makes its
            # slots in the order of the variables.
            owner = by_key[key][seen[name] % len(by_key[key])]
            seen[name] += 1
            kind = EXCEPTIONS.get(
                (type(optimizer).__name__, slot_name), KINDS[slot_name]
            )
            slots[id(owner)].append((kind, slot))
        elif len(slot.shape) > 0:
            unknown.append(slot)
    return slots, unknown


def restart_slots(slots, factor, restarted, treatment):
    """Treats the slots of a factor's restarted pairs; leaves the others alone.

    Moments are treated as the recipe says. A moving average of the weights
    (`use_ema`) starts from the new pair, a gradient that is being accumulated
    from zero.

    Args:
        slots: list of `(kind, slot)` of this factor.
        factor: the variable, after the restart, of shape `(rank, ...)`.
        restarted: bool array of shape `(rank, 1)`.
        treatment: function of `_recipes.SLOTS`.
    """
    for kind, slot in slots:
        old = ops.convert_to_tensor(slot)
        if kind == WEIGHT_AVERAGE:
            new = ops.stop_gradient(ops.convert_to_tensor(factor))
        elif kind == GRADIENT_SUM:
            new = ops.zeros_like(old)
        else:
            new = treatment(kind, old)
        slot.assign(ops.where(restarted, new, old))


def warn_of_unknown(optimizer, unknown):
    """Says which slots stay as they are because nobody knows what they are."""
    if _keras.is_stock_optimizer(optimizer):
        # Adafactor's factored second moments, one for a row and one for a
        # column of a variable, carry no path: they go on.
        return
    if unknown:
        names = sorted({slot.path for slot in unknown})
        warnings.warn(
            f"Optimizer {optimizer.name!r} ({type(optimizer).__name__}) keeps "
            f"state that SRLoRA does not understand: {names[:4]} "
            f"({len(names)} in all). It is left as it is when a pair restarts.",
            stacklevel=2,
        )


def row_mask(rank, slots):
    """Bool array of shape `(rank, 1)`, true in `slots`."""
    mask = np.zeros((rank, 1), "bool")
    mask[slots] = True
    return mask
