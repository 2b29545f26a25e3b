"""Parts that train and are saved with a layer, beside its variables."""

from typing import Any

import numpy as np


def are_attached(layers: list, name: str, owner) -> bool:
    """Whether all layers save their parts of `owner`, not others made since."""
    parts = [layer.companions.get(name) for layer in layers]
    return all(part is not None and part.belongs_to(owner) for part in parts)


class Companions:
    """Parts that a run attaches to a layer, so that weights files hold them.

    A part is any object with `to_arrays()`, which returns `{name: array}`, and
    `restore(arrays)`, which takes them back, or restarts from an empty dict.
    The scores of a layer's pairs are one part; the state of the run, attached
    to its first layer, is another. The layer knows neither.

    Arrays that are loaded for a part wait until it is attached.

    Attributes:
        adapters: the named adapters that the layer has a part in, or `None`.
            They are not saved.
    """

    def __init__(self):
        self.adapters: Any = None
        self._parts: dict[str, Any] = {}
        self._waiting: dict[str, dict] = {}

    def attach(self, name: str, part) -> dict:
        """Attaches a part, in place of the last one of this name.

        Returns:
            The arrays that wait for it: of the last part, or of a file.
        """
        arrays = self.arrays_of(name)
        self._waiting.pop(name, None)
        self._parts[name] = part
        return arrays

    def get(self, name: str):
        """The part that is attached under a name, or `None`."""
        return self._parts.get(name)

    def detach(self, name: str) -> None:
        """Takes a part off; its arrays stay with the layer."""
        part = self._parts.pop(name, None)
        if part is not None:
            self._waiting[name] = part.to_arrays()

    def arrays_of(self, name: str) -> dict:
        """The arrays of a part now; empty where there are none."""
        if name in self._parts:
            return self._parts[name].to_arrays()
        return self._waiting.get(name, {})

    def restart(self, name: str) -> None:
        """Lets one part start anew."""
        self._give(name, {})

    def to_arrays(self) -> dict:
        """Of all parts, `{"<part>.<name>": array}`."""
        return {
            f"{name}.{key}": np.asarray(array)
            for name in {**self._waiting, **self._parts}
            for key, array in self.arrays_of(name).items()
        }

    def restore(self, arrays: dict) -> None:
        """The inverse of `to_arrays`; parts without arrays start anew."""
        given: dict[str, dict] = {
            name: {} for name in {**self._waiting, **self._parts}
        }
        for full_name, array in arrays.items():
            name, _, key = full_name.partition(".")
            if key:
                given.setdefault(name, {})[key] = np.array(array)
        for name, of_part in given.items():
            self._give(name, of_part)

    def _give(self, name, arrays):
        if name in self._parts:
            self._parts[name].restore(arrays)
        else:
            self._waiting[name] = arrays
