"""Many devices take the same decisions, and end where one device ends."""

import json
import pathlib
import signal
import socket

import devices_run
import keras
import numpy as np
import pytest
from processes import Child

BACKEND = keras.backend.backend()


def only_on(backend):
    return pytest.mark.skipif(BACKEND != backend, reason=f"{backend} alone")


def run(engine, folder, ports=(), index=0):
    """Starts a function of `devices_run.py` in a child process."""
    flags = f"--xla_force_host_platform_device_count={2 if ports else 4}"
    if engine == "sharded_kernels":
        flags += f" --xla_dump_to={folder} --xla_dump_hlo_as_text"
    # Threads for all devices, however few cores there are; see docs/devices.md.
    environment = {"XLA_FLAGS": flags, "PJRT_NPROC": "16"}
    if engine == "multi_worker":
        workers = [f"127.0.0.1:{port}" for port in ports]
        environment["TF_CONFIG"] = json.dumps(
            {
                "cluster": {"worker": workers},
                "task": {"type": "worker", "index": index},
            }
        )
    return Child(
        getattr(devices_run, engine),
        (folder, ports[0], index) if ports else (folder,),
        folder / f"log_{engine}_{index}.txt",
        environment,
    )


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


def start_two(engine, folder):
    """Starts the script twice, as two processes of one run."""
    with socket.socket() as one, socket.socket() as other:
        for free in (one, other):
            free.bind(("127.0.0.1", 0))
        ports = [free.getsockname()[1] for free in (one, other)]
    return [run(engine, folder, ports, index) for index in (0, 1)]


def run_two(engine, folder):
    for child in start_two(engine, folder):
        child.assert_ends()
    first, second = (load(folder, f"process_{index}") for index in (0, 1))
    assert_equal_to_the_bit(first, second)
    return first


@only_on("tensorflow")
def test_mirrored_strategy(on_one_device, tmp_path):
    run("mirrored", tmp_path).assert_ends()
    found = load(tmp_path)
    assert_ends_where_one_device_does(found, on_one_device)
    # The scores are of the gradient of the whole batch.
    for name in ("first average_a", "second uncertainty_b"):
        np.testing.assert_allclose(found[name], on_one_device[name], rtol=1e-4)
    for replica in ("replica_0", "replica_1"):
        assert_equal_to_the_bit(load(tmp_path, replica), found)


@only_on("tensorflow")
def test_a_gradient_must_be_finite_on_all_replicas(tmp_path):
    run("mirrored_mishaps", tmp_path).assert_ends()
    found = load(tmp_path)
    assert not found["factor"].any() and not found["head"].any()
    assert (found["nothing"] > 0).any(axis=-1).all()
    assert "in `with strategy.scope():`" in str(found["message"])


@only_on("tensorflow")
def test_multi_worker_loop(on_one_device, tmp_path):
    found = run_two("multi_worker", tmp_path)
    # `fit` and the loop round differently; no fit counts the epochs.
    assert_ends_where_one_device_does(found, on_one_device)


@only_on("jax")
def test_one_process_of_four_devices(on_one_device, tmp_path):
    run("one_process", tmp_path).assert_ends()
    found = load(tmp_path, "data_parallel")
    assert_ends_where_one_device_does(found, on_one_device)
    for device in range(4):
        found = load(tmp_path, f"device_{device}")
        assert_ends_where_one_device_does(found, on_one_device)
        assert_equal_to_the_bit(found, load(tmp_path, "device_0"))
    found = load(tmp_path, "model_parallel")
    # After recompositions that assigned to all of them.
    assert {
        name: str(found.pop(name)) for name in [*found] if "spec" in name
    } == {
        "spec first/kernel": "(None, 'model')",
        "spec first/lora_kernel_a": "()",
        "spec first/lora_kernel_b": "(None, 'model')",
        "spec second/kernel": "('model',)",
        "spec second/lora_kernel_a": "(None, 'model')",
        "spec second/lora_kernel_b": "()",
    }
    assert_ends_where_one_device_does(found, on_one_device)


@pytest.fixture(scope="module")
def sharded_kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded_kernels")
    run("sharded_kernels", folder).assert_ends()
    return load(folder)


@only_on("jax")
def test_sharded_kernels_stay_in_parts(sharded_kernels):
    found = sharded_kernels
    for name in ("rows", "columns", "gemma", "llama"):
        programs, *whole = found[name]
        assert int(programs) > 10
        assert not whole, (name, whole[:3])
        before, after = found[f"{name} specs"]
        assert before.tolist() == after.tolist()
        assert all("model" in spec for spec in after)
        bound = 0.02 if name == "llama" else 1e-5
        assert found[f"{name} drift"] < bound


@only_on("jax")
def test_a_layout_map_without_keys_for_factors(sharded_kernels):
    found = sharded_kernels
    assert found["columns warnings"].size == 0
    (message,) = found["rows warnings"]
    assert "layout_map['wide/lora_kernel_a'] = (None, 'model')" in message
    assert "lora_kernel_b" not in message
    (message,) = found["gemma warnings"]
    assert "no key for 14 of their factors" in message
    path = "decoder_block_0/attention/attention_output"
    assert f"{path}/lora_kernel_a'] = (None, 'model')" in message
    assert f"{path}/lora_kernel_b'] = (None, 'batch')" in message
    (message,) = found["llama warnings"]
    assert "no key for 14 of their factors" in message


@only_on("jax")
def test_two_processes(on_one_device, tmp_path):
    found = run_two("two_processes", tmp_path)
    assert_ends_where_one_device_does(found, on_one_device)


@only_on("jax")
def test_kernels_that_span_processes(on_one_device, tmp_path):
    found = run_two("spanning_kernels", tmp_path)
    trained, disabled, again, merged = found.pop("outputs")
    assert_ends_where_one_device_does(found, on_one_device)
    assert np.abs(trained - disabled).max() > 0.01
    np.testing.assert_array_equal(trained, again)
    np.testing.assert_allclose(trained, merged, rtol=0, atol=1e-5)


@only_on("torch")
@pytest.mark.parametrize("engine", ["torch_fit", "torch_loop"])
def test_two_gloo_processes(engine, on_one_device, tmp_path):
    found = run_two(engine, tmp_path)
    assert_ends_where_one_device_does(found, on_one_device)


@only_on("torch")
def test_processes_that_would_part_are_refused(tmp_path):
    found = run_two("torch_mishaps", tmp_path)
    assert "different weights" in str(found["weights"])
    assert "different scores" in str(found["gradients"])
    assert "Average the gradients" in str(found["gradients"])
    assert found["weights kept"] and found["gradients kept"]
    # Of the losses of both: the first, and those of the last windows.
    assert found["gate"][0] > 0 and len(found["gate"]) > 2


@pytest.mark.skipif(BACKEND == "tensorflow", reason="`fit` cannot")
def test_two_processes_killed_and_resumed(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    folder.mkdir()
    first, second = start_two("killed", folder)
    second.assert_ends(-signal.SIGKILL)
    first.kill()
    # One process had saved the epoch, the other was about to.
    names = {path.name for path in folder.glob("epoch-*")}
    assert "epoch-02-1.weights.h5" in names
    assert "epoch-03-1.weights.h5" not in names
    children = start_two("resumable", folder), start_two("resumable", whole)
    for child in sum(children, []):
        child.assert_ends()
    for index in (0, 1):
        resumed, expected = (
            load(x, f"process_{index}") for x in (folder, whole)
        )
        assert resumed.pop("first epoch") == 2
        assert expected.pop("first epoch") == 0
        # The records of the callbacks are of what each has seen.
        for name in ("steps", "slots", "directions"):
            assert_tail(resumed.pop(name), expected.pop(name))
        assert_equal_to_the_bit(resumed, expected)


def assert_tail(tail, whole):
    assert 0 < len(tail) < len(whole)
    np.testing.assert_array_equal(tail, whole[-len(tail) :])
