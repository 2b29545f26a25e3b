"""Directions files, the progress bar, and the memory that conversion takes."""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from support import assert_same_variables
from support import to_numpy

import keras_srlora
from keras_srlora.backend import progress
from keras_srlora.files import directions as directions_file
from keras_srlora.files import tensors as tensors_file

pytest.importorskip("safetensors")

NAMES = ["first", "second", "third"]


def plain_model(dtype="float32", widths=(40, 40)):
    """Pretrained, so to speak; of the same names and weights each time."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((30,), dtype=dtype)
    x = inputs
    for name, width in zip(NAMES, widths):
        x = keras.layers.Dense(width, name=name, dtype=dtype)(x)
    x = keras.layers.Reshape((4, widths[-1] // 4), dtype=dtype)(x)
    x = keras.layers.EinsumDense(
        "btd,ndh->btnh", (4, 5, 9), name="third", dtype=dtype
    )(x)
    x = keras.layers.Flatten()(x)
    outputs = keras.layers.Dense(2, name="head", dtype=dtype)(x)
    return keras.Model(inputs, outputs)


def convert(path, model=None, rank=2, target_rank=6, **kwargs):
    """Converts a model; returns it and its three converted layers."""
    model = model or plain_model()
    layers = keras_srlora.enable_srlora(
        model, rank, target_rank=target_rank, directions=path, **kwargs
    )
    return model, layers


def assert_same_directions(layers, others):
    for layer, other in zip(layers, others, strict=True):
        mine, theirs = (x.record.directions for x in (layer, other))
        for x, y in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.directions.safetensors"


@pytest.fixture
def decomposed(monkeypatch):
    """The shapes of the kernels that were decomposed."""
    shapes = []
    original = directions_file.decompose

    def counted(matrix, count, method):
        shapes.append(tuple(matrix.shape))
        return original(matrix, count, method)

    monkeypatch.setattr(directions_file, "decompose", counted)
    return shapes


def again(path, decomposed, **kwargs):
    """The layers of a further run, and what was decomposed in it."""
    decomposed.clear()
    _, layers = convert(path, **kwargs)
    return layers, list(decomposed)


# What is read.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", ["adaptive", "paper"])
@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_the_second_run_decomposes_nothing(
    method, recipe, dtype, path, decomposed
):
    kwargs = {"recipe": recipe, "decomposition": method}
    model, layers = convert(path, plain_model(dtype), **kwargs)
    assert len(decomposed) == 3
    written = path.read_bytes()
    without = plain_model(dtype)
    keras_srlora.enable_srlora(without, 2, target_rank=6, **kwargs)
    decomposed.clear()
    second, others = convert(path, plain_model(dtype), **kwargs)
    assert not decomposed
    assert path.read_bytes() == written
    assert_same_directions(layers, others)
    assert_same_variables(model.variables, second.variables)
    assert_same_variables(without.variables, second.variables)


def test_any_safetensors_reader_reads_it(path):
    import safetensors.numpy

    _, layers = convert(path)
    tensors = safetensors.numpy.load_file(path)
    for layer in layers:
        for field, array in layer.record.directions._asdict().items():
            read = tensors.pop(f"{layer.path}/{field}")
            np.testing.assert_array_equal(read, array)
    assert not tensors


def test_more_directions_serve_fewer(path, decomposed):
    _, layers = convert(path, target_rank=9)
    written = path.read_bytes()
    others, shapes = again(path, decomposed, target_rank=6)
    assert not shapes
    assert path.read_bytes() == written
    for layer, other in zip(layers, others):
        mine, theirs = (x.record.directions for x in (layer, other))
        for x, y in zip(mine, theirs):
            np.testing.assert_array_equal(x[:6], y)
            assert len(y) == 6


def test_a_model_without_enable_srlora(path, decomposed):
    def build():
        keras.utils.set_random_seed(7)
        x = inputs = keras.Input((30,))
        for name in NAMES:
            x = keras_srlora.SRLoRADense(30, rank=2, name=name)(x)
        return keras.Model(inputs, x)

    first = keras_srlora.initialize_factors(build(), directions=path)
    assert len(decomposed) == 3
    second = keras_srlora.initialize_factors(build(), directions=path)
    assert len(decomposed) == 3
    assert_same_directions(first, second)
    # What is decomposed already is not looked for.
    model = build()
    keras_srlora.initialize_factors(model)
    other = path.with_name("other")
    keras_srlora.initialize_factors(model, directions=other)
    assert not other.exists()


def test_the_kernel_is_taken_as_it_is_now(path, decomposed):
    """What was trained before decomposing belongs to it."""
    x = inputs = keras.Input((30,))
    layer = keras_srlora.SRLoRADense(20, rank=2, name="first")
    model = keras.Model(inputs, layer(x))
    layer.lora_kernel_b.assign(np.ones((2, 20)))
    expected = to_numpy(layer.effective_kernel())
    with pytest.warns(UserWarning, match="is their pretrained kernel"):
        keras_srlora.initialize_factors(model, directions=path)
    values = np.linalg.svd(expected, compute_uv=False)[:16]
    found = layer.record.directions.singular_values
    np.testing.assert_allclose(found, values, rtol=1e-4)


# What is decomposed anew.


@pytest.mark.parametrize("change", [lambda x: x[::-1], lambda x: x * 1.001])
def test_another_kernel(change, path, decomposed):
    convert(path)
    model = plain_model()
    kernel = model.get_layer("second").kernel
    kernel.assign(change(to_numpy(kernel)).copy())
    values = to_numpy(kernel)
    decomposed.clear()
    with pytest.warns(UserWarning, match="1 of 3 kernels.*'second'.*again"):
        _, layers = convert(path, model)
    assert decomposed == [(40, 40)]
    np.testing.assert_allclose(
        layers[1].record.directions.singular_values,
        np.linalg.svd(values, compute_uv=False)[:6],
        rtol=1e-4,
    )
    model = plain_model()
    model.get_layer("second").kernel.assign(values)
    assert again(path, decomposed, model=model)[1] == []


def test_another_shape(path, decomposed):
    convert(path)
    model = plain_model(widths=(40, 44))
    with pytest.warns(UserWarning, match="2 of 3 kernels"):
        assert len(again(path, decomposed, model=model)[1]) == 2


def test_fewer_directions(path, decomposed):
    convert(path)
    with pytest.warns(UserWarning, match="3 of 3 kernels"):
        assert len(again(path, decomposed, target_rank=7)[1]) == 3
    assert again(path, decomposed, target_rank=7)[1] == []


def test_another_method(path, decomposed):
    convert(path, decomposition="randomized")
    # For kernels as small as these it stands for the exact one.
    with pytest.warns(UserWarning, match="3 of 3 kernels"):
        assert len(again(path, decomposed, decomposition="auto")[1]) == 3
    assert again(path, decomposed, decomposition="exact")[1] == []
    with pytest.warns(UserWarning, match="3 of 3 kernels"):
        found = again(path, decomposed, decomposition="randomized")[1]
    assert len(found) == 3


def test_exact_ones_serve_where_any_will_do(path, decomposed, monkeypatch):
    convert(path, decomposition="exact")
    monkeypatch.setattr("keras_srlora.functional.decomposition.OVERSAMPLING", 0)
    assert directions_file.choose_method((40, 40), 6, "auto") == "randomized"
    assert again(path, decomposed)[1] == []


def test_other_layers_stay_in_the_file(path, decomposed):
    convert(path, target_layer_names=["first"])
    with pytest.warns(UserWarning, match="2 of 2 kernels, such as.*'second'"):
        convert(path, target_layer_names=["second", "third"])
    assert again(path, decomposed)[1] == []


# What is refused, and leaves everything as it was.


def refused(path, message, error=ValueError, model=None, **kwargs):
    model = model or plain_model()
    before = [to_numpy(v) for v in model.variables]
    trainable = [v.path for v in model.trainable_variables]
    with pytest.raises(error, match=message):
        convert(path, model, **kwargs)
    assert not [x for x in model.layers if "SRLoRA" in type(x).__name__]
    assert trainable == [v.path for v in model.trainable_variables]
    assert_same_variables(before, model.variables)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"text", b"\xff" * 400])
def test_any_other_file(content, path):
    path.write_bytes(content)
    refused(path, "not a safetensors file, or is damaged.*delete it")
    assert path.read_bytes() == content


def test_a_safetensors_file_of_another_kind(path):
    model, _ = convert(None)
    keras_srlora.save_adapter(model, path, include_trainable=True)
    refused(path, "no directions that.*format='keras_srlora adapter'")


def test_a_damaged_file(path, rng):
    convert(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    refused(path, "damaged")
    model = plain_model()
    for position in rng.integers(len(data), size=30):
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        refused(path, "damaged|no directions|format", model=model)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("path", "fourth"),
        ("path", None),
        ("method", "guessed"),
        ("method", "auto"),
        ("fingerprint", [1.0]),
        ("fingerprint", None),
    ],
)
def test_metadata_that_lie(field, value, path):
    convert(path)
    kind = directions_file.KIND
    with tensors_file.opened(path, kind) as (tensors, metadata):
        tensors = dict(tensors)
    metadata["layers"][0][field] = value
    tensors_file.write(path, tensors, metadata, kind)
    refused(path, "make no sense")


@pytest.mark.parametrize(
    "array", [np.zeros((5, 40), "float32"), np.zeros((6, 40))]
)
def test_arrays_that_lie(array, path):
    convert(path)
    kind = directions_file.KIND
    with tensors_file.opened(path, kind) as (tensors, metadata):
        tensors = dict(tensors)
    tensors["second/right"] = array
    tensors_file.write(path, tensors, metadata, kind)
    refused(path, "make no sense")


def test_a_folder_that_does_not_exist(tmp_path):
    refused(tmp_path / "none" / "x", "in a folder that", FileNotFoundError)


def test_layers_of_one_path_are_told_apart_by_their_models(path):
    def block(name):
        inputs = keras.Input((30,))
        outputs = keras.layers.Dense(30, name="same")(inputs)
        return keras.Model(inputs, outputs, name=name)

    x = inputs = keras.Input((30,))
    x = block("right")(block("left")(x))
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    kwargs = {"model": model, "target_layer_names": ["same"]}
    assert len(convert(path, **kwargs)[1]) == 2
    with tensors_file.opened(path, directions_file.KIND) as (_, metadata):
        paths = [layer["path"] for layer in metadata["layers"]]
    assert sorted(paths) == ["left/same", "right/same"]


def test_files_are_written_whole_or_not_at_all(path, monkeypatch):
    convert(path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="not written .*No space") as caught:
        _, layers = convert(path, target_rank=8)
    (said,) = (w for w in caught if "not written" in str(w.message))
    assert said.filename == __file__
    monkeypatch.undo()
    # What was decomposed is not lost with it.
    assert_same_directions(layers, convert(None, target_rank=8)[1])
    monkeypatch.setattr(directions_file, "decompose", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(path, target_rank=8)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


# The progress bar.


def test_nothing_is_shown_unless_asked(capsys):
    convert(None)
    convert(None, verbose=0)
    assert capsys.readouterr().out == ""
    convert(None, verbose=1)
    assert "3/3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("terminal", "patience", "shown"),
    [(True, -1.0, True), (True, 60.0, False), (False, -1.0, False)],
)
def test_a_bar_where_someone_waits(
    terminal, patience, shown, monkeypatch, capsys
):
    monkeypatch.setattr(progress, "PATIENCE", patience)
    monkeypatch.setattr(progress, "_is_interactive", lambda: terminal)
    convert(None)
    assert ("3/3" in capsys.readouterr().out) is shown


@pytest.mark.parametrize("verbose", ["loud", 3, None])
def test_what_verbose_may_be(verbose):
    refused(None, '`verbose` must be "auto", 0 or 1', verbose=verbose)
    model, _ = convert(None)
    with pytest.raises(ValueError, match="`verbose` must be"):
        keras_srlora.initialize_factors(model, verbose=verbose)


# Memory.

CONVERSION = """
import gc
import sys

import keras
import keras_srlora

SIDE, COUNT = 2048, 6


def convert(count):
    x = inputs = keras.Input((SIDE,), dtype="bfloat16")
    for index in range(count):
        x = keras.layers.Dense(SIDE, name=f"dense_{index}", dtype="bfloat16")(x)
    head = keras.layers.Dense(2, name="head", dtype="bfloat16")
    model = keras.Model(inputs, head(x))
    for variable in model.variables:  # JAX may be making them still
        largest = keras.ops.cast(keras.ops.max(variable), "float32")
        keras.ops.convert_to_numpy(largest)
    gc.collect()
    before = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    keras_srlora.enable_srlora(model, rank=4, recipe=sys.argv[1])
    # Remainders, which the published recipe has at once, stay.
    kept = memory("VmRSS") if sys.argv[1] == "paper" else before
    return memory("VmHWM") - kept


def memory(name):
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith(name))
    return int(line.split()[1]) * 1024


convert(1)  # libraries and compiled functions
print(convert(COUNT) / (4 * SIDE**2))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux"
)
@pytest.mark.parametrize(("recipe", "kernels"), [("adaptive", 3), ("paper", 8)])
def test_one_kernel_at_a_time(recipe, kernels):
    """The peak is that of one kernel in float32, not of all six."""
    old = keras.backend.backend() == "torch" and keras.__version__ < "3.15"
    if recipe == "paper" and old:
        # What an operation is given stays until Python collects garbage:
        # `torchtree_impl._dict_to_ordered_dict` makes cycles there.
        kernels = 12
    root = pathlib.Path(keras_srlora.__file__).parents[1]
    printed = subprocess.run(
        [sys.executable, "-c", CONVERSION, recipe],
        check=True,
        stdout=subprocess.PIPE,
        # Large blocks go back to the system when they are freed.
        env={
            **os.environ,
            "PYTHONPATH": str(root),
            "MALLOC_MMAP_THRESHOLD_": "65536",
        },
    ).stdout
    assert float(printed) < kernels
