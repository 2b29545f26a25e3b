"""Pictures without a display, all in one style."""

import matplotlib
import matplotlib.ticker

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# 0.25 and 4, not 2.5 x 10^-1 and 2^2.
PLAIN = matplotlib.ticker.FormatStrFormatter("%g")


def subplots(rows=1, columns=1, size=(8, 5)):
    """`(figure, axes)` that use their space and have no box."""
    figure, axes = plt.subplots(
        rows, columns, figsize=size, layout="constrained"
    )
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure, path):
    """Writes the picture and forgets it."""
    figure.savefig(path, dpi=110)
    plt.close(figure)
