"""Putting a `SensitivityOptimizer` into a model for the time of a `fit`.

A `LossScaleOptimizer` stays outside of it, so that a step that overflows leaves
no mark. The wrapper, and the train function that was compiled with it, stay
with the model for the next `fit`, which then compiles nothing.
"""

import keras

from keras_srlora.backend import keras_private
from keras_srlora.training.optimizer import SensitivityOptimizer


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
    kept = keras_private.get_kept_training(model)
    if kept is None or not kept.serves(outer, inner, layers, beta1, beta2):
        wrapper = SensitivityOptimizer(inner, layers, beta1, beta2)
        kept = _Kept(outer, wrapper)
    put_in_place(model, outer, kept.wrapper)
    if not model.optimizer.built:
        # TensorFlow builds an optimizer in the first step.
        model.optimizer.build(model.trainable_variables)
    kept.swap_functions(model)
    keras_private.keep_training(model, kept)
    return kept.wrapper


def unwrap_optimizer(model):
    """Gives a model its own optimizer back; the wrapper is kept."""
    outer, inner = split_optimizer(model)
    put_in_place(model, outer, inner)
    kept = keras_private.get_kept_training(model)
    if kept is not None:
        kept.swap_functions(model)


def check_wrapped(model, outer, wrapper):
    """Raises where a model no longer trains with a wrapper; before each step.

    Args:
        model: the model.
        outer: its `LossScaleOptimizer`, or `None`.
        wrapper: the `SensitivityOptimizer` inside.
    """
    optimizer = model.optimizer
    if getattr(optimizer, "inner_optimizer", optimizer) is wrapper:
        return
    # On JAX the state of the run is about to be written back.
    put_in_place(model, outer, wrapper)
    raise RuntimeError(
        "The optimizer of the model was replaced during the run, so that its "
        "pairs are no longer scored. Compile before `fit`, not in a callback. "
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

    def __init__(self, outer, wrapper):
        self.outer = outer
        self.wrapper = wrapper
        self.train_function = None

    def serves(self, outer, inner, layers, beta1, beta2):
        """Whether a run with these can go on with what was compiled."""
        scores = self.wrapper.sensitivity
        return (
            self.outer is outer
            and self.wrapper.unwrap() is inner
            and (scores.beta1, scores.beta2) == (beta1, beta2)
            and len(scores.layers) == len(layers)
            and all(a is b for a, b in zip(scores.layers, layers))
            and scores.is_attached
        )

    def swap_functions(self, model):
        """Exchanges the train functions with and without the wrapper."""
        self.train_function = keras_private.exchange_train_function(
            model, self.train_function
        )
