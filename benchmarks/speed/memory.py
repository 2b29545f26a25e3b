"""Peak memory of training, whole process, one process a method. Linux only.

    KERAS_BACKEND=jax python -m benchmarks.speed.memory

The peak is reset when the model is ready: what building it took at most, with
its random weights, is of no interest. On a GPU, the peak of the device beside.
"""

import json
import subprocess
import sys

import keras

from benchmarks.shared import environment
from benchmarks.speed import contestants

METHODS = ("full", "floor", "keras_lora", "srlora")
STEPS = 8


def measure():
    """`{layers: {method: MiB}}`, and SRLoRA's ratios to the others."""
    methods = list(METHODS)
    if keras.backend.backend() == "torch":
        methods.append("peft_lora")
    return {str(layers): compare(methods, layers) for layers in (2, 12)}


def compare(methods, layers):
    """Each method in a process of its own."""
    peaks = {}
    for method in methods:
        command = [sys.executable, "-m", __spec__.name, method, str(layers)]
        printed = subprocess.run(
            command, check=True, stdout=subprocess.PIPE
        ).stdout
        peaks[method] = json.loads(printed.splitlines()[-1])
    ratios = {
        place: {
            method: round(peaks["srlora"][place] / peaks[method][place], 3)
            for method in methods
            if method != "srlora"
        }
        for place in peaks["srlora"]
    }
    return {"mebibytes": peaks, "ratios": ratios}


def peak(method, layers):
    """MiB of a few steps, on the host and on the device."""
    peft = method in contestants.PEFT
    make = contestants.peft_loop if peft else contestants.keras_loop
    loop, _ = make(method, layers=layers)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    loop.run(STEPS)
    with open("/proc/self/status", encoding="utf-8") as file:
        (line,) = (line for line in file if line.startswith("VmHWM"))
    loop.end()
    found = {"host": int(line.split()[1]) // 1024}
    if environment.accelerator():
        found["device"] = device_peak() // 2**20
    return found


def device_peak():
    """Bytes."""
    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        return torch.cuda.max_memory_allocated()
    if backend == "jax":
        import jax

        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    import tensorflow as tf

    return tf.config.experimental.get_memory_info("GPU:0")["peak"]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(peak(sys.argv[1], int(sys.argv[2]))))
    else:
        print(json.dumps(measure()))
