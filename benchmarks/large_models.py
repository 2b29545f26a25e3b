"""Time and memory to convert models of 1 B and 8 B parameters.

    KERAS_BACKEND=torch python -m benchmarks.large_models

Real layers of KerasHub's Llama 3 with random bfloat16 weights are converted by
`enable_srlora` with a `directions` file: all 16 layers of the model of 1 B
parameters, 16 of the 32 of that of 8 B, for which 8 GiB of memory are enough
(`--layers 16 32` takes all). The vocabulary is small, since embeddings are left
alone. Each run is a process of its own; the second one finds the file. Seconds
of the first run of a whole model are those of its kernels, by their medians
over the layers; of the second, those of the run, by the number of layers. Bytes
are counted. Linux only.
"""

import argparse
import gc
import json
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import keras
from keras import ops

import keras_srlora
from keras_srlora.layers import pairs

RANK, TARGET_RANK = 8, 64
MODELS = {
    "Llama 3.2 1B": {
        "num_layers": 16,
        "hidden_dim": 2048,
        "intermediate_dim": 8192,
        "num_query_heads": 32,
        "num_key_value_heads": 8,
    },
    "Llama 3 8B": {
        "num_layers": 32,
        "hidden_dim": 4096,
        "intermediate_dim": 14336,
        "num_query_heads": 32,
        "num_key_value_heads": 8,
    },
}


def main():
    """Prints the measurements, and those calculated for the whole models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs=2, default=(16, 16))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, layers, path = args.one
        print(json.dumps(convert(name, int(layers), path)))
        return
    print(describe(), "\n")
    found = {}
    for name, layers in zip(MODELS, args.layers):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", __spec__.name]
            command += ["--one", name, str(layers)]
            found[name] = (
                layers,
                [
                    json.loads(
                        subprocess.run(
                            [*command, f"{folder}/directions.safetensors"],
                            check=True,
                            stdout=subprocess.PIPE,
                        ).stdout.splitlines()[-1]
                    )
                    for _ in range(2)
                ],
            )
    measured_table(found)
    print()
    kernel_table(found)
    print()
    whole_table(found)


def describe():
    """The machine and the versions, in a line."""
    from benchmarks.shared import environment

    found = environment.describe()
    versions = found["versions"]
    backend = found["backend"]
    names = ("keras", "keras-hub", backend)
    return (
        f"{found['cores']} cores of {found['processor']}, "
        f"{found['accelerator'] or 'no accelerator'}: "
        + ", ".join(f"{name} {versions[name]}" for name in names)
    )


# One run.


def convert(name, layers, path):
    """Converts some layers of a model.

    Returns:
        dict of seconds of the conversion and of each kind of kernel, and MiB of
        the peak above the model, of what stays, and of the largest kernel in
        float32.
    """
    model = build(name, layers)
    for variable in model.variables:
        # JAX may be making it still.
        ops.convert_to_numpy(ops.cast(ops.max(variable), "float32"))
    gc.collect()
    seconds, before = time_kernels(), memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    start = time.perf_counter()
    converted = keras_srlora.enable_srlora(
        model, RANK, target_rank=TARGET_RANK, directions=path, verbose=0
    )
    total = time.perf_counter() - start
    peak = memory("VmHWM") - before
    assert not any(x.frozen.remainder is not None for x in converted)
    return {
        "total": total,
        "kernels": {k: statistics.median(v) for k, v in seconds.items()},
        "peak": peak,
        "kept": memory("VmRSS") - before,
        "largest": max(math.prod(x.kernel.shape) for x in converted) / 2**18,
        "file": pathlib.Path(path).stat().st_size / 2**20,
    }


def build(name, layers):
    """A backbone of random bfloat16 weights, the same each time."""
    import keras_hub

    keras.utils.set_random_seed(0)
    return keras_hub.models.Llama3Backbone(
        vocabulary_size=1000,
        dtype="bfloat16",
        **{**MODELS[name], "num_layers": layers},
    )


def time_kernels():
    """`{name: [seconds]}`, which fills while kernels are decomposed."""
    seconds, original = {}, pairs.start_pairs

    def timed(layer, *args):
        start = time.perf_counter()
        original(layer, *args)
        # What was only begun.
        ops.convert_to_numpy(ops.cast(ops.max(layer.lora_kernel_b), "float32"))
        taken = time.perf_counter() - start
        seconds.setdefault(layer.name, []).append(taken)

    pairs.start_pairs = timed
    return seconds


def memory(name):
    """MiB of this process."""
    with open("/proc/self/status", encoding="utf-8") as file:
        (line,) = (line for line in file if line.startswith(name))
    return int(line.split()[1]) / 1024


# What follows.


def shapes(name):
    """`{kind of kernel: (in, out)}` of one layer."""
    sizes = MODELS[name]
    wide, inner = sizes["hidden_dim"], sizes["intermediate_dim"]
    head = wide // sizes["num_query_heads"]
    narrow = head * sizes["num_key_value_heads"]
    return {
        "query": (wide, wide),
        "key": (wide, narrow),
        "value": (wide, narrow),
        "attention_output": (wide, wide),
        "feedforward_gate_dense": (wide, inner),
        "feedforward_intermediate_dense": (wide, inner),
        "feedforward_output_dense": (inner, wide),
    }


def numbers(name):
    """How many numbers there are of each part, in the whole model."""
    layers, of_layer = MODELS[name]["num_layers"], shapes(name).values()
    sides = layers * sum(rows + columns for rows, columns in of_layer)
    return {
        "adapted kernels": layers * sum(a * b for a, b in of_layer),
        "largest kernel": max(a * b for a, b in of_layer),
        "directions": TARGET_RANK * (sides + layers * len(of_layer)),
        "factors": RANK * sides,
    }


def measured_table(found):
    """What was run."""
    _head(
        "measured",
        "kernels",
        "first run",
        "second run",
        "peak above the model",
        "of it, what stays",
        "largest kernel in float32",
        "file",
    )
    for name, (layers, (first, second)) in found.items():
        _row(
            f"{layers} of {MODELS[name]['num_layers']} layers of {name}",
            layers * len(shapes(name)),
            f"{first['total']:.0f} s",
            f"{second['total']:.1f} s",
            f"{first['peak']:.0f} MiB",
            f"{first['kept']:.0f} MiB",
            f"{first['largest']:.0f} MiB",
            f"{first['file']:.0f} MiB",
        )


def kernel_table(found):
    """Seconds of each kind of kernel."""
    _head(
        "kernel", *(f"{x}, {run} run" for x in found for run in ("1st", "2nd"))
    )
    for kind in shapes("Llama 3 8B"):
        _row(
            f"`{kind}`",
            *(
                f"{_kernel_shape(name, kind)}: {run['kernels'][kind]:.2f} s"
                for name, (_, runs) in found.items()
                for run in runs
            ),
        )


def whole_table(found):
    """What follows for the whole models."""
    _head("calculated", *found)
    layers = {name: MODELS[name]["num_layers"] for name in found}
    first = [
        layers[name] * sum(runs[0]["kernels"].values())
        for name, (_, runs) in found.items()
    ]
    second = [
        layers[name] / taken * runs[1]["total"]
        for name, (taken, runs) in found.items()
    ]
    _row("first run", *(f"{x:.0f} s" for x in first))
    _row("second run", *(f"{x:.0f} s" for x in second))
    counted = [numbers(name) for name in found]
    _row("trainable parameters", *(f"{x['factors']:,}" for x in counted))
    for title, part, size in (
        ("adapted kernels, bfloat16", "adapted kernels", 2),
        ("the largest kernel, float32", "largest kernel", 4),
        ("directions, float32, on the host and in the file", "directions", 4),
        ("after the first recomposition: remainders, float32, on the host",)
        + ("adapted kernels", 4),
    ):
        _row(title, *(f"{x[part] * size / 2**30:.2f} GiB" for x in counted))


def _kernel_shape(name, kind):
    return "{:,} x {:,}".format(*shapes(name)[kind])


def _head(*cells):
    _row(*cells)
    print("|---" * len(cells) + "|")


def _row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
