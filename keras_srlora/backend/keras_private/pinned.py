"""Variables that `layer.trainable = True` does not thaw.

A Keras layer has two lists of variables, by how they were *made*: trainable
ones and others. `layer.trainable = ...` sets the flags of the first list, and
`layer.variables`, hence a weights file, is the first list and then the second.
A pinned variable moves to the second list and keeps its place in the order.
"""

import sys
import warnings
from typing import Any

import keras


class _InOrder(list):
    """The second list of a layer, with pinned variables among the others.

    Attributes:
        order: list of all variables, as before.
        pinned: list of those that are pinned.
        before: set of the ids of layer and variables that were trainable.
    """

    def __init__(self, variables, order, pinned, before):
        super().__init__(variables)
        self.order = order
        self.pinned = pinned
        self.before = before

    def __radd__(self, trainable):
        """`trainable + self`, which is how Keras lists all variables."""
        place = {id(v): i for i, v in enumerate(self.order)}
        return sorted(
            [*trainable, *self], key=lambda v: place.get(id(v), len(place))
        )


def own_variables(layer):
    """The variables of a layer itself that were made as trainable ones.

    Private: `Layer._trainable_variables`.
    """
    pinned = _ids(pinned_variables(layer))
    made_trainable = pinned | _ids(layer._trainable_variables)
    everything = layer._trainable_variables + layer._non_trainable_variables
    return [v for v in everything if id(v) in made_trainable]


def pinned_variables(layer):
    """Those of them that are pinned."""
    return getattr(layer._non_trainable_variables, "pinned", [])


def has_pins(layer):
    """Whether `pin` was called for a layer, and `unpin` was not."""
    return isinstance(layer._non_trainable_variables, _InOrder)


def pin(layer, variables):
    """Freezes some of a layer's own variables, for good, and no others."""
    before, wanted = trainable_before(layer), _ids(variables)
    unpin(layer)
    own = own_variables(layer)
    order = layer._trainable_variables + layer._non_trainable_variables
    others = [v for v in layer._non_trainable_variables if id(v) not in wanted]
    pinned = [v for v in own if id(v) in wanted]
    _replace(
        layer,
        [v for v in own if id(v) not in wanted],
        _InOrder([*pinned, *others], order, pinned, before),
    )
    for variable in pinned:
        variable.trainable = False


def trainable_before(layer):
    """Ids of a layer and its own variables, where they are trainable.

    Of a layer with pins: where they were, when the first one was pinned.
    """
    if has_pins(layer):
        return layer._non_trainable_variables.before
    return {id(x) for x in [layer, *own_variables(layer)] if x.trainable}


def unpin(layer):
    """Undoes `pin` and `hold`; variables stay frozen until they are thawed."""
    if is_held(layer):
        del vars(layer)[HOOK]
    if not has_pins(layer):
        return
    own, pinned = own_variables(layer), _ids(pinned_variables(layer))
    others = [v for v in layer._non_trainable_variables if id(v) not in pinned]
    _replace(layer, own, others)


def hold(layer):
    """Freezes a layer with pins; thawing an outer one passes it by.

    Its flag is `False` then, which a config says and which lets batch
    normalization use its moving averages, and leave them as they are. Private:
    `Layer._setattr_hook`, which `Layer.__setattr__` calls.
    """
    set_own_trainable(layer, False)
    vars(layer)[HOOK] = _StaysFrozen(layer)


def is_held(layer):
    """Whether `hold` was called for a layer, and `unpin` was not."""
    return isinstance(vars(layer).get(HOOK), _StaysFrozen)


def open_around(layer):
    """Makes a frozen layer trainable, and nothing that is inside of it.

    TensorFlow does nothing in `layer.trainable = True` where the layer has
    that very object already. Here it thaws what is inside all the same.
    """
    set_own_trainable(layer, True)
    vars(layer)[HOOK] = _ThawsInside(layer)


HOOK = "_setattr_hook"


class _Hook:
    """A layer calls it with each attribute that is about to be set."""

    def __init__(self, layer):
        self._layer = layer

    def __call__(self, name, value):
        value = self.change(name, value)
        return type(self._layer)._setattr_hook(self._layer, name, value)

    def change(self, name, value):
        """The value that is set instead."""
        raise NotImplementedError


class _StaysFrozen(_Hook):
    def change(self, name, value):
        if name != "_trainable":
            return value
        if value and _sets_one_layer():
            _warn_of_held(self._layer)
        return False


class _ThawsInside(_Hook):
    def change(self, name, value):
        # Another object than `True`, which means the same.
        return 1 if name == "trainable" and value is True else value


def _sets_one_layer():
    """Whether a layer itself is thawed, not an outer one.

    The setter of `Layer.trainable` calls those of the layers inside.
    """
    setter = keras.layers.Layer.trainable.fset.__code__
    frame: Any = sys._getframe()
    calls = 0
    while frame is not None:
        calls += frame.f_code is setter
        frame = frame.f_back
    return calls == 1


def _warn_of_held(layer):
    warnings.warn(
        f"Layer {layer.path or layer.name!r} was frozen by `enable_srlora` and "
        "stays so. To train it, name it in `modules_to_save` when you convert "
        "the model; `merge_srlora` and `unload_srlora` release it. "
        "Received: trainable=True",
        stacklevel=7,
    )


def set_own_trainable(layer, trainable):
    """Sets the flag of a layer alone, not of its sublayers.

    Private: `Layer._trainable`.
    """
    # Past Keras's `__setattr__`, and the hook of `hold`.
    vars(layer)["_trainable"] = trainable


def set_trainable(layer, trainable):
    """Sets the flags of a layer and of all its sublayers.

    `layer.trainable = ...` does nothing on TensorFlow where the outermost one
    has that value already.
    """
    for part in layer._flatten_layers(include_self=True, recursive=True):
        set_own_trainable(part, trainable)
        for variable in part._trainable_variables:
            variable.trainable = trainable


def layers_directly_inside(layer):
    """The attributes of a layer that are layers. Private: `_flatten_layers`."""
    return layer._flatten_layers(include_self=False, recursive=False)


def _replace(layer, trainable, others):
    """Private: `Layer._tracker`, which fills both lists."""
    lists = {
        "trainable_variables": trainable,
        "non_trainable_variables": others,
    }
    for name, variables in lists.items():
        is_one, _ = layer._tracker.config[name]
        layer._tracker.config[name] = is_one, variables
        layer._tracker.stored_ids[name] = _ids(variables)
        # Past Keras's `__setattr__`, which would track the list.
        vars(layer)[f"_{name}"] = variables


def _ids(objects):
    return set(map(id, objects))
