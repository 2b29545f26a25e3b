"""Adapters that wait on the host while another one is current."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_srlora.adapters.combine import Part
from keras_srlora.adapters.combine import part_of
from keras_srlora.adapters.format import has_fingerprint
from keras_srlora.adapters.moments import keep_moments
from keras_srlora.adapters.moments import put_moments
from keras_srlora.adapters.others import trainable_beside
from keras_srlora.adapters.save_load import clear
from keras_srlora.backend import devices
from keras_srlora.backend.interrupts import held_interrupts
from keras_srlora.conversion.freezing import saved_variables
from keras_srlora.functional.fingerprint import fingerprint
from keras_srlora.layers import pairs
from keras_srlora.layers.base import SRLoRALayer
from keras_srlora.layers.find import srlora_layers
from keras_srlora.layers.record import Record
from keras_srlora.layers.requirements import check_built
from keras_srlora.layers.switched_off import check_switched_on

# Arguments of a layer that may differ from one adapter to the next.
ARGUMENTS = (
    "target_rank",
    "lora_alpha",
    "use_rslora",
    "modules_to_save",
    "recipe",
)


class LayerState(NamedTuple):
    """One adapter in one layer.

    Attributes:
        layer: the SRLoRA layer.
        arguments: dict of `ARGUMENTS`.
        scale: float. The scale of the factors' product.
        a: array of shape `(rank, in)`.
        b: array of shape `(rank, out)`.
        record: `Record`.
        companions: dict of arrays: statistics and place of a run.
        pretrained: fingerprint of the pretrained kernel.
    """

    layer: SRLoRALayer
    arguments: dict
    scale: float
    a: np.ndarray
    b: np.ndarray
    record: Record
    companions: dict
    pretrained: list

    def part(self) -> Part:
        """Its `Part` of a weighted sum."""
        return part_of(self.a, self.b, self.scale, self.record)


@dataclasses.dataclass
class Adapter:
    """One adapter: its part in each layer, and the other trained values.

    Attributes:
        layers: list of `LayerState`.
        variables: list of `(variable, array)`.
        moments: the states of its optimizers, from `keep_moments`.
    """

    layers: list[LayerState]
    variables: list[tuple]
    moments: list[tuple]

    def state_of(self, layer) -> LayerState | None:
        """Its part in one layer, or `None`."""
        return next((x for x in self.layers if x.layer is layer), None)


@dataclasses.dataclass
class Adapters:
    """The named adapters of a model.

    Attributes:
        current: name of the one that the layers hold.
        waiting: the others, by name.
        names: all names, in the order in which they were added.
        layers: the SRLoRA layers that they have a part in.
    """

    current: str = "default"
    waiting: dict[str, Adapter] = dataclasses.field(default_factory=dict)
    names: list[str] = dataclasses.field(default_factory=lambda: ["default"])
    layers: list = dataclasses.field(default_factory=list)

    def keep(self, model) -> Adapter:
        """The current adapter, as it is now, on the host."""
        beside = [
            *saved_variables(model),
            *trainable_beside(model, self.layers),
            # Of a head that is frozen meanwhile, for example.
            *(v for kept in self.waiting.values() for v, _ in kept.variables),
        ]
        variables = {id(v): v for v in beside}.values()
        return Adapter(
            [_state_of(layer) for layer in self.layers],
            [(v, _on_host(v)) for v in variables],
            keep_moments(self.layers),
        )

    def check_kernels(self, adapter) -> None:
        """Raises where an adapter was kept on other pretrained kernels."""
        for state in self.states_of(adapter):
            layer = state.layer
            matrix = pairs.pretrained_matrix(layer)
            if not has_fingerprint(matrix, state.pretrained):
                raise ValueError(
                    f"The pretrained kernel of layer {layer.path!r} is not the "
                    "one that the adapter was kept on: other weights were "
                    "loaded meanwhile. Load the former ones, or delete the "
                    "adapter and add it again."
                )

    def changes_scales(self, adapter) -> bool:
        """Whether compiled functions hold other scales than an adapter's."""
        return any(x.scale != x.layer.scale for x in self.states_of(adapter))

    def states_of(self, adapter) -> list[LayerState]:
        """The parts of an adapter in the layers that were not merged since."""
        states = map(adapter.state_of, self.layers)
        return [state for state in states if state is not None]

    def put_on(self, adapter) -> None:
        """Lets the layers hold an adapter."""
        for layer in self.layers:
            state = adapter.state_of(layer)
            if state is None:
                clear(layer)
                continue
            pairs.restore_adapter(
                layer, state.a, state.b, state.arguments, state.record
            )
            layer.companions.restore(state.companions)
        for variable, value in adapter.variables:
            variable.assign(value)
        put_moments(self.layers, adapter.moments)

    @contextlib.contextmanager
    def whole(self, model, kept):
        """Puts the kept adapter back if the block raises; Ctrl-C waits.

        A device may run out of memory.
        """
        with held_interrupts():
            try:
                yield
            except BaseException:
                self.put_on(kept)
                known = set(map(id, self.layers))
                for layer in srlora_layers(model):
                    # Those that a file has converted.
                    if id(layer) not in known:
                        clear(layer)
                raise

    def attach(self, model) -> None:
        """Lets all SRLoRA layers of a model take part."""
        known = set(map(id, self.layers))
        self.layers += [x for x in srlora_layers(model) if id(x) not in known]
        for layer in self.layers:
            layer.companions.adapters = self


def find_adapters(model) -> Adapters:
    """The named adapters of a model: one, where none was added yet.

    Raises:
        ValueError: if there is no SRLoRA layer, adapters are switched off, or
            parts of the model have named adapters of their own.
    """
    layers = srlora_layers(model)
    for layer in layers:
        check_built(layer)
    check_switched_on(layers)
    found = {
        id(layer.companions.adapters): layer.companions.adapters
        for layer in layers
        if layer.companions.adapters is not None
    }
    if len(found) > 1:
        raise ValueError(
            "Parts of the model have named adapters of their own, and it "
            "is not clear which ones are meant. Pass one of those parts. "
            f"Received: model {model.name!r} with "
            f"{[x.names for x in found.values()]}"
        )
    adapters = next(iter(found.values()), None) or Adapters()
    # A part of the model may have been merged since.
    adapters.layers = [
        x
        for x in adapters.layers
        if isinstance(x, SRLoRALayer) and x.companions.adapters is adapters
    ]
    known = set(map(id, adapters.layers))
    adapters.layers += [x for x in layers if id(x) not in known]
    return adapters


def _state_of(layer):
    a, b = layer.factors
    return LayerState(
        layer,
        {name: getattr(layer, name) for name in ARGUMENTS},
        layer.scale,
        _on_host(a),
        _on_host(b),
        layer.record,
        layer.companions.to_arrays(),
        fingerprint(pairs.pretrained_matrix(layer)),
    )


def _on_host(variable):
    return np.array(devices.to_numpy(ops.convert_to_tensor(variable)))
