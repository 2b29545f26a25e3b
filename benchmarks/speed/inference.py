"""Inference after `merge_srlora` beside the model that was never converted.

KERAS_BACKEND=jax python -m benchmarks.speed.inference
"""

import json
import time

import numpy as np

import keras_srlora
from benchmarks.shared import timings
from benchmarks.speed import contestants

ROUNDS, CALLS = 31, 2


def measure():
    """Ratio merged / plain of `predict_on_batch`, batch 8 x 128 tokens."""
    plain = contestants.classifier()
    merged = contestants.classifier()
    contestants.srlora(merged, 8)
    keras_srlora.merge_srlora(merged)
    x, _ = contestants.classifier_data(batch=8, batches=1)
    models = {"merged": merged, "plain": plain}
    seconds = {name: [] for name in models}
    for index in range(ROUNDS + 1):
        for name in sorted(models, reverse=index % 2):
            start = time.perf_counter()
            for _ in range(CALLS):
                models[name].predict_on_batch(x)
            if index:
                seconds[name].append((time.perf_counter() - start) / CALLS)
    ratio = timings.ratio(seconds, "merged", "plain")
    return {
        "seconds": {
            k: round(float(np.median(v)), 4) for k, v in seconds.items()
        },
        "ratio": [round(x, 3) for x in ratio],
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
