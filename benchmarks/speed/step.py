"""Seconds of a training step of each method, side by side in one process.

    KERAS_BACKEND=jax python -m benchmarks.speed.step

Prints medians, and the ratios of SRLoRA to the others with their quartiles.
"""

import json

import keras
import numpy as np

from benchmarks.shared import environment
from benchmarks.shared import timings
from benchmarks.speed import contestants

METHODS = ("full", "floor", "keras_lora", "srlora")
WITHOUT = "srlora_without_statistics"
OTHERS = ("full", "floor", "keras_lora", *contestants.PEFT)


def measure():
    """By the size of the work; a GPU takes the larger one, too."""
    found = {"2 layers, batch 8": compare()}
    if environment.accelerator():
        found["12 layers, batch 32, bfloat16"] = compare(
            layers=12, batch=32, dtype="bfloat16"
        )
    return found


def compare(rounds=11, rounds_of_statistics=31, steps=3, **size):
    """Seconds a step, ratios to the others, trainable parameters."""
    methods = list(METHODS)
    if keras.backend.backend() == "torch":
        methods += contestants.PEFT
    seconds, parameters = race(methods, rounds, steps, **size)
    ratios = {
        other: timings.ratio(seconds, "srlora", other)
        for other in OTHERS
        if other in seconds
    }
    pair, _ = race(["srlora", WITHOUT], rounds_of_statistics, 2, **size)
    ratios[WITHOUT] = timings.ratio(pair, "srlora", WITHOUT)
    ratios["floor / keras_lora"] = timings.ratio(seconds, "floor", "keras_lora")
    return {
        "seconds": {
            name: round(float(np.median(values)), 4)
            for name, values in seconds.items()
        },
        "parameters": parameters,
        "ratios": {
            name: [round(x, 3) for x in values]
            for name, values in ratios.items()
        },
    }


def race(methods, rounds, steps, **size):
    """`(seconds of each round, trainable parameters)`, by method."""
    loops, parameters = {}, {}
    for name in methods:
        make = (
            contestants.peft_loop
            if name in contestants.PEFT
            else contestants.keras_loop
        )
        loops[name], parameters[name] = make(name, **size)
    return timings.interleave(loops, rounds, steps), parameters


if __name__ == "__main__":
    print(json.dumps(measure()))
