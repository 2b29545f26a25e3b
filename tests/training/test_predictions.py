"""How many predictions a step learns from."""

import keras
import numpy as np
import pytest

import keras_srlora
from keras_srlora.training.predictions import PredictionCounter
from keras_srlora.training.predictions import count_predictions

CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def labels(count, classes):
    """What labels count: two classes an eighth, 256 or more one."""
    return count * min(np.log2(classes) / 8, 1)


def own_loss(y_true, y_pred):
    return keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)


class OwnMSE(keras.losses.MeanSquaredError):
    pass


def adapted(*shapes, loss, as_dict=False):
    """A model with an output of each shape."""
    inputs = keras.Input((4,))
    outputs = {}
    x = keras.layers.Dense(6, name="hidden")(inputs)
    for index, shape in enumerate(shapes):
        y = keras.layers.Dense(int(np.prod(shape)))(x)
        name = f"out_{index}"
        outputs[name] = keras.layers.Reshape(shape, name=name)(y)
    if not as_dict:
        outputs = list(outputs.values())
        outputs = outputs if len(shapes) > 1 else outputs[0]
    model = keras.Model(inputs, outputs)
    keras_srlora.enable_srlora(model, 2, target_layer_names=["hidden"])
    model.compile("sgd", loss)
    return model


def counted(model, x, y, **arguments):
    """What a run finds out about its predictions."""
    callback = keras_srlora.RecompositionCallback()
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[callback], **arguments)
    assert "compute_loss" not in vars(model)
    return callback.recomposer.pace.state.predictions


@pytest.mark.parametrize(
    ("shape", "loss", "expected"),
    [
        ((2,), CROSSENTROPY, 1 / 8),
        ((16,), CROSSENTROPY, 1 / 2),
        ((256,), CROSSENTROPY, 1),
        ((30_000,), CROSSENTROPY, 1),
        ((10,), "categorical_crossentropy", labels(1, 10)),
        ((10,), keras.losses.KLDivergence(), labels(1, 10)),
        ((384,), "cosine_similarity", 1),
        ((7, 10), CROSSENTROPY, labels(7, 10)),
        ((6, 5, 10), "sparse_categorical_crossentropy", labels(30, 10)),
        ((10,), "mse", 10),
        ((1,), "mae", 1),
        ((5, 6, 3), keras.losses.Huber(), 90),
        ((1,), "binary_crossentropy", 1 / 8),
        ((), "binary_crossentropy", 1 / 8),
        ((4,), "binary_crossentropy", 1 / 4),
        ((4,), keras.losses.BinaryFocalCrossentropy(), 1 / 4),
        ((6, 5, 1), keras.losses.BinaryCrossentropy(), 30 / 8),
        ((10,), OwnMSE(), 10),
        ((10,), own_loss, None),
        ((10,), ["mse", "mae"], None),
        ((None, 10), CROSSENTROPY, None),
        ((7, None), CROSSENTROPY, None),
    ],
)
def test_what_a_loss_compares(shape, loss, expected):
    assert count_predictions(shape, loss) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("loss", "as_dict", "expected"),
    [
        ([CROSSENTROPY, "mse"], False, labels(1, 10) + 3),
        ({"out_1": "mse", "out_0": CROSSENTROPY}, False, labels(1, 10) + 3),
        ({"out_1": "mse", "out_0": CROSSENTROPY}, True, labels(1, 10) + 3),
        (["mse", own_loss], False, 0),  # unknown
        ("mse", False, 13),
    ],
)
def test_outputs_are_added(loss, as_dict, expected):
    model = adapted((10,), (3,), loss=loss, as_dict=as_dict)
    x = np.ones((8, 4), "float32")
    sparse = isinstance(loss, dict) or loss[0] is CROSSENTROPY
    first = np.ones(8, "int32") if sparse else np.ones((8, 10), "float32")
    y = [first, np.ones((8, 3), "float32")]
    if isinstance(loss, dict):
        y = dict(zip(("out_0", "out_1"), y))
    assert counted(model, x, y) == pytest.approx(4 * expected)


@pytest.mark.parametrize(
    ("shape", "target", "expected"),
    [
        ((10,), (), labels(1, 10)),
        ((10,), (1,), labels(1, 10)),
        ((1,), (), labels(1, 2)),
        ((7, 10), (7,), labels(7, 10)),
        ((7, 10), (7, 1), labels(7, 10)),
        ((10,), (10,), 0),  # values, or the classes of one label
        ((1,), (1,), labels(1, 2)),
        ((7, 10), (7, 10), 0),
    ],
)
def test_a_loss_of_the_users_own_compares_what_each_target_is_for(
    shape, target, expected
):
    def own(y_true, y_pred):
        y_true = keras.ops.reshape(y_true, (-1, 1))
        y_pred = keras.ops.reshape(y_pred, (y_true.shape[0], -1))
        return keras.ops.mean(keras.ops.square(y_true - y_pred))

    model = adapted(shape, loss=own)
    x, y = np.ones((8, 4), "float32"), np.ones((8, *target), "int32")
    assert counted(model, x, y) == pytest.approx(4 * expected)


def test_targets_belong_to_outputs_by_their_names():
    loss = {"out_0": own_loss, "out_1": CROSSENTROPY}
    x = np.ones((8, 4), "float32")
    y = {"out_1": np.ones(8, "int32"), "out_0": np.ones((8, 1), "float32")}
    model = adapted((10,), (3,), loss=loss, as_dict=True)
    expected = 4 * (labels(1, 10) + labels(1, 3))
    assert counted(model, x, y) == pytest.approx(expected)
    # A list of outputs is perhaps in another order than the names.
    model = adapted((10,), (3,), loss=loss)
    assert counted(model, x, y) == 0


class Bare:
    """What `fit` may hand over as a target: of unknown rank, or no tensor."""

    @property
    def shape(self):
        raise ValueError("unknown rank")


@pytest.mark.parametrize(
    "y", [None, Bare(), "label", {"a": np.ones(8)}, [np.ones(8), np.ones(8)]]
)
def test_a_target_that_says_nothing_leaves_the_predictions_unknown(y):
    class Own(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, *args, **kwargs):
            return keras.ops.mean(y_pred)

    model = Own(inputs := keras.Input((4,)), keras.layers.Dense(3)(inputs))
    counter = PredictionCounter()
    counter.watch(model)
    model.compute_loss(y=y, y_pred=np.ones((8, 3), "float32"))
    counter.stop_watching(model)
    assert counter.shapes == [(3,)] and counter.vectors == [False]


def test_a_run_that_learns_a_label_an_example_is_lora_with_any_loss():
    def smoothed(labels, logits):
        labels = keras.ops.cast(labels, "int32")
        targets = 0.9 * keras.ops.one_hot(labels, 3) + 0.1 / 3
        return keras.losses.categorical_crossentropy(
            targets, logits, from_logits=True
        )

    model = adapted((3,), loss=smoothed)
    x, y = np.ones((4000, 4), "float32"), np.ones(4000, "int32")
    with pytest.warns(UserWarning, match="plain LoRA.*792 predictions"):
        assert counted(model, x, y) == pytest.approx(labels(4, 3))


def test_sequences_of_any_length_are_counted_as_they_come():
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(9, 4)(tokens)
    model = keras.Model(tokens, keras.layers.Dense(9, name="hidden")(x))
    keras_srlora.enable_srlora(model, 2, target_layer_names=["hidden"])
    model.compile("sgd", CROSSENTROPY)
    x = np.ones((8, 5), "int32")
    assert counted(model, x, x) == pytest.approx(labels(4 * 5, 9))


def test_a_subclass_says_it_too_and_a_second_fit_remembers():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = keras_srlora.SRLoRADense(3, rank=2)

        def call(self, x):
            return self.hidden(x)

    model = Subclassed()
    x, y = np.ones((8, 4), "float32"), np.ones((8, 3), "float32")
    model(x)
    model.compile("sgd", "mse")
    # The second one is not traced again.
    for _ in range(2):
        assert counted(model, x, y) == 12


def test_outputs_of_a_subclass_have_the_names_of_its_dict():
    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = keras_srlora.SRLoRADense(5, rank=2)

        def call(self, x):
            x = self.hidden(x)
            return {"second": x[:, :3], "first": x}

    model = Two()
    x = np.ones((8, 4), "float32")
    model(x)
    model.compile("sgd", {"second": "mse", "first": CROSSENTROPY})
    y = {"second": np.ones((8, 3), "float32"), "first": np.ones(8, "int32")}
    assert counted(model, x, y) == pytest.approx(4 * (3 + labels(1, 5)))


@pytest.mark.parametrize(
    ("target", "expected"), [((3,), 0), ((1,), labels(4, 3)), (None, 0)]
)
def test_a_loss_in_compute_loss_is_one_of_the_users_own(target, expected):
    class Own(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, *args, **kwargs):
            y = 1.0 if y is None else y
            return keras.ops.mean(keras.ops.square(y - y_pred))

    inputs = keras.Input((4,))
    outputs = keras_srlora.SRLoRADense(3, rank=2)(inputs)
    model = Own(inputs, outputs)
    model.compile("sgd")
    x = np.ones((8, 4), "float32")
    y = None if target is None else np.ones((8, *target), "float32")
    assert counted(model, x, y) == pytest.approx(expected)


def test_examples_are_counted_not_weights_nor_those_of_validation():
    model = adapted((3,), loss="mse")
    x, y = np.ones((16, 4), "float32"), np.ones((16, 3), "float32")
    found = counted(
        model,
        x,
        y,
        epochs=2,
        sample_weight=np.arange(16.0),
        validation_data=(x[:5], y[:5]),
    )
    assert found == 12


def test_a_compute_loss_of_the_users_own_comes_back():
    model = adapted((3,), loss="mse")
    compute_loss = model.compute_loss
    calls = []

    def own(*args, **kwargs):
        calls.append(1)
        return compute_loss(*args, **kwargs)

    model.compute_loss = own
    x, y = np.ones((8, 4), "float32"), np.ones((8, 3), "float32")
    callback = keras_srlora.RecompositionCallback()
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[callback])
    assert calls and model.compute_loss is own
    assert callback.recomposer.pace.state.predictions == 12
