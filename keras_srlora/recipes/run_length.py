"""Whether a run is long enough to recompose, by a recipe's minima."""

from __future__ import annotations

import dataclasses

from keras_srlora.recipes.definition import Recipe

UNIT = "predictions (tokens or values; labels of few classes count less)"


@dataclasses.dataclass(frozen=True)
class RunLength:
    """How long a run is; 0 for what is not known.

    Attributes:
        steps: of the run.
        epoch_steps: steps of an epoch.
        predictions: from which a step learns.
        rank: pairs of a layer, on the average.
        accumulation: how many steps of the run make one of the optimizer.
    """

    steps: int
    epoch_steps: int
    predictions: float
    rank: float
    accumulation: int = 1


@dataclasses.dataclass(frozen=True)
class Shortage:
    """Why a run is too short.

    Attributes:
        of_steps: whether it has too few steps; else, too few predictions.
        reason: text for the user: what the run has, and what the recipe needs.
    """

    of_steps: bool
    reason: str


def find_shortage(recipe: Recipe, run: RunLength) -> Shortage | None:
    """What a run has too little of; `None` if it is long enough.

    A recipe with `lives_per_run=1` takes any run.
    """
    lives = recipe.lives_per_run
    if lives == 1:
        return None
    life = recipe.life(run.steps, accumulation=run.accumulation)
    if 0 < run.steps < lives * life:
        each = (
            f", {run.accumulation} of which make one of the optimizer"
            if run.accumulation > 1
            else ""
        )
        return Shortage(
            True,
            f"it has {run.steps} steps{each}, and the recipe needs {lives} "
            f"lifetimes of a pair, {life:.0f} steps each.",
        )
    reason = (
        _repeats(recipe, run)
        or _too_few(recipe, run)
        or _of_rank(recipe, run)
        or _too_many_epochs(recipe, run)
    )
    return Shortage(False, reason) if reason else None


def _repeats(recipe, run):
    """A pair would learn from the same predictions again."""
    of_epoch = run.epoch_steps * run.predictions
    if not 0 < of_epoch < recipe.predictions_per_pair:
        return ""
    return (
        f"an epoch has {of_epoch:,.0f} {UNIT}, and a pair learns from "
        f"{recipe.predictions_per_pair:,}, so it would learn from the same "
        "ones again. Train with more data. If each epoch brings new data, "
        "train with longer epochs."
    )


def _too_many_epochs(recipe, run):
    """A pair would learn from the same examples again and again."""
    most, steps = recipe.epochs_per_pair, run.epoch_steps
    life = recipe.life(run.steps, run.predictions, run.accumulation)
    if not most or not 0 < most * steps < life:
        return ""
    return (
        f"a pair trains for {life:.0f} steps, which are {life / steps:.0f} "
        f"epochs, so it would learn the examples by heart; the recipe allows "
        f"{most} epochs. Received: epochs of {steps} steps. Train with more "
        "data. If each epoch brings new data, train with longer epochs."
    )


def _too_few(recipe, run):
    """There are too few of them for so many lifetimes."""
    lives = recipe.lives_per_run
    life = recipe.life(run.steps, run.predictions, run.accumulation)
    if not 0 < run.steps < lives * life:
        return ""
    return (
        f"a step learns from {run.predictions:g} {UNIT}, so that a pair "
        f"trains for {life:.0f} steps, and the recipe needs {lives} lifetimes "
        f"of a pair. Received: a run of {run.steps} steps. Train longer or "
        "with larger batches."
    )


def _of_rank(recipe, run):
    """There are too few of them for so many pairs."""
    of_run, needed = run.steps * run.predictions, recipe.predictions_per_slot
    if not 0 < of_run < run.rank * needed:
        return ""
    return (
        f"it has {of_run:,.0f} {UNIT}, and the recipe needs {needed:,} for "
        f"each pair of a layer. Received: {run.rank:g} pairs in a layer. Train "
        "longer or with larger batches, or take a smaller rank."
    )
