"""Checks of arguments, whose errors show the value received."""

from typing import Any

import keras
import numpy as np


def is_integer(value: object) -> bool:
    """Whether it is a whole number of Python's or of NumPy's."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a number of Python's or of NumPy's; a bool is none."""
    real = (int, float, np.integer, np.floating)
    return isinstance(value, real) and not isinstance(value, bool)


def as_python_number(value: object):
    """A number of NumPy's as one of Python's; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def check_count(name: str, value: Any, what: str, optional: bool = False):
    """Returns a positive whole number as an `int`; `None` where allowed.

    Args:
        name: of the argument.
        value: the argument.
        what: what it counts, such as `"steps"`.
        optional: whether `None` may be passed.
    """
    if optional and value is None:
        return None
    if not is_integer(value) or value < 1:
        raise ValueError(
            f"`{name}` must be a positive number of {what}"
            f"{' or `None`' if optional else ''}. Received: {name}={value!r}"
        )
    return int(value)


def check_choice(name, value, choices):
    """Raises unless `value` is one of the strings in `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"`{name}` must be one of {sorted(choices)}. "
            f"Received: {name}={value!r}"
        )


def check_fraction(name, value, low_open, high_open):
    """Returns a number from 0 to 1, but for an open end, as a `float`."""
    number = is_number(value)
    above = number and (value > 0 if low_open else value >= 0)
    below = number and (value < 1 if high_open else value <= 1)
    if not (above and below):
        interval = f"{'(' if low_open else '['}0, 1{')' if high_open else ']'}"
        raise ValueError(
            f"`{name}` must be a number in {interval}. "
            f"Received: {name}={value!r}"
        )
    return float(value)


def check_paths(paths, what):
    """Raises where a path occurs twice: files know layers by their paths."""
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise ValueError(
            f"Several {what} have the same path, by which a file finds "
            f"them. Give them different names. Received: {twice[:4]}"
        )


def keras_version() -> tuple:
    """`(major, minor)`."""
    return tuple(map(int, keras.__version__.split(".")[:2]))
