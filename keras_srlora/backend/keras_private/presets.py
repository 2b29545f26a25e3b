"""Where KerasHub saves presets, which it tells no other way."""

import sys
from typing import Any


def saves_a_preset():
    """Whether the code runs in a `save_to_preset` of KerasHub.

    A task asks for the config of its backbone before it writes anything, and
    tells it in no other way what for.
    """
    frame: Any = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        name = frame.f_code.co_name
        if name == "save_to_preset" and module.startswith("keras_hub."):
            return True
        frame = frame.f_back
    return False
