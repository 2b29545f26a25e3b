"""How an optimizer's steps come to be scored, and those of new pairs scaled."""

from typing import NamedTuple

from keras import ops

from keras_srlora.training.bias_correction import BiasCorrection
from keras_srlora.training.bias_correction import corrected_betas
from keras_srlora.training.optimizer import SensitivityOptimizer
from keras_srlora.training.optimizer import is_torch_optimizer
from keras_srlora.training.sensitivity import Sensitivity

# The attribute of an optimizer of `torch.optim` with its `_TorchHooks`, which
# PyTorch neither saves nor copies. A table here would keep all of them alive:
# the hooks lead to the layers, and these to the run and its optimizer.
HOOKS = "_srlora_hooks"


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
    hooks = _TorchHooks(optimizer, layers, beta1, beta2)
    vars(optimizer)[HOOKS] = [*_drop_detached(optimizer), hooks]
    return optimizer, hooks.sensitivity


class Correction(NamedTuple):
    """What scales the steps of pairs that restart with moments of zero.

    Attributes:
        ages: the `BiasCorrection`.
        steps: int. The steps that the optimizer has made.
    """

    ages: BiasCorrection
    steps: int


def find_corrections(optimizer) -> dict:
    """`{layer: Correction}` of an optimizer.

    Empty if the optimizer does not correct its moments, or if nothing scales
    its steps: it is neither a `SensitivityOptimizer` nor one of `torch.optim`
    that a `Recomposer` was given.
    """
    if is_torch_optimizer(optimizer):
        found = {}
        for hooks in vars(optimizer).get(HOOKS, ()):
            if hooks.betas(optimizer) is not None:
                steps = int(hooks.steps(optimizer))
                correction = Correction(hooks.ages, steps)
                found.update(dict.fromkeys(hooks.ages.layers, correction))
        return found
    # It may be in a `LossScaleOptimizer`.
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not isinstance(optimizer, SensitivityOptimizer):
        return {}
    if corrected_betas(optimizer.unwrap()) is None:
        return {}
    steps = int(ops.convert_to_numpy(optimizer.iterations))
    ages = optimizer.bias_correction
    return dict.fromkeys(ages.layers, Correction(ages, steps))


class _TorchHooks:
    """Scores the steps of an optimizer of `torch.optim`, and scales them."""

    def __init__(self, optimizer, layers, beta1, beta2):
        self.sensitivity = Sensitivity(layers, beta1, beta2)
        self.ages = BiasCorrection(layers)
        self._factors = [v for layer in layers for v in layer.factors]
        self._old = None
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self):
        """Takes the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()

    def betas(self, optimizer):
        """As `corrected_betas`."""
        return corrected_betas(optimizer, self._factors)

    def steps(self, optimizer):
        """The steps that it has made; a number or a tensor."""
        for factor in self._factors:
            state = optimizer.state.get(factor.value)
            if state:
                return state["step"]
        return 0

    def _before(self, optimizer, args, kwargs):
        if any(x is not None for x in (*args[1:], *kwargs.values())):
            raise ValueError(
                "`optimizer.step(closure)` computes the gradients after they "
                "would be scored. Call the closure yourself: `loss = "
                "closure()`, then `optimizer.step()`. "
                f"Received: {[*args[1:], *kwargs.values()]}"
            )
        # Before the step: a weight and its gradient belong together.
        self._score(optimizer)
        old = self.ages.copy_factors()
        if old is not None:
            decays = _decays(optimizer)
            old = [decays[id(v.value)] * x for v, x in zip(self._factors, old)]
        self._old = old

    def _after(self, optimizer, *_):
        old, self._old = self._old, None
        if old is None:
            # No pair restarted yet: nothing more in the step.
            return
        betas = self.betas(optimizer)
        if betas is not None:
            self.ages.scale_step(old, self.steps(optimizer), betas)

    def _score(self, optimizer):
        own = {id(v.value) for v in self._factors}
        rest = [
            parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) not in own
        ]
        variables = [*self._factors, *rest]
        gradients = [v.value.grad for v in self._factors]
        gradients += [p.grad for p in rest]
        self.sensitivity.update(gradients, variables)


def _drop_detached(optimizer):
    """The hooks of earlier runs with layers that no later run has taken."""
    kept = []
    for hooks in vars(optimizer).get(HOOKS, ()):
        if hooks.ages.is_attached:
            kept.append(hooks)
        else:
            hooks.remove()
    return kept


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
