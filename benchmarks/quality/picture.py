"""Makes the picture of the README: LoRA, LoRA of four times the rank, SRLoRA.

    KERAS_BACKEND=jax python -m benchmarks.quality.picture

A byte-level language model that was pretrained on film reviews learns source
code (`tasks/language.py`). Trains what is missing of `picture.json` beside the
results, some minutes a curve, then draws the losses against steps and writes
what each model makes of the beginning of a line into `picture.md`. With
`--again` it trains all curves anew.
"""

import argparse
import json

import keras
import numpy as np

from benchmarks.quality import job
from benchmarks.quality import methods
from benchmarks.quality.records import RESULTS
from benchmarks.shared import plots
from benchmarks.shared.tables import markdown

DOCS = RESULTS.parents[2] / "docs"
# Of the validation loss: so many points, of so many examples each.
POINTS, EXAMPLES = 20, 256
PROMPTS = ("    def __init__(self, ", "import ", "    if not isinstance(")
LENGTH, TEMPERATURE = 60, 0.5
DEFAULT = "adaptive"


def main():
    """Trains what is missing, draws, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="code_6000_small")
    parser.add_argument("--rank", type=int, default=2)
    # The best of a grid of half decades, of either rank of LoRA.
    parser.add_argument("--rate", type=float, default=3e-2)
    parser.add_argument("--large-rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    path = RESULTS / "picture.json"
    keep = path.exists() and not args.again
    found = json.loads(path.read_text()) if keep else {}
    curves = found.setdefault(f"{args.task}-{args.rank}-{args.rate:g}", {})
    for method, rank, rate in (
        ("lora", args.rank, args.rate),
        ("lora", 4 * args.rank, args.large_rate),
        (DEFAULT, args.rank, args.rate),
    ):
        name = f"{method}-{rank}"
        if name not in curves:
            print(name, flush=True)
            curves[name] = train(method, rank, rate, args)
            path.write_text(json.dumps(found, indent=1) + "\n")
    if "pretrained" not in curves:
        model = job.load(args.task).build(0)
        curves["pretrained"] = {"texts": [text(model, p) for p in PROMPTS]}
        path.write_text(json.dumps(found, indent=1) + "\n")
    draw(curves, args)
    table = texts(curves, args)
    (RESULTS / "picture.md").write_text(table + "\n", encoding="utf-8")
    print(summary(curves, args))


def train(method, rank, rate, args):
    """The curves of a run, and what the model writes after it."""
    task = job.load(args.task)
    keras.utils.set_random_seed(args.seed)
    model = task.build(args.seed)
    callbacks = methods.METHODS[method](model, task.targets, rank)
    schedule = keras.optimizers.schedules.PolynomialDecay(
        rate, task.steps, end_learning_rate=0.0
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.01)
    model.compile(optimizer, task.loss)
    losses = job.StepLosses()
    x, y = task.splits["validation"]
    history = model.fit(
        Parts(task, args.seed),
        epochs=POINTS,
        verbose=0,
        callbacks=[losses, *callbacks],
        validation_data=(x[:EXAMPLES], y[:EXAMPLES]),
        validation_batch_size=EXAMPLES,
    )
    events = {event.step for c in callbacks for event in c.events}
    return {
        "parameters": sum(
            int(np.prod(v.shape)) for v in model.trainable_variables
        ),
        "steps": task.steps,
        "training": [
            round(float(part.mean()), 4)
            for part in np.array_split(losses.values, 5 * POINTS)
        ],
        "validation": [round(v, 4) for v in history.history["val_loss"]],
        "recompositions": sorted(events),
        "texts": [text(model, prompt) for prompt in PROMPTS],
    }


class Parts(job.ShuffledBatches):
    """The batches of a run in `POINTS` epochs, each with a part of them."""

    def __init__(self, task, seed):
        self.epoch = -1
        super().__init__(task, seed)
        passes = [self.random.permutation(self.order) for _ in range(8)]
        self.all = np.concatenate([self.order, *passes])

    def __len__(self):
        return self.task.steps // POINTS

    def __getitem__(self, index):
        self.order = self.all[self.epoch * len(self) * self.task.batch_size :]
        return super().__getitem__(index)

    def on_epoch_end(self):
        """Goes on to the next part."""
        if self.epoch < 0:
            super().on_epoch_end()
        self.epoch += 1


def text(model, prompt):
    """What the model continues a prompt with, a byte at a time."""
    random = np.random.default_rng(0)
    ids = list(prompt.encode())
    window = model.get_layer("backbone").max_sequence_length
    for _ in range(LENGTH):
        seen = ids[-window:]
        # Of one length, so that it is compiled once.
        padded = np.zeros((1, window), "int32")
        padded[0, : len(seen)] = seen
        logits = keras.ops.convert_to_numpy(model.predict_on_batch(padded))
        logits = logits[0, len(seen) - 1].astype("float64") / TEMPERATURE
        weights = np.exp(logits - logits.max())
        ids.append(int(random.choice(256, p=weights / weights.sum())))
    return bytes(ids[len(prompt.encode()) :]).decode("utf-8", "replace")


def legend(name, curve):
    """The method, its rank, and what it trains."""
    method, rank = name.rsplit("-", 1)
    title = {"lora": "LoRA", DEFAULT: "SRLoRA"}[method]
    return f"{title}, rank {rank}: {curve['parameters']:,} parameters"


def compared(args):
    """The names of the three runs."""
    small, large = f"lora-{args.rank}", f"lora-{4 * args.rank}"
    return [small, f"{DEFAULT}-{args.rank}", large]


def summary(curves, args):
    """What each run trains, and where it ends."""
    rows = [["", "parameters", "validation loss", "of the gap"]]
    names = compared(args)
    small, _, large = last = [curves[name]["validation"][-1] for name in names]
    for name, loss in zip(names, last):
        title, parameters = legend(name, curves[name]).split(": ")
        part = f"{(small - loss) / (small - large):.0%}"
        rows.append([title, parameters.split()[0], f"{loss:.3f}", part])
    return markdown(rows)


def draw(curves, args):
    """Validation loss thick, training loss thin, recompositions as dots."""
    names = compared(args)
    colors = dict(zip(names, ("C7", "C3", "C0")))
    figure, axes = plots.subplots(size=(6.4, 4.2))
    for name in names:
        curve = curves[name]
        color = colors[name]
        steps = np.linspace(0, curve["steps"], len(curve["training"]) + 1)
        axes.plot(
            (steps[1:] + steps[:-1]) / 2,
            curve["training"],
            color=color,
            linewidth=0.8,
            alpha=0.45,
        )
        steps = np.linspace(0, curve["steps"], len(curve["validation"]) + 1)
        axes.plot(
            steps[1:],
            curve["validation"],
            color=color,
            linewidth=2.4,
            label=legend(name, curve),
        )
        axes.annotate(
            f"{curve['validation'][-1]:.2f}",
            (curve["steps"], curve["validation"][-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontweight="bold",
        )
    last = [curves[name]["validation"] for name in names]
    axes.set_ylim(min(map(min, last)) - 0.06, max(x[0] for x in last) + 0.05)
    axes.set_xlabel("training steps")
    axes.set_ylabel("loss a byte")
    axes.set_title(
        "A language model of film reviews learns source code", loc="left"
    )
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, title="validation loss (thin: training loss)")
    plots.save(figure, DOCS / "language_model.png")


def texts(curves, args):
    """A row a prompt, a column a model."""
    names = ["pretrained", *compared(args)]
    header = ["pretrained"] + [
        legend(name, curves[name]).split(":")[0] for name in names[1:]
    ]
    rows = [["prompt", *header]]
    for index, prompt in enumerate(PROMPTS):
        cells = [curves[name]["texts"][index] for name in names]
        rows.append([as_code(cell) for cell in (prompt, *cells)])
    return markdown(rows)


def as_code(written):
    """For a cell of a table."""
    for old, new in (("|", "\\|"), ("\n", "⏎"), ("`", "'")):
        written = written.replace(old, new)
    return f"`{written}`"


if __name__ == "__main__":
    main()
