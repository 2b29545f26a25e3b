"""A training script that runs on many devices.

    python tests/devices_run.py ENGINE OUTPUT [PORT PROCESSES INDEX]

`test_devices.py` runs it in child processes, since devices are made before the
backend starts, and compares what it leaves in the folder `OUTPUT` with a run on
one device, which it makes in its own process with `fit`.
"""

import functools
import os
import pathlib
import sys

if __name__ == "__main__" and os.environ["KERAS_BACKEND"] == "jax":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import keras
import numpy as np
from support import converted_model
from support import to_numpy

import keras_srlora

EPOCHS, STEPS, BATCH = 4, 5, 8
INTERVAL = 5  # recomposed after steps 5, 10 and 15


def make_model(**arguments):
    return converted_model(keras.optimizers.Adam(0.01), **arguments)


def make_data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((STEPS * BATCH, 12)).astype("float32")
    return x, np.tanh(x @ rng.standard_normal((12, 3)).astype("float32"))


def fit(model, *data, **arguments):
    callback = keras_srlora.RecompositionCallback(interval=INTERVAL)
    model.fit(
        *data,
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        callbacks=[callback],
        **arguments,
    )
    return callback.record


def fit_on_one_device():
    model = make_model()
    record = fit(model, *make_data(), batch_size=BATCH)
    return everything(model, record)


def everything(model, record, read=to_numpy):
    """All numbers of a run, by name."""
    variables = [*model.variables, *model.optimizer.variables]
    # Without the numbers that Keras gives to optimizers.
    found = {
        f"{i} {v.path.split('/', 1)[-1]}": read(v)
        for i, v in enumerate(variables)
    }
    for layer in srlora_layers(model):
        statistics = layer.adapter_state.statistics_to_numpy()
        for name, array in statistics._asdict().items():
            found[f"{layer.name} {name}"] = array
        found[f"{layer.name} effective"] = read(layer.effective_kernel())
    found["slots"] = np.array([event.slots for event in record])
    found["directions"] = np.array([event.directions for event in record])
    found["steps"] = np.array([event.step for event in record])
    return found


def srlora_layers(model):
    return [model.get_layer(name) for name in ("first", "second")]


# TensorFlow.


def mirrored(output):
    strategy = two_replicas()
    with strategy.scope():
        model = make_model()
    record = fit(model, *make_data(), batch_size=BATCH)
    save(output, everything(model, record))
    for replica in range(2):
        read = functools.partial(replica_value, replica=replica)
        save(output, everything(model, record, read), f"replica_{replica}")


def mirrored_mishaps(output):
    """One replica's gradient is not finite; statistics out of the scope."""
    import tensorflow as tf

    strategy = two_replicas()
    with strategy.scope():
        model = make_model()
        scored = keras_srlora.Sensitivity(srlora_layers(model))
    variables = model.trainable_variables

    def update(sensitivity, poisoned):
        def step():
            context = tf.distribute.get_replica_context()
            second = tf.equal(context.replica_id_in_sync_group, 1)
            bad = tf.where(second, float("nan"), 1.0)
            gradients = [
                tf.ones(v.shape) * (bad if v is poisoned else 1.0)
                for v in variables
            ]
            sensitivity.update(gradients, variables)

        strategy.run(tf.function(step))
        return [
            replica_value(v, i) for v in sensitivity.variables for i in (0, 1)
        ]

    found = {
        name: update(scored, poisoned)
        for name, poisoned in {
            "factor": variables[0],
            "head": variables[-1],
            "nothing": None,
        }.items()
    }
    outside = keras_srlora.Sensitivity(srlora_layers(model))
    try:
        update(outside, None)
    except ValueError as error:
        found["message"] = str(error)
    save(output, found)


def two_replicas():
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 2
    )
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def replica_value(variable, replica):
    """What one replica holds."""
    import tensorflow as tf

    value = getattr(variable, "value", variable)
    if isinstance(value, tf.distribute.DistributedValues):
        value = value.values[replica]
    return value.numpy()


def save(output, found, name="run"):
    np.savez(pathlib.Path(output) / f"{name}.npz", **found)


if __name__ == "__main__":
    engine, output, *cluster = sys.argv[1:]
    globals()[engine](output, *cluster)
