"""An adapted embedding table: read by PEFT, refused where it cannot be."""

import json

import keras
import numpy as np
import pytest
from pieces import nudge
from pieces import state_of
from support import to_numpy

import keras_srlora

MODULES = {"table": "table", "projection": "projection"}


def with_table(recipe):
    keras.utils.set_random_seed(7)
    inputs = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(20, 8, name="table")(inputs)
    x = keras.layers.Dense(6, name="projection")(x)
    model = keras.Model(inputs, x)
    nudge(
        keras_srlora.enable_srlora(
            model,
            2,
            target_rank=4,
            recipe=recipe,
            target_layer_names=["table", "projection"],
        )
    )
    return model


@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("recipe", ["paper", "lora_restarts"])
def test_peft_reads_an_adapted_table(recipe, rank, rng, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    model = with_table(recipe)
    names = keras_srlora.export_peft(model, tmp_path, rank, MODULES)[1]
    assert sorted(names) == ["projection", "table"]

    class Base(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(20, 8)
            self.projection = torch.nn.Linear(8, 6)

        def forward(self, ids):
            return self.projection(self.table(ids))

    base = Base()
    ids = rng.integers(0, 20, (3, 5)).astype("int32")
    with keras_srlora.adapter_disabled(model):
        weights = {
            "table.weight": to_numpy(model.get_layer("table").embeddings),
            "projection.weight": to_numpy(
                model.get_layer("projection").kernel
            ).T,
            "projection.bias": to_numpy(model.get_layer("projection").bias),
        }
        pretrained = to_numpy(model(ids))
    base.load_state_dict({k: torch.tensor(v) for k, v in weights.items()})
    with torch.no_grad():
        found = base(torch.tensor(ids, dtype=torch.long)).numpy()
        np.testing.assert_allclose(found, pretrained, atol=1e-5)
        tuned = peft.PeftModel.from_pretrained(base, str(tmp_path))
        found = tuned(torch.tensor(ids, dtype=torch.long)).numpy()
    np.testing.assert_allclose(found, to_numpy(model(ids)), atol=1e-4)
    assert np.max(np.abs(found - pretrained)) > 0.1


def test_kerashubs_files_hold_no_table(tmp_path):
    model = with_table("paper")
    before = state_of(model)
    with pytest.raises(ValueError, match="table"):
        keras_srlora.export_lora(model, tmp_path / "a.lora.h5")
    assert list(tmp_path.iterdir()) == []
    for a, b in zip(state_of(model), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_config_of_a_table_is_one_of_lora(tmp_path):
    keras_srlora.export_peft(with_table("paper"), tmp_path, modules=MODULES)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert sorted(config["target_modules"]) == ["projection", "table"]
