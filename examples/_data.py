"""Data for the examples, all of it through `tensorflow_datasets`.

A data set has TFDS's name: `glue/sst2`, `cifar100`. With `offline`, real texts
or photographs from installed packages replace it. They are stored under the
same name and in the same format in another folder, and `tfds.load` reads them.
"""

import contextlib
import io
import logging
import random
import re

import _packages
import keras
import tensorflow as tf
import tensorflow_datasets as tfds

VERSION = "1.0.0"

if keras.backend.backend() != "tensorflow":
    # TensorFlow only reads data then, and would take the whole GPU for it.
    tf.config.set_visible_devices([], "GPU")


def load(
    name,
    train_examples=None,
    validation_examples=None,
    offline=False,
    cache=None,
):
    """Returns a training set, a validation set and TFDS's `info` on them."""
    # `None` is TFDS's own place: `TFDS_DATA_DIR` or `~/tensorflow_datasets`.
    data_dir = None
    if offline:
        data_dir = _packages.cache_folder(cache) / "stand_ins"
        store(name, data_dir)
    builder = tfds.builder(name, data_dir=data_dir)
    # A prepared data set needs no network.
    if not builder.is_prepared():
        download(builder)
    train, validation = tfds.load(
        name,
        data_dir=data_dir,
        split=[
            first_of(builder.info, "train", train_examples),
            first_of(
                builder.info,
                validation_split(builder.info),
                validation_examples,
            ),
        ],
        download=False,
    )
    return train, validation, builder.info


def download(builder):
    try:
        builder.download_and_prepare()
    except OSError as error:
        raise SystemExit(
            f"{builder.info.full_name} is not in {builder.data_dir} and could "
            f"not be downloaded: {error}\n"
            "Without a network there is --offline."
        ) from error


def first_of(info, split, count):
    """The first examples of a split, or all of them if there are fewer."""
    size = info.splits[split].num_examples
    return f"{split}[:{min(count, size)}]" if count else split


def validation_split(info):
    # The test labels of GLUE are hidden: look for a validation split first.
    for kind in ("validation", "test"):
        for split in info.splits:
            if split.startswith(kind):
                return split
    raise SystemExit(
        f"{info.full_name} has neither a validation nor a test split, only "
        f"{list(info.splits)}. Choose another data set."
    )


def store(name, data_dir):
    """Stores a stand-in where `tfds.load` finds it, the first time."""
    if name not in STAND_INS:
        raise SystemExit(
            f"{name} has no stand-in, only {', '.join(STAND_INS)} have. "
            "Leave out --offline."
        )
    name, _, config = name.partition("/")
    make, features = STAND_INS[f"{name}/{config}" if config else name]
    version = VERSION
    if features is None:
        # The features of the data set that is replaced.
        builder = tfds.builder(f"{name}/{config}", data_dir=data_dir)
        features, version = builder.info.features, str(builder.version)
    if (data_dir / name / config / version).exists():
        return
    print(f"Preparing local data, once ({make.__doc__})", flush=True)
    tfds.disable_progress_bar()
    logging.getLogger("absl").setLevel("ERROR")
    train, validation = make()
    # TFDS would report a download.
    with contextlib.redirect_stdout(io.StringIO()):
        tfds.dataset_builders.store_as_tfds_dataset(
            name=name,
            config=config or None,
            version=version,
            data_dir=data_dir,
            description=make.__doc__,
            features=features,
            split_datasets={
                "train": list(enumerate(train)),
                "validation": list(enumerate(validation)),
            },
        )


def split(rows, validation, limit=None):
    """Shuffles rows and cuts the validation rows off."""
    rows = random.Random(0).sample(rows, limit or len(rows))
    return rows[validation:], rows[:validation]


def with_columns(splits, *names):
    """Examples as GLUE has them: named columns and a running number.

    A text that occurs twice is never in both splits.
    """
    train, validation = splits
    held_out = {texts_of(row) for row in validation}
    train = [row for row in train if texts_of(row) not in held_out]
    return [
        [{"idx": i, **dict(zip(names, row))} for i, row in enumerate(rows)]
        for rows in (train, validation)
    ]


def texts_of(row):
    return tuple(x for x in row if isinstance(x, str))


# Texts that stand in for GLUE.


def film_reviews():
    """sentences of film reviews: did the reviewer like the film?"""
    rows = _packages.rotten_tomatoes()
    return with_columns(split(rows, 2_000), "sentence", "label")


def swapped_words():
    """sentences of film reviews, as written or with two words swapped"""
    chance = random.Random(0)
    rows = []
    for sentence, _ in _packages.rotten_tomatoes():
        words = sentence.split()
        # Neighbours that are words, and not the same.
        places = [
            i
            for i, (a, b) in enumerate(zip(words, words[1:]))
            if a.isalpha() and b.isalpha() and a != b
        ]
        acceptable = chance.randrange(2)
        if places and not acceptable:
            i = chance.choice(places)
            words[i : i + 2] = words[i + 1], words[i]
        if places:
            rows.append((" ".join(words), acceptable))
    return with_columns(split(rows, 1_000), "sentence", "label")


def same_story():
    """two sentences of BBC News: are they of the same article?"""
    splits = news_pairs(first_paragraph, second_sentence, 200)
    rows = [[(a, b, int(same)) for a, b, same in part] for part in splits]
    return with_columns(rows, "sentence1", "sentence2", "label")


def headline_and_sentence():
    """a headline and a sentence of BBC News: is it of that article?"""
    splits = news_pairs(headline, second_sentence, 400)
    rows = [[(a, b, int(not same)) for a, b, same in part] for part in splits]
    return with_columns(rows, "question", "sentence", "label")


def paragraph_and_headline():
    """a paragraph and a headline of BBC News: do they belong together?"""
    splits = news_pairs(first_paragraph, headline, 150, limit=1_400)
    rows = [[(a, b, int(not same)) for a, b, same in part] for part in splits]
    return with_columns(rows, "sentence1", "sentence2", "label")


def rated_words():
    """words, and how good people said that they feel"""
    rows = [
        # From -4 to 4 there, from 0 to 5 in STS-B.
        (word, "a good feeling", (score + 4) * 5 / 8)
        for word, score in _packages.rated_words()
    ]
    splits = split(rows, 1_000)
    return with_columns(splits, "sentence1", "sentence2", "label")


def headline(title, body):
    return title


def first_paragraph(title, body):
    return body[0]


def second_sentence(title, body):
    """The first one of the second paragraph, where there is one."""
    return re.split(r"(?<=[.?!]) ", body[min(1, len(body) - 1)])[0]


def news_pairs(first, second, validation, limit=None):
    """Two parts of an article, and of two articles of the same section.

    No article's first part is in both splits.
    """
    sections = {}
    for section, title, body in _packages.bbc_news():
        sections.setdefault(section, []).append((title, body))
    pairs = []
    for articles in sections.values():
        for i, article in enumerate(articles):
            # A story goes on for days: half of the section away is another.
            other = articles[(i + len(articles) // 2) % len(articles)]
            pairs.append(
                [
                    (first(*article), second(*article), True),
                    (first(*article), second(*other), False),
                ]
            )
    splits = split(pairs, validation, limit)
    return [split(sum(part, []), 0)[0] for part in splits]


# Photographs.


def solar_cells():
    """photographs of solar cells (ELPV): kind and chance of a defect"""
    rows = [
        {"image": str(path), "label": f"{kind}, {chance:.2f}"}
        for path, kind, chance in _packages.solar_cells()
    ]
    return split(rows, 600)


SOLAR_CELLS = tfds.features.FeaturesDict(
    {
        "image": tfds.features.Image(shape=(300, 300, 1)),
        "label": tfds.features.ClassLabel(
            names=[
                f"{kind}, {chance:.2f}"
                for kind in ("mono", "poly")
                for chance in (0, 1 / 3, 2 / 3, 1)
            ]
        ),
    }
)

# By TFDS's name: the function that makes it, and features that TFDS lacks.
STAND_INS = {
    "glue/sst2": (film_reviews, None),
    "glue/mrpc": (same_story, None),
    "glue/cola": (swapped_words, None),
    "glue/qnli": (headline_and_sentence, None),
    "glue/rte": (paragraph_and_headline, None),
    "glue/stsb": (rated_words, None),
    "solar_cells": (solar_cells, SOLAR_CELLS),
}


# Features.


def text_names(info):
    """The features of a data set that are text, in their order."""
    return [
        name
        for name, feature in info.features.items()
        if isinstance(feature, tfds.features.Text)
    ]
