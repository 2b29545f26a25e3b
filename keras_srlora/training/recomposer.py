"""`Recomposer`: a run, in `fit` or in a loop."""

from __future__ import annotations

from typing import Any

import keras

from keras_srlora.backend.arguments import check_count
from keras_srlora.backend.random_state import RandomState
from keras_srlora.layers.find import srlora_layers
from keras_srlora.layers.paths import layer_paths
from keras_srlora.recipes.definition import Recipe
from keras_srlora.training import preparation
from keras_srlora.training.optimizer import accumulation_steps
from keras_srlora.training.optimizer import is_between_accumulations
from keras_srlora.training.pace import Pace
from keras_srlora.training.recomposition import Recomposition
from keras_srlora.training.recomposition import describe
from keras_srlora.training.recomposition import recompose
from keras_srlora.training.recomposition import remaining_recompositions
from keras_srlora.training.recomposition import work_left
from keras_srlora.training.run_state import RunState
from keras_srlora.training.scoring import score_steps

# The name of the run among the companions of its first layer.
COMPANION = "run"


class Recomposer:
    """Follows a recipe in a custom training loop of TensorFlow, JAX or PyTorch.

    It scores the pairs, decides when to recompose, recomposes, and treats the
    optimizer's moments. In `fit`, `RecompositionCallback` uses one.

    ```python
    recomposer = keras_srlora.Recomposer(model, adam, total_steps=len(batches))
    optimizer = recomposer.optimizer  # scores the pairs in each step
    for step, (x, y) in enumerate(batches):
        recomposer.before_step(step)
        loss = train_step(x, y)  # with `optimizer`
        recomposer.report_loss(loss)
    ```

    It decomposes kernels that are not decomposed yet. Its state is saved with
    the weights of its first layer; see `restore`.

    Args:
        model: a `keras.Model` with SRLoRA layers, or a list of such layers.
        optimizer: the optimizer of the loop. A Keras optimizer is wrapped in a
            `SensitivityOptimizer`; train with `recomposer.optimizer`. A
            `torch.optim` optimizer stays the same, and the gradients are scored
            before each of its steps.
        recipe: a `Recipe` or its name. Defaults to `None`: that of the layers.
        total_steps: int. Steps of the run. Required unless `interval` is given.
        interval: int or `None`. Steps between two recompositions, in place of
            the recipe's gate and schedule. Defaults to `None`: the recipe's.
        fusion_ratio: float in (0, 1], or `None` for that of the recipe.
        predictions_per_step: int or `None`. How many tokens or values a step
            learns from; a label of few classes counts less (see `Recipe`). With
            few, pairs are fused later, or never. `None`: steps alone count.
        steps_per_epoch: int or `None`. Steps of an epoch, if the data repeat.
            If it is short, a recipe trains plain LoRA.
        verbose: 0 or 1. With 1, prints a line for each recomposition.

    Attributes:
        layers: list of the SRLoRA layers.
        recipe: the `Recipe` of the run.
        optimizer: the optimizer to train with.
        sensitivity: the `Sensitivity` that scores the pairs.
        events: list of `Recomposition`, in order.
        pace: `Pace`. Schedule, gate and position.

    Raises:
        ValueError: before anything changes, if there is no SRLoRA layer, one is
            not built or frozen, a kernel is not finite, the optimizer does not
            fit, the layers began with another `start`, or neither
            `total_steps` nor `interval` is given.
    """

    def __init__(
        self,
        model: keras.Model | list,
        optimizer: Any,
        recipe: Recipe | str | dict | None = None,
        total_steps: int | None = None,
        interval: int | None = None,
        *,
        fusion_ratio: float | None = None,
        predictions_per_step: int | None = None,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ) -> None:
        preparation.check_length(total_steps, interval)
        check_count("steps_per_epoch", steps_per_epoch, "steps", True)
        predictions = check_count(
            "predictions_per_step", predictions_per_step, "predictions", True
        )
        whole = isinstance(model, keras.Model)
        self._model = model if whole else None
        self.layers = srlora_layers(model) if whole else list(model)
        self.recipe = preparation.choose_recipe(
            self.layers, recipe, fusion_ratio
        )
        preparation.check_run(self.layers, self.recipe, optimizer)
        self.optimizer, self.sensitivity = score_steps(
            optimizer, self.layers, self.recipe.beta1, self.recipe.beta2
        )
        if self._model is not None:
            self.sensitivity.paths = layer_paths(self._model)
        preparation.start_layers(self.layers, self.recipe)
        self.events: list[Recomposition] = []
        rank = sum(layer.rank for layer in self.layers) / len(self.layers)
        self.pace = Pace(
            self.recipe, interval, self._work_left, rank, verbose, predictions
        )
        self.pace.accumulation = accumulation_steps(self.optimizer)
        self.pace.total_steps = total_steps or 0
        self.restored = False  # whether a file was loaded since it was made
        self._verbose = verbose
        self._begun = self._warned_of_exhausted = False
        self._random: RandomState | None = None
        part = _SavedPart(self)
        self._saved = self.layers[0].companions.attach(COMPANION, part)
        if total_steps != 0:
            self.start(0, int(steps_per_epoch or 0))
            if self.pace.wants_predictions:
                self.pace.report_predictions(None)

    # Each step.

    def is_due(self, step: int) -> bool:
        """Whether `before_step(step)` may read or change variables.

        If it is true, a JAX loop writes its state to the variables first.
        """
        return self.pace.is_due(step)

    def before_step(self, step: int) -> list[Recomposition]:
        """Recomposes if it is time. Call it before each step.

        Args:
            step: int. Number of training steps done.

        Returns:
            List of `Recomposition`, empty for most steps.

        Raises:
            RuntimeError: if an SRLoRA layer was frozen since the run began.
        """
        step = preparation.check_step(step)
        self.pace.state.begun = step
        if not self.is_due(step) or not is_between_accumulations(
            self.optimizer
        ):
            return []
        return self._recompose(step) if self.pace.decide(step) else []

    def report_loss(self, total: Any, count: float = 1) -> None:
        """Reports the losses of the steps since the last report to a gate.

        Args:
            total: sum of the losses. A number, or a scalar tensor, which is
                only read when it is needed.
            count: number of losses in the sum. Defaults to `1`.
        """
        self.pace.report_loss(total, count)

    def consult_gate(self, step: int) -> list[Recomposition]:
        """Lets the gate read the reported losses before it is due."""
        if not is_between_accumulations(self.optimizer):
            return []
        return self._recompose(step) if self.pace.consult_gate(step) else []

    # Beginning, and going on.

    def start(self, step: int, epoch_steps: int = 0) -> None:
        """Begins a run at `step`, with all directions that are unused."""
        self._begin()
        self.pace.start(step, epoch_steps)

    def resume(self, saved: RunState, epoch_steps: int = 0) -> None:
        """Resumes from a saved state, with its own schedule."""
        self._begin()
        self.pace.resume(saved, epoch_steps)

    def restore(self, arrays: dict | None = None) -> None:
        """Resumes a saved run.

        A weights file has the state of a run. `model.load_weights` restores the
        run of an existing `Recomposer`. If you make it after loading, call
        `recomposer.restore()`. Continue with step `recomposer.steps_done`.

        Args:
            arrays: dict that `to_arrays` returned. Defaults to `None`: the
                state that was loaded before the `Recomposer` was made.

        Raises:
            ValueError: if there is nothing to restore, it is of another format,
                or of a run with another kind of gate.
        """
        if arrays is not None:
            self._saved = arrays
        if not self._saved:
            raise ValueError(
                "There is no saved run to resume: load the weights that were "
                "saved in its middle first. Received: layers whose first is "
                f"{self.layers[0].path!r}, without a run"
            )
        self.resume(self.saved_state(with_gate=True))

    def to_arrays(self) -> dict:
        """The state as `{name: array}`; events are in the layers' records."""
        if not self._begun and self._saved:
            # No step since the state was loaded.
            return self._saved
        random = {} if self._random is None else self._random.to_arrays()
        return {"state": self.pace.state.to_array(self.recipe), **random}

    @property
    def steps_done(self) -> int:
        """Steps that were begun; a restored loop continues with this step."""
        return self.pace.state.begun + 1

    def saved_state(self, with_gate: bool = False) -> RunState:
        """The state that was loaded, or the state before any run."""
        if not self._saved:
            return RunState()
        recipe = self.recipe if with_gate else None
        return RunState.from_array(self._saved["state"], recipe)

    def take(self, arrays: dict) -> None:
        """Takes over the state that a weights file holds."""
        self._saved = arrays
        self.restored = bool(arrays)
        if not arrays or not self._begun:
            # `fit` decides where it goes on when its first epoch begins.
            return
        if self.pace.state.begun < 0:
            self.restore()
        elif self._random is not None:
            # In the middle of a run its own schedule stays.
            self._random.restore(arrays)

    def _begin(self):
        self._begun = True
        if self._model is not None:
            self._random = RandomState(self._model)
            self._random.restore(self._saved)

    # A recomposition.

    def _recompose(self, step):
        preparation.check_still_trained(self.layers, self._model)
        recipe = self.recipe
        exhausted = [
            x for x in self.layers if not remaining_recompositions(x, recipe)
        ]
        if exhausted:
            self._warn_of_exhausted(exhausted)
        layers = self.pace.state.schedule.take_layers(step, self.layers)
        scores, optimizer = self.sensitivity, self.optimizer
        events = recompose(scores, optimizer, step, recipe, layers)
        self.events.extend(events)
        if events and self._verbose:
            print(f"\n{describe(events, len(self.layers))}", flush=True)
        return events

    def _work_left(self):
        work = work_left(self.layers, self.recipe, self.pace.life)
        if work.recompositions == 0:
            self._warn_of_exhausted(self.layers)
        return work

    def _warn_of_exhausted(self, layers):
        if not self._warned_of_exhausted:
            self._warned_of_exhausted = True
            step = max(0, self.pace.state.begun)
            preparation.warn_of_exhausted(layers, len(self.layers), step)


class _SavedPart:
    """A run as the companion of its first layer."""

    def __init__(self, recomposer):
        self._recomposer = recomposer

    def to_arrays(self):
        return self._recomposer.to_arrays()

    def restore(self, arrays):
        self._recomposer.take(arrays)
