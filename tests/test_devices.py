"""Many devices take the same decisions, and end where one device ends."""

import os
import pathlib
import subprocess
import sys

import devices_run
import keras
import numpy as np
import pytest

BACKEND = keras.backend.backend()
SCRIPT = pathlib.Path(devices_run.__file__)


def only_on(backend):
    return pytest.mark.skipif(BACKEND != backend, reason=f"{backend} alone")


def run(engine, folder, *cluster):
    """Starts the script in a child process."""
    root = str(SCRIPT.parent.parent)
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), engine, str(folder), *map(str, cluster)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output_of(child, returncode=0):
    output, _ = child.communicate(timeout=300)
    assert child.returncode == returncode, output[-4000:]
    return output


def load(folder, name="run"):
    with np.load(pathlib.Path(folder) / f"{name}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def on_one_device():
    return devices_run.fit_on_one_device()


def assert_ends_where_one_device_does(found, expected):
    assert found.keys() == expected.keys()
    assert found["steps"].tolist() == [5, 5, 10, 10, 15, 15]
    for name, value in expected.items():
        np.testing.assert_allclose(
            found[name], value, rtol=0, atol=1e-5, err_msg=name
        )


def assert_equal_to_the_bit(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@only_on("tensorflow")
def test_mirrored_strategy(on_one_device, tmp_path):
    output_of(run("mirrored", tmp_path))
    found = load(tmp_path)
    assert_ends_where_one_device_does(found, on_one_device)
    # The scores are of the gradient of the whole batch.
    for name in ("first average_a", "second uncertainty_b"):
        np.testing.assert_allclose(found[name], on_one_device[name], rtol=1e-4)
    for replica in ("replica_0", "replica_1"):
        assert_equal_to_the_bit(load(tmp_path, replica), found)


@only_on("tensorflow")
def test_a_gradient_must_be_finite_on_all_replicas(tmp_path):
    output_of(run("mirrored_mishaps", tmp_path))
    found = load(tmp_path)
    assert not found["factor"].any() and not found["head"].any()
    assert (found["nothing"] > 0).any(axis=-1).all()
    assert "in `with strategy.scope():`" in str(found["message"])
