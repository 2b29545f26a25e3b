"""`Recomposer`: a run in a loop, saved and restored.

The loops here compute their gradients by hand, so that they are the same on
every backend; `test_custom_loops.py` has those of the examples.
"""

import warnings

import keras
import numpy as np
import pytest
import reference
from keras import ops
from support import GATED
from support import assert_same_variables
from support import effective
from support import frozen_kernel
from support import state_arrays
from support import statistics
from support import to_numpy

import keras_srlora
from keras_srlora import Recipe
from keras_srlora import Recomposer
from keras_srlora.files.packing import pack
from keras_srlora.files.packing import unpack
from keras_srlora.recipes.gate import FlatLoss

STEPS, SIDE, RATE = 240, 12, 0.05
# With a gate, for a run of 240 steps: a window of 24, read each 3.
QUICK = Recipe(**{**GATED.to_dict(), "steps_per_pair": 12})


class Loop:
    """A student of rank 1 of a teacher of rank 12, and its loop."""

    def __init__(self, recipe=QUICK, **kwargs):
        keras.utils.set_random_seed(5)
        rng = np.random.default_rng(1)
        self.x = rng.standard_normal((64, SIDE)).astype("float32")
        self.y = self.x @ rng.standard_normal((SIDE, SIDE)).astype("float32")
        inputs = keras.Input((SIDE,))
        self.layer = keras_srlora.SRLoRADense(
            SIDE, rank=1, use_bias=False, name="student", recipe=recipe
        )
        self.model = keras.Model(inputs, self.layer(inputs))
        self.kwargs = kwargs or {"total_steps": STEPS}
        self.reports = 0

    def begin(self, **kwargs):
        self.recomposer = Recomposer(
            self.model, keras.optimizers.Adam(RATE), **{**self.kwargs, **kwargs}
        )
        self.optimizer = self.recomposer.optimizer
        self.optimizer.build(self.model.trainable_variables)
        return self

    def train(self):
        """A step; returns the loss before it."""
        a, b = (to_numpy(v).astype("float64") for v in self.layer.factors)
        kernel, scale = frozen_kernel(self.layer), self.layer.scale
        gradients = reference.linear_gradients(
            self.x, self.y, kernel, a.T, b, 0.0, scale
        )
        self.optimizer.apply(
            [
                ops.convert_to_tensor(g.astype("float32"))
                for g in (gradients["a"].T, gradients["b"])
            ],
            list(self.layer.factors),
        )
        outputs = self.x @ (kernel + scale * a.T @ b)
        return float(np.mean((outputs - self.y) ** 2))

    def run(self, first=0, last=STEPS, report=None):
        """Returns the losses; `report` is told each."""
        report = report or (lambda step, loss: self.report(loss))
        losses = []
        for step in range(first, last):
            self.recomposer.before_step(step)
            losses.append(self.train())
            report(step, losses[-1])
        return losses

    def report(self, loss):
        self.recomposer.report_loss(loss)

    @property
    def steps(self):
        return [event.step for event in self.recomposer.events]


@pytest.fixture(scope="module")
def whole():
    """A run that nothing interrupted."""
    loop = Loop().begin()
    loop.losses = loop.run()
    return loop


# Deciding.


def test_a_loop_says_how_many_predictions_a_step_learns_from():
    recipe = Recipe(
        start="lora",
        scale="as_lora",
        slots="zero",
        schedule="by_life",
        predictions_per_pair=1000,
        lives_per_run=5,
    )
    arguments = {"recipe": recipe, "total_steps": STEPS}
    with pytest.warns(UserWarning, match="from 10 predictions.*for 100 steps"):
        few = Loop().begin(predictions_per_step=10, **arguments)
    few.run()
    assert few.steps == []
    # A life of 25 steps.
    loop = Loop().begin(predictions_per_step=40, **arguments)
    loop.run(last=60)
    assert loop.steps == [25, 50]
    # The data repeat: an epoch of 24 steps has 960 predictions.
    with pytest.warns(UserWarning, match="an epoch has 960"):
        short = Loop().begin(
            predictions_per_step=40, steps_per_epoch=24, **arguments
        )
    short.run()
    assert short.steps == []
    loop = Loop().begin(
        predictions_per_step=40, steps_per_epoch=25, **arguments
    )
    loop.run(last=60)
    assert loop.steps == [25, 50]
    # Not told, it counts steps, and warns where they would be enough.
    with pytest.warns(UserWarning, match="predictions .* is unknown"):
        Loop().begin(**arguments)
    with pytest.raises(ValueError, match="steps_per_epoch.*Received"):
        Loop().begin(steps_per_epoch=0, **arguments)
    with pytest.raises(ValueError, match="predictions_per_step.*Received"):
        Loop().begin(predictions_per_step=0, **arguments)


def test_a_loop_follows_the_whole_recipe(whole):
    """Gate, schedule and stop: nothing, a probe, and then a row of them."""
    steps = whole.steps
    assert len(steps) >= 5
    assert steps[0] >= 48  # two windows that are flat
    assert steps[1] - steps[0] >= 24  # the probe is judged by a window
    intervals = np.diff(steps[1:])
    assert intervals.min() >= 12 and intervals.max() - intervals.min() <= 2
    assert max(steps) < QUICK.stop * STEPS
    assert [e.directions for e in whole.recomposer.events] == [
        (i,) for i in range(len(steps))
    ]
    assert max(e.drift for e in whole.recomposer.events) <= 1e-5
    # What a rank of 1 leaves stays without it.
    plain = Loop(Recipe(start="lora", stop=1e-3), interval=STEPS)
    with pytest.warns(UserWarning, match="Nothing will be recomposed"):
        plain.begin(total_steps=STEPS)
    assert whole.losses[-1] < 0.9 * plain.run()[-1]


@pytest.mark.parametrize("how", ["tensors", "sums", "backlog"])
def test_losses_may_be_reported_as_tensors_and_as_sums(how, whole):
    loop = Loop().begin()
    kept = []

    def report(step, loss):
        if how == "tensors":
            loop.recomposer.report_loss(ops.convert_to_tensor(loss, "float32"))
            return
        kept.append(loss)
        # The gate reads each three steps.
        if (step + 1) % 3 == 0:
            if how == "sums":
                loop.recomposer.report_loss(sum(kept), len(kept))
            else:
                for loss in kept:
                    loop.recomposer.report_loss(loss)
            kept.clear()

    losses = loop.run(report=report)
    assert loop.steps == whole.steps
    np.testing.assert_array_equal(losses, whole.losses)


def test_a_loop_that_reports_no_loss_is_told_once():
    loop = Loop().begin()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.run(last=120, report=lambda step, loss: None)
    (said,) = [w for w in caught if "report_loss" in str(w.message)]
    assert "has read no loss until step" in str(said.message)
    assert "'flat_loss'" in str(said.message)
    assert not loop.steps


def test_a_recipe_without_a_gate_needs_no_losses():
    loop = Loop("paper", total_steps=24).begin()
    loop.run(last=24, report=lambda step, loss: None)
    # 24 steps and the seven directions that are left: each 3.43 steps.
    assert loop.steps == [4, 7, 11, 14, 18, 21]


def test_with_an_interval_the_gate_is_left_out():
    loop = Loop(interval=5).begin()
    loop.run(last=22, report=lambda step, loss: None)
    assert loop.steps == [5, 10, 15, 20]


def test_variables_change_only_where_it_is_due():
    """What a JAX loop relies on; asking changes nothing."""
    loop = Loop().begin()
    due = []
    for step in range(STEPS):
        is_due = loop.recomposer.is_due(step)
        assert loop.recomposer.is_due(step) is is_due
        before = [to_numpy(v) for v in loop.model.variables]
        events = loop.recomposer.before_step(step)
        changed = any(
            not np.array_equal(old, to_numpy(new))
            for old, new in zip(before, loop.model.variables)
        )
        assert changed == bool(events) and (is_due or not events)
        due.append(is_due)
        loop.report(loop.train())
    assert 10 < sum(due) < STEPS / 2
    assert not any(due[int(QUICK.stop * STEPS) :])


def test_a_list_of_layers_will_do(whole):
    loop = Loop()
    loop.recomposer = Recomposer(
        [loop.layer], keras.optimizers.Adam(RATE), total_steps=STEPS
    )
    loop.optimizer = loop.recomposer.optimizer
    loop.run()
    assert loop.steps == whole.steps
    assert_same_variables(loop.layer.variables, whole.layer.variables)


def test_the_arguments_are_those_of_the_callback(capsys):
    loop = Loop(
        Recipe(start="lora"), interval=4, fusion_ratio=1.0, verbose=1
    ).begin()
    loop.run(last=9)
    assert loop.steps == [4, 8]
    assert loop.recomposer.recipe.fusion_ratio == 1.0
    assert loop.layer.recipe.fusion_ratio == 0.5
    assert capsys.readouterr().out.count("step 4: recomposed 1 of 1") == 1


def test_the_scores_are_those_of_the_recipes_betas():
    """One step from zero: `(1 - beta) |w g|`."""
    loops = [Loop(Recipe(beta1=b, beta2=0.5), interval=9) for b in (0.0, 0.75)]
    for loop in loops:
        loop.begin().run(last=1)
    first, second = (statistics(loop.layer) for loop in loops)
    np.testing.assert_allclose(
        second.average_b, 0.25 * first.average_b, rtol=1e-6
    )
    assert first.average_b.max() > 0


def test_a_gate_that_reads_no_more_keeps_no_tensors():
    loop = Loop().begin()
    loop.recomposer.before_step(STEPS)
    for _ in range(1000):
        loop.recomposer.report_loss(ops.ones(()))
    state = loop.recomposer.pace.state
    assert len(state.reported) <= 257 and state.losses() == (1000.0, 1000.0)


# Saved and restored.


def saved(loop, path):
    """What a user keeps of an interrupted loop."""
    loop.model.save_weights(path)
    return [to_numpy(v) for v in loop.optimizer.variables]


def by_a_file_before(path, optimizer, arrays):
    loop = Loop()
    loop.model.load_weights(path)
    loop.begin()
    loop.recomposer.restore()
    return loop


def by_a_file_afterwards(path, optimizer, arrays):
    loop = Loop().begin()
    loop.model.load_weights(path)
    return loop


def by_arrays(path, optimizer, arrays):
    """The state in a file of the user's own."""
    loop = Loop()
    loop.model.load_weights(path)
    loop.begin()
    with np.load(arrays) as file:
        loop.recomposer.restore(dict(file))
    return loop


@pytest.mark.parametrize("where", ["waiting", "probing", "going"])
@pytest.mark.parametrize(
    "route", [by_a_file_before, by_a_file_afterwards, by_arrays]
)
def test_a_restored_run_is_the_whole_one_to_the_bit(
    route, where, whole, tmp_path
):
    probe, go, *_ = whole.steps
    last = {"waiting": probe - 10, "probing": probe + 5, "going": go + 5}
    interrupted = Loop().begin()
    interrupted.run(last=last[where])
    path, arrays = tmp_path / "x.weights.h5", tmp_path / "run.npz"
    optimizer = saved(interrupted, path)
    np.savez(arrays, **interrupted.recomposer.to_arrays())
    loop = route(path, optimizer, arrays)
    for variable, value in zip(loop.optimizer.variables, optimizer):
        variable.assign(value)
    assert loop.recomposer.steps_done == last[where]
    losses = loop.run(loop.recomposer.steps_done)
    np.testing.assert_array_equal(losses, whole.losses[last[where] :])
    assert interrupted.steps + loop.steps == whole.steps
    assert_same_variables(loop.model.variables, whole.model.variables)
    expected = state_arrays(whole.layer)
    found = state_arrays(loop.layer)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, name)


def test_what_was_loaded_is_saved_again(tmp_path):
    """Between `load_weights` and the first step nothing is lost."""
    loop = Loop().begin()
    loop.run(last=30)
    loop.model.save_weights(tmp_path / "a.weights.h5")
    other = Loop()
    other.model.load_weights(tmp_path / "a.weights.h5")
    other.model.save_weights(tmp_path / "b.weights.h5")
    third = Loop()
    third.model.load_weights(tmp_path / "b.weights.h5")
    expected, found = state_arrays(loop.layer), state_arrays(third.layer)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, name)


def test_the_file_says_what_it_holds():
    """By field name, with a format and the kind of the gate."""
    loop = Loop().begin()
    loop.run(last=30)
    state = unpack(loop.recomposer.to_arrays()["state"], "run", 1)
    assert state["begun"] == 29 and state["gate_kind"] == "flat_loss"
    assert state["gate"]["window"] == 24
    assert set(state["schedule"]) == {
        "interval",
        "origin",
        "recomposed_at",
        "turns",
        "turn",
    }


def test_another_number_of_predictions_in_a_restored_run_is_named():
    loop = Loop().begin(predictions_per_step=40)
    arrays = loop.recomposer.to_arrays()
    Loop().begin(predictions_per_step=40).recomposer.restore(arrays)
    Loop().begin().recomposer.restore(arrays)
    other = Loop().begin(predictions_per_step=50).recomposer
    with pytest.warns(UserWarning, match="counts 40 .*predictions_per_step=50"):
        other.restore(arrays)
    assert other.pace.state.predictions == 40


def test_nothing_to_restore_is_refused():
    with pytest.raises(ValueError, match="no saved run.*load the weights"):
        Loop().begin().recomposer.restore()


def test_another_format_is_refused_by_both_numbers():
    recomposer = Loop().begin().recomposer
    array = pack({"begun": 3}, "run", 99)
    with pytest.raises(ValueError, match="format 99.*run of format 1"):
        recomposer.restore({"state": array})
    # And the run that was refused goes on.
    assert recomposer.before_step(0) == []


@keras.saving.register_keras_serializable("test_recomposer")
class AnotherGate(FlatLoss):
    pass


@pytest.mark.parametrize(
    ("gate", "named"),
    [("none", "'none'"), (AnotherGate, "'test_recomposer>AnotherGate'")],
)
def test_a_gate_of_another_kind_is_refused_by_both_names(gate, named):
    arrays = Loop().begin().recomposer.to_arrays()
    recipe = Recipe(**{**QUICK.to_dict(), "gate": gate})
    recomposer = Loop(recipe).begin().recomposer
    with pytest.raises(ValueError, match=f"'flat_loss' in the.*gate={named}"):
        recomposer.restore(arrays)


def test_a_gate_of_ones_own_is_saved_and_restored():
    recipe = Recipe(**{**QUICK.to_dict(), "gate": AnotherGate})
    loop = Loop(recipe).begin()
    loop.run(last=60)
    other = Loop(recipe).begin()
    other.recomposer.restore(loop.recomposer.to_arrays())
    gate = other.recomposer.pace.state.gate
    assert type(gate) is AnotherGate
    assert gate == loop.recomposer.pace.state.gate


# Bad input.


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"total_steps": None}, "pass `total_steps`, or an `interval`"),
        ({"total_steps": -1}, "`total_steps` must be a positive"),
        ({"total_steps": 2.5}, "`total_steps` must be a positive"),
        ({"interval": 0}, "`interval` must be a positive"),
        ({"fusion_ratio": 0.0}, "`fusion_ratio` must be"),
        ({"recipe": "best"}, "`recipe` must be one of"),
    ],
)
def test_bad_arguments_are_refused_before_anything_changes(kwargs, message):
    loop = Loop()
    before = [to_numpy(v) for v in loop.model.variables]
    with pytest.raises(ValueError, match=f"{message}.*Received"):
        loop.begin(**kwargs)
    assert not loop.layer.initialized
    assert state_arrays(loop.layer) == {}
    assert_same_variables(before, loop.model.variables)


@pytest.mark.parametrize("step", [-1, 2.0, None, True])
def test_a_step_that_is_none_is_refused(step):
    with pytest.raises(ValueError, match="number of training steps done"):
        Loop().begin().recomposer.before_step(step)


def test_an_optimizer_that_is_none_is_refused():
    loop = Loop()
    with pytest.raises(ValueError, match="needs a `keras.optimizers"):
        Recomposer(loop.model, "adam", total_steps=9)
    assert not loop.layer.initialized


def test_a_layer_that_was_frozen_since_is_noticed():
    loop = Loop(interval=4).begin()
    loop.run(last=6)
    loop.layer.trainable = False
    kernel = effective(loop.layer)
    with pytest.raises(RuntimeError, match="frozen during the run.*'student'"):
        loop.recomposer.before_step(8)
    np.testing.assert_array_equal(effective(loop.layer), kernel)
