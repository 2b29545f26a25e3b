"""`SensitivityOptimizer`: sees the gradients inside the train step."""

import warnings
from typing import Any

import keras
from keras import ops

from keras_srlora.backend.keras_private.fit_state import accumulated_gradient
from keras_srlora.backend.keras_private.fit_state import around_update
from keras_srlora.backend.keras_private.fit_state import micro_batches_seen
from keras_srlora.backend.keras_private.fit_state import (
    optimizer_trainable_variables,
)
from keras_srlora.layers.find import srlora_layers
from keras_srlora.training.bias_correction import BiasCorrection
from keras_srlora.training.bias_correction import corrected_betas
from keras_srlora.training.sensitivity import Sensitivity

# Numbers nearer to 1 are rounded to 1. By hand: an optimizer may be built in a
# compiled step, where nothing can be computed.
HALF_SPACING_BELOW_ONE = {"bfloat16": 2**-9, "float16": 2**-12}


# Attributes of the wrapper; all others are the wrapped optimizer's.
OWN = frozenset(
    (
        "apply",
        "apply_gradients",
        "bias_correction",
        "build",
        "sensitivity",
        "stateless_apply",
        "unwrap",
        "variables",
        "_step_gradients",
        "_update",
    )
)
# Attributes that Python reads. `__class__` is the wrapped optimizer's, which
# `isinstance` looks at after the type, and by which it is saved.
PYTHONS = frozenset(("__dict__", "__init__", "__reduce_ex__", "__setattr__"))


@keras.saving.register_keras_serializable("keras_srlora")
class SensitivityOptimizer(keras.optimizers.Optimizer):
    """Wraps an optimizer and scores the SRLoRA pairs from its gradients.

    Keras has no hook for gradients. Like `LossScaleOptimizer`, this class wraps
    another optimizer and passes the gradients on to it. `RecompositionCallback`
    uses it during `fit`; custom loops use it directly.

    The wrapper has the attributes and methods of the wrapped optimizer, so
    other callbacks find `use_ema`, `beta_1` or `weight_decay`, and
    `isinstance(optimizer, keras.optimizers.Adam)` is true if an `Adam` is
    wrapped. The wrapper itself adds `apply`, `variables` (its own, then those
    of the wrapped optimizer), `sensitivity`, `bias_correction`, and `unwrap()`,
    which returns the wrapped optimizer.

    With `gradient_accumulation_steps=k` the running averages are updated once
    every `k` batches, from the mean gradient that the wrapped optimizer
    applies. They use the gradient before clipping, without loss scales.

    The steps of pairs that restarted with moments of zero are scaled; see
    `keras_srlora/training/bias_correction.py`.

    The optimizer is saved as the wrapped one, so a model that was saved during
    a run loads with the plain optimizer and its state. The running averages and
    the ages of the pairs are saved with the layers.

    Args:
        inner_optimizer: the `keras.optimizers.Optimizer` to wrap.
        model: a `keras.Model` with SRLoRA layers, or a list of such layers.
        beta1: float in [0, 1). Defaults to `0.85`.
        beta2: float in [0, 1). Defaults to `0.85`.

    Example:

    ```python
    adam = keras.optimizers.Adam()
    optimizer = keras_srlora.SensitivityOptimizer(adam, model)
    optimizer.apply(gradients, model.trainable_variables)
    ```
    """

    def __init__(self, inner_optimizer, model, beta1=0.85, beta2=0.85):
        check_optimizer(inner_optimizer)
        if isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "A `LossScaleOptimizer` must be outside, so that a step that "
                "overflows leaves no mark: `LossScaleOptimizer("
                "SensitivityOptimizer(optimizer, model))`. "
                f"Received: inner_optimizer={inner_optimizer.name!r}"
            )
        # Without Keras's `__init__`: its attributes are those of the wrapped
        # optimizer. Past `__setattr__`, which would write them there.
        own: Any = vars(self)
        own["unwrap"] = lambda: inner_optimizer
        layers = model if isinstance(model, list) else srlora_layers(model)
        own["sensitivity"] = Sensitivity(layers, beta1, beta2)
        own["bias_correction"] = BiasCorrection(layers)
        if inner_optimizer.built:
            _check_built(inner_optimizer, self.sensitivity)

    def __getattribute__(self, name):
        if name in OWN or name in PYTHONS:
            return object.__getattribute__(self, name)
        inner = object.__getattribute__(self, "__dict__").get("unwrap")
        if inner is None:
            # Keras and TensorFlow look at it before `__init__`.
            return object.__getattribute__(self, name)
        return getattr(inner(), name)

    def __setattr__(self, name, value):
        setattr(self.unwrap(), name, value)

    def __delattr__(self, name):
        delattr(self.unwrap(), name)

    def __dir__(self):
        return sorted(OWN.union(dir(self.unwrap())))

    def __repr__(self):
        return f"<SensitivityOptimizer of {self.unwrap()!r}>"

    def build(self, variables):
        inner = self.unwrap()
        if not inner.built:
            inner.build(variables)
        _check_built(inner, self.sensitivity)

    @property
    def variables(self):
        return [
            *self.sensitivity.variables,
            self.bias_correction.began,
            *self.unwrap().variables,
        ]

    def apply(self, grads, trainable_variables=None):
        if not self.built:
            self.build(list(trainable_variables))
        variables = list(
            trainable_variables or optimizer_trainable_variables(self)
        )
        grads = list(grads)
        self.sensitivity.update(*self._step_gradients(grads, variables))
        inner = self.unwrap()
        with around_update(inner, self._update):
            inner.apply(grads, variables)

    def _update(self, update):
        """A step of the wrapped optimizer; restarted pairs have a pace."""
        inner, correction = self.unwrap(), self.bias_correction
        betas = corrected_betas(inner)
        old = None if betas is None else correction.copy_factors()
        update()
        if old is not None:
            correction.scale_step(old, inner.iterations + 1, betas)

    def _step_gradients(self, grads, variables):
        """Returns `(gradients, variables, is_step)` of the optimizer's step."""
        inner = self.unwrap()
        steps = inner.gradient_accumulation_steps
        is_step = True
        if steps:
            is_step = ops.equal((micro_batches_seen(inner) + 1) % steps, 0)
            grads = [
                g if g is None else (g + accumulated_gradient(inner, v)) / steps
                for g, v in zip(grads, variables)
            ]
        if inner.loss_scale_factor:
            grads = [
                g if g is None else g / inner.loss_scale_factor for g in grads
            ]
        return grads, variables, is_step

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Returns the wrapped optimizer, because there is no model to score.

        This reads files of versions that saved the wrapper by its name.
        """
        return keras.saving.deserialize_keras_object(
            config["inner_optimizer"], custom_objects=custom_objects
        )


def _check_built(optimizer, sensitivity):
    check_trains(optimizer, sensitivity.layers)
    warn_of_rounded_decay(optimizer, sensitivity.layers)


def accumulation_steps(optimizer) -> int:
    """How many batches make a step of an optimizer."""
    return getattr(optimizer, "gradient_accumulation_steps", None) or 1


def is_between_accumulations(optimizer) -> bool:
    """Whether no gradients are summed up for a later step."""
    if not isinstance(optimizer, SensitivityOptimizer):
        return True
    steps = accumulation_steps(optimizer)
    if steps == 1:
        return True
    return int(micro_batches_seen(optimizer.unwrap())) % steps == 0


def is_torch_optimizer(optimizer) -> bool:
    """Whether it is one of `torch.optim`; imports nothing that is not there."""
    if keras.backend.backend() != "torch":
        return False
    import torch

    return isinstance(optimizer, torch.optim.Optimizer)


def check_optimizer(optimizer):
    """Raises where restarting a pair in this optimizer cannot be right."""
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            "SRLoRA needs a `keras.optimizers.Optimizer`: compile the model "
            f"with one. Received: optimizer={optimizer!r}"
        )
    if isinstance(optimizer, keras.optimizers.Ftrl):
        raise ValueError(
            "Ftrl keeps no weights: it computes them from its slots in each "
            "step, so a pair cannot be restarted. Use another optimizer. "
            f"Received: optimizer={optimizer.name!r}"
        )


def warn_of_rounded_decay(optimizer, layers):
    """Warns where no step of an optimizer of Adam's kind can move a factor.

    Keras computes `1 - beta_2^t` in the dtype of the variable. In bfloat16 the
    default of 0.999 is 1, and every step is zero.
    """
    beta = getattr(optimizer, "beta_2", None)
    if not isinstance(beta, float) or beta >= 1:
        return
    dtypes = {v.dtype: v for layer in layers for v in layer.factors}
    for dtype, factor in dtypes.items():
        if 1.0 - beta <= HALF_SPACING_BELOW_ONE.get(dtype, 0.0):
            warnings.warn(
                f"Optimizer {optimizer.name!r} will not move {factor.path!r}, "
                f"nor any other {dtype} weight: its beta_2={beta} is 1 in that "
                "dtype, so that its steps are zero. Use the dtype policy "
                "'mixed_bfloat16', which keeps weights in float32, or a "
                "smaller rate such as beta_2=0.99.",
                stacklevel=2,
            )


def check_trains(optimizer, layers):
    """Raises where a built optimizer does not train the layers' factors."""
    known = {id(v) for v in optimizer_trainable_variables(optimizer)}
    for layer in layers:
        if not all(id(factor) in known for factor in layer.factors):
            raise ValueError(
                f"The optimizer {optimizer.name!r} does not train the factors "
                f"of layer {layer.path!r}: it was built before the layer was "
                "converted or while it was frozen. Compile the model again. "
                f"Received: layer.trainable={layer.trainable}"
            )
