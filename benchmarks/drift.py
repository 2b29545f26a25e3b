"""How far effective kernels drift over 50 recompositions.

    python -m benchmarks.drift

Kernels of MiniLM, stored in float32, bfloat16, float16, int8 and int4. Between
two recompositions the pairs move, as training moves them; a float64 account of
the same moves gives the exact effective kernel. The drift is the
largest error of an entry, as a part of the kernel's largest entry.

Rounding errors of float32 are independent and grow with the square root of the
number n of recompositions. What rounding to half precision cuts off is
remembered, so that drift does not grow. Beside a quantized kernel float32
factors hold the fused pairs. The last column is the largest `drift / (u · √n)`,
or `drift / u`, of all n, with the unit roundoff u of the dtype; the
documentation promises at most 4.

A second table has the loss if a quantized kernel took up the fused pairs, and
were quantized again each time.
"""

import keras
import numpy as np
from keras import ops

import keras_srlora
from keras_srlora.layers import pairs
from keras_srlora.layers.frozen import float_kernel
from keras_srlora.layers.frozen import is_quantized

RECOMPOSITIONS = 50
RANK = 4
# The unit roundoff of each dtype of a kernel.
DTYPES = {
    "float32": 2.0**-25,
    "bfloat16": 2.0**-9,
    "float16": 2.0**-12,
    # What rounds is the float32 factors beside it.
    "int8": 2.0**-25,
    "int4": 2.0**-25,
}
# Where errors of each recomposition add up.
ADDS_UP = ("float32", "int8", "int4")
# Of integers, as Keras quantizes.
RANGES = {"int8": (-127, 127), "int4": (-8, 7)}
# A step of training moves a pair by a few hundredths of its length.
MOVE = 0.3


def main():
    """Prints two Markdown tables."""
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
    print("\n| recipe | quantized again | after 1 | after 10 | after 50 |")
    print("|---" * 5 + "|")
    for recipe in ("paper", "lora_restarts"):
        for mode in RANGES:
            curves = [quantized_again(k, recipe, mode) for k in kernels]
            worst = np.max(curves, axis=0)
            print(
                f"| `{recipe}` | {mode} | {worst[0]:.1e} | {worst[9]:.1e} | "
                f"{worst[-1]:.1e} |"
            )


def minilm_kernels():
    """Six kernels: attention and feed-forward, of the first and last layer."""
    from benchmarks.quality.tasks.texts import minilm

    backbone = minilm(6)
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
    layer = adapted_layer(kernel, recipe, dtype)
    account, found = effective(layer), []
    for step in range(recompositions):
        before = product(layer)
        move(layer, step)
        account = account + product(layer) - before
        recompose(layer, step)
        error = np.max(np.abs(effective(layer) - account))
        found.append(error / np.max(np.abs(kernel)))
    return np.array(found)


def quantized_again(kernel, recipe, mode, recompositions=RECOMPOSITIONS):
    """Drift of a kernel that takes up fused pairs, as `drifts` has it."""
    layer = adapted_layer(kernel, recipe, mode)
    exact = effective(layer) - product(layer)
    kept, found = exact, []
    for step in range(recompositions):
        move(layer, step)
        recompose(layer, step)
        before, exact = exact, effective(layer) - product(layer)
        integers, scale = keras.quantizers.abs_max_quantize(
            np.float32(kept + exact - before), 0, RANGES[mode], to_numpy=True
        )
        kept = np.float64(integers) / np.float64(scale)
        error = np.max(np.abs(kept - exact))
        found.append(error / np.max(np.abs(kernel)))
    return np.array(found)


def adapted_layer(kernel, recipe, dtype):
    """A decomposed layer that holds a kernel in a dtype."""
    quantized = dtype in RANGES
    layer = keras.layers.Dense(
        kernel.shape[1], dtype="float32" if quantized else dtype
    )
    model = keras.Sequential([keras.Input((kernel.shape[0],)), layer])
    layer.kernel.assign(kernel)
    if quantized:
        layer.quantize(dtype)
    (layer,) = keras_srlora.enable_srlora(
        model,
        rank=RANK,
        target_rank=min(kernel.shape),
        recipe=recipe,
        target_layer_names=[layer.name],
    )
    return layer


def move(layer, step):
    """Moves all pairs, as training does."""
    rng = np.random.default_rng(step)
    for factor in layer.factors:
        size = MOVE / np.sqrt(factor.shape[1])
        moved = ops.convert_to_numpy(ops.cast(factor, "float32"))
        factor.assign(moved + size * rng.standard_normal(factor.shape))


def recompose(layer, step):
    """Fuses half of the pairs."""
    slots = (np.arange(RANK // 2) + step * RANK // 2) % RANK
    pairs.fuse_and_restart(
        layer,
        slots,
        layer.record.unused[: len(slots)],
        np.ones(len(slots)),
        layer.recipe.scale_restarted,
        step,
    )


def product(layer):
    """`s · aᵀ b` of the stored factors, in float64."""
    a, b = (np.float64(x) for x in pairs.factors_to_numpy(layer))
    return layer.scale * a.T @ b


def effective(layer):
    """The stored kernel plus the product, in float64."""
    kernel = ops.convert_to_numpy(ops.cast(float_kernel(layer), "float32"))
    kernel = np.float64(kernel)
    if is_quantized(layer):
        a, b = layer.frozen.fused
        a, b = (np.float64(ops.convert_to_numpy(x)) for x in (a, b))
        kernel = kernel + a.T @ b
    return kernel + product(layer)


def constant(curve, dtype):
    """The largest drift in units of the expected one of the dtype."""
    growth = np.arange(1, len(curve) + 1) ** (0.5 if dtype in ADDS_UP else 0.0)
    return np.max(curve / DTYPES[dtype] / growth)


if __name__ == "__main__":
    print(f"Keras {keras.__version__}, {keras.backend.backend()}\n")
    main()
