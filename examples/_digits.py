"""The small task of the custom loops: handwritten digits, old ones and new.

A small network learns the digits 0 to 4 of scikit-learn's 8x8 images; the loops
adapt it to the digits 5 to 9.
"""

import argparse

import keras
import numpy as np
from sklearn.datasets import load_digits

BATCH_SIZE = 64
VALIDATION = 300
RANK, TARGET_RANK = 4, 16


def load(classes):
    """Returns `(x, y)` to train on and `(x, y)` to validate on."""
    digits = load_digits()
    chosen = np.isin(digits.target, classes)
    x = (digits.data[chosen] / 16).astype("float32")
    y = (digits.target[chosen] - min(classes)).astype("int32")
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    return (x[VALIDATION:], y[VALIDATION:]), (x[:VALIDATION], y[:VALIDATION])


def shuffled_batches(x, y, steps, seed=0):
    """A list of `(x, y)`, in an order that depends on the seed alone."""
    random = np.random.default_rng(seed)
    batches, order = [], []
    for _ in range(steps):
        if len(order) < BATCH_SIZE:
            order = random.permutation(len(x))
        chosen, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        batches.append((x[chosen], y[chosen]))
    return batches


def new_model():
    inputs = keras.Input((64,), name="pixels")
    h = keras.layers.Dense(64, activation="relu", name="hidden_1")(inputs)
    h = keras.layers.Dense(64, activation="relu", name="hidden_2")(h)
    return keras.Model(inputs, keras.layers.Dense(5, name="head")(h))


def pretrained_model():
    """A model that knows the digits 0 to 4, with a new head."""
    model = new_model()
    (x, y), validation = load(range(0, 5))
    model.compile(
        keras.optimizers.Adam(3e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(x, y, batch_size=BATCH_SIZE, epochs=10, verbose=0)
    print(f"pretrained on 0 to 4: accuracy {accuracy(model, *validation):.3f}")
    features = model.get_layer("hidden_2").output
    head = keras.layers.Dense(5, name="head")
    return keras.Model(model.input, head(features))


def adapt(model, recomposer, train, steps):
    """Trains with a loop on the digits 5 to 9; prints accuracies."""
    (x, y), validation = load(range(5, 10))
    before = accuracy(model, *validation)
    train(model, recomposer, shuffled_batches(x, y, steps))
    after = accuracy(model, *validation)
    print(f"{len(recomposer.events)} recompositions of a layer")
    print(f"accuracy on 5 to 9: {before:.3f} before, {after:.3f} after")


def accuracy(model, x, y):
    logits = keras.ops.convert_to_numpy(model(x))
    return float(np.mean(np.argmax(logits, axis=-1) == y))


def parse_arguments(description):
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=2000)
    # For short runs; the default, "adaptive", is for long ones.
    parser.add_argument("--recipe", default="lora_restarts", help="by its name")
    return parser.parse_args()


def print_loss(step, steps, losses):
    """Prints the mean loss since the last line, ten times a run."""
    every = max(1, steps // 10)
    if step % every == 0:
        loss = np.mean([float(loss) for loss in losses[-every:]])
        print(f"step {step} of {steps}: loss {loss:.4f}", flush=True)


def print_recompositions(events):
    for event in events:
        print(
            f"  step {event.step}: {event.layer} restarted its pairs "
            f"{list(event.slots)} along the directions "
            f"{list(event.directions)}; rounding changed its kernel by "
            f"{event.drift:.0e}",
            flush=True,
        )
