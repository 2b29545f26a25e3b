"""NumPy references, written from the equations and from nothing else.

Factors in the paper's and Keras's words: `a` is (in, rank), `b` is (rank, out).
"""

import numpy as np


def effective(kernel, a, b, scale):
    return kernel.astype("float64") + scale * a.astype("float64") @ b


def sensitivity_run(weights, gradients, beta1, beta2):
    """Equation 4 over a run; lists of arrays in, `(average, uncertainty)`."""
    average = np.zeros_like(weights[0], "float64")
    uncertainty = np.zeros_like(weights[0], "float64")
    for w, g in zip(weights, gradients):
        observed = np.abs(w.astype("float64") * g)
        average = beta1 * average + (1 - beta1) * observed
        uncertainty = beta2 * uncertainty + (1 - beta2) * np.abs(
            observed - average
        )
    return average, uncertainty


def importance(average_a, uncertainty_a, average_b, uncertainty_b):
    """Equation 5: columns of `a`, rows of `b`."""
    return (average_a * uncertainty_a).mean(axis=0) + (
        average_b * uncertainty_b
    ).mean(axis=1)


def linear_gradients(x, y, kernel, a, b, bias, scale):
    """Gradients of mean((x W + s x a b + bias - y)²) by hand."""
    hidden = x @ a
    error = x @ kernel + scale * hidden @ b + bias - y
    upstream = 2.0 * error / error.size
    return {
        "a": scale * x.T @ (upstream @ b.T),
        "b": scale * hidden.T @ upstream,
        "bias": upstream.sum(axis=0),
    }
