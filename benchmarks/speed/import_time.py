"""Seconds of `import keras_srlora` beyond `import keras`.

KERAS_BACKEND=jax python -m benchmarks.speed.import_time
"""

import json
import subprocess
import sys

import numpy as np

PROCESSES = 9
SCRIPT = """
import time, keras
start = time.perf_counter()
import keras_srlora
print(time.perf_counter() - start)
"""


def measure():
    """Median and quartiles over as many processes, in milliseconds."""
    command = [sys.executable, "-c", SCRIPT]
    seconds = [
        float(
            subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        )
        for _ in range(PROCESSES)
    ]
    lower, median, upper = np.quantile(seconds, [0.25, 0.5, 0.75])
    return {"milliseconds": [round(1e3 * x, 1) for x in (median, lower, upper)]}


if __name__ == "__main__":
    print(json.dumps(measure()))
