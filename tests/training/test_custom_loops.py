"""The loops of `examples/custom_loop_*.py` do what `fit` does."""

import dataclasses
import importlib
import pathlib
import re
import types

import keras
import numpy as np
import pytest
from processes import Child
from processes import run_script
from support import statistics
from support import to_numpy

import keras_srlora
from keras_srlora.recipes.definition import RECIPES
from keras_srlora.recipes.gate import GOING
from keras_srlora.recipes.gate import FlatLoss

BACKEND = keras.backend.backend()
EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
STEPS, BATCH, INTERVAL = 20, 24, 7
LEARNING_RATE = 3e-3
# So small that it does not matter where it is added to the root of the second
# moment: Keras does so before the bias correction, torch after it.
EPSILON = 1e-12
# As a part of a tensor's largest entry. TensorFlow and JAX were equal to the
# bit; another version may add up in another order. torch's own Adam and loss
# round differently from Keras's: 1e-5 after these steps.
TOLERANCE = 1e-4 if BACKEND == "torch" else 1e-5


@keras.saving.register_keras_serializable("test_custom_loops")
@dataclasses.dataclass
class ThreeReadings(FlatLoss):
    """Opens the schedule with the mean of what it reads, whatever it is.

    A flat loss takes more steps than this test has. It reads each other step,
    and remembers the mean of the losses, so that reading others shows.
    """

    def is_due(self, step):
        return step - self.read_at >= 2

    def read(self, step, total, count):
        self.read_at = step
        self.points = [*self.points, (total / count, count)]
        if len(self.points) == 3:
            return "recompose"
        if len(self.points) == 6:
            self.phase = GOING
            return "go"
        return None


@pytest.fixture(scope="module")
def examples():
    """The modules: the task, and the loop of this backend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield types.SimpleNamespace(
            digits=importlib.import_module("_digits"),
            loop=importlib.import_module(f"custom_loop_{BACKEND}"),
        )


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads cost more than they give in a network this small."""
    if BACKEND != "torch":
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def batches(examples):
    (x, y), _ = examples.digits.load(range(5, 10))
    starts = range(0, STEPS * BATCH, BATCH)
    return [(x[i : i + BATCH], y[i : i + BATCH]) for i in starts]


def gated_recipe():
    """Opens by itself: after three readings probes, after six goes on."""
    return keras_srlora.Recipe(
        start="lora",
        selection="oldest",
        scale="as_lora",
        slots="zero",
        gate=ThreeReadings,
    )


# The published recipe, at an interval; and the default one, in small: pairs
# that live six steps, directions that come again, and the stop.
RUNS = {
    "paper": {"recipe": "paper", "interval": INTERVAL},
    "default": {
        "recipe": keras_srlora.Recipe(
            **{
                **RECIPES["adaptive"].to_dict(),
                "steps_per_pair": 6,
                "predictions_per_pair": 1,
                "lives_per_run": 1,
            }
        ),
        "total_steps": STEPS,
    },
    "gate": {"recipe": gated_recipe(), "total_steps": STEPS},
}


@pytest.fixture(scope="module", params=RUNS)
def run(request, examples, batches):
    """What the example's own loop leaves."""
    model, layers = adapted_model(examples)
    arguments = RUNS[request.param]
    recomposer = keras_srlora.Recomposer(
        model, loop_optimizer(model), **arguments
    )
    updates = []
    update = keras_srlora.Sensitivity.update

    def counted_update(*args):
        updates.append(args)
        update(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras_srlora.Sensitivity, "update", counted_update)
        losses = examples.loop.train(model, recomposer, batches)
    return types.SimpleNamespace(
        name=request.param,
        arguments=arguments,
        model=model,
        layers=layers,
        recomposer=recomposer,
        losses=losses,
        updates=len(updates),
    )


def adapted_model(examples):
    keras.utils.set_random_seed(0)
    model = examples.digits.new_model()
    return model, keras_srlora.enable_srlora(
        model, rank=4, target_rank=16, recipe="paper"
    )


def loop_optimizer(model):
    """As in the examples' `main`."""
    if BACKEND == "torch":
        import torch

        return torch.optim.AdamW(
            [v.value for v in model.trainable_variables],
            lr=LEARNING_RATE,
            eps=EPSILON,
            weight_decay=0.0,
        )
    return keras_adam()


def keras_adam():
    return keras.optimizers.Adam(LEARNING_RATE, epsilon=EPSILON)


def numbers_of(model, layers):
    """Every number that a run leaves in a model, by name."""
    numbers = {v.path: to_numpy(v) for v in model.variables}
    for layer in layers:
        for name, value in statistics(layer)._asdict().items():
            numbers[f"{layer.path}/{name}"] = to_numpy(value)
    return numbers


def test_loop_equals_fit(examples, batches, run):
    """The same recipe: gate, schedule and stop included."""
    model, layers = adapted_model(examples)
    model.compile(
        keras_adam(),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # As in the loops: XLA on JAX alone.
        jit_compile=BACKEND == "jax",
    )
    callback = keras_srlora.RecompositionCallback(
        interval=run.arguments.get("interval"),
        recipe=run.arguments["recipe"],
    )
    model.fit(
        np.concatenate([x for x, _ in batches]),
        np.concatenate([y for _, y in batches]),
        batch_size=BATCH,
        shuffle=False,
        verbose=0,
        callbacks=[callback],
    )

    assert len(run.losses) == STEPS
    events = run.recomposer.events
    steps = [event.step for event in events]
    expected = {
        # Six recompositions for twelve directions.
        "paper": [7, 7, 14, 14],
        # Half of the pairs each three steps, until 0.85 of the run.
        "default": [s for s in (3, 6, 9, 12, 15) for _ in layers],
    }
    assert steps == expected.get(run.name, steps)
    assert len(steps) >= 2
    for actual, expected in zip(events, callback.events, strict=True):
        assert actual.step == expected.step
        assert actual.layer == expected.layer
        assert actual.slots == expected.slots
        assert actual.directions == expected.directions
        np.testing.assert_allclose(
            actual.scores, expected.scores, rtol=10 * TOLERANCE
        )
    if run.name == "gate":
        # Both read the same losses at the same steps.
        loop, in_fit = (
            np.array(x.pace.state.gate.points)
            for x in (run.recomposer, callback.recomposer)
        )
        np.testing.assert_allclose(loop[:, 0], in_fit[:, 0], rtol=TOLERANCE)
        # `fit` counts examples, the loop its batches.
        np.testing.assert_array_equal(BATCH * loop[:, 1], in_fit[:, 1])
    actual = numbers_of(run.model, run.layers)
    expected = numbers_of(model, layers)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(
            actual[name],
            value,
            rtol=0,
            atol=TOLERANCE * np.abs(value).max(),
            err_msg=name,
        )


def test_recompositions_do_not_trace_the_step_again(run):
    # Python runs when a step is traced; in torch's loop, in each step.
    assert run.updates == (STEPS if BACKEND == "torch" else 1)


def test_weights_file_carries_what_the_loop_needs(examples, run, tmp_path):
    """As the documentation says: a new model goes on from the file."""
    path = tmp_path / "run.weights.h5"
    model, layers = adapted_model(examples)
    if BACKEND != "torch":
        run.model.compile(run.recomposer.optimizer)
    run.model.save_weights(path)
    recomposer = keras_srlora.Recomposer(
        model, loop_optimizer(model), **run.arguments
    )
    if BACKEND != "torch":
        recomposer.optimizer.build(model.trainable_variables)
        model.compile(recomposer.optimizer)
    model.load_weights(path)

    assert recomposer.steps_done == STEPS
    np.testing.assert_array_equal(
        recomposer.to_arrays()["state"], run.recomposer.to_arrays()["state"]
    )
    expected = numbers_of(run.model, run.layers)
    for name, value in numbers_of(model, layers).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    for layer, saved in zip(layers, run.layers):
        np.testing.assert_array_equal(layer.record.unused, saved.record.unused)
    if BACKEND != "torch":
        for variable, saved in zip(
            recomposer.optimizer.variables, run.recomposer.optimizer.variables
        ):
            np.testing.assert_array_equal(
                to_numpy(variable), to_numpy(saved), err_msg=variable.path
            )


def start_script(folder, *arguments, backend=BACKEND):
    return Child(
        run_script,
        (str(EXAMPLES / f"custom_loop_{BACKEND}.py"), arguments),
        folder / "log.txt",
        {"KERAS_BACKEND": backend},
    )


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["lora_restarts", "paper"])
def test_script_learns_and_recomposes(recipe, tmp_path):
    """With its own recipe, and with another one."""
    # A life is 100 steps of two pairs each, until half of the run.
    arguments, steps = ["--steps=400"], (50, 100, 150)
    if recipe == "paper":
        arguments = ["--steps=40", "--recipe=paper"]
        steps = (7, 14, 20, 27, 34)
    expected = [
        (str(step), layer)
        for step in steps
        for layer in ("hidden_1", "hidden_2")
    ]
    printed = start_script(tmp_path, *arguments).assert_ends()
    losses = [float(x) for x in re.findall(r"loss (\S+)", printed)]
    assert len(losses) == 10
    assert losses[-1] < 0.8 * losses[0]
    events = re.findall(r"step (\d+): (\S+) restarted", printed)
    assert events == expected
    before, after = re.search(
        r"5 to 9: (\S+) before, (\S+) after", printed
    ).groups()
    assert float(after) > float(before) + 0.2


@pytest.mark.slow
def test_script_refuses_another_backend(tmp_path):
    """The script of this backend; the suites of the others run theirs."""
    other = "jax" if BACKEND != "jax" else "torch"
    printed = start_script(tmp_path, backend=other).assert_ends(1)
    assert f"Received: KERAS_BACKEND={other}" in printed
