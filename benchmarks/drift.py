"""How far effective kernels drift over 50 recompositions.

    python benchmarks/drift.py

Kernels of MiniLM, stored in float32, bfloat16 and float16. Between two
recompositions the pairs move, as training moves them; a float64 account of the
same moves says what the effective kernel should be. The drift is the largest
error of an entry, as a part of the kernel's largest entry. Rounding errors of
float32 are independent and grow with the square root of the number n of
recompositions; what rounding to half precision cuts off is remembered, so that
drift does not grow. The last column is the largest `drift / (u · √n)`, or
`drift / u`, of all n, with the unit roundoff u of the dtype; the documentation
promises at most 4.
"""

import pathlib
import sys

import keras
import numpy as np
from keras import ops

import keras_srlora
from keras_srlora._recipes import RECIPES

sys.path.insert(0, str(pathlib.Path(__file__).parent / "quality"))

RECOMPOSITIONS = 50
RANK = 4
# The unit roundoff of each dtype of a kernel.
DTYPES = {"float32": 2.0**-25, "bfloat16": 2.0**-9, "float16": 2.0**-12}
# A step of training moves a pair by a few hundredths of its length.
MOVE = 0.3


def main():
    """Prints a Markdown table."""
    print(
        "| recipe | kernel | drift after 1 | after 10 | after 50 | constant |"
    )
    print("|---" * 6 + "|")
    kernels = minilm_kernels()
    for recipe in ("paper", "lora_restarts"):
        for dtype in DTYPES:
            curves = [drifts(kernel, recipe, dtype) for kernel in kernels]
            worst = np.max(curves, axis=0)
            largest = constant(worst, dtype)
            print(
                f"| `{recipe}` | {dtype} | {worst[0]:.1e} | {worst[9]:.1e} | "
                f"{worst[-1]:.1e} | {largest:.2f} |"
            )


def minilm_kernels():
    """Six kernels: attention and feed-forward, of the first and last layer."""
    import tasks

    backbone = tasks.minilm(6)
    return [
        ops.convert_to_numpy(layer.kernel).reshape(layer.kernel.shape[0], -1)
        for index in (0, 5)
        for block in [backbone.get_layer(f"transformer_layer_{index}")]
        for layer in (
            block._self_attention_layer.query_dense,
            block._feedforward_intermediate_dense,
            block._feedforward_output_dense,
        )
    ]


def drifts(kernel, recipe, dtype, recompositions=RECOMPOSITIONS):
    """Drift after each recomposition, of one kernel; float64 array."""
    rng = np.random.default_rng(0)
    layer = keras_srlora.SRLoRADense(
        kernel.shape[1],
        rank=RANK,
        target_rank=min(kernel.shape),
        recipe=recipe,
        dtype=dtype,
    )
    layer.build((None, kernel.shape[0]))
    layer.kernel.assign(kernel)
    layer.initialize_factors()
    account, found = effective(layer), []
    for step in range(recompositions):
        before = product(layer)
        for factor in layer.factors:
            size = MOVE / np.sqrt(factor.shape[1])
            moved = ops.convert_to_numpy(ops.cast(factor, "float32"))
            factor.assign(moved + size * rng.standard_normal(factor.shape))
        account = account + product(layer) - before
        chosen = RECIPES[recipe]
        slots = (np.arange(RANK // 2) + step * RANK // 2) % RANK
        layer.fuse_and_restart(
            slots,
            layer.adapter_state.unused[: len(slots)],
            np.ones(len(slots)),
            chosen["scale"],
            step,
        )
        error = np.max(np.abs(effective(layer) - account))
        found.append(error / np.max(np.abs(kernel)))
    return np.array(found)


def product(layer):
    """`s · aᵀ b` of the stored factors, in float64."""
    a, b = (np.float64(x) for x in layer.factors_to_numpy())
    return layer.scale * a.T @ b


def effective(layer):
    """The stored kernel plus the product, in float64."""
    stored = ops.convert_to_numpy(ops.cast(layer.kernel, "float32"))
    return np.float64(stored) + product(layer)


def constant(curve, dtype):
    """The largest drift in units of what is expected of the dtype."""
    growth = np.arange(1, len(curve) + 1) ** (
        0.5 if dtype == "float32" else 0.0
    )
    return np.max(curve / DTYPES[dtype] / growth)


if __name__ == "__main__":
    print(f"Keras {keras.__version__}, {keras.backend.backend()}\n")
    main()
