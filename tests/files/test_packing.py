"""Small states as arrays: by name, with a format that is checked."""

import math

import numpy as np
import pytest

from keras_srlora.files.packing import pack
from keras_srlora.files.packing import unpack

STATE = {
    "step": 7,
    "interval": 10 / 3,
    "smallest": 5e-324,
    "gate": None,
    "points": [[0.1, 8], [1e300, 3]],
    "name": "flat_loss ü",
}


def test_round_trip():
    """Floats to the last bit; what is returned is the dict, and no more."""
    array = pack(STATE, "run", 1)
    assert array.dtype == np.uint8 and array.ndim == 1
    assert array.flags.writeable
    assert unpack(array, "run", 1) == STATE


def test_a_number_that_is_not_finite_comes_back():
    state = unpack(pack({"x": math.inf, "y": math.nan}, "run", 1), "run", 1)
    assert state["x"] == math.inf and math.isnan(state["y"])


def test_round_trip_through_a_weights_file(tmp_path):
    """As HDF5 gives it back: another kind of array."""
    import h5py

    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["state"] = pack(STATE, "run", 1)
    with h5py.File(tmp_path / "x.h5") as file:
        assert unpack(file["state"], "run", 1) == STATE


@pytest.mark.parametrize(
    ("what", "version"), [("run", 2), ("record", 1), ("record", 2)]
)
def test_another_format_or_kind_is_refused_by_both_names(what, version):
    message = f"is a {what} of format {version};.*reads a run of format 1"
    with pytest.raises(ValueError, match=message):
        unpack(pack(STATE, what, version), "run", 1)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(0, "uint8"),
        np.arange(256, dtype="uint8"),
        np.frombuffer(b"[1, 2]", "uint8"),
        np.frombuffer(b"3", "uint8"),
        np.frombuffer(b'{"what": "run"}', "uint8"),
        # As the first releases would have written it: a tuple of numbers.
        np.array([5.0, 0.0, 1.0]),
    ],
)
def test_something_else_is_refused(array):
    with pytest.raises(ValueError, match="cannot be read.*run of format 1"):
        unpack(array, "run", 1)
