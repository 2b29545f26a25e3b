"""How an optimizer's steps come to be scored, and those of new pairs scaled."""

import weakref
from typing import NamedTuple

from keras import ops

from keras_srlora.training.bias_correction import BiasCorrection
from keras_srlora.training.bias_correction import corrected_betas
from keras_srlora.training.optimizer import SensitivityOptimizer
from keras_srlora.training.optimizer import is_torch_optimizer
from keras_srlora.training.sensitivity import Sensitivity


def score_steps(optimizer, layers, beta1, beta2):
    """Lets the steps of an optimizer be scored, and those of new pairs scaled.

    Returns:
        `(optimizer, sensitivity)`: the optimizer to train with, a
        `SensitivityOptimizer` around one of Keras, and the `Sensitivity`.
    """
    if isinstance(optimizer, SensitivityOptimizer):
        return optimizer, optimizer.sensitivity
    if not is_torch_optimizer(optimizer):
        wrapper = SensitivityOptimizer(optimizer, layers, beta1, beta2)
        return wrapper, wrapper.sensitivity
    sensitivity = Sensitivity(layers, beta1, beta2)
    # Before the step: a weight and its gradient belong together.
    optimizer.register_step_pre_hook(
        lambda optimizer, *_: _score_torch_step(optimizer, sensitivity)
    )
    if corrected_betas(optimizer, _factors(layers)) is not None:
        _corrections[optimizer] = _TorchHooks(optimizer, layers)
    return optimizer, sensitivity


class Correction(NamedTuple):
    """What scales the steps of pairs that restart with moments of zero.

    Attributes:
        ages: the `BiasCorrection`.
        steps: int. The steps that the optimizer has made.
    """

    ages: BiasCorrection
    steps: int


def find_correction(optimizer) -> Correction | None:
    """The `Correction` of an optimizer.

    `None` if the optimizer does not correct its moments, or if nothing scales
    its steps: it is neither a `SensitivityOptimizer` nor one of `torch.optim`
    that a `Recomposer` was given.
    """
    if is_torch_optimizer(optimizer):
        hooks = _corrections.get(optimizer)
        if hooks is None:
            return None
        return Correction(hooks.ages, int(hooks.steps(optimizer)))
    # It may be in a `LossScaleOptimizer`.
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not isinstance(optimizer, SensitivityOptimizer):
        return None
    if corrected_betas(optimizer.unwrap()) is None:
        return None
    steps = int(ops.convert_to_numpy(optimizer.iterations))
    return Correction(optimizer.bias_correction, steps)


def _score_torch_step(optimizer, sensitivity):
    factors = _factors(sensitivity.layers)
    own = {id(v.value) for v in factors}
    rest = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) not in own
    ]
    gradients = [v.value.grad for v in factors] + [p.grad for p in rest]
    sensitivity.update(gradients, [*factors, *rest])


class _TorchHooks:
    """Scales the steps of an optimizer of `torch.optim`."""

    def __init__(self, optimizer, layers):
        self.ages = BiasCorrection(layers)
        self._old = None
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def steps(self, optimizer):
        """The steps that it has made; a number or a tensor."""
        for factor in _factors(self.ages.layers):
            state = optimizer.state.get(factor.value)
            if state:
                return state["step"]
        return 0

    def _before(self, optimizer, *_):
        old = self.ages.copy_factors()
        if old is not None:
            decays = _decays(optimizer)
            factors = _factors(self.ages.layers)
            old = [decays[id(v.value)] * x for v, x in zip(factors, old)]
        self._old = old

    def _after(self, optimizer, *_):
        old, self._old = self._old, None
        betas = corrected_betas(optimizer, _factors(self.ages.layers))
        if old is not None and betas is not None:
            self.ages.scale_step(old, self.steps(optimizer), betas)


def _decays(optimizer):
    """What weight decay leaves of each parameter, apart from the gradient.

    It is no part of what is scaled.
    """
    return {
        id(parameter): 1 - group["lr"] * group["weight_decay"]
        if group.get("decoupled_weight_decay")
        else 1.0
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


# Those of the optimizers of `torch.optim`, which have no place for them.
_corrections: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _factors(layers):
    return [factor for layer in layers for factor in layer.factors]
