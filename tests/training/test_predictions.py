"""How many predictions a step learns from."""

import keras
import numpy as np
import pytest

from keras_srlora.training.predictions import predictions_per_example
from keras_srlora.training.predictions import predictions_per_step

CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def functional(*shapes, loss):
    inputs = keras.Input((4,))
    outputs = []
    for index, shape in enumerate(shapes):
        x = keras.layers.Dense(int(np.prod(shape)))(inputs)
        outputs.append(keras.layers.Reshape(shape, name=f"out_{index}")(x))
    model = keras.Model(inputs, outputs if len(shapes) > 1 else outputs[0])
    model.compile("sgd", loss)
    return model


def own_loss(y_true, y_pred):
    return keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)


class OwnMSE(keras.losses.MeanSquaredError):
    pass


@pytest.mark.parametrize(
    ("shapes", "loss", "expected"),
    [
        ([(10,)], CROSSENTROPY, 1),
        ([(10,)], "categorical_crossentropy", 1),
        ([(10,)], keras.losses.KLDivergence(), 1),
        ([(10,)], "cosine_similarity", 1),
        ([(7, 10)], CROSSENTROPY, 7),
        ([(6, 5, 10)], "sparse_categorical_crossentropy", 30),
        ([(10,)], "mse", 10),
        ([(1,)], "mae", 1),
        ([(5, 6, 3)], keras.losses.Huber(), 90),
        ([(4,)], "binary_crossentropy", 4),
        ([(10,)], OwnMSE(), 10),
        ([(10,)], own_loss, None),
        ([(10,), (3,)], [CROSSENTROPY, "mse"], 4),
        ([(10,), (3,)], {"out_1": "mse", "out_0": CROSSENTROPY}, 4),
        ([(10,), (3,)], {"out_1": "mse"}, 3),
        ([(10,), (3,)], ["mse", own_loss], None),
    ],
)
def test_what_the_loss_compares(shapes, loss, expected):
    model = functional(*shapes, loss=loss)
    assert predictions_per_example(model) == expected


def test_what_a_model_does_not_say():
    tokens = keras.Input((None,), dtype="int32")
    model = keras.Model(tokens, keras.layers.Embedding(9, 5)(tokens))
    model.compile("sgd", CROSSENTROPY)
    assert predictions_per_example(model) is None  # sequences of any length

    class Subclassed(keras.Model):
        def call(self, x):
            return x

    model = Subclassed()
    model.compile("sgd", "mse")
    assert predictions_per_example(model) is None
    # Without a loss, or not compiled at all.
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    assert predictions_per_example(model) is None
    model.compile("sgd")
    assert predictions_per_example(model) is None


class Counts(keras.callbacks.Callback):
    """What is found before each batch but the first."""

    def on_train_begin(self, logs=None):
        self.found = []

    def on_train_batch_begin(self, batch, logs=None):
        if batch:
            # The property brings the metrics up to date on JAX.
            self.found.append(predictions_per_step(self.model, batch))


def test_examples_of_a_step_are_counted():
    model = functional((3,), loss="mse")
    x, y = np.ones((16, 4), "float32"), np.ones((16, 3), "float32")
    counts = Counts()
    # Validation has other batches, and the last weights are not equal.
    model.fit(
        x,
        y,
        batch_size=4,
        epochs=2,
        verbose=0,
        sample_weight=np.arange(16.0),
        validation_data=(x[:5], y[:5]),
        callbacks=[counts],
    )
    assert counts.found == [12.0] * 6
