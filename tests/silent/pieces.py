"""Models and readers that the tests of this folder share."""

import contextlib
import warnings

import keras
import numpy as np
from keras import ops
from support import to_numpy

import keras_srlora

WIDTH = 8
NAMES = ["first", "second"]


def encoder(seed=7, name=None, activation="tanh"):
    """A functional model of two named `Dense` layers; the same each time."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((WIDTH,))
    x = inputs
    for layer in NAMES:
        x = keras.layers.Dense(WIDTH, activation=activation, name=layer)(x)
    return keras.Model(inputs, x, name=name)


def convert(model, recipe="paper", names=NAMES, **arguments):
    """Converts the two layers of an `encoder`, wherever it is."""
    arguments = {"rank": 2, "target_rank": 6, "recipe": recipe, **arguments}
    return keras_srlora.enable_srlora(
        model, target_layer_names=names, **arguments
    )


def nudge(layers, seed=3, size=0.5):
    """Gives the factors other values, as training would."""
    rng = np.random.default_rng(seed)
    for layer in layers:
        for factor in layer.factors:
            change = size * rng.standard_normal(factor.shape)
            factor.assign_add(ops.cast(change, factor.dtype))


def tuned_encoder(recipe="paper", seed=7, **arguments):
    """An `encoder` that was converted, and whose factors have moved."""
    model = encoder(seed)
    nudge(convert(model, recipe, **arguments))
    return model


def batch(rng, rows=4, width=WIDTH):
    return rng.standard_normal((rows, width)).astype("float32")


def fit(model, data, callbacks=(), epochs=2, **arguments):
    """A run in batches of 8, always in the same order."""
    with collected_warnings():
        model.fit(
            *data,
            batch_size=8,
            epochs=epochs,
            shuffle=False,
            verbose=0,
            callbacks=list(callbacks),
            **arguments,
        )


def called(model, x):
    """What a model computes when it is called eagerly: always up to date."""
    return keras.tree.map_structure(to_numpy, model(x, training=False))


def predicted(model, x):
    return model.predict(x, verbose=0)


def assert_close(actual, expected, atol=1e-5):
    """Two structures of arrays are equal, but for rounding."""
    keras.tree.map_structure(
        lambda a, b: np.testing.assert_allclose(
            to_numpy(a), to_numpy(b), atol=atol, rtol=atol
        ),
        actual,
        expected,
    )


def differ(first, second, by=1e-2):
    """Whether some entry of two arrays differs by more than rounding."""
    return float(np.max(np.abs(to_numpy(first) - to_numpy(second)))) > by


@contextlib.contextmanager
def collected_warnings():
    """Collects the messages of `UserWarning`s instead of raising them."""
    messages = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [
        str(x.message) for x in caught if issubclass(x.category, UserWarning)
    ]


def plain(layers):
    """Whether all of some layers are Keras's own."""
    own = (keras.layers.Dense, keras.layers.EinsumDense)
    return all(type(layer) in own for layer in layers)


def state_of(model):
    """Copies of all variables of a model, by the order in it."""
    return [to_numpy(v) for v in model.variables]


def assert_unchanged(model, before):
    after = state_of(model)
    assert len(after) == len(before)
    for a, b in zip(after, before, strict=True):
        np.testing.assert_array_equal(a, b)


@keras.saving.register_keras_serializable("silent")
class UnbuiltBlock(keras.layers.Layer):
    """A transformer block as on keras.io: a `Sequential`, and no `build`."""

    def __init__(self, width=WIDTH, heads=2, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.heads = heads
        self.attention = keras.layers.MultiHeadAttention(
            heads, width // heads, name="attention"
        )
        self.feedforward = keras.Sequential(
            [
                keras.layers.Dense(2 * width, "relu", name="inner"),
                keras.layers.Dense(width, name="outer"),
            ],
            name="feedforward",
        )
        self.norm_1 = keras.layers.LayerNormalization(name="norm_1")
        self.norm_2 = keras.layers.LayerNormalization(name="norm_2")

    def call(self, inputs):
        x = self.norm_1(inputs + self.attention(inputs, inputs))
        return self.norm_2(x + self.feedforward(x))

    def get_config(self):
        return {
            **super().get_config(),
            "width": self.width,
            "heads": self.heads,
        }


LENGTH = 5


def blocks(head, count=2, seed=7, **arguments):
    """Token ids → embedding, blocks, and what `head` makes of them."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(20, WIDTH, name="embedding")(inputs)
    for index in range(count):
        x = UnbuiltBlock(name=f"block_{index}", **arguments)(x)
    return keras.Model(inputs, head(x))


def pooled(x):
    return keras.layers.GlobalAveragePooling1D(name="pooling")(x)


def ids(rng, rows=4):
    return rng.integers(0, 20, (rows, LENGTH)).astype("int32")


def paths(variables):
    return sorted(v.path for v in variables)


def trainable(model):
    return paths(model.trainable_variables)


def others(model):
    """Paths of the trainable variables that are no factors."""
    return [path for path in trainable(model) if "lora_kernel" not in path]
