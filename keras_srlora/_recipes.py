"""The choices that make a recipe, each a small pure function chosen by name.

The mechanism (score, fuse, restart) is the same for all; a recipe says which
pairs are fused, which directions come next and at what scale, what happens to
the optimizer's slots, and when. Another choice is another function in one of
the tables below.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_srlora._checks import check_choice


class Pairs(NamedTuple):
    """What a selection may look at; NumPy arrays of shape `(rank,)`.

    Attributes:
        scores: importance of the pair in each slot.
        started: step at which the pair in each slot started.
    """

    scores: np.ndarray
    started: np.ndarray


# Which pairs are fused: (pairs, count) -> `count` slots.


def least_important(pairs, count):
    """The slots of the lowest importance (published: section 3)."""
    return np.sort(np.argsort(pairs.scores, kind="stable")[:count])


# Which directions come next: (singular_values, unused, count) -> `count`
# indices out of `unused`, the indices that no pair started along yet.


def largest_singular_value(singular_values, unused, count):
    """The unused directions of the largest singular values (published)."""
    order = np.argsort(-singular_values[unused], kind="stable")
    return unused[order[:count]]


# At what scale a pair starts: (singular_values, tolerance, scale) ->
# (scale_a, scale_b), so that `a = scale_a · u` and `b = scale_b · v`.


def sqrt_singular_value(singular_values, tolerance, scale):
    """`√S / √s` on both sides (published; PiSSA, arXiv 2404.02948, eq. 2-3).

    A direction of singular value zero would start with both factors zero and
    never learn: it starts as a LoRA pair does, `a = u` and `b = 0`.
    """
    root = np.sqrt(singular_values / scale)
    null = singular_values <= tolerance
    return np.where(null, 1.0, root), np.where(null, 0.0, root)


# What happens to the optimizer's slots of a restarted pair:
# (kind, values) -> values, with `kind` one of `_slots.KINDS`.


def zero_slots(kind, values):
    """All moments start from zero, as those of a new variable do."""
    return ops.zeros_like(values)


def zero_first_moments(kind, values):
    """First moments start from zero, second moments go on.

    The first belong to the fused pair's descent direction. The second only
    scale the step, and Adam's bias correction, long gone by then, would make
    the steps after zeroing them too large.
    """
    return ops.zeros_like(values) if kind == "first_moment" else values


def keep_slots(kind, values):
    """The new pair inherits all moments of the fused one."""
    return values


# When: (total_steps, recompositions) -> steps between two recompositions.


def evenly(total_steps, recompositions):
    """`total_steps / N_switch`, at least a step (published: section 3)."""
    return max(1.0, total_steps / max(1, recompositions))


SELECTIONS = {"least_important": least_important}
ORDERS = {"largest_singular_value": largest_singular_value}
SCALES = {"sqrt_singular_value": sqrt_singular_value}
SLOTS = {
    "zero": zero_slots,
    "zero_first_moments": zero_first_moments,
    "keep": keep_slots,
}
SCHEDULES = {"evenly": evenly}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The choices of a run, by name.

    Args:
        selection: which pairs are fused. `"least_important"`.
        order: which directions come next. `"largest_singular_value"`.
        scale: at what scale a pair starts. `"sqrt_singular_value"`.
        slots: what happens to the optimizer's slots of a restarted pair.
            `"zero"`, `"zero_first_moments"` or `"keep"`.
        schedule: when. `"evenly"`.

    The defaults are the published recipe (SRLoRA, arXiv 2505.12433), which
    leaves `slots` open.

    Example:

    ```python
    recipe = keras_srlora.Recipe(slots="keep")
    callback = keras_srlora.RecompositionCallback(recipe=recipe)
    ```
    """

    selection: str = "least_important"
    order: str = "largest_singular_value"
    scale: str = "sqrt_singular_value"
    slots: str = "zero_first_moments"
    schedule: str = "evenly"

    def __post_init__(self):
        for field, table in _TABLES.items():
            check_choice(field, getattr(self, field), table)

    def to_dict(self):
        """As plain Python, for JSON."""
        return dataclasses.asdict(self)

    def __getitem__(self, field):
        """The function behind a choice."""
        return _TABLES[field][getattr(self, field)]


_TABLES = {
    "selection": SELECTIONS,
    "order": ORDERS,
    "scale": SCALES,
    "slots": SLOTS,
    "schedule": SCHEDULES,
}

RECIPES = {"paper": Recipe()}


def get_recipe(identifier):
    """Returns a `Recipe`, from one or from its name."""
    if isinstance(identifier, Recipe):
        return identifier
    check_choice("recipe", identifier, RECIPES)
    return RECIPES[identifier]
