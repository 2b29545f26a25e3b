"""Checked safetensors files, with metadata that a person can read.

A file is checked as a whole before anything of it is used, and written whole or
not at all. This module knows bytes and arrays, no model.
"""

import collections.abc
import contextlib
import hashlib
import json
import pathlib
from typing import NamedTuple

import numpy as np

from keras_srlora.files.atomic import refuse_folder
from keras_srlora.files.atomic import written_whole


class Kind(NamedTuple):
    """A kind of file, and the advice where a file is of another kind.

    Attributes:
        name: what it holds, such as `"adapter"`.
        version: int. The version that is written, and the one that is read.
        writer: who writes such files.
        remedy: a sentence: the remedy for a damaged file.
    """

    name: str
    version: int
    writer: str
    remedy: str

    @property
    def format(self):
        return f"keras_srlora {self.name}"


class Tensors(collections.abc.Mapping):
    """The arrays of an open file, each read when it is asked for."""

    def __init__(self, file):
        self._file = file
        self._names = dict.fromkeys(file.keys())

    def __getitem__(self, name):
        return self._file.get_tensor(self._known(name))

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)

    def rows(self, name, count):
        """The first rows of an array, without reading the others."""
        return self._file.get_slice(self._known(name))[:count]

    def specification(self, name):
        """`(dtype, shape)`, such as `("F32", (3, 4))`, without reading it."""
        described = self._file.get_slice(self._known(name))
        return described.get_dtype(), tuple(described.get_shape())

    def _known(self, name):
        if name not in self._names:
            raise KeyError(name)
        return name


def write(path, tensors, metadata, kind):
    """Writes arrays and metadata, or leaves the old file as it was.

    Args:
        path: path of the file.
        tensors: `{name: NumPy array}`.
        metadata: dict that JSON can hold.
        kind: a `Kind`.
    """
    text = json.dumps(metadata, indent=1)
    write_tensors(
        path,
        tensors,
        {
            "format": kind.format,
            "format_version": str(kind.version),
            kind.name: text,
            "sha256": _digest(tensors, text),
        },
    )


def write_tensors(path, tensors, metadata=None):
    """Writes a safetensors file of NumPy arrays, whole or not at all."""
    safetensors = import_safetensors()
    tensors = {
        # `np.ascontiguousarray` would make a vector of a scalar.
        name: np.asarray(tensors[name], order="C")
        for name in sorted(tensors)
    }
    with written_whole(path) as unfinished:
        try:
            # Not `save`, whose bytes would be a second copy of everything.
            safetensors.numpy.save_file(tensors, unfinished, metadata)
        except safetensors.SafetensorError as error:
            # A full disk, for example, which is an `OSError` elsewhere.
            raise OSError(f"{str(path)!r} was not written: {error}") from error


@contextlib.contextmanager
def opened(path, kind):
    """Yields `(tensors, metadata)` of a checked file, mapped into memory.

    `tensors` are `Tensors`, to be read inside of the `with` block.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is of another kind, or is damaged.
    """
    safetensors = import_safetensors()
    path = pathlib.Path(path)
    refuse_folder(path)
    with contextlib.ExitStack() as stack:
        with _damaged(path, kind):
            file = stack.enter_context(
                safetensors.safe_open(path, framework="numpy")
            )
            header = file.metadata() or {}
        _check_kind(header, path, kind)
        tensors, text = Tensors(file), header.get(kind.name, "")
        with _damaged(path, kind):
            digest = _digest(tensors, text)
        if header.get("sha256") != digest:
            raise ValueError(
                f"{str(path)!r} is damaged: its contents do not give the "
                f"checksum that was written with it. {kind.remedy}"
            )
        try:
            metadata = json.loads(text)
        except ValueError as error:
            raise ValueError(
                f"{str(path)!r} has metadata that are not JSON: {error}."
            ) from error
        yield tensors, metadata


def _check_kind(header, path, kind):
    if header.get("format") != kind.format:
        raise ValueError(
            f"{str(path)!r} is a safetensors file but no {kind.name} that "
            f"{kind.writer} wrote. "
            f"Received: format={header.get('format')!r}"
        )
    if header.get("format_version") != str(kind.version):
        raise ValueError(
            f"{str(path)!r} has a format that this version of keras_srlora "
            f"does not read; it reads version {kind.version}. Received: "
            f"format_version={header.get('format_version')!r}"
        )


@contextlib.contextmanager
def _damaged(path, kind):
    """Returns the error for a file that safetensors cannot read."""
    try:
        yield
    except OSError:
        # There is none, or it is not allowed.
        raise
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} is not a safetensors file, or is damaged: "
            f"{error}. {kind.remedy}"
        ) from error


def _digest(tensors, text):
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def import_safetensors():
    """The package, which no more than a few functions need."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "Files of adapters and of directions need the package "
            "safetensors: `pip install safetensors`, or `pip install "
            "keras-srlora[adapters]`."
        ) from error
    return safetensors
