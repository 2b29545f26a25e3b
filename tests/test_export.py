"""Adapters for stock KerasHub: exported here, read there."""

import keras
import numpy as np
import pytest
from support import effective
from support import to_numpy

import keras_srlora
from keras_srlora._recipes import RECIPES

keras_hub = pytest.importorskip("keras_hub")


def backbone():
    """The same weights each time."""
    keras.utils.set_random_seed(7)
    return keras_hub.models.BertBackbone(
        vocabulary_size=50,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=24,
        max_sequence_length=6,
    )


def outputs(bert):
    ids = np.arange(12).reshape(2, 6)
    inputs = {
        "token_ids": ids,
        "segment_ids": np.zeros_like(ids),
        "padding_mask": np.ones_like(ids),
    }
    return to_numpy(bert(inputs)["sequence_output"])


def adapted(names=None, recipe="paper", rank=2):
    """A backbone after two recompositions, with factors as if trained."""
    bert = backbone()
    layers = keras_srlora.enable_srlora(
        bert, rank=rank, target_layer_names=names, recipe=recipe
    )
    rng = np.random.default_rng(0)
    for layer in layers:
        for step in range(2):
            for factor in layer.factors:
                noise = rng.standard_normal(factor.shape) * 0.2
                factor.assign(to_numpy(factor) + noise)
            layer.fuse_and_restart(
                np.array([step % rank]),
                layer.adapter_state.unused[:1],
                np.ones(1),
                layer.recipe["scale"],
                step,
            )
    return bert, layers


@pytest.mark.parametrize("recipe", ["paper", RECIPES["lora_restarts"]])
def test_the_whole_update_is_a_product_of_two_factors(recipe):
    _, layers = adapted(recipe=recipe)
    plain = {layer.path: layer for layer in backbone()._flatten_layers()}
    for layer in layers:
        a, b = layer.update_factors()
        assert len(a) == len(b) <= 2 * layer.direction_count
        update = to_numpy(layer.shape_as_kernel(a.T @ b))
        expected = effective(layer) - to_numpy(plain[layer.path].kernel)
        np.testing.assert_allclose(update, expected, atol=1e-5)


@pytest.mark.parametrize("recipe", ["paper", RECIPES["lora_restarts"]])
def test_stock_keras_hub_computes_the_same(recipe, tmp_path):
    bert, _ = adapted(recipe=recipe)
    path = tmp_path / "adapter.lora.h5"
    rank, names, error = keras_srlora.export_lora(bert, path)
    assert error == 0.0
    stock = backbone()
    stock.enable_lora(rank, target_layer_names=names)
    assert np.abs(outputs(stock) - outputs(bert)).max() > 1e-2
    stock.load_lora_weights(path)
    np.testing.assert_allclose(outputs(stock), outputs(bert), atol=1e-4)


def test_query_and_value_load_without_more(tmp_path):
    bert, _ = adapted(names=["query", "value"])
    path = tmp_path / "adapter.lora.h5"
    keras_srlora.export_lora(bert, path)
    stock = backbone()
    stock.load_lora_weights(path)
    np.testing.assert_allclose(outputs(stock), outputs(bert), atol=1e-4)


def test_a_layer_of_the_same_name_that_was_not_adapted(tmp_path):
    bert, layers = adapted(names=[".*layer_1.*/query"])
    assert len(layers) == 1
    path = tmp_path / "adapter.lora.h5"
    rank, names, _ = keras_srlora.export_lora(bert, path)
    assert names == ["query"]
    stock = backbone()
    stock.enable_lora(rank, target_layer_names=names)
    stock.load_lora_weights(path)
    np.testing.assert_allclose(outputs(stock), outputs(bert), atol=1e-4)


def test_a_smaller_rank_keeps_the_best_and_says_what_it_cut(tmp_path):
    bert, layers = adapted()
    path = tmp_path / "adapter.lora.h5"
    rank, names, error = keras_srlora.export_lora(bert, path, rank=2)
    assert rank == 2
    stock = backbone()
    stock.enable_lora(rank, target_layer_names=names)
    stock.load_lora_weights(path)
    pretrained = {
        x.path: x.kernel
        for x in backbone()._flatten_layers()
        if hasattr(x, "kernel")
    }
    here = {x.path: x for x in stock._flatten_layers()}
    worst = 0.0
    for layer in layers:
        base = to_numpy(pretrained[layer.path])
        update = (effective(layer) - base).reshape(-1, base.shape[-1])
        values = np.linalg.svd(update, compute_uv=False)
        best = np.sqrt(np.sum(values[2:] ** 2) / np.sum(values**2))
        got = (to_numpy(here[layer.path].kernel) - base).reshape(update.shape)
        left = np.linalg.norm(update - got) / np.linalg.norm(update)
        np.testing.assert_allclose(left, best, atol=1e-3)
        worst = max(worst, best)
    np.testing.assert_allclose(error, worst, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("adapter.h5", {}, r"must end in `.lora.h5`"),
        ("adapter.lora.h5", {"rank": 0}, "`rank` must be a positive"),
    ],
)
def test_bad_input_is_refused(name, kwargs, message, tmp_path):
    bert, _ = adapted(names=["query"])
    with pytest.raises(ValueError, match=message):
        keras_srlora.export_lora(bert, tmp_path / name, **kwargs)
    assert not list(tmp_path.iterdir())


def test_a_backbone_without_srlora_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no SRLoRA layer"):
        keras_srlora.export_lora(backbone(), tmp_path / "a.lora.h5")
