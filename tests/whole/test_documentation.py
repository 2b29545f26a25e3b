"""The documentation's code runs, and what its commands name is there.

The Python blocks of a page run one after the other, in one namespace. Small
models stand in for the pretrained ones, so that nothing is downloaded. Before a
block that mentions them, `model` and `backbone` are new: plain where the block
converts them, else converted and compiled. A comment `<!-- skip: ... -->` in a
page leaves out what another backend needs.
"""

import contextlib
import functools
import os
import pathlib
import re
import shlex
import socket
import unittest
from importlib.util import find_spec

import keras
import numpy as np
import pytest
from processes import Child
from processes import run_script
from support import tiny_bert

import keras_srlora
from keras_srlora.backend.arguments import keras_version
from keras_srlora.layers.requirements import QUANTIZED_SINCE

sybil = pytest.importorskip("sybil")

from sybil.parsers.markdown import CodeBlockParser  # noqa: E402
from sybil.parsers.markdown import PythonCodeBlockParser  # noqa: E402
from sybil.parsers.markdown import SkipParser  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.glob("*.md")])
BACKEND = keras.backend.backend()

pytestmark = [
    pytest.mark.skipif(
        find_spec("keras_hub") is None or find_spec("safetensors") is None,
        reason="not installed: keras_hub or safetensors",
    ),
    # Keras, of the parts of a model that it does not quantize.
    pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method"),
    # A head that is trained with each adapter.
    pytest.mark.filterwarnings("ignore:.*in the new adapter"),
]


def name_of(page):
    return page.name


def parse(page, *parsers):
    return sybil.document.Document.parse(str(page), *parsers)


PYTHON_PAGES = [
    page for page in PAGES if "```python\n" in page.read_text("utf-8")
]
# Warnings of others: of PEFT, of TensorBoard's protocol buffers.
WARN = ("adapters.md", "pictures.md")


def with_marks(page):
    warns = pytest.mark.filterwarnings("default")
    return pytest.param(page, marks=[warns] if page.name in WARN else [])


@pytest.mark.parametrize(
    "page", list(map(with_marks, PYTHON_PAGES)), ids=name_of
)
def test_python_blocks_run(page, monkeypatch, tmp_path):
    if page.name == "quantization.md" and keras_version() < QUANTIZED_SINCE:
        pytest.skip("needs a newer Keras")
    monkeypatch.chdir(tmp_path)
    put_stand_ins(monkeypatch, page.name)
    document = parse(page, PythonCodeBlockParser(), SkipParser())
    document.namespace.update(names_for(page.name, tmp_path))
    for example in document.examples():
        if isinstance(example.parsed, str):
            document.namespace.update(fresh_models(page.name, example.parsed))
        # A directive leaves out one block, not the page.
        with contextlib.suppress(unittest.SkipTest):
            example.evaluate()


# Small models instead of pretrained ones.


def put_stand_ins(monkeypatch, page):
    import keras_hub

    models = keras_hub.models
    small = {"vocabulary_size": 50, "num_layers": 1, "hidden_dim": 16}
    decoder = {**small, "intermediate_dim": 24, "num_query_heads": 2}
    decoder["num_key_value_heads"] = 1

    def from_preset(cls, preset, **arguments):
        if cls is models.BertBackbone:
            return bert()
        if cls is models.CausalLM:
            return causal_lm()
        keras.utils.set_random_seed(7)
        heads = {"head_dim": 8} if cls is models.GemmaBackbone else {}
        return cls(**decoder, **heads)

    for name in ("BertBackbone", "CausalLM", "GemmaBackbone", "LlamaBackbone"):
        cls = getattr(models, name)
        monkeypatch.setattr(cls, "from_preset", classmethod(from_preset))
    if BACKEND == "torch" and page == "adapters.md":
        import transformers

        monkeypatch.setattr(
            transformers.AutoModel, "from_pretrained", transformers_bert
        )


def bert():
    return tiny_bert(num_layers=1, name="bert_backbone")


def causal_lm():
    """A GPT-2 of single letters that takes texts."""
    import keras_hub

    models = keras_hub.models
    letters = ["<|endoftext|>", "Ġ", *map(chr, range(33, 127)), "Ġh"]
    tokenizer = models.GPT2Tokenizer(
        vocabulary={letter: i for i, letter in enumerate(letters)},
        merges=["Ġ h"],
    )
    keras.utils.set_random_seed(7)
    backbone = models.GPT2Backbone(
        vocabulary_size=len(letters),
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=24,
        max_sequence_length=12,
    )
    preprocessor = models.GPT2CausalLMPreprocessor(tokenizer, 12)
    return models.GPT2CausalLM(backbone, preprocessor)


def transformers_bert(name):
    import transformers

    config = transformers.BertConfig(
        vocab_size=50,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_size=16,
        intermediate_size=24,
        max_position_embeddings=6,
    )
    return transformers.BertModel(config)


def classifier(backbone):
    pooled = backbone(backbone.input)["pooled_output"]
    logits = keras.layers.Dense(2, name="logits")(pooled)
    return compiled(keras.Model(backbone.input, logits))


def dense_model():
    keras.utils.set_random_seed(7)
    inputs = keras.Input((12,))
    x = keras.layers.Dense(16, "relu", name="hidden")(inputs)
    return compiled(
        keras.Model(inputs, keras.layers.Dense(2, name="logits")(x))
    )


def compiled(model):
    model.compile(keras.optimizers.Adam(1e-3), a_loss())
    return model


def a_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def fresh_models(page, block):
    """`model` and `backbone`, where the block mentions one of them."""
    if not re.search(r"\b(model|backbone)\b", block):
        return {}
    if page == "pictures.md" or "combine_adapters" in block:
        return {}  # what the page has done so far
    plain = "enable_srlora(" in block
    if page == "README.md":
        model = causal_lm()
        if not plain:
            keras_srlora.enable_srlora(model, rank=2)
        return {"model": model}
    if page in ("custom_loops.md", "devices.md"):
        model = dense_model()
        if plain:
            return {"model": model}
        keras_srlora.enable_srlora(model, rank=2)
        recomposer = keras_srlora.Recomposer(
            model,
            keras.optimizers.Adam(1e-3),
            total_steps=10,
            predictions_per_step=1024,
        )
        recomposer.optimizer.build(model.trainable_variables)
        return {
            "model": compiled(model),
            "optimizer": keras.optimizers.Adam(1e-3),
            "recomposer": recomposer,
        }
    backbone = bert()
    if not plain:
        keras_srlora.enable_srlora(backbone, rank=2)
    if "enable_srlora(backbone" in block:
        return {"backbone": backbone}
    return {"model": classifier(backbone), "backbone": backbone}


# What a page takes for granted.


class Batches(keras.utils.PyDataset):
    """Two batches `(inputs, labels)`; the same on each backend."""

    def __init__(self, inputs, labels):
        super().__init__()
        self.batches = [
            ({k: v[half] for k, v in inputs.items()}, labels[half])
            for half in (slice(8), slice(8, 16))
        ]

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def names_for(page, folder):
    import keras_hub

    ids = np.arange(96).reshape(16, 6) % 50
    inputs = {
        "token_ids": ids,
        "segment_ids": np.zeros_like(ids),
        "padding_mask": np.ones_like(ids),
    }
    labels = ids[:, 0] % 2
    names = {
        "BACKEND": BACKEND,
        "keras": keras,
        "keras_hub": keras_hub,
        "keras_srlora": keras_srlora,
        "np": np,
        "train": Batches(inputs, labels),
        "val": Batches(inputs, labels),
        "x": inputs,
        "y": labels,
        "loss": a_loss(),
    }
    return names | OF_PAGES.get(page, dict)() | {"folder": folder}


def of_index():
    return {"x": keras.Input((8,)), "texts": ["hello there"] * 32}


def of_readme():
    return {"texts": ["hello there"] * 32, "pretrained_model": causal_lm()}


def of_adapters():
    train = names_for("", None)["train"]
    names = {name: train for name in ("more", "news", "reviews")}
    names["build_pretrained_model"] = lambda: classifier(bert())
    model = classifier(bert())
    keras_srlora.enable_srlora(model, rank=8)
    keras_srlora.save_adapter(
        model, "questions.safetensors", include_trainable=True
    )
    if BACKEND == "torch":
        import peft
        import transformers

        names |= {"peft": peft, "transformers": transformers}
    return names


def of_custom_loops():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 12)).astype("float32")
    y = (x[:, 0] > 0).astype("int64")
    names = {
        "batches": [(x, y)] * 3,
        "x": x,
        "y": y,
        "loss_fn": a_loss(),
        "train_step": lambda x, y: 0.0,
        "MyAdam": type("MyAdam", (keras.optimizers.Adam,), {}),
        "functools": functools,
    }
    if BACKEND == "tensorflow":
        import tensorflow as tf

        names["tf"] = tf
    elif BACKEND == "jax":
        import jax

        names |= {"jax": jax, "read": read, "write": write}
    else:
        import torch

        tensors = (torch.from_numpy(x), torch.from_numpy(y))
        names |= {"torch": torch, "batches": [tensors] * 3}
    return names


def read(variables):
    return [[v.value for v in group] for group in variables]


def write(variables, state):
    for group, values in zip(variables, state):
        for variable, value in zip(group, values):
            variable.assign(value)


def of_devices():
    rng = np.random.default_rng(0)
    return {
        "os": os,
        "process": 0,
        "processes": 1,
        "x": rng.standard_normal((16, 12)).astype("float32"),
        "y": np.arange(16) % 2,
    }


def of_pictures():
    import matplotlib

    matplotlib.use("Agg")
    backbone = bert()
    keras_srlora.enable_srlora(backbone, rank=2, recipe="paper")
    model = classifier(backbone)
    callback = keras_srlora.RecompositionCallback(interval=1)
    train = names_for("", None)["train"]
    model.fit(train, epochs=2, verbose=0, callbacks=[callback])
    keras_srlora.save_adapter(model, "lora.safetensors", include_trainable=True)
    losses = [0.7 - 0.001 * step for step in range(200)]
    return {
        "model": model,
        "callback": callback,
        "losses": losses,
        "lora_losses": losses,
    }


def of_resuming():
    def build_and_convert():
        backbone = bert()
        keras_srlora.enable_srlora(backbone, rank=2)
        return classifier(backbone)

    return {"build_and_convert": build_and_convert}


OF_PAGES = {
    "README.md": of_readme,
    "adapters.md": of_adapters,
    "custom_loops.md": of_custom_loops,
    "devices.md": of_devices,
    "index.md": of_index,
    "pictures.md": of_pictures,
    "resuming.md": of_resuming,
}


# Scripts that a page shows whole, run by the commands beneath them.

TITLED = re.compile(
    r'^```python title="(.*?)"\n(.*?)^```', re.DOTALL | re.MULTILINE
)
COMMANDS = re.compile(r"^```shell\n(.*?)^```", re.DOTALL | re.MULTILINE)
PORT = re.compile(r"127\.0\.0\.1:(\d+)")


def device_blocks():
    """Shell blocks of the page that run on this backend."""
    text = (DOCS / "devices.md").read_text("utf-8")
    return [
        block
        for block in COMMANDS.findall(text)
        if f"KERAS_BACKEND={BACKEND}" in block
    ]


def test_each_backend_has_scripts():
    assert device_blocks()


@pytest.mark.parametrize("block", device_blocks())
def test_scripts_on_many_devices_run(block, tmp_path):
    text = with_free_ports((DOCS / "devices.md").read_text("utf-8"))
    for name, script in TITLED.findall(text):
        (tmp_path / name).write_text(script, "utf-8")
    # Lines one after the other; what `&` separates at the same time.
    for line in block.splitlines():
        children = [
            start(command, tmp_path, tmp_path / f"log_{index}.txt")
            for index, command in enumerate(re.split("[&;]", line))
            if "python" in command
        ]
        for child in children:
            child.assert_ends(timeout=300)
        for index in range(len(children)):
            printed = (tmp_path / f"log_{index}.txt").read_text("utf-8")
            assert "loss" in printed


def start(command, folder, log):
    """Starts `NAME=value python script.py argument`, with Keras imported."""
    words = shlex.split(command)
    python = words.index("python")
    environment = dict(word.split("=", 1) for word in words[:python])
    script, *arguments = words[python + 1 :]
    return Child(
        run_script, (str(folder / script), arguments), log, environment
    )


def with_free_ports(text):
    """Other processes may run the same scripts at the same time."""
    sockets = {port: socket.socket() for port in PORT.findall(text)}
    for free in sockets.values():
        free.bind(("127.0.0.1", 0))
    ports = {port: s.getsockname()[1] for port, s in sockets.items()}
    for free in sockets.values():
        free.close()
    return PORT.sub(lambda m: f"127.0.0.1:{ports[m[1]]}", text)


# Commands and paths.

SHELL_PAGES = [
    page for page in PAGES if "```shell\n" in page.read_text("utf-8")
]
PATH = re.compile(
    r"(?<![\w/.-])(?:benchmarks|examples|tests|tools|keras_srlora)/[\w./-]*\w"
)


@pytest.mark.once
@pytest.mark.parametrize("page", SHELL_PAGES, ids=name_of)
def test_scripts_and_options_of_commands_exist(page):
    parser = CodeBlockParser("shell", evaluator=lambda example: None)
    text = page.read_text("utf-8")
    own = dict(TITLED.findall(text))
    found = 0
    for example in parse(page, parser).examples():
        for line in example.parsed.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|[&;|]", line):
                words = shlex.split(command, comments=True)
                found += check_command(words, own)
    assert found


def check_command(words, own):
    """Checks a command; 1 if it starts a script or a session of ours."""
    words = [as_script(word) for word in words]
    script = next((w for w in words if w.endswith(".py")), None)
    if "nox" in words and "-s" in words:
        session = words[words.index("-s") + 1]
        noxfile = (ROOT / "noxfile.py").read_text("utf-8")
        assert f"def {session}(" in noxfile, words
        return 1
    if "pip" in words:
        extras = re.findall(r"\[(.*?)\]", " ".join(words))
        project = (ROOT / "pyproject.toml").read_text("utf-8")
        for extra in ",".join(extras).split(","):
            assert not extra or f"\n{extra} = [" in project, words
        return 1
    if script is None or script in own:
        return int(script is not None)
    assert (ROOT / script).is_file(), words
    sources = [
        path.read_text("utf-8") for path in (ROOT / script).parent.glob("*.py")
    ]
    for option in words[words.index(script) :]:
        if option.startswith("--"):
            name = option.split("=")[0]
            assert any(f'"{name}"' in s for s in sources), words
    return 1


def as_script(word):
    """`benchmarks.drift`, which follows `-m`, as `benchmarks/drift.py`."""
    is_module = re.fullmatch(r"benchmarks(\.\w+)+", word)
    return word.replace(".", "/") + ".py" if is_module else word


@pytest.mark.once
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_exist(page):
    text = page.read_text("utf-8")
    for path in PATH.findall(text):
        assert (ROOT / path).exists() or (ROOT / f"{path}.py").exists(), path
