"""Runs a table of the laboratory: tasks x methods x ranks x rates x seeds.

    python -m benchmarks.quality.run digits --ranks 1 2 4 8 16

For each cell the learning rate is chosen by the loss on the validation split,
on the first two seeds, from a grid of half decades that grows until the best is
not on its edge; the other seeds run at the best. Each run is a line in
`benchmarks/results/quality/<task>.jsonl`; what is there is not run again.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import pathlib

from benchmarks.quality.records import KEY
from benchmarks.quality.records import RESULTS
from benchmarks.quality.records import SEEDS_TO_CHOOSE
from benchmarks.quality.records import best_rate
from benchmarks.quality.records import read

GRID = [round(m * 10.0**e, 9) for e in range(-6, 1) for m in (1, 3)]


def main():
    """Runs what is missing of a table."""
    args = parse_arguments()
    path = pathlib.Path(args.results) / f"{args.task}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = read(path)
    cells = list(itertools.product([args.task], args.methods, args.ranks))
    with Workers(args.workers) as workers, open(path, "a") as file:
        while jobs := missing(done, cells, args):
            print(f"{len(jobs)} runs", flush=True)
            for record in workers.run(jobs):
                done[tuple(record[name] for name in KEY)] = record
                file.write(json.dumps(record) + "\n")
                file.flush()
                print(describe(record), flush=True)


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task")
    parser.add_argument("--methods", nargs="+", default=["lora", "adaptive"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--rates", nargs="+", type=float)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--results", default=RESULTS)
    return parser.parse_args()


def missing(done, cells, args):
    """The runs that the next round needs; none when the table is full."""
    jobs = []
    for cell in cells:
        rates = args.rates or grid(done, cell)
        first = list(
            itertools.product(
                [cell], rates, range(min(SEEDS_TO_CHOOSE, args.seeds))
            )
        )
        wanted = [(*c, rate, seed) for c, rate, seed in first]
        if all(key in done for key in wanted):
            best = best_rate(done, cell, rates)
            wanted = [(*cell, best, seed) for seed in range(args.seeds)]
        jobs += [key for key in wanted if key not in done]
    return jobs


def grid(done, cell):
    """Three half decades around the best so far."""
    tried = sorted({key[3] for key in done if key[:3] == cell})
    if not tried:
        # A method starts where its neighbours of other ranks were best.
        near = [key[:3] for key in done if key[1] == cell[1]]
        near = min(near, key=lambda c: abs(c[2] - cell[2]), default=None)
        best = best_rate(done, near) if near else 3e-3
        i = GRID.index(best)
        return GRID[i - 1 : i + 2]
    i = GRID.index(best_rate(done, cell))
    return sorted({*tried, *GRID[max(0, i - 1) : i + 2]})


def describe(record):
    """One line about a run."""
    return (
        f"{record['method']:10} r={record['rank']:<3} "
        f"rate={record['rate']:<8g} seed={record['seed']} "
        f"train {record['train_loss']:.4f} test {record['test_loss']:.4f} "
        f"accuracy {record.get('test_accuracy', float('nan')):.4f} "
        f"recompositions {record['recompositions']} "
        f"{record['seconds']:.1f} s"
    )


class Workers:
    """Processes that run jobs, one a core."""

    def __init__(self, count):
        self.count = count

    def __enter__(self):
        spawn = multiprocessing.get_context("spawn")
        cores = spawn.Queue()
        for core in sorted(os.sched_getaffinity(0))[: self.count]:
            cores.put(core)
        self.pool = spawn.Pool(self.count, pin, (cores,))
        return self

    def __exit__(self, *exception):
        self.pool.terminate()

    def run(self, jobs):
        """Yields the records as they come."""
        return self.pool.imap_unordered(run_job, jobs)


def pin(cores):
    """Before a backend counts the cores to start its threads."""
    os.sched_setaffinity(0, {cores.get()})
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"):
        os.environ[name] = "1"


def run_job(key):
    """In a worker; it imports Keras only when it is pinned."""
    from benchmarks.quality import job

    return job.run(key)


if __name__ == "__main__":
    main()
