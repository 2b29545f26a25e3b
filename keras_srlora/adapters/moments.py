"""The optimizer's state of each adapter: its moments, and its steps.

Every adapter is trained as if it had an optimizer of its own, as in PEFT, where
it has parameters of its own.
"""

import warnings
import weakref

import keras

from keras_srlora.backend import torch_optimizers
from keras_srlora.backend.keras_private import rebuilding


def keep_moments(layers) -> list:
    """The states of the optimizers that train some layers.

    Returns:
        List of `(weak reference to the optimizer, state)`.
    """
    return [
        (weakref.ref(optimizer), kind.state_of(optimizer))
        for kind, optimizer in _optimizers(layers)
    ]


def put_moments(layers, kept) -> None:
    """Gives the optimizers of some layers the states that were kept.

    One that had none starts anew, at step 0. One that cannot goes on with the
    state that it has, with a warning.

    Args:
        layers: list of SRLoRA layers.
        kept: result of `keep_moments`; an empty list for a fresh adapter.
    """
    states = {id(reference()): state for reference, state in kept}
    failed = []
    for kind, optimizer in _optimizers(layers):
        try:
            state = states.get(id(optimizer)) or kind.initial_state(optimizer)
            kind.set_state(optimizer, state)
        except Exception as error:
            name = getattr(optimizer, "name", type(optimizer).__name__)
            failed.append(f"{name!r}, {type(error).__name__}: {error}")
    if failed:
        warnings.warn(
            "An optimizer could not be given the state of the adapter that is "
            "current now, and has that of the last one: call `model.compile` "
            f"again before you train. Received: {'; '.join(failed)}",
            stacklevel=4,
        )


def _optimizers(layers):
    """`[(module that knows its kind, optimizer)]`."""
    factors = [v for layer in layers for v in layer.factors]
    found = [
        (rebuilding, optimizer)
        for optimizer in rebuilding.living_optimizers(factors)
    ]
    if keras.backend.backend() == "torch":
        found += [
            (torch_optimizers, optimizer)
            for optimizer in torch_optimizers.living_optimizers(factors)
        ]
    return found
