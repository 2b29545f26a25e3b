"""Adapters as plain LoRA: exported here, read by KerasHub and by PEFT."""

import json

import keras
import numpy as np
import pytest
from support import bert_outputs
from support import effective
from support import tiny_bert
from support import to_numpy

import keras_srlora
from keras_srlora.functional.contraction import as_kernel
from keras_srlora.layers import pairs
from keras_srlora.recipes.definition import RECIPES

keras_hub = pytest.importorskip("keras_hub")


def adapted(names=None, recipe="paper", rank=2):
    """A backbone after two recompositions, with factors as if trained."""
    bert = tiny_bert()
    layers = keras_srlora.enable_srlora(
        bert, rank=rank, target_layer_names=names, recipe=recipe
    )
    train_a_little(layers, rank)
    return bert, layers


def train_a_little(layers, rank):
    rng = np.random.default_rng(0)
    for layer in layers:
        for step in range(2):
            for factor in layer.factors:
                noise = rng.standard_normal(factor.shape) * 0.2
                factor.assign(to_numpy(factor) + noise)
            pairs.fuse_and_restart(
                layer,
                np.array([step % rank]),
                layer.record.unused[:1],
                np.ones(1),
                layer.recipe.scale_restarted,
                step,
            )


@pytest.mark.parametrize("recipe", ["paper", RECIPES["lora_restarts"]])
def test_the_whole_update_is_a_product_of_two_factors(recipe):
    _, layers = adapted(recipe=recipe)
    plain = {layer.path: layer for layer in tiny_bert()._flatten_layers()}
    for layer in layers:
        a, b = pairs.update_factors(layer)
        assert len(a) == len(b) <= 2 * layer.direction_count
        update = to_numpy(as_kernel(a.T @ b, layer.plan()))
        expected = effective(layer) - to_numpy(plain[layer.path].kernel)
        np.testing.assert_allclose(update, expected, atol=1e-5)


@pytest.mark.parametrize("recipe", ["paper", RECIPES["lora_restarts"]])
def test_stock_keras_hub_computes_the_same(recipe, tmp_path):
    bert, _ = adapted(recipe=recipe)
    path = tmp_path / "adapter.lora.h5"
    rank, names, error = keras_srlora.export_lora(bert, path)
    assert error == 0.0
    stock = tiny_bert()
    stock.enable_lora(rank, target_layer_names=names)
    assert np.abs(bert_outputs(stock) - bert_outputs(bert)).max() > 1e-3
    stock.load_lora_weights(path)
    np.testing.assert_allclose(
        bert_outputs(stock), bert_outputs(bert), atol=1e-4
    )


def test_query_and_value_load_without_more(tmp_path):
    bert, _ = adapted(names=["query", "value"])
    path = tmp_path / "adapter.lora.h5"
    keras_srlora.export_lora(bert, path)
    stock = tiny_bert()
    stock.load_lora_weights(path)
    np.testing.assert_allclose(
        bert_outputs(stock), bert_outputs(bert), atol=1e-4
    )


def test_a_layer_of_the_same_name_that_was_not_adapted(tmp_path):
    bert, layers = adapted(names=[".*layer_1.*/query"])
    assert len(layers) == 1
    path = tmp_path / "adapter.lora.h5"
    rank, names, _ = keras_srlora.export_lora(bert, path)
    assert names == ["query"]
    stock = tiny_bert()
    stock.enable_lora(rank, target_layer_names=names)
    stock.load_lora_weights(path)
    np.testing.assert_allclose(
        bert_outputs(stock), bert_outputs(bert), atol=1e-4
    )


def test_a_smaller_rank_keeps_the_best_and_says_what_it_cut(tmp_path):
    bert, layers = adapted()
    path = tmp_path / "adapter.lora.h5"
    rank, names, error = keras_srlora.export_lora(bert, path, rank=2)
    assert rank == 2
    stock = tiny_bert()
    stock.enable_lora(rank, target_layer_names=names)
    stock.load_lora_weights(path)
    pretrained = {
        x.path: x.kernel
        for x in tiny_bert()._flatten_layers()
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
        keras_srlora.export_lora(tiny_bert(), tmp_path / "a.lora.h5")


# PEFT, on Hugging Face's models of the same weights.


def transformers():
    pytest.importorskip("peft")
    return pytest.importorskip("transformers")


def fill(module, tensors):
    """Sets a torch module's parameters, every one of them."""
    import torch

    state = {
        name: torch.from_numpy(np.ascontiguousarray(value))
        for name, value in tensors.items()
    }
    module.load_state_dict(state, strict=True)
    return module.eval()


def linear(name, kernel, bias, out_axes=1):
    """A `torch.nn.Linear` of a Keras kernel with `out_axes` axes for `out`."""
    kernel, bias = to_numpy(kernel), to_numpy(bias)
    out = int(np.prod(kernel.shape[-out_axes:]))
    return {
        f"{name}.weight": kernel.reshape(-1, out).T,
        f"{name}.bias": bias.reshape(-1),
    }


def norm(name, layer):
    return {
        f"{name}.weight": to_numpy(layer.gamma),
        f"{name}.bias": to_numpy(layer.beta),
    }


def hugging_face_bert(bert):
    config = transformers().BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=6,
        # KerasHub's is the approximation by tanh.
        hidden_act="gelu_new",
    )
    layers = {layer.path: layer for layer in bert._flatten_layers()}
    tensors = norm("embeddings.LayerNorm", layers["embeddings_layer_norm"])
    for ours, theirs in (
        ("token_embedding", "word_embeddings"),
        ("position_embedding", "position_embeddings"),
        ("segment_embedding", "token_type_embeddings"),
    ):
        weights = layers[ours].weights[0]
        tensors[f"embeddings.{theirs}.weight"] = to_numpy(weights)
    for i in range(2):
        ours, theirs = f"transformer_layer_{i}", f"encoder.layer.{i}"
        attention = f"{ours}/self_attention_layer"
        for name in ("query", "key", "value"):
            layer = layers[f"{attention}/{name}"]
            tensors |= linear(
                f"{theirs}.attention.self.{name}", layer.kernel, layer.bias, 2
            )
        for name, module in (
            (f"{attention}/attention_output", "attention.output.dense"),
            (f"{ours}/feedforward_intermediate_dense", "intermediate.dense"),
            (f"{ours}/feedforward_output_dense", "output.dense"),
        ):
            layer = layers[name]
            tensors |= linear(f"{theirs}.{module}", layer.kernel, layer.bias)
        tensors |= norm(
            f"{theirs}.attention.output.LayerNorm",
            layers[f"{attention}_norm"],
        )
        tensors |= norm(
            f"{theirs}.output.LayerNorm",
            layers[f"{ours}/feedforward_layer_norm"],
        )
    pooler = layers["pooled_dense"]
    tensors |= linear("pooler.dense", pooler.kernel, pooler.bias)
    return fill(transformers().BertModel(config), tensors)


def hugging_face_outputs(model):
    import torch

    with torch.no_grad():
        ids = torch.arange(12).reshape(2, 6)
        return model(input_ids=ids).last_hidden_state.numpy()


# Warnings of these packages are not this one's.
theirs_warn = pytest.mark.filterwarnings("default")


@theirs_warn
@pytest.mark.parametrize("recipe", ["paper", RECIPES["lora_restarts"]])
def test_peft_on_a_hugging_face_bert_computes_the_same(recipe, tmp_path):
    theirs = hugging_face_bert(tiny_bert())
    np.testing.assert_allclose(
        hugging_face_outputs(theirs), bert_outputs(tiny_bert()), atol=1e-5
    )
    ours, _ = adapted(recipe=recipe)
    rank, names, error = keras_srlora.export_peft(ours, tmp_path / "adapter")
    assert error == 0.0
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == rank
    assert config["target_modules"] == names
    peft = pytest.importorskip("peft")
    adapter = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    np.testing.assert_allclose(
        hugging_face_outputs(adapter), bert_outputs(ours), atol=1e-4
    )


def vit():
    keras.utils.set_random_seed(7)
    return keras_hub.models.ViTBackbone(
        image_shape=(8, 8, 3),
        patch_size=4,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=24,
        use_mha_bias=True,
        use_mlp_bias=True,
    )


def hugging_face_vit(model):
    config = transformers().ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    # KerasHub's spelling until 0.26.
    layers = {
        (layer.path or "").replace("/tranformer", "/transformer"): layer
        for layer in model._flatten_layers()
    }
    embedding = "vit_patching_and_embedding"
    patches = layers[f"{embedding}/patch_embedding"]
    positions = layers[f"{embedding}/position_embedding"].weights[0]
    token = next(v for v in model.variables if v.path.endswith("class_token"))
    tensors = {
        "embeddings.cls_token": to_numpy(token),
        "embeddings.position_embeddings": to_numpy(positions)[None],
        "embeddings.patch_embeddings.projection.weight": np.transpose(
            to_numpy(patches.kernel), (3, 2, 0, 1)
        ),
        "embeddings.patch_embeddings.projection.bias": to_numpy(patches.bias),
    } | norm("layernorm", layers["vit_encoder/ln"])
    for i in range(2):
        ours, theirs = f"vit_encoder/transformer_block_{i + 1}", f"layers.{i}"
        for name, module, out_axes in (
            ("mha/query", "attention.q_proj", 2),
            ("mha/key", "attention.k_proj", 2),
            ("mha/value", "attention.v_proj", 2),
            ("mha/attention_output", "attention.o_proj", 1),
            ("mlp/dense_1", "mlp.fc1", 1),
            ("mlp/dense_2", "mlp.fc2", 1),
        ):
            layer = layers[f"{ours}/{name}"]
            tensors |= linear(
                f"{theirs}.{module}", layer.kernel, layer.bias, out_axes
            )
        tensors |= norm(f"{theirs}.layernorm_before", layers[f"{ours}/ln_1"])
        tensors |= norm(f"{theirs}.layernorm_after", layers[f"{ours}/ln_2"])
    theirs = transformers().ViTModel(config, add_pooling_layer=False)
    return fill(theirs, tensors)


@theirs_warn
def test_peft_on_a_hugging_face_vit_computes_the_same(tmp_path):
    import torch

    images = np.random.default_rng(0).standard_normal((2, 8, 8, 3))
    images = images.astype("float32")

    def their_outputs(model):
        with torch.no_grad():
            pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
            return model(pixel_values=pixels).last_hidden_state.numpy()

    theirs, ours = hugging_face_vit(vit()), vit()
    np.testing.assert_allclose(
        their_outputs(theirs), to_numpy(ours(images)), atol=1e-5
    )
    layers = keras_srlora.enable_srlora(ours, rank=2)
    train_a_little(layers, rank=2)
    keras_srlora.export_peft(ours, tmp_path)
    peft = pytest.importorskip("peft")
    adapter = peft.PeftModel.from_pretrained(theirs, tmp_path)
    np.testing.assert_allclose(
        their_outputs(adapter), to_numpy(ours(images)), atol=1e-4
    )


def small_model():
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, name="one")(inputs)
    x = keras.layers.Dense(8, name="two")(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    keras_srlora.enable_srlora(model, rank=2)
    return model


def test_modules_of_another_model_are_said_by_the_user(tmp_path):
    keras_srlora.export_peft(
        small_model(),
        tmp_path,
        modules={"one": "layers.0", "two": "layers.1"},
        prefix="body.",
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["body.layers.0", "body.layers.1"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "'one' is. Pass it in `modules"),
        ({"modules": {"one": "x"}}, "'two' is. Pass it in `modules"),
        ({"modules": {"one": "x", "two": "x"}}, r"\['x'\] for several"),
        ({"rank": 1.5}, "`rank` must be a positive"),
    ],
)
def test_modules_that_are_not_known_are_refused(kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        keras_srlora.export_peft(small_model(), tmp_path, **kwargs)
    assert not list(tmp_path.iterdir())
