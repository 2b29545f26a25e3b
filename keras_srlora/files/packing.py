"""Small states as arrays, for files that hold nothing but arrays.

A state is written by field name, as JSON with its kind and a format number, so
that another kind or format is recognised.
"""

import json

import numpy as np


def pack(state: dict, what: str, version: int) -> np.ndarray:
    """Writes a dict that JSON can hold into a uint8 array.

    Args:
        state: the fields, by name. Floats come back bit-equal.
        what: what it is the state of, such as `"run"`.
        version: format number, of `what`.
    """
    document = {"what": what, "format": version, **state}
    return np.frombuffer(json.dumps(document).encode(), "uint8").copy()


def unpack(array, what: str, version: int) -> dict:
    """The inverse of `pack`.

    Raises:
        ValueError: if the array holds something else, or another format. The
            message names both.
    """
    try:
        state = json.loads(np.asarray(array, "uint8").tobytes().decode())
        found = state.pop("what"), state.pop("format")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"The saved state of a {what} cannot be read: it is not one that "
            "this version of keras_srlora writes. "
            f"Received: {error}; expected: {what} of format {version}"
        ) from error
    if found != (what, version):
        raise ValueError(
            f"The saved state is a {found[0]} of format {found[1]}; this "
            f"version of keras_srlora reads a {what} of format {version}. "
            "Save it again with this version, or load it with the one that "
            "wrote it."
        )
    return state
