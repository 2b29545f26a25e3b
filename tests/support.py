"""Builders and readers shared by the tests; degenerate matrices live here."""

from typing import NamedTuple

import keras
import numpy as np
import pytest
from keras import ops

import keras_srlora
from keras_srlora.adapters import format as adapter_format
from keras_srlora.backend.keras_private.compiled import functions_that_read
from keras_srlora.backend.keras_private.compiled import kinds_of_functions
from keras_srlora.backend.keras_private.nesting import models_that_hold
from keras_srlora.backend.living import living
from keras_srlora.files import tensors as tensors_file

# Restarts behind the gate that waits for a flat loss.
GATED = keras_srlora.Recipe(
    start="lora",
    selection="oldest",
    scale="as_lora",
    slots="zero",
    steps_per_pair=100,
    gate="flat_loss",
    stop=0.8,
)

# A warning of torch of Keras 3.13, also where pytest's filters do not reach.
OF_OTHERS = "Using a non-tuple sequence for multidimensional"


def to_numpy(x):
    return np.array(ops.convert_to_numpy(x))


def matrix(kind, rows, columns, rng):
    """A matrix of a named kind of spectrum."""
    if kind == "gaussian":
        return rng.standard_normal((rows, columns)).astype("float32")
    if kind == "zero":
        return np.zeros((rows, columns), "float32")
    if kind == "rank_deficient":
        half = max(1, min(rows, columns) // 2)
        left = rng.standard_normal((rows, half))
        return (left @ rng.standard_normal((half, columns))).astype("float32")
    if kind == "repeated":
        side = min(rows, columns)
        left, _ = np.linalg.qr(rng.standard_normal((rows, side)))
        right, _ = np.linalg.qr(rng.standard_normal((columns, side)))
        return (left @ right.T).astype("float32")
    raise ValueError(kind)


KINDS = ("gaussian", "zero", "rank_deficient", "repeated")
SHAPES = ((12, 12), (7, 30), (30, 7), (1, 9), (9, 1), (200, 3))


def dense_layer(kernel, initialize=True, **kwargs):
    """A built `SRLoRADense` with a given kernel; of the published recipe."""
    kwargs = {"recipe": "paper", **kwargs}
    layer = keras_srlora.SRLoRADense(kernel.shape[1], **kwargs)
    layer.build((None, kernel.shape[0]))
    layer.frozen.variable.assign(kernel)
    if initialize:
        layer.initialize_factors()
    return layer


def two_layer_model(rng, rank=4, **kwargs):
    """A functional model: SRLoRADense (published recipe), a plain head."""
    kwargs = {"recipe": "paper", **kwargs}
    inputs = keras.Input((12,))
    x = keras_srlora.SRLoRADense(
        16, rank=rank, activation="tanh", name="hidden", **kwargs
    )(inputs)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


def converted_model(optimizer, dropout=0.0, recipe="paper"):
    """Two converted layers and a head, compiled; the same each time."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((12,))
    x = keras.layers.Dense(16, activation="tanh", name="first")(inputs)
    x = keras.layers.Dropout(dropout)(x)
    x = keras.layers.Dense(16, activation="tanh", name="second")(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    keras_srlora.enable_srlora(
        model, 2, target_layer_names=["first", "second"], recipe=recipe
    )
    model.compile(optimizer, "mse")
    return model


def assert_same_variables(first, second):
    """Two lists of variables (or arrays) are equal to the bit."""
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(
            to_numpy(a), to_numpy(b), getattr(b, "path", "")
        )


def tiny_bert(**arguments):
    """A KerasHub backbone, of the same weights each time."""
    import keras_hub

    keras.utils.set_random_seed(7)
    return keras_hub.models.BertBackbone(
        **{
            "vocabulary_size": 50,
            "num_layers": 2,
            "num_heads": 2,
            "hidden_dim": 16,
            "intermediate_dim": 24,
            "max_sequence_length": 6,
            **arguments,
        }
    )


def bert_outputs(bert):
    """What it makes of the tokens 0 to 11."""
    ids = np.arange(12).reshape(2, 6)
    inputs = {
        "token_ids": ids,
        "segment_ids": np.zeros_like(ids),
        "padding_mask": np.ones_like(ids),
    }
    return to_numpy(bert(inputs)["sequence_output"])


def regression_data(rng, samples=64, inputs=12, outputs=3):
    x = rng.standard_normal((samples, inputs)).astype("float32")
    y = x @ rng.standard_normal((inputs, outputs)).astype("float32")
    return x, np.tanh(y)


def recomposing_fit(model, data, interval=5, epochs=1, **kwargs):
    """Batches of 8, in order; returns the callback."""
    callback = keras_srlora.RecompositionCallback(interval=interval)
    model.fit(
        *data,
        batch_size=8,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[callback],
        **kwargs,
    )
    return callback


def effective(layer):
    return to_numpy(layer.effective_kernel())


def frozen_kernel(layer):
    """The kernel that is stored; `layer.kernel` is the effective one."""
    return to_numpy(layer.frozen.variable)


class Statistics(NamedTuple):
    """Of one layer's pairs, by step."""

    average_a: np.ndarray
    uncertainty_a: np.ndarray
    average_b: np.ndarray
    uncertainty_b: np.ndarray


def statistics(layer):
    """What the layer would save of its scores, copied."""
    arrays = layer.companions.arrays_of("sensitivity")
    return Statistics(**{k: np.array(v) for k, v in arrays.items()})


def state_arrays(layer):
    """All that is saved with a layer beside its variables, copied."""
    arrays = {
        **layer.record.to_arrays(),
        **layer.frozen.to_arrays(),
        **layer.companions.to_arrays(),
    }
    return {name: np.array(array) for name, array in arrays.items()}


def read_adapter(path):
    """The tensors and the metadata of an adapter file."""
    with tensors_file.opened(path, adapter_format.KIND) as (tensors, metadata):
        return dict(tensors), metadata


def write_adapter(path, tensors, metadata):
    """Writes an adapter file of whatever it is given."""
    tensors_file.write(path, tensors, metadata, adapter_format.KIND)


class Recorder(keras.callbacks.Callback):
    """Copies the weights of a layer before each batch."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.weights = []

    def on_train_batch_begin(self, batch, logs=None):
        self.model  # noqa: B018 - on JAX this brings the variables up to date
        self.weights.append({v.name: to_numpy(v) for v in self.layer.variables})


def models_holding(layers):
    """All living models that hold one of some layers."""
    (found,) = living(keras.layers.Layer)
    return models_that_hold(layers, found)


def functions_reading(variables):
    """All living functions that read one of some variables."""
    found = living(*kinds_of_functions())
    return functions_that_read(variables, [x for kind in found for x in kind])


def finite_stream(data):
    """A tf.data.Dataset of unknown cardinality, on any backend."""
    tf = pytest.importorskip("tensorflow")
    x, y = data
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    return dataset.filter(lambda *batch: True)
