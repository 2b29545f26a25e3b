"""The gate of the default recipe, by itself."""

import json

import numpy as np
import pytest

from keras_srlora.recipes import gate as gates
from keras_srlora.recipes.gate import FlatLoss

# 800 steps, windows of 80, a reading each 10.


def answers(loss_at, steps=800, noise=0.0):
    """`{step: answer}` and the gate, for a loss as a function of the step."""
    gate, rng, found = FlatLoss.start(steps, 0), np.random.default_rng(0), {}
    for step in range(1, steps):
        if gate.is_due(step):
            loss = loss_at(step, found) * (1 + noise * rng.standard_normal())
            answer = gate.read(step, 10 * loss, 10)
            if answer:
                found[step] = answer
    return found, gate


def first(step):
    """What a run learns in its first steps."""
    return 2.0 if step <= 10 else 1.0


def test_a_falling_loss_is_left_alone():
    found, gate = answers(lambda step, _: np.exp(-step / 300))
    assert found == {} and gate.phase == gates.WAITING


def test_a_flat_loss_is_probed_and_the_probe_that_pays_opens_the_gate():
    def loss(step, found):
        # A tenth lower with each hundred steps after the probe.
        probed = min(found, default=step)
        return first(step) * (1 - 0.001 * (step - probed))

    found, gate = answers(loss)
    assert list(found.values()) == ["recompose", "go"]
    # Two flat windows, and then one that lies below.
    assert 160 <= min(found) <= 190 < max(found) <= min(found) + 100
    # The probe is judged by a window of losses after it, and by no other.
    assert max(found) >= min(found) + 80
    assert gate.is_open


def test_a_probe_that_brings_nothing_is_the_last():
    found, gate = answers(lambda step, _: first(step))
    assert list(found.values()) == ["recompose"]
    assert gate.phase == gates.STOPPED and not gate.is_due(10**6)
    # Three windows after the probe.
    assert gate.read_at == min(found) + 240


def slow(step):
    """A hundredth lower with each window, probe or not."""
    return first(step) * np.exp(-step / 8000)


def test_a_loss_that_falls_at_its_own_pace_does_not_open_the_gate():
    found, gate = answers(lambda step, _: slow(step))
    # After three windows it may be flat again.
    assert set(found.values()) == {"recompose"} and len(found) == 3
    assert min(np.diff(list(found))) >= 240
    assert gate.phase != gates.STOPPED


@pytest.mark.parametrize("probes", [1, 2])
def test_a_loss_that_falls_faster_after_a_probe_opens_it(probes):
    def loss(step, found):
        probed = list(found)[probes - 1] if len(found) >= probes else step
        return slow(step) * (1 - 0.001 * (step - probed))

    found, gate = answers(loss)
    assert list(found.values()) == probes * ["recompose"] + ["go"]
    assert gate.is_open


def test_the_pace_is_a_line_through_two_windows(rng):
    """By a fit of NumPy to many draws of the two."""
    gate = FlatLoss(80, base=0.99, variance=4e-4, before=1.0)
    gate.before_variance = 1e-4
    draws = rng.normal([[1.0], [0.99]], [[0.01], [0.02]], (2, 20_000))
    lines = np.polyfit([-1, 0], draws, 1)
    for windows in (1.0, 2.5):
        expected = lines[0] * windows + lines[1]
        mean, variance = gate._at_its_pace(windows)
        # Of 20,000 draws: four standard errors, of each.
        spread = expected.std() / 20_000**0.5
        assert abs(mean - expected.mean()) < 4 * spread
        np.testing.assert_allclose(variance, expected.var(), rtol=0.04)
    # A loss that rose is not expected to go on rising.
    gate.before = 0.9
    assert gate._at_its_pace(2.0)[0] == 0.99


def test_the_gate_closes_when_the_loss_falls_no_more():
    def loss(step, found):
        probed = min(found, default=step)
        return first(step) * max(0.9, 1 - 0.001 * (step - probed))

    found, gate = answers(loss)
    assert list(found.values()) == ["recompose", "go"]
    assert gate.phase == gates.STOPPED
    # For good, whatever it is given to read at the ends of epochs.
    for step in range(800, 1600, 10):
        assert gate.read(step, 1.0, 10) is None
        assert gate.phase == gates.STOPPED


@pytest.mark.parametrize("unit", [1e-3, 1e3])
def test_the_unit_of_the_loss_does_not_matter(unit):
    def loss(step, found):
        # The first probe brings nothing: all phases but the last are passed.
        probed = list(found)[1] if len(found) > 1 else step
        return slow(step) * (1 - 0.001 * (step - probed))

    expected, _ = answers(loss, noise=0.005)
    found, _ = answers(lambda *args: unit * loss(*args), noise=0.005)
    assert found == expected and "go" in found.values()


def test_a_loss_that_is_noise_is_not_taken_for_flat():
    """Where a fall could hide in the noise, the run stays as it is."""
    found, _ = answers(lambda step, _: first(step), noise=0.2)
    assert found == {}


def test_a_longer_look_sees_through_noise():
    """Noise of 8 % a reading: two windows are too few, and four are enough."""
    found, _ = answers(lambda step, _: first(step), noise=0.08)
    assert 320 <= min(found) and found[min(found)] == "recompose"


@pytest.mark.parametrize("floor", [0.0, 10.0])
def test_a_floor_below_the_loss_does_not_make_it_flat(floor):
    """Of what there is to learn, an eighth is learnt in each window."""
    found, _ = answers(lambda step, _: floor + np.exp(-step / 600))
    assert found == {}
    # With a twentieth it is flat, in time.
    found, _ = answers(
        lambda step, _: floor + first(step) + np.exp(-step / 200)
    )
    assert min(found) > 200


def test_a_run_that_has_not_begun_to_learn_is_not_flat():
    """A learning rate that warms up; `b` that is still small."""
    found, gate = answers(lambda step, _: 1.0)
    assert found == {} and gate.phase == gates.WAITING


def test_a_small_loss_is_a_loss_like_any_other():
    """One probe, which brings nothing, and the run is left alone."""
    found, gate = answers(lambda step, _: 1.0 if step < 20 else 5e-4)
    assert list(found.values()) == ["recompose"]
    assert gate.phase == gates.STOPPED


@pytest.mark.parametrize("loss", [np.nan, np.inf, -1.0, 0.0])
def test_odd_losses_do_not_break_it(loss):
    with np.errstate(invalid="ignore"):
        _, gate = answers(lambda step, _: loss)
    assert gate.read(10**4, 0.0, 0) is None


def test_round_trip_through_json():
    _, gate = answers(lambda step, _: first(step), steps=300)
    state = json.loads(json.dumps(gate.to_dict()))
    assert gate.points and FlatLoss.from_dict(state) == gate
