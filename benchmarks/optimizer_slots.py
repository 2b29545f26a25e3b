"""What should become of the optimizer's slots of a restarted pair?

The paper leaves it open. A linear teacher whose update has rank 48, adapted at
rank 8 by the published recipe: the relative error that is left after training,
for each treatment of Adam's moments, at its best learning rate.

    python -m benchmarks.optimizer_slots

The update is small, middling or as large as the pretrained kernel: a restarted
pair is anchored at a singular direction, and an update that is small beside it
is reached to first order.
"""

import argparse

import keras
import numpy as np

import keras_srlora

WIDTH, UPDATE_RANK, RANK, BATCH, STEPS = 128, 48, 8, 256, 3000
TREATMENTS = ("keep", "zero_first_moments", "zero")
RATES = (3e-4, 1e-3, 3e-3)


def error_left(treatment, size, learning_rate, seed):
    """Trains one student; returns the part of the update that is missing."""
    rng = np.random.default_rng(seed)
    pretrained = rng.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)
    left, _ = np.linalg.qr(rng.standard_normal((WIDTH, UPDATE_RANK)))
    right, _ = np.linalg.qr(rng.standard_normal((WIDTH, UPDATE_RANK)))
    update = (left * 0.96 ** np.arange(UPDATE_RANK)) @ right.T
    update *= size * np.linalg.norm(pretrained) / np.linalg.norm(update)
    x = rng.standard_normal((STEPS // 10 * BATCH, WIDTH)).astype("float32")
    y = (x @ (pretrained + update)).astype("float32")

    keras.utils.set_random_seed(seed)
    layer = keras_srlora.SRLoRADense(
        WIDTH,
        use_bias=False,
        rank=RANK,
        target_rank=WIDTH,
        recipe=keras_srlora.Recipe(slots=treatment),
    )
    inputs = keras.Input((WIDTH,))
    model = keras.Model(inputs, layer(inputs))
    layer.set_weights([pretrained.astype("float32")])
    model.compile(keras.optimizers.Adam(learning_rate), "mse")
    callback = keras_srlora.RecompositionCallback(
        interval=STEPS // 31 + 1,  # 30, and a stretch after the last
    )
    model.fit(
        x, y, batch_size=BATCH, epochs=10, verbose=0, callbacks=[callback]
    )
    kernel = keras.ops.convert_to_numpy(layer.effective_kernel())
    difference = kernel - pretrained - update
    return np.linalg.norm(difference) / np.linalg.norm(update)


def main():
    """Prints a table: mean and standard deviation over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    print(f"Keras {keras.__version__} on {keras.backend.backend()}")
    print("| size of the update / of the kernel | treatment |", end="")
    print("".join(f" {rate:g} |" for rate in RATES))
    print("|---|---|" + "---|" * len(RATES))
    for size in (0.03, 0.1, 0.3, 1.0):
        for treatment in TREATMENTS:
            cells = []
            for rate in RATES:
                errors = [error_left(treatment, size, rate, s) for s in seeds]
                cells.append(f" {np.mean(errors):.3f} ± {np.std(errors):.3f} |")
            print(f"| {size:g} | `{treatment}` |" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
