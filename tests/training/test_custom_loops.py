"""The loops of `examples/custom_loop_*.py` do what `fit` does."""

import importlib
import os
import pathlib
import re
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
from support import statistics
from support import to_numpy

import keras_srlora

BACKEND = keras.backend.backend()
EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
STEPS, BATCH, INTERVAL = 20, 24, 7
LEARNING_RATE = 3e-3
# So small that it does not matter where it is added to the root of the second
# moment: Keras does so before the bias correction, torch after it.
EPSILON = 1e-12
# As a part of a tensor's largest entry. TensorFlow and JAX were equal to the
# bit; another version may add up in another order. torch's own Adam and loss
# round differently from Keras's: 1e-5 after these steps.
TOLERANCE = 1e-4 if BACKEND == "torch" else 1e-5


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


@pytest.fixture(scope="module")
def run(examples, batches):
    """What the example's own loop leaves."""
    model, layers = adapted_model(examples)
    optimizer, arguments = optimizer_of(model, layers)
    updates = []
    update = keras_srlora.Sensitivity.update

    def counted_update(*args):
        updates.append(args)
        update(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras_srlora.Sensitivity, "update", counted_update)
        losses, record = examples.loop.train(
            model, *arguments, batches, INTERVAL
        )
    return types.SimpleNamespace(
        model=model,
        layers=layers,
        optimizer=optimizer,
        losses=losses,
        record=record,
        updates=len(updates),
    )


def adapted_model(examples):
    keras.utils.set_random_seed(0)
    model = examples.digits.new_model()
    return model, keras_srlora.enable_srlora(
        model, rank=4, target_rank=16, recipe="paper"
    )


def optimizer_of(model, layers):
    """As in the examples' `main`: the optimizer, and what `train` takes."""
    if BACKEND == "torch":
        import torch

        optimizer = torch.optim.AdamW(
            [v.value for v in model.trainable_variables],
            lr=LEARNING_RATE,
            eps=EPSILON,
            weight_decay=0.0,
        )
        return optimizer, (keras_srlora.Sensitivity(layers), optimizer)
    optimizer = keras_srlora.SensitivityOptimizer(keras_adam(), model)
    return optimizer, (optimizer,)


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
    model, layers = adapted_model(examples)
    model.compile(
        keras_adam(),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # As in the loops: XLA on JAX alone.
        jit_compile=BACKEND == "jax",
    )
    callback = keras_srlora.RecompositionCallback(interval=INTERVAL)
    model.fit(
        np.concatenate([x for x, _ in batches]),
        np.concatenate([y for _, y in batches]),
        batch_size=BATCH,
        shuffle=False,
        verbose=0,
        callbacks=[callback],
    )

    assert len(run.losses) == STEPS
    assert [event.step for event in run.events] == [7, 7, 14, 14]
    for actual, expected in zip(run.events, callback.events, strict=True):
        assert actual.step == expected.step
        assert actual.layer == expected.layer
        assert actual.slots == expected.slots
        assert actual.directions == expected.directions
        np.testing.assert_allclose(
            actual.scores, expected.scores, rtol=10 * TOLERANCE
        )
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
    optimizer, arguments = optimizer_of(model, layers)
    if BACKEND != "torch":
        optimizer.build(model.trainable_variables)
        run.model.compile(run.optimizer)
        model.compile(optimizer)
    run.model.save_weights(path)
    model.load_weights(path)

    expected = numbers_of(run.model, run.layers)
    for name, value in numbers_of(model, layers).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    for layer, saved in zip(layers, run.layers):
        np.testing.assert_array_equal(layer.record.unused, saved.record.unused)
    if BACKEND != "torch":
        for variable, saved in zip(
            optimizer.variables, run.optimizer.variables
        ):
            np.testing.assert_array_equal(
                to_numpy(variable), to_numpy(saved), err_msg=variable.path
            )


def run_script(backend, tmp_path, keras_backend=BACKEND):
    root = pathlib.Path(keras_srlora.__file__).parents[1]
    return subprocess.run(
        [
            sys.executable,
            EXAMPLES / f"custom_loop_{backend}.py",
            "--steps=40",
        ],
        env=os.environ
        | {
            "KERAS_BACKEND": keras_backend,
            "PYTHONPATH": str(root),
            "OMP_NUM_THREADS": "1",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_script_learns_and_recomposes(tmp_path):
    done = run_script(BACKEND, tmp_path)
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"loss (\S+)", done.stdout)]
    assert len(losses) == 10
    assert losses[-1] < 0.8 * losses[0]
    events = re.findall(r"step (\d+): (\S+) restarted", done.stdout)
    assert events == [
        (str(step), layer)
        for step in (6, 12, 18, 24, 30, 36)
        for layer in ("hidden_1", "hidden_2")
    ]
    before, after = re.search(
        r"5 to 9: (\S+) before, (\S+) after", done.stdout
    ).groups()
    assert float(after) > float(before) + 0.2


def test_script_refuses_another_backend(tmp_path):
    """The script of this backend; the suites of the others run theirs."""
    other = "jax" if BACKEND != "jax" else "torch"
    done = run_script(BACKEND, tmp_path, keras_backend=other)
    assert done.returncode == 1
    assert f"Received: KERAS_BACKEND={other}" in done.stderr
