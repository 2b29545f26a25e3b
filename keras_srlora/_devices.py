"""What many devices need: all of them must take the same decision.

The engines are Keras's and the backends' own. Each function does nothing where
there is one device, and imports no backend but the one in use.
"""

import contextlib

import keras
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

    `variable.assign` would want to know how to bring different ones together.
    """
    if _replica_context() is None:
        for variable, value in zip(variables, values):
            variable.assign(value)
        return
    import tensorflow as tf

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


def check_on_replicas(variables):
    """Raises where variables were made outside of the strategy's scope."""
    if _replica_context() is None:
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
    if keras.backend.backend() == "jax":
        import jax

        if isinstance(tensor, jax.Array) and not (
            tensor.is_fully_addressable or tensor.is_fully_replicated
        ):
            from jax.experimental import multihost_utils

            return multihost_utils.process_allgather(tensor, tiled=True)
    return ops.convert_to_numpy(tensor)


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
