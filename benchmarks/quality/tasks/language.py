"""A causal language model of bytes: from film reviews to other texts."""

import dataclasses
import functools
import pathlib
import sysconfig

import keras
import numpy as np

from benchmarks.quality import data
from benchmarks.quality.tasks.task import Task
from benchmarks.quality.tasks.task import classification
from benchmarks.quality.tasks.task import new_head
from benchmarks.quality.tasks.texts import BERT_TARGETS

BATCH_SIZE = 16


def language_model(backbone, head=None):
    """A KerasHub backbone under a head, or under its own embedding."""
    if head is None:
        head = functools.partial(backbone.token_embedding, reverse=True)
    tokens = keras.Input((None,), dtype="int32", name="token_ids")
    mask = keras.ops.ones_like(tokens)
    x = backbone({"token_ids": tokens, "padding_mask": mask})
    return keras.Model(tokens, head(x))


def gpt(width):
    """A small one, untrained."""
    import keras_hub

    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=256,
        num_layers=3,
        num_heads=4,
        hidden_dim=width,
        intermediate_dim=4 * width,
        dropout=0.0,
        max_sequence_length=width,
        name="backbone",
    )
    return language_model(backbone)


def byte_windows(text, length, count=None):
    """`windows` of the bytes of a text."""
    return windows(np.frombuffer(text, "uint8"), length, count)


def windows(stream, length, count=None):
    """`(inputs, next tokens)` of consecutive windows, shuffled."""
    size = length + 1
    chunks = stream[: len(stream) // size * size].reshape(-1, size)
    order = np.random.default_rng(0).permutation(len(chunks))[:count]
    chunks = chunks[order].astype("int32")
    return chunks[:, :-1], chunks[:, 1:]


def reviews():
    """The reviews, one a line."""
    return "\n".join(data.imdb()[0]).encode()


def source_code():
    """The standard library of this Python without its tests.

    Three texts: to train, to validate and to test on, of different files.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idlelib", "site-packages", "dist-packages"}
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not left_out & set(path.relative_to(root).parts)
    ]
    order = np.random.default_rng(0).permutation(len(files))
    parts = np.split(order, [len(order) // 20, len(order) // 10])
    validation, test, train = (
        b"\n".join(files[i].read_bytes() for i in part) for part in parts
    )
    return train, validation, test


def pretrain(model, x, y, rate, warmup_steps, batch_size):
    """Trains all weights of a model, once through a text."""
    steps = len(x) // batch_size
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=rate, warmup_steps=warmup_steps
    )
    model.compile(
        keras.optimizers.AdamW(schedule, weight_decay=0.05), classification()
    )
    model.fit(x, y, batch_size=batch_size, epochs=1, verbose=2)


def pretrain_gpt(width, folder):
    """On film reviews; 3,000 steps."""
    keras.utils.set_random_seed(0)
    x, y = byte_windows(reviews(), width, BATCH_SIZE * 3000)
    model = gpt(width)
    pretrain(model, x, y, 2e-3, 200, BATCH_SIZE)
    model.save_weights(folder / "gpt.weights.h5")


def newsgroups():
    """Posts of newsgroups, one a line: letters without punctuation.

    Three texts: to train, to validate and to test on, of different posts.
    """
    posts = [post.encode() for post in data.newsgroups("train")[0]]
    others = [post.encode() for post in data.newsgroups("test")[0]]
    middle = len(others) // 2
    parts = posts, others[:middle], others[middle:]
    return tuple(b"\n".join(part) for part in parts)


def other_reviews():
    """Reviews that the GPT of 64 bytes was not pretrained on.

    Three texts: to train, to validate and to test on.
    """
    x, y = byte_windows(reviews(), 64)
    chunks = np.concatenate([x, y[:, -1:]], axis=1).astype("uint8")
    parts = np.split(chunks[BATCH_SIZE * 3000 :], [-3000, -1500])
    return tuple(part.tobytes() for part in parts)


def adaptation(corpus, steps, width=96, batch_size=BATCH_SIZE, epochs=1):
    """A GPT adapted to the texts that `corpus()` returns; no new head.

    As many bytes a window as the model is wide. With more epochs the steps are
    as many, and the text is shorter.
    """
    folder = data.fetched(
        f"gpt-{width}-reviews", functools.partial(pretrain_gpt, width)
    )
    train, validation, test = corpus()
    x, y = byte_windows(train, width)
    epochs = max(epochs, -(-steps * batch_size // len(x)))
    count = steps // epochs * batch_size

    def build(seed):
        model = gpt(width)
        model.load_weights(folder / "gpt.weights.h5")
        return model

    return Task(
        build=build,
        targets=BERT_TARGETS,
        splits={
            "train": (x[:count], y[:count]),
            "validation": byte_windows(validation, width, 512),
            "test": byte_windows(test, width, 1024),
        },
        loss=classification(),
        metrics=[],
        batch_size=batch_size,
        epochs=epochs,
    )


code = functools.partial(adaptation, source_code)
small = functools.partial(code, width=64)


def lowest_bits(classes, steps):
    """The GPT learns the lowest bits of each next byte, with a new head."""
    task = small(steps)

    def build(seed):
        backbone = task.build(seed).get_layer("backbone")
        head = new_head(classes, seed)
        return language_model(backbone, head)

    splits = {name: (x, y % classes) for name, (x, y) in task.splits.items()}
    return dataclasses.replace(task, build=build, splits=splits)


TASKS = {
    "code": functools.partial(code, 2000),
    "code_small_500": functools.partial(small, 500),
    "code_small_1000": functools.partial(small, 1000),
    "code_small_1500": functools.partial(small, 1500),
    "code_6000": functools.partial(code, 6000),
    "code_small": functools.partial(small, 2000),
    "code_6000_small": functools.partial(small, 6000),
    "code_small_8e": functools.partial(small, 2000, epochs=8),
    "posts_small": functools.partial(adaptation, newsgroups, 2000, width=64),
    "reviews_small": functools.partial(
        adaptation, other_reviews, 2000, width=64
    ),
    "posts_small_500": functools.partial(adaptation, newsgroups, 500, width=64),
    # Labels of few classes.
    "code_classes_2": functools.partial(lowest_bits, 2, 2000),
    "code_classes_4": functools.partial(lowest_bits, 4, 2000),
    "code_classes_16": functools.partial(lowest_bits, 16, 2000),
    "code_classes_256": functools.partial(lowest_bits, 256, 2000),
    "code_classes_2_8000": functools.partial(lowest_bits, 2, 8000),
    # Few predictions a step.
    "code_small_1": functools.partial(small, 2000, batch_size=1),
    "code_small_2": functools.partial(small, 2000, batch_size=2),
    "code_small_4": functools.partial(small, 2000, batch_size=4),
    "code_small_1_16000": functools.partial(small, 16_000, batch_size=1),
    # The same, of few different texts.
    "code_small_1_18e": functools.partial(
        small, 16_000, batch_size=1, epochs=18
    ),
}
