"""Clear errors for bad input, raised before anything is changed."""

import keras
import numpy as np
from keras import ops

from keras_srlora._decomposition import METHODS
from keras_srlora._quantized import MODES

# Before, Keras stored quantized kernels in other ways.
QUANTIZED_SINCE = 3, 15


def check_arguments(rank, target_rank, lora_alpha, decomposition):
    """Raises `ValueError` for arguments that no kernel could satisfy."""
    if not _is_integer(rank) or rank <= 0:
        raise ValueError(
            f"`rank` must be a positive integer. Received: {rank=}"
        )
    if target_rank is not None and (
        not _is_integer(target_rank) or target_rank < rank
    ):
        raise ValueError(
            "`target_rank`, the number of directions that a run may visit, "
            "must be an integer of at least `rank`. "
            f"Received: {target_rank=}, {rank=}"
        )
    if lora_alpha is not None and not (
        isinstance(lora_alpha, (int, float)) and 0 < lora_alpha < float("inf")
    ):
        raise ValueError(
            f"`lora_alpha` must be a positive number. Received: {lora_alpha=}"
        )
    check_choice("decomposition", decomposition, METHODS)


def check_choice(name, value, choices):
    """Raises unless `value` is one of the strings in `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"`{name}` must be one of {sorted(choices)}. "
            f"Received: {name}={value!r}"
        )


def check_rank(plan, rank, path):
    """Raises where a kernel (a `Contraction`) is too small for a rank."""
    smaller = min(plan.in_features, plan.out_features)
    if rank > smaller:
        raise ValueError(
            f"`rank` is above the smaller side of the kernel of layer {path!r}"
            f", which is {plan.in_features} x {plan.out_features} as a matrix: "
            f"use at most {smaller}, or leave this layer out. "
            f"Received: rank={rank}"
        )


def check_finite_kernel(kernel, path):
    """Raises `ValueError` where a kernel has NaN or infinite entries."""
    # Zero times any other number is none; several times faster on PyTorch than
    # `isfinite`, and with a single temporary.
    nothing = ops.sum(ops.multiply(ops.convert_to_tensor(kernel), 0))
    if not ops.convert_to_numpy(ops.equal(nothing, 0)):
        raise ValueError(
            f"The kernel of layer {path!r} has entries that are NaN or "
            "infinite: it cannot be decomposed. Check the weights that were "
            "loaded."
        )


def check_quantization(layer):
    """Raises `ValueError` where a quantized kernel cannot be adapted."""
    mode = layer.quantization_mode
    if mode is None:
        return
    if mode not in MODES:
        raise ValueError(
            f"Layer {layer.path!r} is quantized in a way that cannot be "
            f"adapted: only {sorted(MODES)} can. "
            f"Received: quantization_mode={mode!r}"
        )
    if keras_version() < QUANTIZED_SINCE:
        raise ValueError(
            f"Layer {layer.path!r} is quantized; to adapt it you need Keras "
            f"{'.'.join(map(str, QUANTIZED_SINCE))} or newer. Received: Keras "
            f"{keras.__version__}, quantization_mode={mode!r}"
        )


def keras_version():
    """`(major, minor)`."""
    return tuple(map(int, keras.__version__.split(".")[:2]))


def check_paths(paths, what):
    """Raises where a path occurs twice: files know layers by their paths."""
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise ValueError(
            f"Several {what} have the same path, which is what a file knows "
            f"them by: give them different names. Received: {twice[:4]}"
        )


def check_fraction(name, value, low_open, high_open):
    """Raises unless `value` is a number from 0 to 1 (ends open as said)."""
    number = isinstance(value, (int, float, np.floating))
    above = number and (value > 0 if low_open else value >= 0)
    below = number and (value < 1 if high_open else value <= 1)
    if not (above and below):
        interval = f"{'(' if low_open else '['}0, 1{')' if high_open else ']'}"
        raise ValueError(
            f"`{name}` must be a number in {interval}. "
            f"Received: {name}={value!r}"
        )


def _is_integer(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
