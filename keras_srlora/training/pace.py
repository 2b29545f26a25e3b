"""`Pace`: when a run recomposes. It knows steps and losses, no layers."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable

import numpy as np

from keras_srlora.backend import devices
from keras_srlora.recipes.definition import Recipe
from keras_srlora.recipes.run_length import RunLength
from keras_srlora.recipes.run_length import Shortage
from keras_srlora.recipes.run_length import find_shortage
from keras_srlora.recipes.schedule import Schedule
from keras_srlora.training.recomposition import Work
from keras_srlora.training.run_state import RunState

# A gate that stopped reading must not keep a tensor of each step.
MOST_PENDING = 256


class Pace:
    """Decides at each step whether it is time to recompose.

    Args:
        recipe: the `Recipe` of the run.
        interval: int or `None`. Steps between two recompositions; with a number
            the recipe's gate is left out.
        work: function without arguments that returns the `Work` that is left.
        rank: float. Pairs of a layer, on the average.
        verbose: 0 or 1. With 1, its decisions are printed.
        predictions: how many a step learns from; `None` while unknown.

    Attributes:
        total_steps: int. Training steps of the run; 0 while unknown.
        accumulation: int. How many of them make a step of the optimizer.
        state: `RunState`: schedule, gate and position.
    """

    def __init__(
        self,
        recipe: Recipe,
        interval: int | None,
        work: Callable[[], Work],
        rank: float,
        verbose: int = 0,
        predictions: float | None = None,
    ):
        self.recipe = recipe
        self.interval = interval
        self.total_steps = 0
        self.accumulation = 1
        self.state = RunState()
        self._work = work
        self._rank = rank
        self._verbose = verbose
        self._predictions = predictions
        self._started = 0
        self._warned = False

    def start(self, step: int, epoch_steps: int = 0) -> None:
        """Begins at `step`, once a length or an interval is known."""
        self.state = RunState(
            Schedule(origin=step, recomposed_at=step),
            epoch_steps=epoch_steps,
            predictions=self._predictions,
        )
        if self.total_steps or self.interval:
            self._start_schedule(step)

    def resume(self, saved: RunState, epoch_steps: int = 0) -> None:
        """Resumes from a saved state, with its own schedule."""
        if self._predictions not in (None, saved.predictions):
            _warn_of_another(saved.predictions, self._predictions)
        self.state = saved
        if self.interval:
            saved.schedule = dataclasses.replace(
                saved.schedule, interval=float(self.interval), turns=1, turn=0
            )
        saved.epoch_steps = epoch_steps or saved.epoch_steps

    def set_total_steps(self, total_steps: int, step: int) -> None:
        """Sets the length of a run whose length was unknown before `step`."""
        self.total_steps = total_steps
        if not self.state.schedule.interval and self.state.gate is None:
            self._start_schedule(step)
            self._warn_of_unknown()

    @property
    def last_step(self) -> float:
        """Step from which on nothing is recomposed."""
        total = self.total_steps
        return self.recipe.stop * total if total else float("inf")

    def wants_loss(self, step: int) -> bool:
        """Whether the gate would read the loss now."""
        gate = self.state.gate
        return gate is not None and step < self.last_step and gate.is_due(step)

    @property
    def life(self) -> float:
        """Steps for which a pair is trained at least."""
        return self.recipe.life(
            self.total_steps, self.state.predictions, self.accumulation
        )

    @property
    def shortage(self) -> Shortage | None:
        """Why the recipe leaves a run of this length alone, if it does."""
        if self.interval is not None:
            return None
        state = self.state
        return find_shortage(
            self.recipe,
            RunLength(
                self.total_steps,
                state.epoch_steps,
                state.predictions or 0,
                self._rank,
                self.accumulation,
            ),
        )

    @property
    def wants_predictions(self) -> bool:
        """Whether the number of predictions is to be reported."""
        recipe = self.recipe
        asks = recipe.predictions_per_pair > 1 or (
            recipe.predictions_per_slot > 1 and recipe.lives_per_run > 1
        )
        known = self.state.predictions is not None
        return asks and not known and self.interval is None

    def report_predictions(self, predictions: float | None) -> None:
        """Says how many a step learns from; `None`: no one knows.

        It comes after the first step of a run, when nothing is recomposed yet.
        """
        known_short = self.shortage is not None
        self.state.predictions = predictions or 0
        if predictions and self.total_steps and not known_short:
            self._start_schedule(self._started)
        self._warn_of_unknown()

    def is_due(self, step: int) -> bool:
        """Whether the loss is to be read, or a recomposition is due."""
        if step >= self.last_step:
            return False
        if self.wants_loss(step):
            return True
        gate = self.state.gate
        is_open = gate is None or gate.is_open
        return is_open and self.state.schedule.is_due(step)

    def report_loss(self, total, count: float) -> None:
        """Keeps a sum of losses until the gate reads it."""
        if self.state.gate is not None:
            state = self.state
            state.reported.append((total, count))
            if len(state.reported) > MOST_PENDING:
                state.reported = [state.losses()]

    def decide(self, step: int) -> bool:
        """Whether to recompose now; where the gate is due, it reads first."""
        if not self.is_due(step):
            return False
        if not self.wants_loss(step):
            return True
        if self.state.reported:
            return self.consult_gate(step)
        self._warn_of_silence(step)
        return False

    def consult_gate(self, step: int) -> bool:
        """Lets the gate read the reported losses; whether it wants a probe."""
        total, count = self.state.losses()
        self.state.reported = []
        gate = self.state.gate
        if gate is None or step >= self.last_step:
            return False
        # All processes of a run must hear the same answer.
        total, count = np.sum(devices.gather((total, count)), axis=0)
        phase = gate.phase
        answer = gate.read(step, float(total), float(count))
        if self._verbose and gate.phase != phase:
            print(f"\nstep {step}: {gate.describe()}", flush=True)
        if answer == "go":
            self._make_schedule(step)
        return answer == "recompose"

    def _start_schedule(self, step):
        self._started = step
        self.state.schedule = Schedule(origin=step, recomposed_at=step)
        self.state.gate = None
        shortage = self.shortage
        if shortage is not None:
            self._tell_of_lora(shortage)
            return
        gate = self.recipe.gate_class
        if gate is None or self.interval is not None:
            self._make_schedule(step)
        else:
            self.state.gate = gate.start(
                self.total_steps,
                step,
                self.recipe.steps_per_pair * self.accumulation,
            )

    def _warn_of_unknown(self):
        """Warns of a run that recomposes without the rules for predictions."""
        unknown = self.state.predictions == 0 and self.total_steps
        if unknown and self.shortage is None:
            _warn(
                "The number of predictions (tokens, values or labels) of a "
                "step is unknown, so the recipe counts steps alone. With few "
                "predictions, such as a label an example, this run can end "
                "worse than LoRA. Pass their number, `predictions_per_step`, "
                "to `RecompositionCallback` or `Recomposer`. `fit` counts them "
                "if the loss is one of Keras's, or if each target is a single "
                "number for a vector of outputs."
            )

    def _tell_of_lora(self, shortage):
        """Prints that a run has few steps; warns where it is predictions."""
        if not shortage.of_steps:
            _warn(
                "This run is plain LoRA, without recompositions: "
                f"{shortage.reason} To recompose all the same, pass "
                "`RecompositionCallback(interval=...)` or another recipe, such "
                'as `recipe="lora_restarts"`.'
            )
        elif self._verbose:
            print(f"\nThis run is plain LoRA: {shortage.reason}", flush=True)

    def _make_schedule(self, step):
        """Spreads the recompositions that are left over the rest of the run."""
        left = self.last_step - step
        count, shortest = self._work()
        interval = float(self.interval or 0)
        if self.interval is None:
            interval = max(self.recipe.choose_interval(left, count), shortest)
            updates = left / self.accumulation
            if interval <= self.accumulation and math.inf > count > updates > 0:
                _warn(
                    f"{int(updates)} steps are too few to visit all directions "
                    f"in {count} recompositions: there will be one each step."
                )
        if count and 0 < left <= interval and self.state.gate is None:
            _warn(
                f"Nothing will be recomposed: the recipe has {int(left)} steps "
                f"of this run for it, and the first recomposition would come "
                f"after {interval:g}. Pass a smaller `interval`, or a recipe "
                f"with other `stop` and `steps_per_pair`. Received: "
                f"interval={self.interval}, {self.recipe}"
            )
        turns = self.recipe.turns if self.interval is None else 1
        self.state.schedule = Schedule.start(step, interval, turns)

    def _warn_of_silence(self, step):
        gate = self.state.gate
        late = gate is not None and step - gate.read_at > gate.window
        if late and not self._warned:
            self._warned = True
            _warn(
                f"The recipe's gate ({self.recipe.gate!r}) has read no loss "
                f"until step {step}: nothing is recomposed. Call "
                "`recomposer.report_loss(loss)` after each step, or pass an "
                "`interval`, or a recipe without a gate."
            )


def _warn_of_another(saved, given):
    _warn(
        "A resumed run keeps its schedule. That of the saved run counts "
        f"{saved or 'no'} predictions a step; to use another number, start a "
        f"new run. Received: predictions_per_step={given}"
    )


def _warn(message):
    warnings.warn(message, stacklevel=3)
