"""Masked-language modelling with MiniLM, of texts in another domain."""

import keras
import numpy as np

from benchmarks.quality import data
from benchmarks.quality.tasks.task import Task
from benchmarks.quality.tasks.task import classification
from benchmarks.quality.tasks.task import split
from benchmarks.quality.tasks.texts import BERT_TARGETS
from benchmarks.quality.tasks.texts import bert_inputs
from benchmarks.quality.tasks.texts import minilm
from benchmarks.quality.tasks.texts import tokens

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


TASKS = {"masked_newsgroups": masked_newsgroups}
