"""The choices that make a recipe, each a small pure function.

The mechanism (score, fuse, restart) is the same for all recipes. A recipe sets
how the first pairs start, how pairs are scored, which of them are fused, which
directions come next and at what scale, what happens to the optimizer's slots,
and when. Each table below names the functions of one choice. A function of the
same signature that is registered with
`keras.saving.register_keras_serializable` may stand in a recipe as well.
"""

from typing import Any
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_srlora.functional.importance import pair_importance
from keras_srlora.recipes.gate import FlatLoss


class Pairs(NamedTuple):
    """The input of a selection: NumPy arrays of shape `(rank,)`.

    Attributes:
        scores: importance of the pair in each slot.
        started: number of the recomposition of the layer in which the pair
            in each slot started, through all of its runs; 0 for first pairs.
    """

    scores: np.ndarray
    started: np.ndarray


class Evidence(NamedTuple):
    """The input of a score: tensors of one layer.

    `(rank, in)` for `a`, `(rank, out)` for `b`. The averages are the running
    ones of the sensitivity `I = |w · g|` and of its uncertainty (SRLoRA,
    arXiv 2505.12433, section 3).
    """

    a: object
    b: object
    average_a: object
    uncertainty_a: object
    average_b: object
    uncertainty_b: object


# How important a pair is: (evidence) -> tensor of shape `(rank,)`.


def sensitivity(evidence):
    """Mean of `Ī·Ū` over `a` plus that over `b` (published: section 3)."""
    return pair_importance(*evidence[2:])


def magnitude(evidence):
    """`‖a_k‖ · ‖b_k‖`, the Frobenius norm of the pair's product."""
    a, b = (
        ops.sqrt(ops.sum(ops.square(ops.cast(x, "float32")), axis=1))
        for x in (evidence.a, evidence.b)
    )
    return ops.multiply(a, b)


# Which pairs are fused: (pairs, count) -> `count` slots.


def least_important(pairs, count):
    """The slots of the lowest importance (published: section 3)."""
    return np.sort(np.argsort(pairs.scores, kind="stable")[:count])


def oldest(pairs, count):
    """The slots whose pairs started first; of equals, the least important.

    A pair that restarted a moment ago has learnt nothing yet, and so has a low
    importance: fusing the least important of all restarts the same slots again
    and again.
    """
    return np.sort(np.lexsort((pairs.scores, pairs.started))[:count])


# Which directions come next: (singular_values, unused, count) -> `count`
# indices out of `unused`, the indices that no pair started along yet.


def largest_singular_value(singular_values, unused, count):
    """The unused directions of the largest singular values (published)."""
    order = np.argsort(-singular_values[unused], kind="stable")
    return unused[order[:count]]


def random_direction(singular_values, unused, count):
    """Unused directions in an order that the number of them decides."""
    return np.random.default_rng(len(unused)).permutation(unused)[:count]


# At what scale a pair starts: (singular_values, tolerance, scale) ->
# (scale_a, scale_b), so that `a = scale_a · u` and `b = scale_b · v`.


def sqrt_singular_value(singular_values, tolerance, scale):
    """`√S / √s` on both sides (published; PiSSA, arXiv 2404.02948, eq. 2-3).

    A direction of singular value zero would start with both factors zero and
    never learn: it starts as a LoRA pair does.
    """
    root = np.sqrt(singular_values / scale)
    null = singular_values <= tolerance
    return np.where(null, A_LENGTH, root), np.where(null, 0.0, root)


def as_lora(singular_values, tolerance, scale):
    """`a` along the direction, as long as LoRA's random `a`, and `b` zero.

    Nothing has to be subtracted from the kernel, and a new pair learns at the
    learning rate that the first ones learnt at.
    """
    ones = np.ones_like(singular_values)
    return A_LENGTH * ones, 0.0 * ones


# Expected length of a row of `a` in LoRA's start: `in` numbers, uniform within
# ±√(6 / in).
A_LENGTH = 2.0**0.5


# What happens to the optimizer's slots of a restarted pair:
# (kind, values) -> values, with `kind` one of `training.slots.KINDS`.


def zero_slots(kind, values):
    """All moments start from zero, as those of a new variable do."""
    return ops.zeros_like(values)


def fast_start(kind, values):
    """As `zero_slots`; a new pair's steps are scaled, too.

    The recipe asks for that by this name; see
    `keras_srlora/training/bias_correction.py`.
    """
    return ops.zeros_like(values)


def zero_first_moments(kind, values):
    """First moments start from zero, second moments go on.

    The first belong to the fused pair's descent direction. The second only
    scale the step, and Adam's bias correction, long gone by then, would make
    the steps after zeroing them too large for a pair that starts with `b` as
    large as `a`.
    """
    return ops.zeros_like(values) if kind == "first_moment" else values


def keep_slots(kind, values):
    """The new pair inherits all moments of the fused one."""
    return values


def shared_second_moments(kind, values):
    """First moments start from zero, second ones from the layer's own pairs.

    They are the mean over all slots, so that the first steps of a new pair are
    about as large as those of the others. After zeroing, Adam's bias correction
    being long gone, they are 3 to 7 times as large, which at LoRA's best
    learning rate undoes what the other pairs have learnt; from a quarter of the
    mean an autoencoder still diverged.
    """
    if kind == "first_moment":
        return ops.zeros_like(values)
    return ops.zeros_like(values) + ops.mean(values, axis=0, keepdims=True)


# When: (steps, recompositions) -> steps between two recompositions.


def evenly(steps, recompositions):
    """`total_steps / N_switch`, at least a step (published: section 3)."""
    return max(1.0, steps / max(1, recompositions))


def by_life(steps, recompositions):
    """As often as the life of a pair allows, which the recipe bounds."""
    return 1.0


TABLES: dict[str, dict[str, Any]] = {
    # The first pairs start along the leading directions at one of the scales
    # above, or, where it is `None`, as built: `a` random, `b` zero, all
    # directions unused.
    "start": {"pissa": sqrt_singular_value, "lora": None},
    "score": {"sensitivity": sensitivity, "magnitude": magnitude},
    "selection": {"least_important": least_important, "oldest": oldest},
    "order": {
        "largest_singular_value": largest_singular_value,
        "random": random_direction,
    },
    "scale": {
        "sqrt_singular_value": sqrt_singular_value,
        "as_lora": as_lora,
    },
    "slots": {
        "zero": zero_slots,
        "zero_first_moments": zero_first_moments,
        "keep": keep_slots,
        "shared": shared_second_moments,
        "fast_start": fast_start,
    },
    "schedule": {"evenly": evenly, "by_life": by_life},
    # A class with the methods of `FlatLoss`, or `None`.
    "gate": {"none": None, "flat_loss": FlatLoss},
}
