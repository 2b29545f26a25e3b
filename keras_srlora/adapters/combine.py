"""The weighted sum of adapters, exactly, as one adapter of the same layer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from keras_srlora.functional.low_rank import balanced
from keras_srlora.functional.low_rank import thin_svd
from keras_srlora.layers import pairs
from keras_srlora.layers.record import Record


class Part(NamedTuple):
    """An adapter in one layer, for a sum.

    Attributes:
        a: array of shape `(k, in)`.
        b: array of shape `(k, out)`; the whole update is `aᵀ @ b`.
        record: `Record`.
    """

    a: np.ndarray
    b: np.ndarray
    record: Record


def part_of(a, b, scale, record) -> Part:
    """The `Part` of two factors, their scale, and a record."""
    fused_a, fused_b = a[:0], b[:0]
    if record.initialized:
        fused_a, fused_b = record.frozen_rows(scale)
    return Part(
        np.concatenate([fused_a, scale * a]),
        np.concatenate([fused_b, b]),
        record,
    )


def combined(layer, parts, weights):
    """The weighted sum of whole updates, as factors and record of one layer.

    The largest pairs become the factors, at the scale that the layer has. The
    others go into the frozen kernel as fused pairs, and take up directions.

    Args:
        layer: an SRLoRA layer.
        parts: list of `Part`.
        weights: list of floats.

    Returns:
        `(a, b, record)`; `None` where there is no update at all.

    Raises:
        ValueError: if an update is not finite, or the sum needs a higher rank
            than the layer has room for.
    """
    if not parts:
        return None
    a = np.concatenate([w * part.a for w, part in zip(weights, parts)])
    b = np.concatenate([part.b for part in parts])
    # No entry of the product is larger than that of the norms.
    if not np.isfinite(np.linalg.norm(a) * np.linalg.norm(b)):
        raise ValueError(
            f"The adapters of layer {layer.path!r} have a sum that is NaN or "
            "infinite. Delete the one whose training diverged."
        )
    left, values, right = thin_svd(a, b)
    record = next((x.record for x in parts if x.record.initialized), None)
    if record is None or not len(values):
        return None
    rest = max(0, len(values) - layer.rank)
    _check_room(layer, record, rest)
    root = np.sqrt(values)
    record = with_fused(
        record,
        layer.rank,
        (left * root).T[layer.rank :] / layer.scale,
        (root[:, None] * right)[layer.rank :],
    )
    a, b = balanced(left, values, right, layer.rank)
    a = a.T / layer.scale
    # A pair of zeros would never be trained.
    empty = slice(len(values), None)
    a[empty] = np.array(pairs.a_initializer(layer)(a.shape))[empty]
    return a, b, record


def _check_room(layer, record, rest):
    room = layer.frozen.room
    if not layer.recipe.reuse_directions:
        directions = len(record.directions.singular_values)
        room = directions if room is None else min(room, directions)
    if room is not None and rest > room:
        raise ValueError(
            f"The update has rank {layer.rank + rest} in layer "
            f"{layer.path!r}, and there is room for {layer.rank + room}: its "
            f"rank, {layer.rank}, and {room} fused pairs. Convert the model "
            "with a higher `rank` or `target_rank` and train there, or combine "
            "fewer adapters."
        )


def untouched(record, rank):
    """The record of the same kernel when nothing had happened to it yet."""
    found = record.directions
    return with_fused(record, rank, found.left[:0], found.right[:0])


def with_fused(record, rank, fused_a, fused_b):
    """A record of fused pairs, and of nothing else."""
    found = record.directions
    # Those that an adapter file left out are of no use.
    missing = np.flatnonzero(~found.left.any(axis=1))
    others = np.setdiff1d(np.arange(len(found.left)), missing)[::-1]
    count = max(len(fused_a), len(missing))
    # Each pair that is fused takes up a direction; the last ones first, and
    # again where there are more pairs.
    order = np.concatenate([missing, others]).astype("int64")
    taken = np.resize(order, count)
    combined = Record.start(found, rank)
    np.add.at(combined.visits, taken, 1)
    padding = ((0, count - len(fused_a)), (0, 0))
    combined.add_fused(np.pad(fused_a, padding), np.pad(fused_b, padding))
    # They are no recomposition: all slots have their first pairs.
    combined.add_events(count, {"recomposition": 0, "direction": taken})
    return combined
