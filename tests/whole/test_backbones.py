"""Every backbone of KerasHub: converts, trains, recomposes, saves, merges."""

import os
import pathlib

import backbones
import keras
import numpy as np
import pytest
from support import to_numpy

import keras_srlora
from keras_srlora import enable_srlora

hub = pytest.importorskip("keras_hub")

BACKEND = keras.backend.backend()
# Rounding of float32 (6e-8) through some tens of layers.
TOLERANCE = 1e-4


def exported_classes():
    """Their own names: some classes are exported under two."""
    classes = {
        cls.__name__
        for cls in vars(hub.models).values()
        if isinstance(cls, type) and issubclass(cls, hub.models.Backbone)
    }
    return sorted(classes - backbones.ABSTRACT)


def perturb(backbone, rng):
    """No weight is at a value, such as 0 or 1, that would hide a mistake."""
    for variable in backbone.trainable_variables:
        if variable.name == "tiled_position_embeddings":
            # SAM 3 makes it of another weight, and does not save it.
            continue
        noise = 0.1 * rng.standard_normal(variable.shape)
        variable.assign(to_numpy(variable) + noise.astype("float32"))


def outputs_of(backbone, x):
    """All outputs that are floats."""
    # Without `training=False` some layers of SegFormer's train.
    y = backbone(x, training=False)
    flat = [to_numpy(y) for y in keras.tree.flatten(y)]
    return [y for y in flat if y.dtype.kind == "f"]


def largest_change(new, old):
    """Of an entry, as a part of the largest entry of its output."""
    assert len(new) == len(old)
    assert all(np.isfinite(y).all() for y in new)
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(new, old))


def kernels(backbone):
    classes = (keras.layers.Dense, keras.layers.EinsumDense)
    return [
        layer
        for layer in backbone._flatten_layers()
        if isinstance(layer, classes) and layer.built
    ]


@pytest.fixture(scope="module")
def table():
    rows = []
    yield rows
    path = os.environ.get("BACKBONES_TABLE")
    if path:
        head = (
            "| class | `Dense` and `EinsumDense` kernels converted | largest "
            "relative change of an output at a recomposition |\n|---|---|---|"
        )
        lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
        pathlib.Path(path).write_text("\n".join([head, *lines]) + "\n")


# What KerasHub's layers, and torch on their behalf, say of themselves.
@pytest.mark.filterwarnings(
    "ignore:`build.*` was called on layer:UserWarning",
    "ignore:Layer .* was passed an input with a mask attached:UserWarning",
    "ignore:Layer .* looks like it has unbuilt state:UserWarning",
    "ignore:The 'rwkv_ops' package is not installed:UserWarning",
)
@pytest.mark.parametrize("name", exported_classes())
def test_backbone(name, table, tmp_path, rng):
    assert name in backbones.BACKBONES, (
        f"KerasHub exports {name}, which `tests/whole/backbones.py` does not "
        "make: add an entry to `BACKBONES`."
    )
    slow = backbones.SLOW | (
        backbones.SLOW_ON_JAX if BACKEND == "jax" else set()
    )
    if name in slow and "BACKBONES_TABLE" not in os.environ:
        pytest.skip("It takes long; set BACKBONES_TABLE to run it.")
    backbone = backbones.make(name)
    perturb(backbone, rng)
    x = backbones.inputs(name, backbone, rng)
    if name in backbones.NEEDS_TORCHVISION and BACKEND == "torch":
        pytest.importorskip("torchvision")
    expected = outputs_of(backbone, x)
    count = len(kernels(backbone))
    row = [name, f"0 of {count}", None]
    table.append(row)
    if name in backbones.CONVOLUTIONAL:
        assert count == 0
        with pytest.raises(ValueError, match="no `Dense` or `EinsumDense`"):
            enable_srlora(backbone, rank=2)
        for old, new in zip(expected, outputs_of(backbone, x)):
            np.testing.assert_array_equal(new, old)
        row[-1] = "convolutions only"
        return
    layers = enable_srlora(backbone, rank=2, target_rank=6, recipe="paper")
    outputs = outputs_of(backbone, x)
    assert largest_change(outputs, expected) <= TOLERANCE

    optimizer = keras_srlora.SensitivityOptimizer(
        keras.optimizers.Adam(1e-2), backbone
    )
    # For three steps TensorFlow's tracing does not pay; JAX's does.
    eagerly = keras.backend.backend() == "tensorflow"
    backbone.compile(optimizer, "mse", run_eagerly=eagerly)
    # Random, since normalised outputs have always the same mean square.
    y = keras.tree.map_structure(
        lambda y: rng.standard_normal(y.shape).astype("float32"), backbone(x)
    )
    changes = []
    for step in range(1, 4):
        backbone.train_on_batch(x, y)
        trained = outputs_of(backbone, x)
        assert largest_change(trained, outputs) > TOLERANCE
        left = [layer for layer in layers if len(layer.record.unused)]
        events = keras_srlora.recompose(optimizer.sensitivity, optimizer, step)
        assert len(events) == len(left)
        outputs = outputs_of(backbone, x)
        changes.append(largest_change(outputs, trained))
    assert max(changes) <= TOLERANCE

    path = str(tmp_path / "converted.keras")
    backbone.save(path)
    loaded = keras.saving.load_model(path)
    assert largest_change(outputs_of(loaded, x), outputs) <= TOLERANCE
    keras_srlora.merge_srlora(backbone)
    assert largest_change(outputs_of(backbone, x), outputs) <= TOLERANCE
    row[1:] = f"{len(layers)} of {count}", f"{max(changes):.0e}"
