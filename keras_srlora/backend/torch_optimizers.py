"""The state of `torch.optim` optimizers, as in `keras_private.rebuilding`."""

from keras_srlora.backend.living import living


def living_optimizers(variables) -> list:
    """The optimizers that were given the parameter of one of some variables."""
    import torch

    wanted = {id(v.value) for v in variables}
    (found,) = living(torch.optim.Optimizer)
    return [
        optimizer
        for optimizer in found
        if any(
            id(parameter) in wanted
            for group in getattr(optimizer, "param_groups", ())
            for parameter in group["params"]
        )
    ]


def state_of(optimizer) -> dict:
    """A copy of what the optimizer keeps of each parameter."""
    return {
        parameter: {name: _copy(value) for name, value in state.items()}
        for parameter, state in optimizer.state.items()
    }


def set_state(optimizer, state) -> None:
    """Gives an optimizer the state that `state_of` returned."""
    copied = {p: dict(of_parameter) for p, of_parameter in state.items()}
    optimizer.state.clear()
    optimizer.state.update(copied)


def initial_state(optimizer) -> dict:
    """None: it is made with the first step."""
    return {}


def _copy(value):
    return value.clone() if hasattr(value, "clone") else value
