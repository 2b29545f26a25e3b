"""The records of the runs: a line of JSON for each, a file for each task."""

import json
import pathlib

RESULTS = pathlib.Path(__file__).parents[1] / "results" / "quality"
KEY = ("task", "method", "rank", "rate", "seed")
# The learning rate of a cell is chosen on the first seeds.
SEEDS_TO_CHOOSE = 2


def read(path):
    """The records of a file by their keys."""
    if not path.exists():
        return {}
    records = map(json.loads, path.read_text().splitlines())
    return {tuple(r[name] for name in KEY): r for r in records}


def best_rate(done, cell, rates=None):
    """The rate of the lowest validation loss on the first seeds."""
    losses = {}
    for key, record in done.items():
        if key[:3] == cell and key[4] < SEEDS_TO_CHOOSE:
            if rates is None or key[3] in rates:
                losses.setdefault(key[3], []).append(record["validation_loss"])

    def mean(rate):
        return sum(losses[rate]) / len(losses[rate])

    return min(losses, key=mean)
