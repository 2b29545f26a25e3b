"""Switching the adapter of a layer off for a while, and on again."""

from __future__ import annotations

import numpy as np
from keras import ops

from keras_srlora.backend import devices
from keras_srlora.layers import pairs
from keras_srlora.layers.companions import Companions

# The layers that are switched off: `{id(layer): _SwitchedOff}`.
_NOW: dict = {}


def switch_off(layer):
    """Makes a layer compute its pretrained kernel, until it is switched on.

    It is then like one whose kernel was not decomposed yet, so that a file that
    is saved meanwhile holds the pretrained model. Calls may be nested; the
    outermost one counts.
    """
    now = _NOW.get(id(layer)) or _SwitchedOff(layer)
    now.count += 1
    _NOW[id(layer)] = now


def switch_on(layer):
    """Takes one `switch_off` back; everything is bit-equal to before."""
    now = _NOW[id(layer)]
    now.count -= 1
    if not now.count:
        del _NOW[id(layer)]
        now.restore()


def is_switched_off(layer) -> bool:
    """Whether a layer computes its pretrained kernel for a while."""
    return id(layer) in _NOW


def check_switched_on(layers):
    """Raises `ValueError` where an adapter is switched off."""
    found = [layer.path for layer in layers if is_switched_off(layer)]
    if found:
        raise ValueError(
            "Inside of `adapter_disabled` the SRLoRA layers have pretrained "
            "kernels and no adapter. Leave the `with` block first. To get the "
            "plain pretrained model, call `keras_srlora.unload_srlora(model)` "
            "there. Received: "
            f"{len(found)} layers that are switched off, such as {found[0]!r}"
        )


def check_untouched(layers):
    """Raises `ValueError` where a layer changed since it was switched off."""
    found = [layer.path for layer in layers if _NOW[id(layer)].is_touched()]
    if found:
        raise ValueError(
            "SRLoRA layers were trained or got other weights inside of "
            "`adapter_disabled`. After the block the factors have their old "
            "values again: the training, or the weights, are gone. Train and "
            "load outside of the block. To train the pretrained model, call "
            "`keras_srlora.unload_srlora(model)` first. Received: "
            f"{len(found)} layers that changed, such as {found[0]!r}"
        )


class _SwitchedOff:
    """The state of a layer, to be given back."""

    def __init__(self, layer):
        self.count = 0
        self._layer = layer
        # On the host: no second copy of the kernels on an accelerator.
        self._values = _on_host((*layer.frozen.variables, *layer.factors))
        self._frozen = layer.frozen.to_arrays()
        self._record = layer.record
        self._companions = layer.companions
        try:
            pairs.disable_adapter(layer)
        except BaseException:
            self.restore()
            raise
        layer.companions = Companions()
        self._off = _on_host(layer.factors)

    def is_touched(self):
        """Whether a factor has another value than when it was switched off."""
        now = _on_host(variable for variable, _ in self._off)
        return any(
            not np.array_equal(value, off)
            for (_, value), (_, off) in zip(now, self._off)
        )

    def restore(self):
        for variable, value in self._values:
            variable.assign(value)
        self._layer.frozen.from_arrays(self._frozen)
        self._layer.record = self._record
        self._layer.companions = self._companions


def _on_host(variables):
    """`[(variable, copy of its value)]`."""
    return [
        (v, np.array(devices.to_numpy(ops.convert_to_tensor(v))))
        for v in variables
    ]
