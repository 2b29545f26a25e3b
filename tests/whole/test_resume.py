"""A run that is killed and started again ends where it would have ended."""

import os
import pathlib
import signal
import subprocess
import sys
import warnings

import killed_run
import numpy as np
import pytest
from support import OF_OTHERS
from support import python_path
from support import state_arrays
from support import to_numpy

SCRIPT = pathlib.Path(killed_run.__file__)


def killed(folder, route, optimizer, moment):
    """Runs the script in a child process, which dies."""
    child = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), route, optimizer, moment],
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]


def everything(model):
    """All numbers of a model, its optimizer and its adapters, by name."""
    # Keras numbers optimizers and seed generators on, so the place is said too.
    variables = [*model.variables, *model.optimizer.variables]
    found = {f"{i} {v.name}": to_numpy(v) for i, v in enumerate(variables)}
    for name in ("first", "second"):
        state = state_arrays(model.get_layer(name))
        found.update({f"{name} {key}": array for key, array in state.items()})
    return found


def assert_resumes(tmp_path, route, optimizer, moment, match=None):
    folder, other = tmp_path / "killed", tmp_path / "whole"
    folder.mkdir()
    other.mkdir()
    killed(folder, route, optimizer, moment)
    whole = everything(killed_run.train(other, route, optimizer))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", OF_OTHERS)
        resumed = everything(killed_run.train(folder, route, optimizer))
    said = [str(w.message) for w in caught if w.category is UserWarning]
    assert len(said) == (match is not None), said
    assert all(match in message for message in said)
    assert resumed.keys() == whole.keys()
    assert {
        "first events",
        "first run.random_seeds",
        "second sensitivity.average_b",
    } <= whole.keys()
    # Three recompositions were saved, three come after the kill.
    assert len(whole["first events"]) == 6
    for name, expected in whole.items():
        np.testing.assert_array_equal(resumed[name], expected, name)


@pytest.mark.parametrize("moment", ["middle", "recomposition", "writing"])
@pytest.mark.parametrize("route", ["backup", ".keras", ".weights.h5"])
def test_routes_and_moments(route, moment, tmp_path):
    assert_resumes(tmp_path, route, "adam", moment)


def test_a_backup_without_its_epoch(tmp_path):
    """Killed after Keras wrote the weights, before the number of the epoch."""
    assert_resumes(
        tmp_path, "backup", "adam", "between", "goes on after epoch 3"
    )


@pytest.mark.parametrize("optimizer", [*killed_run.OPTIMIZERS][1:])
def test_optimizers(optimizer, tmp_path):
    route = {"lion": ".keras", "adafactor": ".weights.h5"}
    assert_resumes(
        tmp_path, route.get(optimizer, "backup"), optimizer, "middle"
    )
