"""The step at which an interrupted or repeated `fit` resumes."""

import warnings

from keras_srlora.backend.keras_private.fit_state import get_initial_epoch
from keras_srlora.backend.keras_private.fit_state import set_initial_epoch


def mend_initial_epoch(recomposer, model, epoch_steps):
    """Mends a backup whose weights are newer than its epoch number.

    Keras writes them one after the other, and may be killed in between.
    """
    saved = recomposer.saved_state()
    steps = epoch_steps or saved.epoch_steps
    epoch = get_initial_epoch(model)
    if epoch is None or not steps:
        # Loaded by a callback that restores no epoch: a run of its own.
        return
    done = epochs_done(saved.begun, steps, _steps_per_execution(model))
    if done is not None and done != epoch:
        set_initial_epoch(model, done)
        _warn(
            f"The restored weights are those after epoch {done}, the "
            f"restored epoch number is {epoch}: the run was interrupted "
            f"between the two writes. `fit` goes on after epoch {done}."
        )


def begin_run(recomposer, model, first_epoch, epochs, epoch_steps):
    """Begins a run, or goes on with the one that was saved.

    Args:
        recomposer: the `Recomposer` of the `fit`.
        model: the model.
        first_epoch: number of the epoch that begins.
        epochs: number of the epoch after the last.
        epoch_steps: steps of an epoch; `None` or 0 while unknown.

    Returns:
        Steps of an epoch, as far as known; else 0.
    """
    saved = recomposer.saved_state()
    goes_on = saved.begun >= 0 and (first_epoch > 0 or recomposer.restored)
    steps = epoch_steps or saved.epoch_steps
    if goes_on and not steps and first_epoch:
        # Saved before the callback knew it.
        steps = (saved.begun + 1) // first_epoch
    step = first_epoch * steps
    same_epochs = steps and saved.epoch_steps in (0, steps)
    done = None
    if goes_on and same_epochs:
        done = epochs_done(saved.begun, steps, _steps_per_execution(model))
        if done != first_epoch:
            _warn_of_place(saved, done, first_epoch, steps)
    goes_on = same_epochs and goes_on and (first_epoch > 0 or done is None)
    recomposer.pace.total_steps = epochs * steps
    if goes_on:
        saved = recomposer.saved_state(with_gate=True)
    if goes_on and (saved.schedule.interval or saved.gate):
        recomposer.resume(saved, steps)
        return steps
    if first_epoch > 0 and saved.begun < 0:
        _warn(
            f"`fit` begins with epoch {first_epoch}, and the layers hold no "
            "run that could go on: the weights were saved before one, or came "
            "without it. The recipe begins now, at step "
            f"{step}, with new scores."
        )
    recomposer.start(step, steps)
    if not steps and not recomposer.pace.interval and epochs - first_epoch == 1:
        _warn(
            "The data set has no size and this run has a single epoch, so the "
            "length of the run is unknown: nothing will be recomposed. Pass "
            "`RecompositionCallback(interval=...)` or "
            "`fit(steps_per_epoch=...)`."
        )
    return steps


def epochs_done(begun, steps, steps_per_execution=1):
    """Epochs behind a state that was saved; `None` in the middle of one.

    Args:
        begun: step of the batch that began last.
        steps: steps of an epoch.
        steps_per_execution: as in `compile`.
    """
    epoch, place = divmod(begun, steps)
    last = (steps - 1) // steps_per_execution * steps_per_execution
    return epoch + 1 if place >= last else None


def _steps_per_execution(model):
    return getattr(model, "steps_per_execution", None) or 1


def _warn_of_place(saved, done, first_epoch, steps):
    """Weights that are not those of the first epoch's begin."""
    _warn(
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


def _warn(message):
    warnings.warn(message, stacklevel=3)
