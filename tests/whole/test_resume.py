"""A run that is killed and started again ends where it would have ended."""

import functools
import signal
import warnings

import killed_run
import numpy as np
import pytest
from processes import Child
from support import OF_OTHERS
from support import state_arrays
from support import to_numpy


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a run leaves that nothing kills; the same for all moments."""

    @functools.cache
    def train(route, optimizer):
        folder = tmp_path_factory.mktemp("whole")
        return everything(killed_run.train(folder, route, optimizer))

    return train


def everything(model):
    """All numbers of a model, its optimizer and its adapters, by name."""
    # Keras numbers optimizers and seed generators on, so the place is said too.
    variables = [*model.variables, *model.optimizer.variables]
    found = {f"{i} {v.name}": to_numpy(v) for i, v in enumerate(variables)}
    for name in ("first", "second"):
        state = state_arrays(model.get_layer(name))
        found.update({f"{name} {key}": array for key, array in state.items()})
    return found


def assert_resumes(
    uninterrupted, tmp_path, route, optimizer, moment, match=None
):
    folder = tmp_path / "killed"
    folder.mkdir()
    Child(
        killed_run.train,
        (folder, route, optimizer, moment),
        log=tmp_path / "log.txt",
    ).assert_ends(-signal.SIGKILL)
    whole = uninterrupted(route, optimizer)
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
def test_routes_and_moments(route, moment, uninterrupted, tmp_path):
    assert_resumes(uninterrupted, tmp_path, route, "adam", moment)


def test_a_backup_without_its_epoch(uninterrupted, tmp_path):
    """Killed after Keras wrote the weights, before the number of the epoch."""
    assert_resumes(
        uninterrupted,
        tmp_path,
        "backup",
        "adam",
        "between",
        "goes on after epoch 3",
    )


@pytest.mark.parametrize("optimizer", [*killed_run.OPTIMIZERS][1:])
def test_optimizers(optimizer, uninterrupted, tmp_path):
    routes = {"lion": ".keras", "adafactor": ".weights.h5"}
    route = routes.get(optimizer, "backup")
    assert_resumes(uninterrupted, tmp_path, route, optimizer, "middle")
