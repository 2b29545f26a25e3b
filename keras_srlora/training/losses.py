"""Where a model's training loss can be read while an epoch runs."""

import warnings

import keras
from keras import ops

from keras_srlora.backend.keras_private.fit_state import loss_metric

# Names that a custom `train_step` may give to the mean of its loss.
NAMES = ("loss", "total_loss")


class LossReader:
    """Reads the training losses that an epoch added since the last reading.

    They are in Keras's own mean of the loss or, where a `train_step` keeps
    another, in the `keras.metrics.Mean` that is called "loss" or "total_loss",
    or the only one with "loss" in its name.

    Attributes:
        has_read: bool. Whether there was anything to read yet.
    """

    def __init__(self, model):
        self._model = model
        self._read = 0.0, 0.0

    @property
    def has_read(self) -> bool:
        return self._read[1] > 0

    def read(self) -> tuple[float, float]:
        """Sum and number of the losses since the last reading.

        Where there is nothing to read, the number is 0.
        """
        now, before = _loss_so_far(self._model), self._read
        self._read = now
        return now[0] - before[0], now[1] - before[1]

    def report(self, recomposer) -> None:
        """Reports the losses since the last reading to the gate of a run."""
        total, count = self.read()
        if count:
            recomposer.report_loss(total, count)
        else:
            self._stop_gate(recomposer)

    def report_epoch(self, recomposer, logs, steps: int, step: int) -> None:
        """Reports the mean loss of an epoch that is too short to be read.

        Args:
            recomposer: the `Recomposer` of the run.
            logs: dict, as at the end of an epoch, or `None`.
            steps: of the epoch.
            step: of the run, at the end of the epoch.
        """
        mean = (logs or {}).get("loss")
        if mean is None:
            self._stop_gate(recomposer)
        else:
            recomposer.report_loss(float(mean) * steps, steps)
            recomposer.consult_gate(step)

    def _stop_gate(self, recomposer):
        recomposer.pace.state.gate = None
        _warn_of_no_loss(self._model, recomposer.recipe)


def _warn_of_no_loss(model, recipe):
    """Warns that a gate finds no loss, and names the remedies."""
    names = [metric.name for metric in model.metrics]
    warnings.warn(
        f"The gate of the recipe (gate={recipe.gate!r}) finds no mean of the "
        f"training loss of model {model.name!r}, whose `train_step` does not "
        "update Keras's own, so that nothing will be recomposed. Pass "
        "`RecompositionCallback(interval=...)`, or a `recipe` without a gate, "
        "or let the `train_step` keep a `keras.metrics.Mean(name='loss')` "
        f"among `model.metrics`. Received: metrics {names}",
        stacklevel=5,
    )


def _loss_so_far(model):
    for metric in (loss_metric(model), _own_mean(model)):
        if metric is not None:
            total, count = (
                float(ops.convert_to_numpy(v))
                for v in (metric.total, metric.count)
            )
            if count:
                return total, count
    return 0.0, 0.0


def _own_mean(model):
    means = {
        metric.name: metric
        for metric in model.metrics
        if isinstance(metric, keras.metrics.Mean) and "loss" in metric.name
    }
    for name in NAMES:
        if name in means:
            return means[name]
    return next(iter(means.values())) if len(means) == 1 else None


def has_validated(logs) -> bool:
    """Whether the logs of an epoch come after its validation."""
    return any(name.startswith("val_") for name in logs or {})
