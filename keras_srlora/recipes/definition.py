"""`Recipe`: the choices of a run, and the recipes that have a name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_srlora.backend.arguments import check_choice
from keras_srlora.backend.arguments import check_count
from keras_srlora.backend.arguments import check_fraction
from keras_srlora.recipes.choices import TABLES
from keras_srlora.recipes.choices import Evidence
from keras_srlora.recipes.choices import Pairs
from keras_srlora.recipes.protocol import Gate

Choice = str | Callable


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Defines how a run recomposes: named functions, and a few numbers.

    Each choice is one of the strings below, or a function with the signature
    that is given here; `keras_srlora/recipes/choices.py` has examples. Register
    your function with `keras.saving.register_keras_serializable`, because it is
    saved by its name.

    Args:
        start: how the first pairs start. `"pissa"` (along the leading singular
            directions, which are subtracted from the kernel) or `"lora"` (`a`
            random, `b` zero). A function as for `scale`.
        score: how important a pair is. `"sensitivity"` (`|w · g|`, averaged) or
            `"magnitude"` (`‖a_k‖ · ‖b_k‖`). A function
            `(evidence) -> tensor (rank,)`.
        selection: which pairs are fused. `"least_important"` or `"oldest"` (of
            equals, the least important). A function
            `(pairs, count) -> slots`.
        order: which directions come next. `"largest_singular_value"` or
            `"random"`. A function
            `(singular_values, unused, count) -> indices`.
        scale: at what scale a pair restarts. `"sqrt_singular_value"` or
            `"as_lora"` (`b` zero). A function
            `(singular_values, tolerance, scale) -> (scale_a, scale_b)`.
        slots: how the optimizer's moments of a restarted pair start.
            `"zero_first_moments"`, `"zero"`, `"keep"`, `"shared"` (second
            moments start from the mean of the layer's pairs), or
            `"fast_start"`: all moments start from zero. The steps of the new
            pair are at first up to 3.3 times as large as LoRA's, and shrink
            with its age: after 290 steps they are LoRA's. For optimizers other
            than `Adam`, `AdamW` and `Adamax`, this is `"shared"`. A function
            `(kind, values) -> values`.
        schedule: when a run recomposes. `"evenly"` over the run, or
            `"by_life"`: as often as `steps_per_pair` and `pair_life` allow. A
            function `(steps, recompositions) -> interval`.
        gate: `"none"`, or `"flat_loss"`: the run does not recompose while the
            training loss falls. Once the loss is flat, one recomposition is
            tried. If this speeds up the loss, the schedule continues until the
            loss is flat again. A class with the methods of
            `keras_srlora.recipes.protocol.Gate`.
        turns: int. Number of groups of layers that recompose in turn: every
            `turns`-th layer at a time, so that few pairs are new at once.
        fusion_ratio: float in (0, 1]. Part `γ` of a layer's pairs that a
            recomposition fuses, at least one pair.
        steps_per_pair: int. Least number of the optimizer's steps for which a
            pair trains before its slot restarts; with
            `gradient_accumulation_steps=k`, `k` batches make one. The first
            recomposition comes after a part `fusion_ratio` of it, so that not
            all pairs of a layer are new at once. A run that is too short for
            all directions recomposes less often, and does not visit all of
            them.
        predictions_per_pair: int. Least number of predictions that a pair
            learns from: tokens, values, or labels, of which one of `n` classes
            counts `log2(n) / 8`, at most one. `fit` counts them if the loss, or
            the shapes of outputs and targets, determine their number. If
            `lives_per_run` is above 1, an epoch must have as many.
        pair_life: float in [0, 1). Least part of the run for which a pair
            trains. The largest of the three minima applies: the lifetime.
        lives_per_run: int. Number of lifetimes that a run must last to
            recompose at all. A shorter run is plain LoRA (or PiSSA, with
            `start="pissa"`). With `1`, any run recomposes.
        predictions_per_slot: int. Least number of predictions of a run, for
            each slot of a layer. A run of fewer is plain LoRA: the higher the
            rank, the less a short run gains from new pairs. If layers have
            different ranks, their mean counts. With `lives_per_run=1` it plays
            no role.
        epochs_per_pair: int. Most epochs that a lifetime may last, or `None`
            for any number. In a longer one a pair would learn the examples by
            heart, so the run is plain LoRA, unless `lives_per_run` is 1.
        reuse_directions: bool. Whether a run begins again with the first
            directions once it has used all of them. For pairs that subtract
            nothing (`start="lora"`, `scale="as_lora"`).
        stop: float in (0, 1]. Part of the run after which it does not
            recompose, so that the last pairs have time to train.
        beta1: float in [0, 1). Decay of the average sensitivity `Ī`.
        beta2: float in [0, 1). Decay of its uncertainty `Ū`.

    The default values are the published recipe, `recipe="paper"` (SRLoRA, arXiv
    2505.12433, section 3); the paper does not define `slots`.

    Layers use `recipe="adaptive"` by default. It starts each pair as LoRA does,
    trains it for a thirtieth of the run, and at least for 200 steps and 200,000
    predictions, then fuses it and restarts its slot. A run of fewer than 1,000
    steps or 1,000,000 predictions is plain LoRA. So is one of fewer than
    250,000 predictions for each slot of a layer (2,000,000 at rank 8), and one
    whose epochs have fewer than 200,000, or last under 1/20 of a lifetime.

    `recipe="lora_restarts"` restarts pairs in the same way in the first half of
    a run of any length. It uses each direction once, and zeroes all moments.

    Example:

    ```python
    @keras.saving.register_keras_serializable("my_package")
    def most_important(pairs, count):
        return np.sort(np.argsort(-pairs.scores)[:count])

    recipe = keras_srlora.Recipe(order="random", selection=most_important)
    keras_srlora.enable_srlora(model, rank=8, recipe=recipe)
    ```
    """

    start: Choice = "pissa"
    score: Choice = "sensitivity"
    selection: Choice = "least_important"
    order: Choice = "largest_singular_value"
    scale: Choice = "sqrt_singular_value"
    slots: Choice = "zero_first_moments"
    schedule: Choice = "evenly"
    gate: Choice = "none"
    turns: int = 1
    fusion_ratio: float = 0.5
    steps_per_pair: int = 1
    predictions_per_pair: int = 1
    pair_life: float = 0.0
    lives_per_run: int = 1
    predictions_per_slot: int = 1
    epochs_per_pair: int | None = None
    reuse_directions: bool = False
    stop: float = 1.0
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self):
        for field in TABLES:
            name = _name(field, getattr(self, field))
            object.__setattr__(self, field, name)
        # As Python's numbers, which JSON can hold.
        for field, low_open, high_open in (
            ("fusion_ratio", True, False),
            ("stop", True, False),
            ("pair_life", False, True),
            ("beta1", False, True),
            ("beta2", False, True),
        ):
            number = getattr(self, field)
            number = check_fraction(field, number, low_open, high_open)
            object.__setattr__(self, field, number)
        for field, unit in (
            ("turns", "groups of layers"),
            ("steps_per_pair", "steps"),
            ("predictions_per_pair", "predictions"),
            ("lives_per_run", "lives"),
            ("predictions_per_slot", "predictions"),
            ("epochs_per_pair", "epochs"),
        ):
            optional = getattr(Recipe, field) is None
            count = check_count(field, getattr(self, field), unit, optional)
            object.__setattr__(self, field, count)
        if not isinstance(self.reuse_directions, (bool, np.bool_)):
            raise ValueError(
                "`reuse_directions` must be True or False. "
                f"Received: reuse_directions={self.reuse_directions!r}"
            )
        object.__setattr__(
            self, "reuse_directions", bool(self.reuse_directions)
        )
        if self.reuse_directions and self.subtracts:
            raise ValueError(
                "Directions can come again only where nothing is subtracted "
                'from the kernel: `start="lora"` and `scale="as_lora"`. '
                f"Received: reuse_directions=True, start={self.start!r}, "
                f"scale={self.scale!r}"
            )

    @property
    def subtracts(self) -> bool:
        """Whether pairs start with something that goes out of the kernel."""
        return not self.starts_as_lora or self.scale != "as_lora"

    def to_dict(self) -> dict:
        """As plain Python, for JSON and a layer's config."""
        return dataclasses.asdict(self)

    def life(
        self,
        total_steps: int,
        predictions: float | None = None,
        accumulation: int = 1,
    ) -> float:
        """Steps for which a pair is trained at least.

        Args:
            total_steps: of the run.
            predictions: of a step; 0 or `None` where they are not known.
            accumulation: how many steps of the run make one of the optimizer.
        """
        moved = self.steps_per_pair * accumulation
        seen = self.predictions_per_pair / predictions if predictions else 1
        return max(moved, seen, self.pair_life * total_steps)

    # What each choice does.

    @property
    def starts_as_lora(self) -> bool:
        """Whether the first pairs stay as built: `a` random, `b` zero."""
        return _function("start", self.start) is None

    def scale_first(self, singular_values, tolerance, scale) -> tuple:
        """`(scale_a, scale_b)` of first pairs that start along directions."""
        return _function("start", self.start)(singular_values, tolerance, scale)

    def scale_restarted(self, singular_values, tolerance, scale) -> tuple:
        """`(scale_a, scale_b)` of pairs that restart along directions."""
        return _function("scale", self.scale)(singular_values, tolerance, scale)

    def score_pairs(self, evidence: Evidence) -> Any:
        """Importance of each pair of a layer."""
        return _function("score", self.score)(evidence)

    def select_pairs(self, pairs: Pairs, count: int) -> np.ndarray:
        """The slots to fuse."""
        return _function("selection", self.selection)(pairs, count)

    def select_directions(self, singular_values, unused, count) -> np.ndarray:
        """The directions that come next."""
        return _function("order", self.order)(singular_values, unused, count)

    @property
    def scales_steps(self) -> bool:
        """Whether Adam's steps of restarted pairs are scaled."""
        return self.slots == "fast_start"

    def treat_slots(self, kind: str, values: Any, corrected=True) -> Any:
        """The values of an optimizer's slot of a restarted pair.

        Args:
            kind: str; see `Recipe`.
            values: tensor of shape `(rank, ...)`.
            corrected: bool. Whether the optimizer corrects its moments, and
                its steps can be scaled.
        """
        if self.scales_steps and not corrected:
            return TABLES["slots"]["shared"](kind, values)
        return _function("slots", self.slots)(kind, values)

    def choose_interval(self, steps: float, recompositions: float) -> float:
        """Steps between two of so many recompositions."""
        interval = _function("schedule", self.schedule)(steps, recompositions)
        if not interval > 0:
            raise ValueError(
                "The function for `schedule` in the recipe must return a "
                f"number of steps above zero. Received: {interval!r}"
            )
        return interval

    @property
    def gate_class(self) -> type[Gate] | None:
        """The class of the gate; `None` where there is none."""
        return _function("gate", self.gate)


def _name(field, choice):
    """The string that a choice is saved as."""
    table = TABLES[field]
    if isinstance(choice, str):
        if choice not in table and not _registered(choice):
            check_choice(field, choice, table)
        return choice
    for name, function in table.items():
        if choice is not None and choice is function:
            return name
    name = ""
    if callable(choice):
        name = keras.saving.get_registered_name(choice)
    if not name or _registered(name) is not choice:
        raise ValueError(
            f"`{field}` must be one of {sorted(table)}, or a function that is "
            "registered, so that it can be saved by name: decorate it with "
            '`@keras.saving.register_keras_serializable("my_package")`. '
            f"Received: {field}={choice!r}"
        )
    return name


def _function(field, name):
    if name in TABLES[field]:
        return TABLES[field][name]
    function = _registered(name)
    if function is None:
        raise ValueError(
            f"The recipe names a function for `{field}` that is not "
            "registered in this process: import the module that defines it. "
            f"Received: {field}={name!r}"
        )
    return function


def _registered(name):
    # Registered names have a package; anything else is a misspelt choice.
    return keras.saving.get_registered_object(name) if ">" in name else None


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
    "adaptive": dataclasses.replace(
        LORA_RESTARTS,
        slots="fast_start",
        schedule="by_life",
        steps_per_pair=200,
        pair_life=1 / 30,
        turns=6,
        predictions_per_pair=200_000,
        lives_per_run=5,
        predictions_per_slot=250_000,
        epochs_per_pair=20,
        reuse_directions=True,
        stop=0.85,
    ),
}


def get_recipe(identifier) -> Recipe:
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
