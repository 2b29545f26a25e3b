"""Adapter files that nobody wrote on purpose, and some that somebody did.

`ADAPTER_FUZZ_EXAMPLES=100000 python -m pytest tests/adapters -k fuzz` tries
more of them than the suite does.
"""

import json
import os

import keras
import numpy as np
import pytest
from support import read_adapter
from support import write_adapter

import keras_srlora
from keras_srlora.adapters import format as adapter_format
from keras_srlora.adapters.format import read_checked
from keras_srlora.layers import pairs

pytest.importorskip("safetensors")
hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

EXAMPLES = int(os.environ.get("ADAPTER_FUZZ_EXAMPLES", "300"))
fuzzed = hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=4,
)


def plain_model():
    inputs = keras.Input((5,))
    layer = keras.layers.Dense(4, name="hidden")
    model = keras.Model(inputs, layer(inputs))
    kernel = np.random.default_rng(0).standard_normal((5, 4))
    layer.set_weights([kernel, np.zeros(4)])
    return model


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A file, what it holds, a model that it fits, and a path to write to."""
    folder = tmp_path_factory.mktemp("fuzz")
    model = plain_model()
    (layer,) = keras_srlora.enable_srlora(
        model, rank=2, target_layer_names=["hidden"]
    )
    scale = layer.recipe.scale_restarted
    pairs.fuse_and_restart(
        layer, np.array([1]), np.array([2]), np.ones(1), scale, 5
    )
    keras_srlora.save_adapter(model, folder / "good.safetensors")
    data = (folder / "good.safetensors").read_bytes()
    tensors, metadata = read_adapter(folder / "good.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        # Thousands of files that nobody needs on the disk.
        patch.setattr(os, "fsync", lambda descriptor: None)
        path = folder / "bad.safetensors"
        yield data, tensors, metadata, plain_model(), path


def accepted_or_refused(model, path):
    """Nothing but our own error may come of a file."""
    try:
        plans, _ = read_checked(model, path)
    except ValueError as error:
        assert "bad.safetensors" in str(error) or "hidden" in str(error)
    else:
        assert [layer.name for layer, _, _ in plans] == ["hidden"]


@fuzzed
@hypothesis.given(content=st.binary(max_size=300))
def test_any_bytes(good, content):
    *_, model, path = good
    path.write_bytes(content)
    accepted_or_refused(model, path)


@fuzzed
@hypothesis.given(
    position=st.integers(0, 10**6),
    values=st.binary(min_size=1, max_size=8),
    cut=st.integers(0, 10**6),
)
def test_a_damaged_file(good, position, values, cut):
    data, _, _, model, path = good
    position %= len(data)
    damaged = data[:position] + values + data[position + len(values) :]
    if cut % 3 == 0:
        damaged = damaged[: cut % len(data)]
    path.write_bytes(damaged)
    accepted_or_refused(model, path)


@fuzzed
@hypothesis.given(
    field=st.sampled_from(
        ["layers", "keras_srlora", *adapter_format.DESCRIPTION]
    ),
    value=anything,
)
def test_metadata_that_lie(good, field, value):
    _, tensors, metadata, model, path = good
    changed = json.loads(json.dumps(metadata))
    place = changed if field in changed else changed["layers"][0]
    place[field] = value
    write_adapter(path, tensors, changed)
    accepted_or_refused(model, path)


@fuzzed
@hypothesis.given(data=st.data())
def test_arrays_that_lie(good, data):
    _, tensors, metadata, model, path = good
    changed = dict(tensors)
    name = data.draw(st.sampled_from(sorted(changed)))
    shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
    dtype = data.draw(
        st.sampled_from(["float16", "float32", "float64", "int64", "bool"])
    )
    fill = data.draw(st.floats() | st.integers(-(2**31), 2**31))
    with np.errstate(all="ignore"):
        changed[name] = np.full(shape, fill, "float64").astype(dtype)
    if data.draw(st.booleans()):
        del changed[name]
    write_adapter(path, changed, metadata)
    accepted_or_refused(model, path)
