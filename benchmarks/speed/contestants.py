"""One BERT, trained in each way that is compared, as `Loop`s.

The classifier of KerasHub and, on torch, that of Hugging Face, of the same
size: random weights, no dropout. Every method trains the head; beside it the
adapters of the six kernels of each layer, or what its name says.
"""

import functools

import keras
import keras_hub
import numpy as np

import keras_srlora
from benchmarks.shared.timings import Loop
from keras_srlora.conversion.targets import find_targets

VOCABULARY, TOKENS = 30522, 128
RATE = 1e-4


def data(batch, batches=8):
    """Random tokens and labels."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1000, VOCABULARY, (batch * batches, TOKENS))
    return tokens.astype("int32"), rng.integers(0, 2, batch * batches)


# Keras.


def classifier_data(batch, batches=8):
    """`data` as KerasHub's models take it."""
    tokens, labels = data(batch, batches)
    x = {
        "token_ids": tokens,
        "segment_ids": np.zeros_like(tokens),
        "padding_mask": np.ones_like(tokens),
    }
    return x, labels


def classifier(layers=2, width=768, dtype=None):
    """A `BertTextClassifier` with a frozen backbone."""
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=layers,
        num_heads=width // 64,
        hidden_dim=width,
        intermediate_dim=4 * width,
        dropout=0.0,
        dtype=dtype,
    )
    model = keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, dropout=0.0, preprocessor=None
    )
    backbone.trainable = False
    return model


def targets(model):
    """The layers that SRLoRA adapts by default; all others adapt the same."""
    return find_targets(model.backbone, None)


def full(model, rank):
    """Full fine-tuning."""
    model.backbone.trainable = True


def floor(model, rank):
    """Biases alone: forward, and backward to the activations."""
    for layer in targets(model):
        layer.trainable = True
        layer.kernel.trainable = False


def keras_lora(model, rank):
    """Keras's own LoRA, as KerasHub enables it; without the biases."""
    model.backbone.trainable = True
    names = sorted({layer.name for layer in targets(model)})
    model.backbone.enable_lora(rank, target_layer_names=names)
    for layer in targets(model):
        layer.bias.trainable = False


def srlora(model, rank):
    """The callback scores; its first recomposition lies beyond the end."""
    model.backbone.trainable = True
    keras_srlora.enable_srlora(
        model, rank, target_rank=min(8 * rank, 128), recipe="paper"
    )
    # A run longer than the interval, which the benchmark never reaches.
    return keras_srlora.RecompositionCallback(interval=10**6)


def srlora_without_statistics(model, rank):
    """SRLoRA's layers without the callback."""
    srlora(model, rank)


KERAS = {
    "full": full,
    "floor": floor,
    "keras_lora": keras_lora,
    "srlora": srlora,
    "srlora_without_statistics": srlora_without_statistics,
}


class BeforeStep(keras.callbacks.Callback):
    """Calls a function before each batch of `fit`."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def on_train_batch_begin(self, batch, logs=None):
        self.function()


def keras_loop(method, batch=8, rank=8, layers=2, width=768, dtype=None):
    """A `Loop` of `fit`, and the number of its trainable parameters."""
    model = classifier(layers, width, dtype)
    callback = KERAS[method](model, rank)
    model.compile(
        keras.optimizers.AdamW(RATE),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    x, labels = classifier_data(batch)

    def train(before_step):
        own = [callback] if callback else []
        model.fit(
            x,
            labels,
            batch_size=batch,
            epochs=10**6,
            verbose=0,
            shuffle=False,
            callbacks=[BeforeStep(before_step), *own],
        )

    return Loop(train, functools.partial(wait, model)), count(
        model.trainable_variables
    )


def wait(model):
    """Returns when the last step of a model has ended."""
    if keras.backend.backend() == "jax":
        model.jax_state_sync()
    # On an accelerator what was begun runs on; a value of it waits.
    keras.ops.convert_to_numpy(model.trainable_variables[0])


def count(variables):
    """Number of entries of all variables."""
    return int(sum(np.prod(v.shape) for v in variables))


# Hugging Face.

PROJECTIONS = (
    r".*encoder\.layer\.\d+\.(attention\.self\.(query|key|value)"
    r"|attention\.output\.dense|intermediate\.dense|output\.dense)"
)
PEFT = ("peft_lora", "peft_pissa", "peft_adalora")


def peft_loop(method, batch=8, rank=8, layers=2, width=768, dtype=None):
    """A `Loop` of plain PyTorch, and the number of its parameters."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            hidden_size=width,
            intermediate_size=4 * width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            # KerasHub's, so that both compute the same.
            hidden_act="gelu_pytorch_tanh",
        )
    )
    common = {"r": rank, "lora_alpha": rank, "target_modules": PROJECTIONS}
    common["task_type"] = "SEQ_CLS"
    if method == "peft_adalora":
        del common["r"]
        # As PEFT's own defaults: 12 pairs a kernel, of which 8 remain.
        config = peft.AdaLoraConfig(
            init_r=3 * rank // 2, target_r=rank, total_step=100, **common
        )
    else:
        start = "pissa" if method == "peft_pissa" else True
        config = peft.LoraConfig(init_lora_weights=start, **common)
    model = peft.get_peft_model(model, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device, getattr(torch, dtype or "float32"))
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, RATE)
    tokens, labels = (
        torch.tensor(x, dtype=torch.int64, device=device) for x in data(batch)
    )
    mask = torch.ones_like(tokens[:batch])

    def train(before_step):
        step = 0
        while True:
            before_step()
            rows = slice(step * batch % len(tokens), None)
            loss = model(
                input_ids=tokens[rows][:batch],
                attention_mask=mask,
                labels=labels[rows][:batch],
            ).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if method == "peft_adalora":
                model.base_model.update_and_allocate(step)
            step += 1

    def wait():
        trainable[0].detach().float().cpu()

    return Loop(train, wait), count(trainable)
