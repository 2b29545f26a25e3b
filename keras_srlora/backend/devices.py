"""Work on many devices, which must all take the same decision.

The engines are Keras's and the backends' own. Each function does nothing where
there is one device, and imports no backend but the one in use.
"""

import contextlib

import keras
import numpy as np
from keras import ops

# TensorFlow: the replicas of a `tf.distribute` strategy. Each runs the step on
# its share of the batch, and holds the same weights.


def strategy_scope(model):
    """The scope in which a variable is made on each replica of a model.

    `fit` runs its callbacks outside of the strategy's scope, so the model is
    asked: `Model.distribute_strategy`, which only TensorFlow's models have.
    """
    strategy = getattr(model, "distribute_strategy", None)
    if strategy is None or strategy.num_replicas_in_sync == 1:
        return contextlib.nullcontext()
    return strategy.scope()


def sum_over_replicas(tensors):
    """Adds up tensors over the replicas.

    Keras divides the loss of a replica by their number, so that the sum of the
    gradients is the gradient of the whole batch; its optimizers add them up,
    too, but only behind the wrapper.
    """
    context = _replica_context()
    if context is None:
        return tensors
    import tensorflow as tf

    return context.all_reduce(tf.distribute.ReduceOp.SUM, tensors)


def assign_on_replicas(variables, values):
    """Assigns to variables of which each replica has computed the same value.

    `variable.assign` would ask how to reduce different values to one.

    Raises:
        ValueError: if they were made outside of the strategy's scope.
    """
    if _replica_context() is None:
        for variable, value in zip(variables, values):
            variable.assign(value)
        return
    import tensorflow as tf

    if not all(
        isinstance(v.value, tf.distribute.DistributedValues) for v in variables
    ):
        raise ValueError(
            "The statistics of SRLoRA are on one device, and the step runs on "
            f"{tf.distribute.get_strategy().num_replicas_in_sync} replicas. "
            "Make the `SensitivityOptimizer` (or the `Sensitivity`) in "
            "`with strategy.scope():`. Received: variables="
            f"{[v.path for v in variables]}"
        )

    def assign(strategy, values):
        for variable, value in zip(variables, values):
            strategy.extended.update(
                variable.value,
                lambda component, value: component.assign(value),
                args=(value,),
                group=False,
            )

    # As Keras's optimizers do it.
    tf.__internal__.distribute.interim.maybe_merge_call(
        assign, tf.distribute.get_strategy(), values
    )


def _replica_context():
    """The context of one of several replicas, or `None`."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return None
    return context


# JAX: arrays that are sharded over the devices of a `keras.distribution`, some
# of them in other processes.


def along_kernel(kernel, rows, axis):
    """Lays out rows as one of the kernel's two axes is.

    A product of the two is then computed in parts. Where the rows are whole on
    each device XLA brings the kernel together there, and a product of two
    factors, which has the size of the kernel, is whole on each device.

    Args:
        kernel: tensor of shape `(in, out)`.
        rows: array of shape `(rank, in)` for `axis=0`, `(rank, out)` for 1.
        axis: 0 or 1.
    """
    sharding = _sharding(kernel)
    if sharding is None:
        return rows
    import jax

    spec = (*sharding.spec, None, None)
    return jax.device_put(
        rows,
        jax.sharding.NamedSharding(
            sharding.mesh, jax.sharding.PartitionSpec(None, spec[axis])
        ),
    )


def laid_out_as(kernel, array):
    """An array of the host as a tensor that is sharded as a kernel is."""
    sharding = _sharding(kernel)
    if sharding is None:
        return array
    import jax

    return jax.device_put(array, sharding)


def to_numpy(tensor):
    """A tensor as an array of the host, in each process.

    Parts that lie in other processes are brought together on each device.
    """
    if _spans_processes(tensor) and not tensor.is_fully_replicated:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(tensor, tiled=True)
    return ops.convert_to_numpy(tensor)


def local(tensor):
    """A tensor that each device holds whole, as one of this process alone.

    To compute with, where the other processes do not.
    """
    if _spans_processes(tensor) and tensor.is_fully_replicated:
        return tensor.addressable_data(0)
    return tensor


def _spans_processes(tensor):
    if keras.backend.backend() != "jax":
        return False
    import jax

    return isinstance(tensor, jax.Array) and not tensor.is_fully_addressable


def _sharding(kernel):
    """The layout of a kernel of which no device has all, else `None`."""
    if keras.backend.backend() != "jax":
        return None
    import jax

    sharding = getattr(kernel, "sharding", None)
    if sharding is None or sharding.is_fully_replicated:
        return None
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    return sharding


# PyTorch: the processes of `torch.distributed`, each with a model of its own.
# Keras has no engine for them: the user averages the gradients, and the
# functions below check that all processes do the same.

# As a part of the largest number. Rounding on different processors is far
# below it, gradients of different examples are far above.
AGREEMENT = 1e-3


def gather(values):
    """Gathers an object of each process into a list, in each process."""
    if process_count() == 1:
        return [values]
    import torch

    gathered = [None] * process_count()
    torch.distributed.all_gather_object(gathered, values)
    return gathered


def agree(arrays, names, reason):
    """Returns the arrays of the first process, once the others' agree.

    Args:
        arrays: list of arrays.
        names: list of strings, the layers of the arrays.
        reason: str. Why processes differ, and the remedy.

    Raises:
        RuntimeError: in each process, if they differ by more than rounding.
    """
    first, *others = gather(arrays)
    for process, other in enumerate(others, 1):
        for name, a, b in zip(names, first, other):
            bound = AGREEMENT * np.max(np.abs(a), initial=0.0)
            if not np.allclose(a, b, rtol=0, atol=bound, equal_nan=True):
                raise RuntimeError(
                    f"Processes 0 and {process} of this run have different "
                    f"{reason} Received: {np.ravel(a)[:4]} and "
                    f"{np.ravel(b)[:4]} for layer {name!r}"
                )
    return first


def process_count():
    """How many processes of `torch.distributed` there are."""
    if keras.backend.backend() != "torch":
        return 1
    import torch

    group = torch.distributed
    if not (group.is_available() and group.is_initialized()):
        return 1
    return group.get_world_size()
