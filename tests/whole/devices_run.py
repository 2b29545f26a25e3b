"""Training on many devices, with one function for each engine.

`test_devices.py` runs the functions in child processes, since devices are made
before the backend starts, and compares what they leave in the folder `output`
with a run on one device, which it makes in its own process with `fit`. Of an
engine of two processes the function runs twice, with `index` 0 and 1.
"""

import functools
import glob
import os
import pathlib
import re
import signal
import warnings

import keras
import numpy as np
from support import GATED
from support import converted_model
from support import frozen_kernel
from support import state_arrays
from support import statistics
from support import to_numpy

import keras_srlora
from keras_srlora.backend import devices as backend_devices
from keras_srlora.layers import pairs
from keras_srlora.layers.matching import find_record
from keras_srlora.training.run_state import RunState

PROCESSES = 2
EPOCHS, STEPS, BATCH = 4, 5, 8
INTERVAL = 5  # recomposed after steps 5, 10 and 15
KILLED_AFTER = 3  # epochs
# The published one, but the steps of restarted pairs are scaled.
RECIPE = keras_srlora.Recipe(slots="fast_start")


def make_model(recipe=RECIPE, **arguments):
    return converted_model(
        keras.optimizers.Adam(0.01), recipe=recipe, **arguments
    )


def make_data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((STEPS * BATCH, 12)).astype("float32")
    return x, np.tanh(x @ rng.standard_normal((12, 3)).astype("float32"))


def share_of(index, arrays):
    """The part of each batch that one process is fed with."""
    rows = np.arange(STEPS * BATCH).reshape(STEPS, PROCESSES, -1)[:, index]
    return [array[rows.ravel()] for array in arrays]


def fit(model, *data, callbacks=(), recipe=None, **arguments):
    callback = keras_srlora.RecompositionCallback(
        interval=None if recipe else INTERVAL, recipe=recipe
    )
    model.fit(
        *data,
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        callbacks=[*callbacks, callback],
        **arguments,
    )
    return callback.events


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
        for name, array in statistics(layer)._asdict().items():
            found[f"{layer.name} {name}"] = array
        found[f"{layer.name} effective"] = read(layer.effective_kernel())
    found["slots"] = np.array([event.slots for event in record])
    found["directions"] = np.array([event.directions for event in record])
    found["steps"] = np.array([event.step for event in record])
    return found


def srlora_layers(model):
    return [model.get_layer(name) for name in ("first", "second")]


def save(output, found, name="run"):
    np.savez(pathlib.Path(output) / f"{name}.npz", **found)


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


def multi_worker(output, port, index):
    """Keras's `fit` cannot; a loop of one's own can."""
    import tensorflow as tf

    # Its workers are in the environment, `TF_CONFIG`.
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = make_model()
        optimizer = keras_srlora.SensitivityOptimizer(model.optimizer, model)
        optimizer.build(model.trainable_variables)
    variables = model.trainable_variables

    @tf.function
    def train_step(x, y):
        def step(x, y):
            with tf.GradientTape() as tape:
                error = tf.reduce_mean((model(x, training=True) - y) ** 2)
                loss = error / strategy.num_replicas_in_sync
            optimizer.apply(tape.gradient(loss, variables), variables)

        strategy.run(step, args=(x, y))

    data = tf.data.Dataset.from_tensor_slices(make_data()).batch(BATCH)
    record = []
    for step, batch in enumerate(
        strategy.experimental_distribute_dataset(data.repeat(EPOCHS))
    ):
        if step and step % INTERVAL == 0:
            record += keras_srlora.recompose(
                optimizer.sensitivity, optimizer, step
            )
        train_step(*batch)
    save(output, everything(model, record), f"process_{index}")


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


# JAX, four devices in one process.


def one_process(output):
    """`DataParallel`, then `ModelParallel`."""
    with keras.distribution.DataParallel().scope():
        model = make_model()
        record = fit(model, *make_data(), batch_size=BATCH)
        save(output, everything(model, record), "data_parallel")
        for device in range(4):
            read = functools.partial(device_value, device=device)
            found = everything(model, record, read)
            save(output, found, f"device_{device}")
    devices = keras.distribution.list_devices()
    with sharded_on_either_side(devices).scope():
        model = make_model()
        record = fit(model, *make_data(), batch_size=BATCH)
        found = everything(model, record)
        for layer in srlora_layers(model):
            for variable in (layer.frozen.variable, *layer.factors):
                found[f"spec {variable.path}"] = spec_of(variable)
        save(output, found, "model_parallel")


def sharded_on_either_side(devices, **arguments):
    mesh = keras.distribution.DeviceMesh(
        (2, 2), ("batch", "model"), np.reshape(devices, (2, 2))
    )
    layouts = keras.distribution.LayoutMap(mesh)
    layouts["first/kernel"] = (None, "model")
    layouts["first/lora_kernel_b"] = (None, "model")
    layouts["second/kernel"] = ("model", None)
    layouts["second/lora_kernel_a"] = (None, "model")
    return keras.distribution.ModelParallel(layout_map=layouts, **arguments)


def device_value(variable, device):
    value = getattr(variable, "value", variable)
    return np.array(value.addressable_shards[device].data)


def spec_of(variable):
    """Axes of the device mesh, without what is `None` at the end."""
    spec = list(variable.value.sharding.spec)
    while spec and spec[-1] is None:
        spec.pop()
    return str(tuple(spec))


def sharded_kernels(output):
    """No device holds a kernel whole, or an array of its size.

    XLA writes the programs that it compiles into the folder; in those, arrays
    have the shapes that one device holds.
    """
    import jax

    # What is read from the cache is not written there.
    jax.config.update("jax_enable_compilation_cache", False)
    found = {}
    seen = set()

    def whole_arrays(layers):
        shapes = set()
        for layer in layers:
            kernel = tuple(layer.frozen.variable.shape)
            matrix = tuple(pairs.pretrained_matrix(layer).shape)
            shapes |= {kernel, matrix, matrix[::-1], (np.prod(kernel),)}
        texts = {f"[{','.join(map(str, shape))}]" for shape in shapes}
        new = set(glob.glob(f"{output}/*after_optimizations.txt")) - seen
        seen.update(new)
        lines = [
            f"{pathlib.Path(path).name}: {match[0]}"
            for path in new
            for match in re.finditer(
                r"%\S+ = \(?\w+(\[[\d,]*\])", pathlib.Path(path).read_text()
            )
            if match[1] in texts
        ]
        return np.array([len(new), *sorted(lines)])

    def follow(name, model, kwargs):
        seen.update(glob.glob(f"{output}/*after_optimizations.txt"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layers = keras_srlora.enable_srlora(
                model,
                rank=2,
                target_rank=6,
                recipe="paper",
                decomposition="randomized",
                **kwargs,
            )
        found[f"{name} warnings"] = np.array(
            [str(w.message) for w in caught if w.category is UserWarning]
        )
        statistics = keras_srlora.Sensitivity(layers)
        factors = [v for layer in layers for v in layer.factors]
        gradients = [
            keras.ops.full(v.shape, 1.0 + i) for i, v in enumerate(factors)
        ]
        statistics.update(gradients, factors)
        before = [spec_of(layer.frozen.variable) for layer in layers]
        events = keras_srlora.recompose(statistics, step=1)
        assert len(events) == len(layers)
        for layer in layers:
            find_record(layer)
            layer.effective_kernel()
        found[name] = whole_arrays(layers)
        found[f"{name} drift"] = max(event.drift for event in events)
        after = [spec_of(layer.frozen.variable) for layer in layers]
        found[f"{name} specs"] = np.array([before, after])

    def mesh():
        return keras.distribution.DeviceMesh((2, 2), ("batch", "model"))

    for name, layout in {
        "rows": ("model", None),
        "columns": (None, "model"),
    }.items():
        layouts = keras.distribution.LayoutMap(mesh())
        layouts["wide/kernel"] = layout
        if name == "columns":
            layouts["wide/lora_kernel_b"] = layout
        distribution = keras.distribution.ModelParallel(layout_map=layouts)
        with distribution.scope():
            keras.utils.set_random_seed(0)
            inputs = keras.Input((96,))
            outputs = keras.layers.Dense(160, name="wide")(inputs)
            model = keras.Model(inputs, outputs)
            follow(name, model, {"target_layer_names": ["wide"]})
    for name, (backbone, policy, arguments) in kerashub_backbones().items():
        layouts = backbone.get_layout_map(mesh())
        distribution = keras.distribution.ModelParallel(layout_map=layouts)
        with distribution.scope():
            keras.utils.set_random_seed(0)
            follow(name, backbone(**arguments, dtype=policy), {})
    save(output, found)


def kerashub_backbones():
    """Those with layout maps of their own; no two sizes are equal by chance."""
    import keras_hub

    arguments = {
        "vocabulary_size": 64,
        "num_layers": 1,
        "num_query_heads": 4,
        "num_key_value_heads": 4,
        "hidden_dim": 40,
        "intermediate_dim": 88,
    }
    return {
        "gemma": (
            keras_hub.models.GemmaBackbone,
            "float32",
            {**arguments, "head_dim": 18},
        ),
        "llama": (keras_hub.models.LlamaBackbone, "bfloat16", arguments),
    }


# JAX, two processes of two devices each.


def two_processes(output, port, index):
    """Each has all weights, and is fed with its share of a batch."""
    initialize(port, index)
    data = share_of(index, make_data())
    with keras.distribution.DataParallel(auto_shard_dataset=False).scope():
        model = make_model()
        record = fit(model, *data, batch_size=BATCH // PROCESSES)
        save(output, everything(model, record), f"process_{index}")


def spanning_kernels(output, port, index):
    """Each has a part of the kernels, and is fed with whole batches."""
    initialize(port, index)
    devices = np.reshape(keras.distribution.list_devices(), (2, 2)).T
    distribution = sharded_on_either_side(devices, auto_shard_dataset=False)
    with distribution.scope():
        model = make_model()
        record = fit(model, *make_data(), batch_size=BATCH)
        kernel = model.get_layer("first").frozen.variable.value
        assert not kernel.is_fully_addressable

        def read(value):
            return np.array(
                backend_devices.to_numpy(getattr(value, "value", value))
            )

        found = everything(model, record, read)
        x = make_data()[0][:BATCH]
        outputs = [outputs_of(model, x)]
        with keras_srlora.adapter_disabled(model):
            outputs.append(outputs_of(model, x))
        outputs.append(outputs_of(model, x))
        keras_srlora.merge_srlora(model)
        outputs.append(outputs_of(model, x))
        found["outputs"] = np.array(outputs)
        save(output, found, f"process_{index}")


def outputs_of(model, x):
    return np.array(backend_devices.to_numpy(model(x)))


def initialize(port, index):
    address = f"127.0.0.1:{port}"
    keras.distribution.initialize(address, PROCESSES, index)


# PyTorch, two processes.


def torch_fit(output, port, index):
    """`fit`, with hooks that average the gradients."""
    join(port, index)
    data = share_of(index, make_data())
    model = make_model()
    average_gradients(model)
    record = fit(model, *data, batch_size=BATCH // PROCESSES)
    save(output, everything(model, record), f"process_{index}")


def torch_loop(output, port, index):
    """A loop around `DistributedDataParallel`."""
    import torch

    join(port, index)
    x, y = map(torch.from_numpy, share_of(index, make_data()))
    model = make_model()
    optimizer = keras_srlora.SensitivityOptimizer(model.optimizer, model)
    variables = model.trainable_variables
    optimizer.build(variables)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    record = []
    for step in range(EPOCHS * STEPS):
        if step and step % INTERVAL == 0:
            record += keras_srlora.recompose(
                optimizer.sensitivity, optimizer, step
            )
        size = BATCH // PROCESSES
        rows = slice(step % STEPS * size, (step % STEPS + 1) * size)
        model.zero_grad()
        outputs = parallel(x[rows])
        torch.nn.functional.mse_loss(outputs, y[rows]).backward()
        with torch.no_grad():
            gradients = [v.value.grad for v in variables]
            optimizer.apply(gradients, variables)
    save(output, everything(model, record), f"process_{index}")


def torch_mishaps(output, port, index):
    """Weights that differ, gradients that were not averaged; then a gate."""
    join(port, index)
    data = share_of(index, make_data())
    found = {}
    for mishap in ("weights", "gradients"):
        model = make_model()
        before = frozen_kernel(model.get_layer("first"))
        if mishap == "weights":
            for factor in model.get_layer("first").factors:
                factor.assign(factor * (1.0 + index))
        try:
            fit(model, *data, batch_size=BATCH // PROCESSES)
        except RuntimeError as error:
            found[mishap] = str(error)
        after = frozen_kernel(model.get_layer("first"))
        found[f"{mishap} kept"] = np.array_equal(before, after)
    model = make_model(recipe=GATED)
    average_gradients(model)
    model.optimizer.learning_rate = 1e-5  # flat from the start
    fit(model, *data, batch_size=BATCH // PROCESSES, recipe=GATED)
    run = srlora_layers(model)[0].companions.arrays_of("run")
    gate = RunState.from_array(run["state"], GATED).gate
    points = gate.to_dict().pop("points")
    found["gate"] = np.array([gate.first, gate.read_at, *np.ravel(points)])
    save(output, found, f"process_{index}")


def join(port, index):
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=index,
        world_size=PROCESSES,
    )


def average_gradients(model):
    """Averages each gradient over the processes as soon as it is there."""
    import torch

    def average(parameter):
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= torch.distributed.get_world_size()

    for variable in model.trainable_variables:
        variable.value.register_post_accumulate_grad_hook(average)


# Killed and resumed, on two processes.


class SaveEpoch(keras.callbacks.Callback):
    """Each process has a file of its own; half of one is never seen."""

    def __init__(self, folder, index, dies):
        super().__init__()
        self.folder = pathlib.Path(folder)
        self.index = index
        self.dies = dies

    def on_epoch_end(self, epoch, logs=None):
        half = self.folder / f"half-{self.index}.weights.h5"
        self.model.save_weights(half)
        if self.dies and epoch + 1 == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)
        name = f"epoch-{epoch + 1:02d}-{self.index}.weights.h5"
        os.replace(half, self.folder / name)


def newest_epoch(folder):
    """The last epoch of which each process has a file; 0 for none."""
    epochs = [
        {
            int(path.name.split("-")[1])
            for path in pathlib.Path(folder).glob(f"epoch-*-{index}.*")
        }
        for index in range(PROCESSES)
    ]
    return max(set.intersection(*epochs), default=0)


def resumable(output, port, index, dies=False):
    """The script that may be killed: process 1 dies before its file is whole.

    With dropout, for which each process of PyTorch draws on its own.
    """
    data = share_of(index, make_data())
    if keras.backend.backend() == "jax":
        initialize(port, index)
        distribution = keras.distribution.DataParallel(auto_shard_dataset=False)
        keras.distribution.set_distribution(distribution)
        model = make_model(dropout=0.2)
    else:
        import torch

        join(port, index)
        model = make_model(dropout=0.2)
        average_gradients(model)
        torch.manual_seed(index)
    model.optimizer.build(model.trainable_variables)
    epoch = newest_epoch(output)
    if epoch:
        model.load_weights(f"{output}/epoch-{epoch:02d}-{index}.weights.h5")
    record = fit(
        model,
        *data,
        batch_size=BATCH // PROCESSES,
        initial_epoch=epoch,
        callbacks=[SaveEpoch(output, index, dies)],
    )
    found = everything(model, record)
    for layer in srlora_layers(model):
        for name, array in state_arrays(layer).items():
            found[f"{layer.name} state {name}"] = array
    found["first epoch"] = epoch
    save(output, found, f"process_{index}")


def killed(output, port, index):
    resumable(output, port, index, dies=index == 1)
