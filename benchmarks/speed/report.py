"""Writes the tables and the picture of `benchmarks/results/speed`.

    python -m benchmarks.speed.report

The tables go between the two marks of `benchmarks/README.md`; the picture is
`docs/growth.png`, and the exponents of its curves are in the tables.
"""

import json
import pathlib
import re

import numpy as np

from benchmarks.shared import plots
from benchmarks.shared.tables import fill_in
from benchmarks.shared.tables import markdown

FOLDER = pathlib.Path(__file__).parents[1]
README = FOLDER / "README.md"
RESULTS = FOLDER / "results" / "speed"
PICTURE = FOLDER.parent / "docs" / "growth.png"
NAMES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}

# Figure, result file, and where in it; three numbers are median and quartiles.
STEP = "2 layers, batch 8"
ROWS = (
    ("step / Keras's `enable_lora`", "step", (STEP, "ratios", "keras_lora")),
    ("step / floor", "step", (STEP, "ratios", "floor")),
    ("step / PEFT's LoRA", "step", (STEP, "ratios", "peft_lora")),
    ("step / PEFT's PiSSA", "step", (STEP, "ratios", "peft_pissa")),
    ("step / PEFT's AdaLoRA", "step", (STEP, "ratios", "peft_adalora")),
    ("step / full fine-tuning", "step", (STEP, "ratios", "full")),
    (
        "statistics on / off (31 rounds)",
        "step",
        (STEP, "ratios", "srlora_without_statistics"),
    ),
    ("recomposition of BERT-base / step", "recomposition", ("ratio",)),
    (
        "randomized / exact decomposition, BERT-base",
        "decomposition",
        ("bert_base", "ratio"),
    ),
    (
        "energy of 64 randomized / exact directions, MiniLM, worst and median",
        "decomposition",
        ("minilm", "64"),
    ),
    (
        "the same of 8 directions",
        "decomposition",
        ("minilm", "8"),
    ),
    (
        "peak memory of training / `enable_lora`, 2 layers",
        "memory",
        ("2", "ratios", "host", "keras_lora"),
    ),
    ("the same, 12 layers", "memory", ("12", "ratios", "host", "keras_lora")),
    (
        "peak memory / PEFT's LoRA, 12 layers",
        "memory",
        ("12", "ratios", "host", "peft_lora"),
    ),
    ("inference after `merge_srlora` / plain", "inference", ("ratio",)),
    ("`import keras_srlora`, ms", "import_time", ("milliseconds",)),
)
# Curve of `growth`, what it grows with, and the exponent that is expected.
CURVES = (
    ("step by rank", "rank", 0),
    ("step by width", "width", 2),
    ("step by tokens", "tokens", 1),
    ("recomposition by width", "width", 2),
    ("randomized by width", "width", 2),
    ("exact by width", "width", 3),
)


def main():
    """Reads the results."""
    results = {}
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        backend = content["environment"]["backend"]
        results[content["figure"], backend] = content
    found = {key: content["found"] for key, content in results.items()}
    parts = [
        machine(results),
        ratios(found),
        steps(found),
        large_kernel(found),
        exponents(found),
        association(found),
    ]
    fill_in(README, "speed", "\n\n".join(parts))
    growth = {b: found["growth", b] for f, b in found if f == "growth"}
    if growth:
        plot(growth)


def machine(results):
    """What all of it was measured on, a line for each machine."""
    lines = set()
    for content in results.values():
        e = content["environment"]
        where = e["accelerator"] or f"{e['cores']} cores of {e['processor']}"
        versions = ", ".join(f"{k} {v}" for k, v in e["versions"].items() if v)
        threads = ", ".join(f"{k}={v}" for k, v in e["threads"].items())
        lines.add(
            f"Measured on {where} ({e['system']}, Python {e['python']}, "
            f"{threads or 'threads by default'}): {versions}."
        )
    return "\n".join(sorted(lines))


def ratios(found):
    """One row a figure, one column a backend."""

    def cell(figure, keys, backend):
        value = found.get((figure, backend))
        for key in keys:
            value = (value or {}).get(key)
        if value is None:
            return "–"
        if not isinstance(value, list):
            return f"{value:.3g}"
        if len(value) == 2:
            return " and ".join(f"{x:.4f}" for x in value)
        median, lower, upper = value
        return f"{median:.3g} ({lower:.3g} to {upper:.3g})"

    rows = [
        [name, *(cell(figure, keys, backend) for backend in NAMES)]
        for name, figure, keys in ROWS
    ]
    return (
        "Ratios of what ran by turns in one process; quartiles in brackets.\n\n"
        + markdown([["figure", *NAMES.values()], *rows])
    )


def steps(found):
    """Seconds and trainable parameters of each method."""
    parts = []
    for backend, title in NAMES.items():
        for size, values in found.get(("step", backend), {}).items():
            rows = [
                [f"`{name}`", seconds, f"{values['parameters'][name]:,}"]
                for name, seconds in values["seconds"].items()
            ]
            header = [f"{title}, {size}", "seconds a step", "parameters"]
            parts.append(markdown([header, *rows]))
    return "\n\n".join(parts)


def large_kernel(found):
    """The kernel of 4,096 x 14,336 on one core."""
    rows = [
        [
            f"`{name}`",
            NAMES[b],
            value["seconds"],
            f"{value['missing_energy']:.1%}",
        ]
        for b in NAMES
        for name, value in found.get(("decomposition", b), {})
        .get("large", {})
        .items()
        # The rivals do not depend on the backend.
        if name == "keras_srlora" or b == "torch"
    ]
    header = [
        "128 directions of 4,096 x 14,336, one core; iterations",
        "backend",
        "seconds",
        "energy missed",
    ]
    return markdown([header, *rows])


def exponents(found):
    """Slopes of the last three points, in logarithms."""
    rows = []
    for curve, _, expected in CURVES:
        row = [curve, expected]
        for backend in NAMES:
            points = found.get(("growth", backend), {}).get(curve)
            row.append(f"{exponent(points):.2f}" if points else "–")
        rows.append(row)
    header = ["curve", "expected exponent", *NAMES.values()]
    return (
        "Exponents over the last three points of each curve "
        "(`docs/growth.png`).\n\n" + markdown([header, *rows])
    )


def points_of(curve):
    """`(x, seconds)` of a curve; of a step, those of SRLoRA."""
    x = np.array([int(n) for n in curve])
    y = [v["srlora"] if isinstance(v, dict) else v for v in curve.values()]
    return x, np.array(y)


def exponent(curve):
    """How seconds grow at the end of the curve."""
    x, y = points_of(curve)
    return np.polyfit(np.log(x[-3:]), np.log(y[-3:]), 1)[0]


def association(found):
    """Materialised / thin, one table a backend."""
    parts = []
    for backend, title in NAMES.items():
        shapes = found.get(("association", backend))
        if shapes is None:
            continue
        ranks = list(next(iter(next(iter(shapes.values())).values())))
        rows = [
            [shape, tokens, *(f"{value:.2f}" for value in row.values())]
            for shape, by_tokens in shapes.items()
            for tokens, row in by_tokens.items()
        ]
        header = [
            f"{title}: kernel",
            "tokens",
            *(f"rank {rank}" for rank in ranks),
        ]
        parts.append(markdown([header, *rows]))
    if not parts:
        return ""
    return (
        "Seconds of forward and backward pass with the materialised kernel, as "
        "a part of those with thin products.\n\n" + "\n\n".join(parts)
    )


def plot(growth):
    """One panel a curve, one line a backend."""
    figure, axes = plots.subplots(2, 3, size=(11, 6.5))
    for axis, (curve, x_name, _) in zip(axes.flat, CURVES):
        for color, backend in enumerate(NAMES):
            if curve not in growth.get(backend, {}):
                continue
            points = growth[backend][curve]
            x, y = points_of(points)
            style = {"color": f"C{color}", "marker": "."}
            axis.plot(x, y, label=NAMES[backend], **style)
            if re.match("step", curve):
                floor = [v["floor"] for v in points.values()]
                label = f"{NAMES[backend]}, floor"
                axis.plot(x, floor, ":", label=label, **style)
        axis.set(
            title=curve,
            xlabel=x_name,
            ylabel="seconds",
            xscale="log",
            yscale="log",
        )
        axis.set_xticks(x, [f"{n:,}" for n in x], minor=False)
        axis.minorticks_off()
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(alpha=0.3)
    axes.flat[0].set_ylim(bottom=0.5 * min(axes.flat[0].get_ylim()))
    axes.flat[0].legend(fontsize=8, ncols=2)
    plots.save(figure, PICTURE)


if __name__ == "__main__":
    main()
