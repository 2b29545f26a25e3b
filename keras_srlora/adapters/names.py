"""Layers and variables of a model, by the paths that a file has."""

import re


def find_by_path(path, by_path, what, filepath):
    """The one layer, or variable, of a path."""
    found = by_path.get(path, [])
    if len(found) == 1:
        return found[0]
    number = f"{len(found)} of that path" if found else f"no such {what}"
    raise ValueError(
        f"{str(filepath)!r} is for a {what} {path!r}; the model has {number}. "
        f"{_explain_names(path, by_path)}"
    )


def _explain_names(path, by_path):
    """The remedy where a path is missing, or occurs several times."""
    counted = _without_numbers(path)
    near = [p for p in by_path if p and _without_numbers(p) == counted]
    if path in by_path or not near:
        return (
            "Load it on the model that it was trained on, built with the same "
            "names."
        )
    return (
        "These are automatic names, which Keras counts up within a process: a "
        "model that is built again, in the same notebook for example, has "
        "others. Call `keras.utils.clear_session()` before the model is built, "
        "each time, or name its layers, as in "
        '`Dense(8, name="projection")`. '
        f"Received: a model with {near[:3]}"
    )


def _without_numbers(path):
    """Without the number that Keras appends to automatic names."""
    return re.sub(r"_\d+(?=/|$)", "", path)
