"""Adapter files: safetensors with metadata that a person can read.

A file is checked as a whole before anything of it is used, and written whole or
not at all. This module knows bytes and arrays, no model.
"""

import hashlib
import json
import pathlib

import numpy as np

from keras_srlora._files import written_whole

FORMAT, VERSION = "keras_srlora adapter", 1


def write(path, tensors, metadata):
    """Writes arrays and metadata, or leaves the old file as it was.

    Args:
        path: path of the file.
        tensors: `{name: NumPy array}`.
        metadata: dict that JSON can hold.
    """
    text = json.dumps(metadata, indent=1)
    write_tensors(
        path,
        tensors,
        {
            "format": FORMAT,
            "format_version": str(VERSION),
            "adapter": text,
            "sha256": _digest(tensors, text),
        },
    )


def write_tensors(path, tensors, metadata=None):
    """Writes a safetensors file of NumPy arrays, whole or not at all."""
    safetensors = _import_safetensors()
    tensors = {
        # `np.ascontiguousarray` would make a vector of a scalar.
        name: np.asarray(tensors[name], order="C")
        for name in sorted(tensors)
    }
    data = safetensors.numpy.save(tensors, metadata)
    with written_whole(path) as unfinished:
        pathlib.Path(unfinished).write_bytes(data)


def read(path):
    """Reads `(tensors, metadata)`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not an adapter, or is damaged.
    """
    safetensors = _import_safetensors()
    path = pathlib.Path(path)
    data = path.read_bytes()
    try:
        # `load` gives no metadata; a header of 8 bytes and JSON does.
        tensors = safetensors.numpy.load(data)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} is not a safetensors file, or is damaged: {error}. "
            "Write it again with `keras_srlora.save_adapter`."
        ) from error
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{str(path)!r} is a safetensors file but no adapter that "
            "`keras_srlora.save_adapter` wrote. "
            f"Received: format={header.get('format')!r}"
        )
    if header.get("format_version") != str(VERSION):
        raise ValueError(
            f"{str(path)!r} has a format that this version of keras_srlora "
            f"does not read; it reads version {VERSION}. Received: "
            f"format_version={header.get('format_version')!r}"
        )
    text = header.get("adapter", "")
    if header.get("sha256") != _digest(tensors, text):
        raise ValueError(
            f"{str(path)!r} is damaged: what it holds does not give the "
            "checksum that was written with it. Copy or write it again."
        )
    try:
        return tensors, json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} has metadata that are not JSON: {error}."
        ) from error


def _digest(tensors, text):
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _import_safetensors():
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "Adapter files need the package safetensors: `pip install "
            "safetensors`, or `pip install keras-srlora[adapters]`."
        ) from error
    return safetensors
