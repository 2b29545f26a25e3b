"""One recomposition of all layers of a BERT-base, beside one training step.

    KERAS_BACKEND=jax python -m benchmarks.speed.recomposition

Beside the seconds: how often JAX compiled something, and how often the compiled
step was traced anew, in each recomposition.
"""

import json
import time

import keras
import numpy as np

import keras_srlora
from benchmarks.speed import contestants

RECOMPOSITIONS, STEPS = 6, 3


class Recompose(keras.callbacks.Callback):
    """Recomposes before some batches; times that, and the steps between."""

    def __init__(self, optimizer, calls):
        super().__init__()
        self.optimizer, self.calls = optimizer, calls
        self.recompositions, self.steps, self.compilations = [], [], []

    def on_train_batch_begin(self, batch, logs=None):
        if batch % STEPS == 0 and batch:
            contestants.wait(self.model)
            self.steps.append((time.perf_counter() - self.begun) / STEPS)
            if not self.recompositions:
                self.calls_before = len(self.calls)
            before = len(COMPILATIONS)
            start = time.perf_counter()
            keras_srlora.recompose(
                self.optimizer.sensitivity, self.optimizer, batch
            )
            contestants.wait(self.model)
            self.recompositions.append(time.perf_counter() - start)
            self.compilations.append(len(COMPILATIONS) - before)
        if batch % STEPS == 0:
            self.begun = time.perf_counter()


COMPILATIONS = []  # of JAX


def measure(layers=12, batch=8, width=768):
    """Seconds of a step and of a recomposition of `6 · layers` kernels."""
    if keras.backend.backend() == "jax":
        import jax

        jax.monitoring.register_event_duration_secs_listener(
            lambda event, seconds, **_: (
                COMPILATIONS.append(event)
                if event == "/jax/core/compile/backend_compile_duration"
                else None
            )
        )
    model = contestants.classifier(layers, width)
    model.backbone.trainable = True
    start = time.perf_counter()
    keras_srlora.enable_srlora(model, 8, target_rank=64, recipe="paper")
    converted = time.perf_counter() - start
    optimizer = keras_srlora.SensitivityOptimizer(
        keras.optimizers.AdamW(contestants.RATE), model
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    count = STEPS * (RECOMPOSITIONS + 1)
    x, y = contestants.classifier_data(batch, count)
    calls = count_calls(optimizer.sensitivity.layers[0])
    timed = Recompose(optimizer, calls)
    model.fit(x, y, batch_size=batch, verbose=0, callbacks=[timed])
    step = float(np.median(timed.steps[1:]))
    return {
        "enable_srlora_seconds": round(converted, 2),
        "step_seconds": round(step, 3),
        "first_recomposition_seconds": round(timed.recompositions[0], 3),
        "recomposition_seconds": [round(t, 3) for t in timed.recompositions],
        "ratio": round(float(np.median(timed.recompositions[1:])) / step, 3),
        "compilations": timed.compilations,
        # Of `call` in Python after the first step: 0 where it is compiled.
        "calls": len(calls) - timed.calls_before,
    }


def count_calls(layer):
    """Counts the calls of a layer from now on; a compiled step makes none."""
    calls, call = [], layer.call
    layer.call = lambda *args, **kw: (calls.append(1), call(*args, **kw))[1]
    return calls


if __name__ == "__main__":
    print(json.dumps(measure()))
