"""Measures everything about speed and memory, on each backend.

    python -m benchmarks.speed.run
    python -m benchmarks.speed.run --backends jax --figures step memory --again

Each figure on each backend is one process, and one file of
`benchmarks/results/speed`; figures that are there are not measured again. Then
`report` writes the tables and pictures.
"""

import argparse
import importlib
import json
import os
import pathlib
import subprocess
import sys

RESULTS = pathlib.Path(__file__).parents[1] / "results" / "speed"
BACKENDS = ("tensorflow", "jax", "torch")
FIGURES = (
    "step",
    "recomposition",
    "decomposition",
    "memory",
    "inference",
    "import_time",
    "association",
    "growth",
)


def main():
    """Runs the missing figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--figures", nargs="+", default=FIGURES)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.results.mkdir(exist_ok=True)
    if args.one:
        return measure_one(args.one, args.results)
    for backend in args.backends:
        for figure in args.figures:
            path = args.results / f"{figure}-{backend}.json"
            if path.exists() and not args.again:
                continue
            print(path.stem, flush=True)
            command = [sys.executable, "-m", __spec__.name, "--one", figure]
            subprocess.run(
                [*command, "--results", args.results],
                env=os.environ | {"KERAS_BACKEND": backend},
                check=True,
            )
    # Of what lies in the repository, wherever the others were written.
    report = [sys.executable, "-m", "benchmarks.speed.report"]
    subprocess.run(report, check=True)


def measure_one(figure, results):
    """In a process that has the backend."""
    from benchmarks.shared import environment

    found = importlib.import_module(f"benchmarks.speed.{figure}").measure()
    described = environment.describe()
    path = results / f"{figure}-{described['backend']}.json"
    content = {"figure": figure, "environment": described, "found": found}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
