"""Putting a `SensitivityOptimizer` into a model for the time of a `fit`.

A `LossScaleOptimizer` stays outside of it, so that a step that overflows leaves
no mark. The wrapper, and the train function that was compiled with it, stay
with the model for the next `fit`, which then compiles nothing.
"""

import keras

from keras_srlora.backend.keras_private.fit_state import compile_config
from keras_srlora.backend.keras_private.fit_state import exchange_train_function
from keras_srlora.backend.keras_private.fit_state import get_kept_training
from keras_srlora.backend.keras_private.fit_state import keep_training
from keras_srlora.training.optimizer import SensitivityOptimizer
from keras_srlora.training.predictions import PredictionCounter


def split_optimizer(model):
    """Returns the `LossScaleOptimizer` or `None`, and the stock optimizer."""
    outer, inner = None, model.optimizer
    if isinstance(inner, keras.optimizers.LossScaleOptimizer):
        outer, inner = inner, inner.inner_optimizer
    if isinstance(inner, SensitivityOptimizer):
        # Of a run that was interrupted, or put there by hand.
        inner = inner.unwrap()
    return outer, inner


def wrap_optimizer(model, layers, beta1, beta2):
    """Lets a model train with a `SensitivityOptimizer` around its optimizer.

    Returns:
        The wrapper: that of the last `fit`, where nothing has changed since.
    """
    outer, inner = split_optimizer(model)
    kept = get_kept_training(model)
    if kept is None or not kept.serves(
        model, outer, inner, layers, beta1, beta2
    ):
        if kept is not None:
            kept.leave(model)
        wrapper = SensitivityOptimizer(inner, layers, beta1, beta2)
        kept = _Kept(model, outer, wrapper)
        keep_training(model, kept)
    kept.enter(model)
    if not model.optimizer.built:
        # TensorFlow builds an optimizer in the first step.
        model.optimizer.build(model.trainable_variables)
    return kept.wrapper


def unwrap_optimizer(model):
    """Gives a model its own optimizer back; the wrapper is kept."""
    kept = get_kept_training(model)
    if kept is not None:
        kept.leave(model)
    outer, inner = split_optimizer(model)
    put_in_place(model, outer, inner)


def check_first(model, of_fit):
    """Raises `ValueError` if a `fit` has begun a run with this model already.

    Args:
        model: the model, which has its own optimizer back then.
        of_fit: the dict that Keras gives to all callbacks of one `fit`.
    """
    kept = get_kept_training(model)
    if kept is None or not of_fit:
        return
    before, kept.of_fit = kept.of_fit, of_fit
    if before is of_fit:
        unwrap_optimizer(model)
        raise ValueError(
            "`fit` got more than one `RecompositionCallback`, or one twice. "
            "Each would recompose the same pairs: pass a single one. "
            f"Received: model {model.name!r}"
        )


def count_predictions(callback, steps):
    """Tells a run how many predictions the first steps of an epoch had.

    Args:
        callback: the `RecompositionCallback` of the run.
        steps: int. Steps of the epoch that are done; with 0 nothing happens.
    """
    pace = callback.recomposer.pace
    if steps and pace.wants_predictions:
        # On JAX the public property brings the metrics up to date.
        model = callback.model
        counter = get_kept_training(model).counter
        pace.report_predictions(counter.per_step(model, steps))


def is_wrapped_by(model, wrapper):
    """Whether a model trains with a wrapper."""
    optimizer = model.optimizer
    return getattr(optimizer, "inner_optimizer", optimizer) is wrapper


def check_wrapped(model, outer, wrapper):
    """Raises where a model no longer trains with a wrapper; before each step.

    Args:
        model: the model.
        outer: its `LossScaleOptimizer`, or `None`.
        wrapper: the `SensitivityOptimizer` inside.
    """
    if is_wrapped_by(model, wrapper):
        return
    optimizer = model.optimizer
    # On JAX the state of the run is about to be written back.
    put_in_place(model, outer, wrapper)
    raise RuntimeError(
        "The optimizer of the model was replaced during the run, so that its "
        "pairs are no longer scored. Compile before `fit`, and neither compile "
        "nor `fit` the model in a callback. "
        f"Received: model.optimizer={optimizer!r}"
    )


def put_in_place(model, outer, inner):
    """Gives a model an optimizer, inside of a `LossScaleOptimizer` if any.

    A scored optimizer in there would be saved with the statistics among its
    variables: for the time of it the outer one saves itself as the stock one.
    """
    if outer is None:
        model.optimizer = inner
        return
    outer.inner_optimizer = inner
    model.optimizer = outer
    for name in ("save_own_variables", "load_own_variables"):
        if isinstance(inner, SensitivityOptimizer):
            setattr(outer, name, _as_stock(outer, inner, name))
        elif name in vars(outer):
            delattr(outer, name)


def _as_stock(outer, inner, name):
    method = getattr(type(outer), name)

    def call(store):
        outer.inner_optimizer = inner.unwrap()
        try:
            method(outer, store)
        finally:
            outer.inner_optimizer = inner

    return call


class _Kept:
    """A wrapper, and the train function that is not in use."""

    def __init__(self, model, outer, wrapper):
        self.outer = outer
        self.wrapper = wrapper
        # Kept like the compiled step, which is traced once.
        self.counter = PredictionCounter()
        self._compiled = compile_config(model)
        self._train_function = None
        self._entered = False
        self.of_fit: dict | None = None

    def serves(self, model, outer, inner, layers, beta1, beta2):
        """Whether a run with these can use the compiled function."""
        scores = self.wrapper.sensitivity
        return (
            # A new object with each call of `compile`.
            self._compiled is compile_config(model)
            and self.outer is outer
            and self.wrapper.unwrap() is inner
            and (scores.beta1, scores.beta2) == (beta1, beta2)
            and len(scores.layers) == len(layers)
            and all(a is b for a, b in zip(scores.layers, layers))
            and scores.is_attached
            and self.wrapper.bias_correction.is_attached
        )

    def enter(self, model):
        """Puts the wrapper in place, with the function compiled for it."""
        put_in_place(model, self.outer, self.wrapper)
        self.counter.watch(model)
        if not self._entered:
            # Not after a run that was interrupted: they are in place.
            self._exchange_functions(model)
            self._entered = True

    def leave(self, model):
        """The inverse of `enter`; of the optimizer, unless `compile` came."""
        self.of_fit = None
        self.counter.stop_watching(model)
        if self._entered and is_wrapped_by(model, self.wrapper):
            put_in_place(model, self.outer, self.wrapper.unwrap())
            self._exchange_functions(model)
        self._entered = False

    def _exchange_functions(self, model):
        self._train_function = exchange_train_function(
            model, self._train_function
        )
