"""`RecompositionCallback`."""

import dataclasses
import warnings

import keras
import numpy as np
from keras import ops

from keras_srlora import _devices
from keras_srlora import _keras
from keras_srlora._checks import check_fraction
from keras_srlora._converted import inside
from keras_srlora._layers import initialize_factors
from keras_srlora._layers import match_records
from keras_srlora._layers import srlora_layers
from keras_srlora._random import RandomState
from keras_srlora._recipes import get_recipe
from keras_srlora._state import Schedule
from keras_srlora.optimizer import SensitivityOptimizer
from keras_srlora.optimizer import check_optimizer
from keras_srlora.optimizer import check_trains
from keras_srlora.optimizer import put_in_place
from keras_srlora.recomposition import pairs_per_recomposition
from keras_srlora.recomposition import recompose
from keras_srlora.recomposition import remaining_recompositions


class RecompositionCallback(keras.callbacks.Callback):
    """Scores the pairs of the SRLoRA layers in `fit`, and recomposes them.

    Without arguments it follows the recipe of the layers. The default recipe,
    `"adaptive"`, recomposes nothing while the training loss falls: the run is
    plain LoRA, and cannot be worse. Where the loss is flat, one recomposition
    probes whether the rank is what limits the run; if the loss then falls
    faster, recompositions are spread evenly over what is left, so that each
    layer visits `target_rank` directions if the run is long enough for it.

    Expect a gain where the update that a task needs has a higher rank than the
    adapter and the run is long enough for the loss to become flat; expect what
    LoRA does where it still falls at the end.

    The length of the run is `epochs` times the steps of an epoch; where the
    data set does not say its size, it is known after the first epoch.

    During `fit` the optimizer is wrapped in a `SensitivityOptimizer`; after it
    the model has its own optimizer back. A step is a batch of `fit`; with
    `gradient_accumulation_steps` a recomposition waits for the end of an
    accumulation, with `steps_per_execution` for the end of an execution. A
    recomposition takes place before the first batch after it was due; none
    after the last step of the run, where it would change nothing.

    Args:
        interval: int or `None`. Steps between two recompositions; with a
            number the recipe's gate is left out. Defaults to `None`:
            `total_steps / N`, where `N` recompositions use up the directions of
            the layer that has the most left.
        fusion_ratio: float in (0, 1]. Part `γ` of a layer's pairs that a
            recomposition fuses, at least one pair. Defaults to `None`: that of
            the recipe.
        beta1: float in [0, 1). Decay of the average sensitivity. Defaults to
            `0.85`.
        beta2: float in [0, 1). Decay of its uncertainty. Defaults to `0.85`.
        recipe: a `Recipe` or the name of one, which the layers get.
            Defaults to `None`: that of the layers.
        verbose: 0 or 1. With 1, one line a recomposition. Defaults to `0`.

    Attributes:
        record: list of `Recomposition`: what happened, in order.

    `logs` of an epoch gain `srlora_recompositions` (in this epoch),
    `srlora_directions` (directions used so far, mean over the layers) and
    `srlora_drift` (largest in this epoch), so that `History` has them, and
    `CSVLogger` and `TensorBoard` where they come later in the list.

    Raises:
        ValueError: when `fit` starts, before anything is changed: no SRLoRA
            layer, a layer that is not built or frozen, a kernel that is not
            finite, an optimizer that cannot work or was built for other
            variables, another model's run that has not ended.
        RuntimeError: if the model's optimizer is replaced during the run, or
            the processes of a run on several start from different weights or
            score different gradients.

    Example:

    ```python
    callback = keras_srlora.RecompositionCallback(verbose=1)
    model.fit(train, epochs=3, callbacks=[callback])
    [event.to_dict() for event in callback.record]
    ```

    References:
        - [SRLoRA](https://arxiv.org/abs/2505.12433), section 3
    """

    def __init__(
        self,
        interval=None,
        fusion_ratio=None,
        beta1=0.85,
        beta2=0.85,
        recipe=None,
        verbose=0,
    ):
        super().__init__()
        if interval is not None and (
            not isinstance(interval, int) or interval < 1
        ):
            raise ValueError(
                "`interval` must be a positive number of steps or `None`. "
                f"Received: interval={interval!r}"
            )
        if fusion_ratio is not None:
            check_fraction("fusion_ratio", fusion_ratio, True, False)
        check_fraction("beta1", beta1, False, True)
        check_fraction("beta2", beta2, False, True)
        self.interval = interval
        self.fusion_ratio = fusion_ratio
        self.beta1 = beta1
        self.beta2 = beta2
        # `recipe` becomes that of a run; the next starts from the argument.
        self._given_recipe = None if recipe is None else get_recipe(recipe)
        self.recipe = self._given_recipe
        self.verbose = verbose
        self.record = []
        self._running = False

    def to_dict(self):
        """Arguments and record as plain Python, for JSON."""
        return {
            "interval": self.interval,
            "fusion_ratio": self.fusion_ratio,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "recipe": self.recipe and self.recipe.to_dict(),
            "record": [event.to_dict() for event in self.record],
        }

    # Keras calls `set_model` before it makes the train function: whatever the
    # compiled step must see is put in place here.

    def set_model(self, model):
        if self._running and model is not self._model:
            raise ValueError(
                f"This callback follows the run of model {self._model.name!r}, "
                "which has not ended (or was interrupted): make another one, "
                "`RecompositionCallback(...)`, for each model. "
                f"Received: model {model.name!r}"
            )
        super().set_model(model)
        self._layers = srlora_layers(model)
        self._schedule = self._layers[0].adapter_state.schedule
        recipe = _choose_recipe(
            self._layers, self._given_recipe, self.fusion_ratio
        )
        self._check(model, recipe)
        _devices.check_same_start(self._layers)
        self.recipe = recipe
        for layer in self._layers:
            layer.recipe = recipe
        initialize_factors(model)
        self._outer_optimizer, _ = _split_optimizer(model)
        with _devices.strategy_scope(model):
            self._optimizer = _wrap_optimizer(
                model, self._layers, self.beta1, self.beta2
            )
        _keras.drop_compiled_functions(model)

    def _check(self, model, recipe):
        optimizer = getattr(model, "optimizer", None)
        if optimizer is None:
            raise ValueError(
                f"Model {model.name!r} has no optimizer: compile it first, as "
                "in `model.compile('adamw', loss)`. Received: "
                f"optimizer={optimizer!r}"
            )
        trainable = {id(v) for v in model.trainable_variables}
        for layer in self._layers:
            layer.check_initializable()
            if not all(id(factor) in trainable for factor in layer.factors):
                raise ValueError(
                    f"The factors of layer {layer.path!r} are frozen: the "
                    "callback would wait for gradients that never come. Set "
                    "`trainable = True` on it (the kernel stays frozen). "
                    f"Received: layer.trainable={layer.trainable}"
                )
            layer.check_recipe(recipe, layer.direction_count)
            if layer.initialized:
                _check_start(layer, recipe)
        _, inner = _split_optimizer(model)
        check_optimizer(inner)
        if inner.built:
            check_trains(inner, self._layers)
        match_records(self._layers)

    def on_train_begin(self, logs=None):
        self.record = []
        self._running = True
        self._epochs = (self.params or {}).get("epochs", 1)
        self._epoch_steps = (self.params or {}).get("steps")
        self._step = None
        self._said_exhausted = False
        if self._was_restored():
            self._begin_where_the_weights_are()

    def on_epoch_begin(self, epoch, logs=None):
        if self._step is None:
            # `initial_epoch` is not among the parameters; the first epoch is.
            self._begin_run(epoch)
        # A file that was loaded since the last epoch has one of its own.
        self._set_schedule(self._schedule)
        state = self._layers[0].adapter_state
        state.gate = self._gate
        self._losses_read = (0.0, 0.0)
        self._epoch_start = self._step
        self._events_before = len(self.record)
        self._batches_ended = []

    # A recomposition comes at the begin of a batch. Keras calls
    # `on_train_batch_end` in another thread, while the next step runs already;
    # without `async_safe` it would wait for the result of each step instead.

    async_safe = True

    def on_train_batch_end(self, batch, logs=None):
        # Calls may overtake each other; appending is safe from any thread.
        self._batches_ended.append(batch)

    def on_train_batch_begin(self, batch, logs=None):
        if not _is_wrapped_by(self._model, self._optimizer):
            received = self._model.optimizer
            # On JAX the state of the run is about to be written back.
            put_in_place(self._model, self._outer_optimizer, self._optimizer)
            raise RuntimeError(
                "The optimizer of the model was replaced during the run, so "
                "that its pairs are no longer scored. Compile before `fit`, "
                "not in a callback. "
                f"Received: model.optimizer={received!r}"
            )
        self._step = self._schedule.begun = self._epoch_start + batch
        if self._step >= self._last_step():
            return
        if self._gate is not None and self._gate.is_due(self._step):
            # Before the first batch of an epoch there is nothing to read.
            if batch and self._is_between_accumulations():
                self._ask_gate()
        elif self._is_open() and self._schedule.is_due(self._step):
            if self._is_between_accumulations():
                self._recompose()

    def _last_step(self):
        """Step from which on nothing is recomposed."""
        total = self._epochs * (self._epoch_steps or 0)
        return self.recipe.stop * total if total else float("inf")

    def on_epoch_end(self, epoch, logs=None):
        learned = not self._epoch_steps
        if learned:
            self._epoch_steps = max(self._batches_ended) + 1
        self._step = self._epoch_start + self._epoch_steps
        self._schedule.epoch_steps = self._epoch_steps
        if learned and not self._schedule.interval:
            self._start_schedule()
        unread = self._gate is not None and not any(self._losses_read)
        if unread and self._is_between_accumulations():
            # Too short an epoch to be read on its way.
            mean = (logs or {}).get("loss", float("nan"))
            self._follow_gate(mean * self._epoch_steps, self._epoch_steps)
        if logs is not None:
            events = self.record[self._events_before :]
            used = [layer.adapter_state.used.sum() for layer in self._layers]
            logs["srlora_recompositions"] = len({e.step for e in events})
            logs["srlora_directions"] = float(sum(used) / len(used))
            logs["srlora_drift"] = max((e.drift for e in events), default=0.0)

    def on_train_end(self, logs=None):
        self._running = False
        _unwrap_optimizer(self._model, self._optimizer)
        _keras.drop_compiled_functions(self._model)

    # The schedule.

    def _was_restored(self):
        """Whether another callback, `BackupAndRestore`, has loaded a state."""
        held = self._layers[0].adapter_state.schedule
        return held is not self._schedule and held.begun >= 0

    def _begin_where_the_weights_are(self):
        """Mends a backup whose weights are newer than its epoch number.

        Keras writes them one after the other, and may be killed in between.
        """
        saved = self._layers[0].adapter_state.schedule
        steps = self._epoch_steps or saved.epoch_steps
        epoch = _keras.get_initial_epoch(self._model)
        if epoch is None or not steps:
            # Loaded by a callback that restores no epoch: a run of its own.
            return
        done = saved.epochs_done(steps, self._steps_per_execution())
        if done is not None and done != epoch:
            _keras.set_initial_epoch(self._model, done)
            self._say(
                f"The restored weights are those after epoch {done}, the "
                f"restored epoch number is {epoch}: the run was interrupted "
                f"between the two writes. `fit` goes on after epoch {done}."
            )

    def _steps_per_execution(self):
        return getattr(self._model, "steps_per_execution", None) or 1

    def _begin_run(self, first_epoch):
        state = self._layers[0].adapter_state
        saved = state.schedule
        goes_on = saved.begun >= 0 and (first_epoch > 0 or self._was_restored())
        steps = self._epoch_steps or saved.epoch_steps
        if goes_on and not steps and first_epoch:
            # Saved before the callback could learn it.
            steps = (saved.begun + 1) // first_epoch
        self._epoch_steps = steps
        self._step = first_epoch * steps
        self._set_schedule(
            Schedule(origin=self._step, recomposed_at=self._step)
        )
        state.attach_random(RandomState(self._model))
        same_epochs = steps and saved.epoch_steps in (0, steps)
        done = None
        if goes_on and same_epochs:
            done = saved.epochs_done(steps, self._steps_per_execution())
            if done != first_epoch:
                self._say_where(saved, done, first_epoch, steps)
        goes_on = same_epochs and goes_on and (first_epoch > 0 or done is None)
        self._gate = state.gate if goes_on else None
        if goes_on and (saved.interval or self._gate):
            # The run that was interrupted goes on.
            interval = float(self.interval or saved.interval)
            self._set_schedule(
                dataclasses.replace(saved, interval=interval, epoch_steps=steps)
            )
        elif steps or self.interval:
            self._start_schedule()
        elif self._epochs - first_epoch == 1:
            self._say(
                "The data set does not say its size and this run has a single "
                "epoch, so that the length of the run is unknown: nothing will "
                "be recomposed. Pass `RecompositionCallback(interval=...)` or "
                "`fit(steps_per_epoch=...)`."
            )

    def _say_where(self, saved, done, first_epoch, steps):
        """Weights that are not those of the first epoch's begin."""
        self._say(
            f"`fit` begins with epoch {first_epoch}, at step "
            f"{first_epoch * steps}, but the weights were saved after step "
            f"{saved.begun + 1}: "
            + (
                "in the middle of an epoch, which Keras begins again with its "
                "first batch, so that batches are seen twice. To resume "
                "exactly, save at the end of epochs: "
                '`BackupAndRestore(save_freq="epoch")`.'
                if done is None
                else f"pass `initial_epoch={done}`. After `BackupAndRestore`, "
                "list this callback behind it, which then sees to it."
            )
        )

    def _make_schedule(self):
        """Spreads what is left to do over what is left of the run."""
        steps = self._epoch_steps or 0
        left = self._last_step() - self._step
        count = max(map(remaining_recompositions, self._layers))
        if count == 0:
            self._say_exhausted(self._layers)
        interval = self.interval
        if interval is None:
            interval = max(
                self.recipe["schedule"](left, count), self._shortest_interval()
            )
            if interval == 1.0 and count > left > 0:
                self._say(
                    f"{int(left)} steps are too few to visit all directions in "
                    f"{count} recompositions: there will be one each step."
                )
        if count and 0 < left <= interval and self._gate is None:
            self._say(
                f"Nothing will be recomposed: the recipe has {int(left)} steps "
                f"of this run for it, and the first recomposition would come "
                f"after {interval:g}. Pass a smaller `interval`, or a recipe "
                f"with other `stop` and `steps_per_pair`. Received: "
                f"interval={self.interval}, {self.recipe}"
            )
        self._set_schedule(
            Schedule(
                float(interval),
                self._step,
                steps,
                self._step,
                self._schedule.begun,
            )
        )

    # The gate: until it is open the schedule has no interval.

    def _start_schedule(self):
        if self.recipe["gate"] is None or self.interval is not None:
            self._make_schedule()
        elif _keras.loss_metric(self._model) is None:
            self._say(
                f"Model {self._model.name!r} has no mean of its training loss, "
                "which its recipe waits for (`gate='flat_loss'`): nothing will "
                "be recomposed. Pass `RecompositionCallback(recipe=...)` with "
                "another gate, or an `interval`."
            )
        else:
            total = self._epochs * self._epoch_steps
            self._gate = self._layers[0].adapter_state.gate = self.recipe[
                "gate"
            ].start(total, self._step, self.recipe.steps_per_pair)

    def _ask_gate(self):
        self._bring_variables_up_to_date()
        loss = _keras.loss_metric(self._model)
        sums = tuple(
            float(ops.convert_to_numpy(v)) for v in (loss.total, loss.count)
        )
        # Of the epoch so far, less what was read before.
        total, count = np.subtract(sums, self._losses_read)
        self._losses_read = sums
        self._follow_gate(total, count)

    def _is_open(self):
        return self._gate is None or self._gate.is_open

    def _follow_gate(self, total, count):
        if self._step >= self._last_step():
            return
        phase = self._gate.phase
        # All processes of a run must hear the same answer.
        total, count = np.sum(_devices.gather((total, count)), axis=0)
        answer = self._gate.read(self._step, float(total), float(count))
        if self.verbose and self._gate.phase != phase:
            print(f"\nstep {self._step}: {self._gate.describe()}", flush=True)
        if answer == "recompose":
            self._recompose()
        elif answer == "go":
            self._make_schedule()

    def _shortest_interval(self):
        """Steps between two recompositions that leave a pair its time."""
        return max(
            self.recipe.steps_per_pair
            * pairs_per_recomposition(layer)
            / layer.rank
            for layer in self._layers
        )

    def _set_schedule(self, schedule):
        self._schedule = schedule
        for layer in self._layers:
            layer.adapter_state.schedule = schedule

    # A recomposition.

    def _check_layers(self):
        """Raises where a layer was taken out of the run."""
        present = inside(self._model)
        gone = [x.path for x in self._layers if id(x) not in present]
        if gone:
            raise RuntimeError(
                "SRLoRA layers were removed from the model during the run, "
                "whose compiled step still has them: stop training first, then "
                f"compile and fit again. Received: {gone} are no longer in "
                f"model {self._model.name!r}"
            )
        frozen = [x for x in self._layers if not x.trains_factors]
        for layer in frozen:
            # On JAX the state of the run is about to be written back.
            layer.trainable = True
        if frozen:
            raise RuntimeError(
                "SRLoRA layers were frozen during the run, whose compiled step "
                "still trains them: stop training first, then freeze, compile "
                "and fit again. They were thawed. Received: "
                f"trainable=False of {[layer.path for layer in frozen]}"
            )

    def _recompose(self):
        self._check_layers()
        self._bring_variables_up_to_date()
        exhausted = [
            layer
            for layer in self._layers
            if not len(layer.adapter_state.unused)
        ]
        if exhausted:
            self._say_exhausted(exhausted)
        events = recompose(
            self._optimizer.sensitivity,
            self._optimizer,
            self._step,
        )
        self._schedule.recomposed_at = self._step
        self.record.extend(events)
        if events and self.verbose:
            print(f"\n{describe(events, len(self._layers))}", flush=True)

    def _bring_variables_up_to_date(self):
        # On JAX they are not during an epoch; the public property sees to it.
        self.model  # noqa: B018

    def _is_between_accumulations(self):
        inner = self._optimizer.unwrap()
        accumulation = inner.gradient_accumulation_steps or 1
        if accumulation == 1:
            return True
        self._bring_variables_up_to_date()
        return int(_keras.micro_batches_seen(inner)) % accumulation == 0

    def _say_exhausted(self, layers):
        if self._said_exhausted:
            return
        self._said_exhausted = True
        self._say(
            f"{len(layers)} of {len(self._layers)} SRLoRA layers have used all "
            f"their directions at step {self._step} and train on as plain "
            f"LoRA: {[layer.path for layer in layers[:3]]}. A larger "
            "`target_rank` has more directions."
        )

    def _say(self, message):
        warnings.warn(message, stacklevel=2)


def describe(events, layer_count):
    """One line about the recomposition of a model at one step."""
    pairs = sum(len(event.slots) for event in events)
    directions = [index for event in events for index in event.directions]
    drift = max(event.drift for event in events)
    return (
        f"step {events[0].step}: recomposed {len(events)} of {layer_count} "
        f"layers, {pairs} pairs fused and restarted along directions "
        f"{min(directions)} to {max(directions)}; largest change of a kernel "
        f"{drift:.1e} of its largest entry"
    )


# The recipe of a run.


def _choose_recipe(layers, recipe, fusion_ratio):
    if recipe is None:
        recipe = layers[0].recipe
        for layer in layers:
            if layer.recipe != recipe:
                raise ValueError(
                    "The SRLoRA layers have different recipes; pass the one to "
                    "follow: `RecompositionCallback(recipe=...)`. Received: "
                    f"{recipe} in layer {layers[0].path!r}, {layer.recipe} in "
                    f"layer {layer.path!r}"
                )
    if fusion_ratio is None:
        return recipe
    return dataclasses.replace(recipe, fusion_ratio=fusion_ratio)


def _check_start(layer, recipe):
    if layer.recipe.start != recipe.start:
        raise ValueError(
            f"The pairs of layer {layer.path!r} started already, as the recipe "
            f"that it was made with says: {layer.recipe.start!r}. Pass the "
            "recipe there, `enable_srlora(model, recipe=...)` or "
            "`SRLoRADense(..., recipe=...)`, and none to the callback. "
            f"Received: a recipe that starts with {recipe.start!r}"
        )


# Putting the wrapper in place. A `LossScaleOptimizer` stays outside of it, so
# that a step that overflows leaves no mark.


def _split_optimizer(model):
    """Returns the `LossScaleOptimizer` or `None`, and the stock optimizer."""
    outer, inner = None, model.optimizer
    if isinstance(inner, keras.optimizers.LossScaleOptimizer):
        outer, inner = inner, inner.inner_optimizer
    if isinstance(inner, SensitivityOptimizer):
        # Of a run that was interrupted, or put there by hand.
        inner = inner.unwrap()
    return outer, inner


def _wrap_optimizer(model, layers, beta1, beta2):
    outer, inner = _split_optimizer(model)
    wrapper = SensitivityOptimizer(inner, layers, beta1, beta2)
    put_in_place(model, outer, wrapper)
    if not model.optimizer.built:
        # TensorFlow builds an optimizer in the first step.
        model.optimizer.build(model.trainable_variables)
    return wrapper


def _unwrap_optimizer(model, wrapper):
    wrapper.sensitivity.detach()
    outer, inner = _split_optimizer(model)
    put_in_place(model, outer, inner)


def _is_wrapped_by(model, wrapper):
    # Every step: no more than two looks.
    optimizer = model.optimizer
    return getattr(optimizer, "inner_optimizer", optimizer) is wrapper
