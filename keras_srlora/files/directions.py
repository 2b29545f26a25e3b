"""Directions files: a kernel that was decomposed once is not decomposed again.

A safetensors file of the singular directions of many kernels, by the paths of
their layers, and how they were found: the method, and the fingerprint of each
kernel.
"""

import contextlib
import pathlib
import warnings
from typing import Any
from typing import NamedTuple

import numpy as np

from keras_srlora.backend.arguments import check_paths
from keras_srlora.files import tensors as tensors_file
from keras_srlora.functional.decomposition import Directions
from keras_srlora.functional.decomposition import choose_method
from keras_srlora.functional.decomposition import decompose
from keras_srlora.functional.fingerprint import fingerprint
from keras_srlora.functional.fingerprint import is_fingerprint

KIND = tensors_file.Kind(
    name="directions",
    version=1,
    writer="`keras_srlora.enable_srlora(model, directions=...)`",
    remedy="Copy it again, or delete it: it is then written anew.",
)
FOUND_BY = ("exact", "randomized")
# The order of float32 sums changes a fingerprint by less than this.
ROUNDING = 1e-5


def open_directions(filepath, layers, paths):
    """A `DirectionsFile` for some layers, or, without a path, `None`.

    For a `with` block. `paths` are those of `layers.paths.layer_paths`.
    """
    if filepath is None:
        return contextlib.nullcontext()
    check_paths([paths[id(layer)] for layer in layers], "layers to decompose")
    return DirectionsFile(filepath, paths)


class DirectionsFile:
    """Decomposes kernels, or reads the directions of an earlier run.

    To be used in a `with` block, at whose end the file is written, if a kernel
    had to be decomposed. Entries of other layers stay in the file.

    Args:
        filepath: path of the file, which need not exist.
        paths: `{id(layer): path}`.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if there is such a file, and it is damaged or of another
            kind.
    """

    def __init__(self, filepath, paths):
        self._path = pathlib.Path(filepath)
        self._paths = paths
        self._open = contextlib.ExitStack()
        self._tensors: Any = {}
        self._saved: dict = {}
        self._wanted = 0
        self._new: dict = {}
        if self._path.exists():
            with contextlib.ExitStack() as stack:
                self._tensors, metadata = stack.enter_context(
                    tensors_file.opened(self._path, KIND)
                )
                self._saved = _read_entries(metadata, self._tensors, filepath)
                self._open = stack.pop_all()
        else:
            # Before minutes of work whose result could not be written.
            tensors_file.import_safetensors()
            if not self._path.parent.is_dir():
                raise FileNotFoundError(
                    "`directions` must be the path of a file, in a folder that "
                    f"exists. Received: directions={str(filepath)!r}"
                )

    def decompose(self, layer, matrix, count, method):
        """As `decomposition.decompose`, for the kernel of a layer."""
        path = self._paths[id(layer)]
        self._wanted += 1
        wanted = _Entry(method, fingerprint(matrix), (count, *matrix.shape))
        if path in self._saved and self._saved[path].serves(wanted):
            return Directions(
                *(self._tensors.rows(name, count) for name in _names(path))
            )
        method = choose_method(matrix.shape, count, method)
        directions = decompose(matrix, count, method)
        self._new[path] = wanted._replace(method=method), directions
        return directions

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        with self._open:
            if error is None and self._new:
                tensors, entries = self._everything()
        # Closed: not every system replaces a file that is open.
        if error is None and self._new:
            message = self._keep(tensors, entries)
            if message:
                warnings.warn(message, stacklevel=3)

    def _keep(self, tensors, entries):
        """Writes the file; returns a warning, if there is one."""
        try:
            _write(self._path, tensors, entries)
        except OSError as failure:
            # Nothing is lost but the time of the next run.
            return (
                f"{str(self._path)!r} was not written ({failure}). The "
                f"{len(self._new)} kernels that it was to keep are decomposed "
                "all the same, and will be again in the next run."
            )
        if not self._saved:
            return None
        return (
            f"{str(self._path)!r} held no directions that fit "
            f"{len(self._new)} of {self._wanted} kernels, such as that of "
            f"layer {next(iter(self._new))!r}: none, fewer, of another "
            "kernel or found by another method. They were decomposed, and "
            "the file was written again."
        )

    def _everything(self):
        """Entries of the file, and those that were decomposed now."""
        entries = {
            **self._saved,
            **{path: entry for path, (entry, _) in self._new.items()},
        }
        tensors = {
            name: self._tensors[name]
            for path in self._saved
            for name in _names(path)
            if path not in self._new
        }
        for path, (_, directions) in self._new.items():
            tensors.update(zip(_names(path), directions))
        return tensors, entries


class _Entry(NamedTuple):
    """How the directions of a kernel were found.

    Attributes:
        method: `"exact"` or `"randomized"`; of those that are wanted, `"auto"`
            too.
        fingerprint: that of the kernel.
        sizes: `(count, in, out)`.
    """

    method: str
    fingerprint: list
    sizes: tuple

    def serves(self, wanted):
        """Whether these are, or begin with, the directions that are wanted."""
        (count, *shape), (wanted_count, *wanted_shape) = (
            self.sizes,
            wanted.sizes,
        )
        methods = {wanted.method}
        if wanted.method == "auto":
            # The exact ones are those that the randomized ones come near to.
            chosen = choose_method(wanted_shape, wanted_count, "auto")
            methods = {"exact", chosen}
        if shape != wanted_shape or self.method not in methods:
            return False
        size = np.max(np.abs(wanted.fingerprint))
        error = np.abs(np.subtract(self.fingerprint, wanted.fingerprint))
        return count >= wanted_count and np.max(error) <= ROUNDING * size


# The bytes.


def _names(path):
    return [f"{path}/{field}" for field in Directions._fields]


def _write(path, tensors, entries):
    layers = [
        {"path": name, "method": x.method, "fingerprint": x.fingerprint}
        for name, x in entries.items()
    ]
    tensors_file.write(path, tensors, {"layers": layers}, KIND)


def _read_entries(metadata, tensors, filepath):
    """`{path: _Entry}`; the checksum of a file is no proof of sense."""
    try:
        entries = {
            layer["path"]: _Entry(
                layer["method"],
                layer["fingerprint"],
                _sizes(layer["path"], tensors),
            )
            for layer in metadata["layers"]
        }
        sense = all(
            entry.method in FOUND_BY and is_fingerprint(entry.fingerprint)
            for entry in entries.values()
        )
    except (KeyError, TypeError, ValueError):
        sense = False
    if not sense:
        raise ValueError(
            f"The metadata of {str(filepath)!r} make no sense, or do not fit "
            f"its arrays. {KIND.remedy}"
        )
    return entries


def _sizes(path, tensors):
    """`(count, in, out)`; raises `ValueError` unless the shapes agree."""
    types, shapes = zip(*map(tensors.specification, _names(path)))
    (count, rows), (of_values,), (of_right, columns) = shapes
    if {*types} != {"F32"} or {count, of_values, of_right} != {count}:
        raise ValueError
    return count, rows, columns
