"""The choices that make a recipe, each a small pure function chosen by name.

The mechanism (score, fuse, restart) is the same for all; a recipe says how the
first pairs start, which pairs are fused, which directions come next and at
what scale, what happens to the optimizer's slots, and when. Another choice is
another function in one of the tables below.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_srlora._checks import check_choice
from keras_srlora._checks import check_fraction
from keras_srlora._gate import FlatLoss


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

# How the first pairs start: along the leading directions at one of the scales
# above, or, where it is `None`, as built: `a` random, `b` zero, all directions
# unused.

STARTS = {"pissa": sqrt_singular_value, "lora": None}


# What happens to the optimizer's slots of a restarted pair:
# (kind, values) -> values, with `kind` one of `_slots.KINDS`.


def zero_slots(kind, values):
    """All moments start from zero, as those of a new variable do."""
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


# When: (total_steps, recompositions) -> steps between two recompositions.


def evenly(total_steps, recompositions):
    """`total_steps / N_switch`, at least a step (published: section 3)."""
    return max(1.0, total_steps / max(1, recompositions))


# What a run waits for before its first recomposition, and where it stops.

GATES = {"none": None, "flat_loss": FlatLoss}


TABLES = {
    "start": STARTS,
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
    },
    "schedule": {"evenly": evenly},
    "gate": GATES,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The choices of a run: the functions by name, and three numbers.

    Args:
        start: how the first pairs start. `"pissa"` (along the leading singular
            directions, which go out of the kernel) or `"lora"` (`a` random,
            `b` zero).
        selection: which pairs are fused. `"least_important"` or `"oldest"` (of
            equals, the least important).
        order: which directions come next. `"largest_singular_value"` or
            `"random"`.
        scale: at what scale a pair restarts. `"sqrt_singular_value"` or
            `"as_lora"` (`b` zero).
        slots: what happens to the optimizer's slots of a restarted pair.
            `"zero_first_moments"`, `"zero"` or `"keep"`.
        schedule: when. `"evenly"` over the run.
        gate: `"none"`, or `"flat_loss"`: nothing is recomposed while the
            training loss falls. Where it is flat, one recomposition probes; the
            others follow, by the schedule, if the loss then falls faster than
            before, and as long as it falls.
        fusion_ratio: float in (0, 1]. Part `γ` of a layer's pairs that a
            recomposition fuses, at least one pair.
        steps_per_pair: int. Least number of steps that a pair is trained
            before its slot restarts: a run that is short for its directions
            recomposes less often, and does not visit all of them.
        stop: float in (0, 1]. Part of the run after which nothing is
            recomposed, so that the last pairs have their time.

    The defaults are the published recipe, `recipe="paper"` (SRLoRA, arXiv
    2505.12433, section 3), which leaves `slots` open.
    `recipe="lora_restarts"` starts each pair, the first ones too, as LoRA does.
    `recipe="adaptive"`, which layers have by default, is that with a gate: it
    is LoRA unless the loss shows that the rank limits it.

    Example:

    ```python
    recipe = keras_srlora.Recipe(order="random")
    keras_srlora.enable_srlora(model, rank=8, recipe=recipe)
    ```
    """

    start: str = "pissa"
    selection: str = "least_important"
    order: str = "largest_singular_value"
    scale: str = "sqrt_singular_value"
    slots: str = "zero_first_moments"
    schedule: str = "evenly"
    gate: str = "none"
    fusion_ratio: float = 0.5
    steps_per_pair: int = 1
    stop: float = 1.0

    def __post_init__(self):
        for field, table in TABLES.items():
            check_choice(field, getattr(self, field), table)
        check_fraction("fusion_ratio", self.fusion_ratio, True, False)
        check_fraction("stop", self.stop, True, False)
        steps = self.steps_per_pair
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(
                "`steps_per_pair` must be a positive number of steps. "
                f"Received: steps_per_pair={steps!r}"
            )

    @property
    def subtracts(self):
        """Whether pairs start with something that goes out of the kernel."""
        return self.start != "lora" or self.scale != "as_lora"

    def to_dict(self):
        """As plain Python, for JSON and a layer's config."""
        return dataclasses.asdict(self)

    def __getitem__(self, field):
        """The function behind a choice."""
        return TABLES[field][getattr(self, field)]


LORA_RESTARTS = Recipe(
    start="lora",
    selection="oldest",
    scale="as_lora",
    slots="zero",
    steps_per_pair=100,
    stop=0.5,
)

RECIPES = {
    "paper": Recipe(),
    "lora_restarts": LORA_RESTARTS,
    "adaptive": dataclasses.replace(LORA_RESTARTS, gate="flat_loss", stop=0.8),
}


def get_recipe(identifier):
    """Returns a `Recipe`, from one, its name, or its `to_dict()`."""
    if isinstance(identifier, Recipe):
        return identifier
    if isinstance(identifier, dict):
        fields = {field.name for field in dataclasses.fields(Recipe)}
        if not set(identifier) <= fields:
            raise ValueError(
                f"A recipe has the choices {sorted(fields)}. "
                f"Received: {sorted(map(str, identifier))}"
            )
        return Recipe(**identifier)
    check_choice("recipe", identifier, RECIPES)
    return RECIPES[identifier]
