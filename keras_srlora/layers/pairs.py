"""Starting, fusing and restarting the pairs of a layer; its whole update.

Functions of a layer's frozen kernel (`layer.frozen`), its two factors, its
`layer.record` and its scale. The layer's function never changes here, but for
`restore_adapter` and `disable_adapter`, whose purpose that is.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_srlora.backend import devices
from keras_srlora.backend.keras_private.kernels import unpacked_kernel
from keras_srlora.functional import decomposition
from keras_srlora.functional.contraction import as_kernel
from keras_srlora.functional.contraction import matmul
from keras_srlora.functional.fusion import effective_kernel
from keras_srlora.functional.fusion import full_dtype
from keras_srlora.functional.fusion import in_full
from keras_srlora.functional.fusion import recompose_pairs
from keras_srlora.functional.fusion import relative_change
from keras_srlora.layers.record import Record


def factor_values(layer) -> tuple[Any, Any]:
    """The factors as tensors that no gradient flows through."""
    a, b = layer.factors
    return (
        ops.stop_gradient(ops.convert_to_tensor(a)),
        ops.stop_gradient(ops.convert_to_tensor(b)),
    )


def factors_to_numpy(layer):
    """Both factors as arrays, `(rank, in)` and `(rank, out)`.

    In float32, or in float64 where they are.
    """
    return tuple(
        np.array(devices.to_numpy(ops.cast(value, full_dtype(value))))
        for value in factor_values(layer)
    )


def row_mask(rank, slots):
    """Bool array of shape `(rank, 1)`, true in `slots`."""
    mask = np.zeros((rank, 1), "bool")
    mask[slots] = True
    return mask


# The kernel as a matrix.


def effective_matrix(layer):
    """Frozen kernel plus scaled product of the factors, `(in, out)`."""
    return effective_kernel(
        layer.frozen.in_full(), *factor_values(layer), layer.scale
    )


def kernel_in_step(layer):
    """The effective kernel, of the stored one's shape, for other readers.

    A layer that reads `dense.kernel` itself (tied weights, for example)
    computes with the effective kernel; gradients reach the factors.
    """
    if "frozen" not in vars(layer):
        # Not built, or about to be converted.
        return unpacked_kernel(layer)
    a, b = layer.factors
    product = matmul(ops.transpose(ops.multiply(a, layer.scale)), b)
    matrix = ops.add(layer.frozen.matrix(), product)
    kernel = as_kernel(matrix, layer.plan())
    return ops.cast(kernel, layer.compute_dtype)


def pretrained_matrix(layer):
    """The kernel before SRLoRA, from the frozen one and the record.

    Returns:
        tensor of shape `(in, out)`, float32 or float64; equal to rounding.
    """
    rows = frozen_rows(layer, layer.record)
    return effective_kernel(layer.frozen.in_full(), *rows, -1.0)


def frozen_rows(layer, record) -> tuple[np.ndarray, np.ndarray]:
    """The fused and subtracted pairs of a record, as two factors."""
    if record.initialized:
        return record.frozen_rows(layer.scale)
    plan = layer.plan()
    return (
        np.zeros((0, plan.in_features), "float32"),
        np.zeros((0, plan.out_features), "float32"),
    )


def update_factors(layer):
    """The whole update since the pretrained kernel, as two factors.

    Returns:
        arrays `a` of shape `(k, in)` and `b` of shape `(k, out)`: the
        update is `aᵀ @ b`. The fused pairs, the directions that were
        subtracted, and the pairs being trained.
    """
    a, b = factors_to_numpy(layer)
    fused_a, fused_b = frozen_rows(layer, layer.record)
    return (
        np.concatenate([fused_a, layer.scale * a]),
        np.concatenate([fused_b, b]),
    )


# Starting.


def a_initializer(layer, seed=None):
    """The initializer of the first factor."""
    # Keras's own LoRA starts with `he_uniform`, whose fan is that of
    # (in, rank); stored transposed, its limit is given by hand.
    limit = (6.0 / layer.plan().in_features) ** 0.5
    return keras.initializers.RandomUniform(-limit, limit, seed)


def draw_factors(layer, seed=None):
    """Draws both factors as a new layer has them: `a` at random, `b` zero."""
    a = layer.factors[0]
    a.assign(a_initializer(layer, seed)(a.shape, dtype=a.dtype))
    zero_b(layer)


def zero_b(layer):
    """Sets `b` to zero, so that no pair adds anything."""
    b = layer.factors[1]
    b.assign(ops.zeros(b.shape, dtype=b.dtype))


def start_pairs(layer, recipe, file=None):
    """Decomposes the kernel that a checked layer has, and starts its pairs.

    Args:
        layer: a layer that passed `check_initializable`.
        recipe: a `Recipe`, for the start of the first pairs.
        file: an open `DirectionsFile` that may have the directions, or `None`.
    """
    trained = ops.any(ops.not_equal(layer.factors[1], 0))
    if trained and layer.frozen.room is not None:
        raise ValueError(
            f"The kernel of layer {layer.path!r} is quantized and cannot take "
            "up the pairs that were trained before it was decomposed. Call "
            "`keras_srlora.initialize_factors(model)` before training. "
            f"Received: quantization_mode={layer.quantization_mode!r}"
        )
    directions = _decompose(layer, file)
    layer.record = Record.start(directions, layer.rank)
    layer.companions.restore({})
    if not recipe.starts_as_lora:
        layer.frozen.remainder = None
        leading = np.arange(layer.rank)
        _restart(layer, leading, leading, recipe.scale_first)
    elif trained:
        # The directions are those of the sum: it is the pretrained kernel now.
        layer.frozen.store(
            effective_matrix(layer), frozen_rows(layer, Record())
        )
        zero_b(layer)
    else:
        layer.frozen.remainder = None


def _decompose(layer, file):
    if ops.any(ops.not_equal(layer.factors[1], 0)):
        matrix = effective_matrix(layer)
    else:
        # A product of zeros, and its sum, would be two more kernels.
        matrix = layer.frozen.in_full()
    arguments = matrix, layer.direction_count, layer.decomposition
    if file is None:
        found = decomposition.decompose(*arguments)
    else:
        found = file.decompose(layer, *arguments)
    # Subtracted from a kernel in float64 and added in float64.
    return decomposition.Directions(
        *(x.astype(full_dtype(matrix)) for x in found)
    )


def is_untrained(layer):
    """Whether the pairs are as they started, and nothing was fused.

    Such a layer computes what its pretrained kernel does, so that it can start
    in another way.
    """
    record = layer.record
    if not record.initialized or len(record.events):
        return not record.initialized
    a, b = factors_to_numpy(layer)
    if record.starts_as_lora:
        return not b.any()
    used = record.slot_direction
    expected = record.anchors[used, None] * record.directions.right[used]
    product = layer.scale * np.linalg.norm(a, axis=1)[:, None] * b
    size = np.max(np.abs(expected), initial=0.0)
    return bool(np.max(np.abs(product - expected)) <= 1e-5 * size)


def reset_pairs(layer):
    """Makes an untrained layer one that was not decomposed yet."""
    nothing = frozen_rows(layer, Record())
    layer.frozen.store(pretrained_matrix(layer), nothing)
    layer.record = Record()
    draw_factors(layer)


# Fusing and restarting.


def fuse_and_restart(layer, slots, directions, scores, scale, step):
    """Fuses the pairs in `slots` and restarts them along `directions`.

    Args:
        layer: an initialised SRLoRA layer.
        slots: int array of shape `(n,)`.
        directions: int array of shape `(n,)`; indices of unused directions.
        scores: float array of shape `(n,)`; importance of the fused pairs.
        scale: function `(singular_values, tolerance, scale) ->
            (scale_a, scale_b)`.
        step: int. For the record.

    Returns:
        The drift: largest change of an entry of the effective kernel as a part
        of its largest entry.
    """
    event = {
        "step": step,
        "slot": slots,
        "score": scores,
        "direction": directions,
    }
    return _restart(layer, slots, directions, scale, event)


def _restart(layer, slots, indices, scale, event=None):
    """Restarts the pairs in some slots; with an event, it fuses them first."""
    record, frozen = layer.record.copy(), layer.frozen
    found = record.directions
    scale_a, scale_b = scale(
        found.singular_values[indices], found.tolerance, layer.scale
    )
    factor_a, factor_b = layer.factors
    restarted = row_mask(layer.rank, slots)
    fresh_a = np.zeros(factor_a.shape, found.left.dtype)
    fresh_b = np.zeros(factor_b.shape, found.left.dtype)
    fresh_a[slots] = scale_a[:, None] * found.left[indices]
    fresh_b[slots] = scale_b[:, None] * found.right[indices]
    stored = frozen.matrix()
    before = _computed_matrix(layer, stored)
    kernel, a, b = recompose_pairs(
        stored,
        *factor_values(layer),
        ops.convert_to_tensor(restarted),
        ops.convert_to_tensor(fresh_a),
        ops.convert_to_tensor(fresh_b),
        layer.scale,
        frozen.remainder,
    )
    if event is not None:
        record.add_fused(*(x[slots] for x in factors_to_numpy(layer)))
        record.add_events(len(slots), event)
    record.anchors[indices] = layer.scale * scale_a * scale_b
    record.visits[indices] += 1
    record.slot_direction[slots] = indices
    frozen.store(kernel, frozen_rows(layer, record))
    factor_a.assign(a)
    factor_b.assign(b)
    # Now: a measurement that fails must not leave them apart.
    layer.record = record
    after = _computed_matrix(layer, frozen.matrix())
    drift = relative_change(before, after)
    if event is not None:
        record.set_drift(len(slots), drift)
    return drift


def _computed_matrix(layer, stored):
    """The effective kernel with the kernel as it is stored, rounded."""
    return effective_kernel(in_full(stored), *factor_values(layer), layer.scale)


# Adapters.


def restore_adapter(layer, a, b, arguments, record):
    """Takes over the factors and the record of another run.

    Args:
        layer: an SRLoRA layer.
        a: array of shape `(rank, in)`.
        b: array of shape `(rank, out)`.
        arguments: dict of those arguments of the layer that come with them:
            `lora_alpha`, for one.
        record: a `Record` of the same pretrained kernel.
    """
    before = frozen_rows(layer, layer.record)
    # By the scale that the layer has now.
    pretrained = None if _is_nothing(before) else pretrained_matrix(layer)
    for name, value in arguments.items():
        setattr(layer, name, value)
    layer.record = record
    layer.companions.restore({})
    rows = frozen_rows(layer, record)
    if not (_is_nothing(before) and _is_nothing(rows)):
        if pretrained is None:
            pretrained = layer.frozen.in_full()
        layer.frozen.store(effective_kernel(pretrained, *rows, 1.0), rows)
    for factor, value in zip(layer.factors, (a, b)):
        factor.assign(value)


def forget_update(layer):
    """Drops factors and record of a layer whose kernel has its final value.

    Whoever breaks off then, between two layers, adds nothing twice.
    """
    layer.frozen.remainder = None
    layer.record = Record()
    zero_b(layer)


def _is_nothing(rows):
    """Whether nothing went into a kernel, which then stays as it is."""
    return len(rows[0]) == 0


def disable_adapter(layer):
    """Back to the pretrained kernel, with nothing learnt and no record.

    No factor is as it was: one that is not finite would make zero times NaN.
    """
    layer.frozen.store(pretrained_matrix(layer), frozen_rows(layer, Record()))
    layer.record = Record()
    # With a seed: no other random number is a different one afterwards.
    draw_factors(layer, seed=0)
