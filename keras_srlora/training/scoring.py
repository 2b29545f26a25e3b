"""How an optimizer's steps come to be scored."""

from keras_srlora.training.optimizer import SensitivityOptimizer
from keras_srlora.training.optimizer import is_torch_optimizer
from keras_srlora.training.sensitivity import Sensitivity


def score_steps(optimizer, layers, beta1, beta2):
    """Lets the steps of an optimizer be scored.

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
    return optimizer, sensitivity


def _score_torch_step(optimizer, sensitivity):
    factors = [v for layer in sensitivity.layers for v in layer.factors]
    own = {id(v.value) for v in factors}
    rest = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) not in own
    ]
    gradients = [v.value.grad for v in factors] + [p.grad for p in rest]
    sensitivity.update(gradients, [*factors, *rest])
