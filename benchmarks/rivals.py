"""The claims on Keras's LoRA and on PEFT in the comparison tables, measured.

    KERAS_BACKEND=torch python -m benchmarks.rivals

Resuming: a run of eight steps beside one that is saved after four, loaded into
a new model and resumed. The number is the largest difference of a weight at the
end; 0 is bit-identical. Quantized kernels: whether a model that Keras quantized
trains after `enable_lora`. PEFT's quantized kernels need bitsandbytes and a
GPU, and are not tried.
"""

import pathlib
import re
import tempfile

import keras
import numpy as np
import peft
import torch

import keras_srlora

STEPS, HALF, BATCH, WIDTH, RANK = 8, 4, 8, 16, 2


def main():
    """Measures and prints two tables."""
    print("| resuming in the middle of a run | largest difference |")
    print("|---|---|")
    for name, (start, train, interrupt, weights) in CONTESTANTS.items():
        row = resumes(start, train, interrupt, weights)
        print(f"| {name} | {row} |", flush=True)
    print("\n| Keras `enable_lora` on a kernel in | |\n|---|---|")
    for mode in ("int8", "int4", "float8"):
        print(f"| {mode} | {trains_quantized(mode)} |", flush=True)


def resumes(start, train, interrupt, weights):
    """The largest difference that an interruption makes, or the error."""
    whole = start()
    train(whole, 0, HALF)
    train(whole, HALF, STEPS)
    halves = start()
    train(halves, 0, HALF)
    try:
        halves = interrupt(halves)
        train(halves, HALF, STEPS)
    except RuntimeError as error:
        return one_line(error)
    pairs = zip(weights(whole), weights(halves), strict=True)
    return f"{max(np.abs(a - b).max() for a, b in pairs):.2g}"


def one_line(error):
    """The type of an error and the beginning of its message."""
    message = re.sub(r"\x1b\[\d+m|\s+", " ", str(error)).replace("|", "/")
    return f"{type(error).__name__}: {message[:140]}"


def batches(first, last):
    """Inputs and targets of some steps, as one array each."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((STEPS * BATCH, WIDTH)).astype("float32")
    y = np.tanh(x @ rng.standard_normal((WIDTH, 4)).astype("float32"))
    rows = slice(first * BATCH, last * BATCH)
    return x[rows], y[rows]


# Keras.


def plain_keras():
    """A network of two layers, always with the same weights."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    inputs = keras.Input((WIDTH,))
    x = keras.layers.Dense(WIDTH, "tanh", name="hidden")(inputs)
    return keras.Model(inputs, keras.layers.Dense(4, name="head")(x))


def compiled(model):
    """The model with a built optimizer."""
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def start_srlora():
    """This package's layer."""
    model = plain_keras()
    keras_srlora.enable_srlora(model, RANK, target_layer_names=["hidden"])
    return compiled(model)


def start_keras_lora():
    """Keras's own."""
    model = plain_keras()
    model.get_layer("hidden").enable_lora(RANK)
    return compiled(model)


def keras_fit(model, first, last, callbacks=()):
    """An epoch from one step to another."""
    model.fit(
        *batches(first, last),
        batch_size=BATCH,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
        initial_epoch=first // HALF,
        epochs=last // HALF,
    )


def srlora_fit(model, first, last):
    """As `keras_fit`, with a recomposition every other step."""
    callback = keras_srlora.RecompositionCallback(interval=2)
    keras_fit(model, first, last, [callback])


def by_weights(start):
    """Saves a weights file and loads it into a model that was made anew."""

    def interrupt(model):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "run.weights.h5"
            model.save_weights(path)
            model = start()
            model.load_weights(path)
        return model

    return interrupt


def by_model(model):
    """Saves the whole model and loads it."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "run.keras"
        model.save(path)
        return keras.saving.load_model(path)


def keras_effective(model):
    """The kernel with its adapter, and the head."""
    values = [model.get_layer("hidden").kernel, *model.layers[-1].weights]
    return [keras.ops.convert_to_numpy(value) for value in values]


def trains_quantized(mode):
    """Whether the adapter of a quantized kernel learns, or the error."""
    model = plain_keras()
    try:
        model.quantize(mode)
        model.get_layer("hidden").enable_lora(RANK)
        model.get_layer("head").trainable = False
        model.compile(keras.optimizers.Adam(1e-2), "mse")
        x, y = batches(0, STEPS)
        model(x)
        before = model.evaluate(x, y, verbose=0)
        model.fit(x, y, batch_size=BATCH, epochs=5, verbose=0)
        after = model.evaluate(x, y, verbose=0)
    except Exception as error:
        return one_line(error)
    return f"trains: loss {before:.3f} before, {after:.3f} after"


# PEFT.


class Network(torch.nn.Module):
    """The network of `plain_keras`, with other weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hidden = torch.nn.Linear(WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, 4)

    def forward(self, x):
        """The outputs."""
        return self.head(torch.tanh(self.hidden(x)))


def start_peft(config):
    """`(model, optimizer)` of a kind of adapter."""
    return with_optimizer(peft.get_peft_model(Network(), config))


def with_optimizer(model):
    """A model and Adam for what trains in it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.Adam(trained, lr=1e-2)


def peft_fit(run, first, last):
    """Steps as PEFT documents them, AdaLoRA's own call included."""
    model, optimizer = run
    x, y = map(torch.from_numpy, batches(first, last))
    for step in range(first, last):
        rows = slice((step - first) * BATCH, (step - first + 1) * BATCH)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
        if isinstance(model.base_model, peft.AdaLoraModel):
            model.base_model.update_and_allocate(step)


def peft_interrupt(run):
    """Saves adapter and optimizer, and loads both."""
    model, optimizer = run
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        state = pathlib.Path(folder) / "optimizer.pt"
        torch.save(optimizer.state_dict(), state)
        model, optimizer = with_optimizer(
            peft.PeftModel.from_pretrained(Network(), folder, is_trainable=True)
        )
        optimizer.load_state_dict(torch.load(state))
    return model, optimizer


def peft_effective(run):
    """The weights with the adapter merged."""
    model = run[0].merge_and_unload()
    return [parameter.detach().numpy() for parameter in model.parameters()]


def lora_config():
    """LoRA."""
    return peft.LoraConfig(r=RANK, target_modules=["hidden"])


def adalora_config():
    """AdaLoRA, which still prunes when the run is interrupted."""
    return peft.AdaLoraConfig(
        init_r=2 * RANK,
        target_r=RANK,
        tinit=1,
        tfinal=1,
        deltaT=1,
        total_step=STEPS,
        target_modules=["hidden"],
    )


# Name: how a run starts, trains and is interrupted, and its weights.
CONTESTANTS = {
    "keras-srlora, `save_weights`": (
        start_srlora,
        srlora_fit,
        by_weights(start_srlora),
        keras_effective,
    ),
    "keras-srlora, `model.save`": (
        start_srlora,
        srlora_fit,
        by_model,
        keras_effective,
    ),
    "Keras `enable_lora`, `save_weights`": (
        start_keras_lora,
        keras_fit,
        by_weights(start_keras_lora),
        keras_effective,
    ),
    "Keras `enable_lora`, `model.save`": (
        start_keras_lora,
        keras_fit,
        by_model,
        keras_effective,
    ),
    "PEFT LoRA, adapter and optimizer": (
        lambda: start_peft(lora_config()),
        peft_fit,
        peft_interrupt,
        peft_effective,
    ),
    "PEFT AdaLoRA, adapter and optimizer": (
        lambda: start_peft(adalora_config()),
        peft_fit,
        peft_interrupt,
        peft_effective,
    ),
}

if __name__ == "__main__":
    main()
