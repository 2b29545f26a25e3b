"""The Python blocks of the documentation run, one after the other.

A small model takes the place of the pretrained one, so that a page needs no
download; what a page calls `model`, `train` and so on is there.
"""

import pathlib
import re
from importlib.util import find_spec

import keras
import numpy as np
import pytest
from support import tiny_bert

import keras_srlora

ROOT = pathlib.Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)

PAGES = [
    "choosing.md",
    "faq.md",
    "from_keras_lora.md",
    "from_peft.md",
    "index.md",
]

pytestmark = pytest.mark.skipif(
    find_spec("keras_hub") is None or find_spec("safetensors") is None,
    reason="not installed: keras_hub or safetensors",
)


def with_head(backbone):
    pooled = backbone(backbone.input)["pooled_output"]
    return keras.Model(backbone.input, keras.layers.Dense(2)(pooled))


def batches():
    ids = np.arange(96).reshape(16, 6) % 50
    inputs = {
        "token_ids": ids,
        "segment_ids": np.zeros_like(ids),
        "padding_mask": np.ones_like(ids),
    }
    import tensorflow as tf

    slices = tf.data.Dataset.from_tensor_slices((inputs, ids[:, 0] % 2))
    return slices.batch(8)


def surroundings(block):
    """The names that a block takes for granted."""
    backbone = tiny_bert()
    if "enable_srlora(" not in block:
        keras_srlora.enable_srlora(backbone, rank=2)
    model = with_head(backbone)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adamw", loss)
    return {
        "keras_srlora": keras_srlora,
        "backbone": backbone,
        "model": model,
        "loss": loss,
        "train": batches(),
        "val": batches(),
        "x": keras.Input((8,)),
    }


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_a_page_run(page, monkeypatch, tmp_path):
    import keras_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        keras_hub.models.BertBackbone,
        "from_preset",
        lambda preset, **changes: tiny_bert(**changes),
    )
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    assert blocks
    for block in blocks:
        names = surroundings(block)
        exec(compile(block, page, "exec"), names)
