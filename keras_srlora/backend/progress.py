"""A progress bar that is shown where someone waits."""

import sys
import time

import keras

# Seconds after which a user wants to see progress.
PATIENCE = 2.0


class Progress:
    """Keras's own progress bar, over a number of kernels.

    Args:
        count: int. How many kernels.
        verbose: 0: no bar. 1: one from the beginning. `"auto"`: one on a
            terminal or in a notebook, where it takes longer than two seconds.
    """

    def __init__(self, count, verbose="auto"):
        self._begun = time.monotonic()
        self._waits = verbose == "auto" and _is_interactive()
        # Silent at first, but counting from the first kernel.
        verbose = 0 if verbose == "auto" else int(verbose)
        self._bar = keras.utils.Progbar(
            count, verbose=verbose, unit_name="kernel"
        )

    def update(self, done):
        """Shows how many kernels are done."""
        if self._waits and time.monotonic() - self._begun > PATIENCE:
            self._bar.verbose = 1
        self._bar.update(done)


def check_verbose(verbose):
    """Raises unless it is one of the values that `Progress` takes."""
    if verbose not in ("auto", 0, 1):
        raise ValueError(
            f'`verbose` must be "auto", 0 or 1. Received: {verbose=}'
        )


def _is_interactive():
    return sys.stdout.isatty() or "ipykernel" in sys.modules
