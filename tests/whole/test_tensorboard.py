"""Keras's own TensorBoard callback writes what the recompositions were."""

import keras
import numpy as np
import pytest
from support import converted_model
from support import regression_data

import keras_srlora

pytest.importorskip("tensorflow")
accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator"
)

EPOCHS = 3


# TensorBoard, of the protocol buffers that it reads.
@pytest.mark.filterwarnings("default")
def test_tensorboard_has_the_numbers_of_the_history(tmp_path):
    model = converted_model(keras.optimizers.Adam(0.01))
    history = model.fit(
        *regression_data(np.random.default_rng(0)),
        batch_size=8,
        epochs=EPOCHS,
        verbose=0,
        callbacks=[
            keras_srlora.RecompositionCallback(interval=5),
            keras.callbacks.TensorBoard(tmp_path, write_graph=False),
        ],
    ).history
    written = accumulator.EventAccumulator(str(tmp_path / "train"))
    written.Reload()
    for name in ("recompositions", "directions", "drift"):
        events = written.Tensors(f"epoch_srlora_{name}")
        values = [float(read(event)) for event in events]
        assert len(values) == EPOCHS
        np.testing.assert_allclose(values, history[f"srlora_{name}"])
    assert sum(history["srlora_recompositions"]) == 4


def read(event):
    """The number of a summary, which TensorFlow writes as a tensor."""
    import tensorflow as tf

    return tf.make_ndarray(event.tensor_proto)
