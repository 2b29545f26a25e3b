"""`RecompositionCallback`: a `Recomposer` in `fit`."""

from __future__ import annotations

import keras

from keras_srlora.backend import devices
from keras_srlora.backend.arguments import check_count
from keras_srlora.backend.arguments import check_fraction
from keras_srlora.layers.base import SRLoRALayer
from keras_srlora.layers.find import srlora_layers
from keras_srlora.recipes.definition import Recipe
from keras_srlora.recipes.definition import get_recipe
from keras_srlora.training import preparation
from keras_srlora.training import resume
from keras_srlora.training import wrapping
from keras_srlora.training.losses import LossReader
from keras_srlora.training.losses import has_validated
from keras_srlora.training.recomposer import COMPANION
from keras_srlora.training.recomposer import Recomposer
from keras_srlora.training.recomposition import Recomposition


class RecompositionCallback(keras.callbacks.Callback):
    """Scores the pairs of the SRLoRA layers in `fit`, and recomposes them.

    The default recipe, `"adaptive"`, trains each pair for a thirtieth of the
    run, at least 200 steps and 200,000 predictions (tokens or values; labels of
    few classes count less). Then it fuses the pair and restarts its slot, until
    0.85 of the run. A run of fewer than five such lifetimes, with short epochs,
    or few predictions for its rank is LoRA. It warns, except of few steps.

    A run is one `fit`. Its length is `epochs` times the steps of an epoch. If
    the data set has no size, it is known after the first epoch.

    During `fit` the optimizer is wrapped in a `SensitivityOptimizer`. A step is
    a batch. Recompositions come between two batches, and wait for the end of a
    gradient accumulation, or of an execution of several steps.

    Args:
        interval: int or `None`. Steps between two recompositions, in place of
            the recipe's gate and schedule. Defaults to `None`: the recipe's.
        fusion_ratio: float in (0, 1]. Part `γ` of a layer's pairs that a
            recomposition fuses, at least one. Defaults to `None`: the recipe's.
        recipe: a `Recipe` or its name; one with another `start` only before
            training. Defaults to `None`: that of the layers.
        verbose: 0 or 1. With 1, prints a line for each recomposition. Defaults
            to `0`.
        predictions_per_step: int or `None`. As for `Recomposer`. Defaults to
            `None`: `fit` counts them.

    Attributes:
        events: list of `Recomposition`, in order.
        recomposer: the `Recomposer` of the run.

    The callback adds to the `logs` of an epoch: `srlora_recompositions` (in
    this epoch), `srlora_directions` (used so far, mean over the layers) and
    `srlora_drift` (largest in this epoch). `History` has them, and so do
    `CSVLogger` and `TensorBoard` if they come later in the list.

    Raises:
        ValueError: when `fit` starts, before anything changes, if there is no
            SRLoRA layer, a layer is not built or is frozen, a kernel is not
            finite, the optimizer is not supported or was built for other
            variables, `fit` has two of them, or this one is in two at a time.
        RuntimeError: if the model's optimizer is replaced during the run, or
            the processes of a distributed run start from different weights or
            score different gradients.

    Example:

    ```python
    callback = keras_srlora.RecompositionCallback(verbose=1)
    model.fit(train, epochs=3, callbacks=[callback])
    ```

    References:
        - [SRLoRA](https://arxiv.org/abs/2505.12433), section 3
    """

    def __init__(
        self,
        interval: int | None = None,
        fusion_ratio: float | None = None,
        recipe: Recipe | str | dict | None = None,
        verbose: int = 0,
        predictions_per_step: int | None = None,
    ):
        super().__init__()
        self.predictions_per_step = check_count(
            "predictions_per_step", predictions_per_step, "predictions", True
        )
        self.interval = check_count("interval", interval, "steps", True)
        if fusion_ratio is not None:
            fusion_ratio = check_fraction(
                "fusion_ratio", fusion_ratio, True, False
            )
        self.fusion_ratio = fusion_ratio
        # `recipe` becomes that of a run; the next run starts from the argument.
        self._given_recipe = None if recipe is None else get_recipe(recipe)
        self.recipe: Recipe | None = self._given_recipe
        self.verbose = verbose
        # Made with each `fit`; the hooks of Keras come after that.
        self.recomposer: Recomposer = None  # type: ignore[assignment]
        self._running = False
        self._prepared = False

    @property
    def events(self) -> list[Recomposition]:
        return [] if self.recomposer is None else self.recomposer.events

    def to_dict(self) -> dict:
        """Arguments and events as plain Python, for JSON."""
        return {
            "interval": self.interval,
            "fusion_ratio": self.fusion_ratio,
            "recipe": self.recipe and self.recipe.to_dict(),
            "predictions_per_step": self.predictions_per_step,
            "events": [event.to_dict() for event in self.events],
        }

    # Keras calls `set_model` before it makes the train function, so this puts
    # in place what the compiled step must see. Keras calls it for `evaluate`
    # and `predict` too, which must leave the model as it is.

    def set_model(self, model) -> None:
        if self._running and model is not self._model:
            raise ValueError(
                f"This callback follows the run of model {self._model.name!r}, "
                "which has not ended (or was interrupted). Make another one, "
                "`RecompositionCallback(...)`, for each model. "
                f"Received: model {model.name!r}"
            )
        super().set_model(model)
        if _begins_fit(model):
            self._prepare()

    def _prepare(self):
        model = self._model
        layers = srlora_layers(model)
        recipe = preparation.choose_recipe(
            layers, self._given_recipe, self.fusion_ratio
        )
        preparation.check_model(model, layers)
        self._outer_optimizer, inner = wrapping.split_optimizer(model)
        preparation.check_run(layers, recipe, inner)
        self.recipe = recipe
        with devices.strategy_scope(model):
            wrapper = wrapping.wrap_optimizer(
                model, layers, recipe.beta1, recipe.beta2
            )
        self._prepared = True
        # The length of the run is known when its first epoch begins.
        self.recomposer = Recomposer(
            model,
            wrapper,
            recipe,
            total_steps=0,
            interval=self.interval,
            predictions_per_step=self.predictions_per_step,
            verbose=self.verbose,
        )

    def on_test_begin(self, logs=None) -> None:
        if self._running:
            # After it the model's metrics count the examples of validation.
            wrapping.count_predictions(self, self._epoch_steps)
        self._withdraw()

    def on_predict_begin(self, logs=None) -> None:
        self._withdraw()

    def _withdraw(self):
        """Gives the model its own optimizer back, where no run has begun."""
        if self._prepared and not self._running:
            self._prepared = False
            wrapping.unwrap_optimizer(self._model)

    def on_train_begin(self, logs=None) -> None:
        wrapping.check_first(self._model, self.params)
        if not self._prepared:
            # In a loop with a `CallbackList`, or with a `History` used before.
            self._prepare()
            if self._model.train_function is None:
                self._model.make_train_function()
        self._running = True
        self._epochs = (self.params or {}).get("epochs", 1)
        self._epoch_steps: int = (self.params or {}).get("steps") or 0
        self._step = 0
        self._begun = False
        if self.recomposer.restored:
            # By another callback, `BackupAndRestore`.
            resume.mend_initial_epoch(
                self.recomposer, self._model, self._epoch_steps
            )

    def on_epoch_begin(self, epoch, logs=None) -> None:
        if not self._begun:
            self._begun = True
            # `initial_epoch` is not among the parameters; the first epoch is.
            self._epoch_steps = resume.begin_run(
                self.recomposer,
                self._model,
                epoch,
                self._epochs,
                self._epoch_steps,
            )
            self._step = epoch * self._epoch_steps
        self._losses = LossReader(self._model)
        self._epoch_start = self._step
        self._events_before = len(self.events)
        self._batches_ended: list[int] = []

    # A recomposition comes at the begin of a batch. Keras calls
    # `on_train_batch_end` in other threads, in any order, while the next step
    # runs; without `async_safe` it would wait for the result of each step.

    async_safe = True

    def on_train_batch_end(self, batch, logs=None) -> None:
        self._batches_ended.append(batch)

    def on_train_batch_begin(self, batch, logs=None) -> None:
        recomposer = self.recomposer
        wrapping.check_wrapped(
            self._model, self._outer_optimizer, recomposer.optimizer
        )
        self._step = self._epoch_start + batch
        wrapping.count_predictions(self, batch)
        if recomposer.is_due(self._step):
            # On JAX variables are not up to date during an epoch; the public
            # property sees to it.
            self.model  # noqa: B018
            # Before the first batch of an epoch there is nothing to read.
            if batch and recomposer.pace.wants_loss(self._step):
                self._losses.report(recomposer)
        recomposer.before_step(self._step)

    def on_epoch_end(self, epoch, logs=None) -> None:
        recomposer = self.recomposer
        learned = not self._epoch_steps
        if learned:
            self._epoch_steps = max(self._batches_ended) + 1
        if not has_validated(logs):
            wrapping.count_predictions(self, self._epoch_steps)
        self._step = self._epoch_start + self._epoch_steps
        recomposer.pace.state.epoch_steps = self._epoch_steps
        if learned:
            recomposer.pace.set_total_steps(
                self._epochs * self._epoch_steps, self._step
            )
        if recomposer.pace.state.gate is not None and not self._losses.has_read:
            # Too short an epoch to be read on its way.
            self.model  # noqa: B018
            self._losses.report_epoch(
                recomposer, logs, self._epoch_steps, self._step
            )
        if logs is not None:
            of_epoch = self.events[self._events_before :]
            logs.update(_epoch_logs(of_epoch, recomposer.layers))

    def on_train_end(self, logs=None) -> None:
        self._running = False
        self._prepared = False
        wrapping.unwrap_optimizer(self._model)
        # The state of the run stays with the weights, unless they were merged.
        first = self.recomposer.layers[0]
        if isinstance(first, SRLoRALayer):
            first.companions.detach(COMPANION)


def _begins_fit(model):
    """Whether it is `fit` that calls `set_model`, not `evaluate` or `predict`.

    `fit` has just given the model a new `History`, which has no `epoch` until
    training begins.
    """
    history = getattr(model, "history", None)
    return isinstance(history, keras.callbacks.History) and not hasattr(
        history, "epoch"
    )


def _epoch_logs(events, layers):
    # Without those that another callback has merged.
    layers = [layer for layer in layers if isinstance(layer, SRLoRALayer)]
    used = [layer.record.used.sum() for layer in layers]
    return {
        "srlora_recompositions": len({event.step for event in events}),
        "srlora_directions": float(sum(used) / max(1, len(used))),
        "srlora_drift": max((event.drift for event in events), default=0.0),
    }
