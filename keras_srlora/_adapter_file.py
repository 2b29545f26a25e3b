"""Adapter files: which kind of a checked safetensors file they are."""

from keras_srlora import _tensors_file

KIND = _tensors_file.Kind(
    name="adapter",
    version=1,
    writer="`keras_srlora.save_adapter`",
    remedy="Copy it again, or write it with `keras_srlora.save_adapter`.",
)


def write(path, tensors, metadata):
    """Writes arrays and metadata, or leaves the old file as it was.

    Args:
        path: path of the file.
        tensors: `{name: NumPy array}`.
        metadata: dict that JSON can hold.
    """
    _tensors_file.write(path, tensors, metadata, KIND)


def read(path):
    """Reads `(tensors, metadata)`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not an adapter, or is damaged.
    """
    with _tensors_file.opened(path, KIND) as (tensors, metadata):
        return dict(tensors), metadata
