"""The base of classes that are mixed in before a Keras layer."""

from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
    # For the type checker they are layers; Keras has no types.
    KerasMixin: Any = object
else:

    class KerasMixin:
        """Adds nothing: the Keras class comes next in the order."""
