"""The tables of the documentation, from the results."""

import numpy as np

from benchmarks.quality.comparison import FEWEST_SEEDS
from benchmarks.quality.comparison import VERDICTS
from benchmarks.quality.comparison import at_rate
from benchmarks.quality.comparison import differences
from benchmarks.quality.comparison import gap_of_means
from benchmarks.quality.comparison import method_of
from benchmarks.quality.comparison import test_loss
from benchmarks.quality.comparison import verdict
from benchmarks.quality.records import best_rate
from benchmarks.shared.tables import markdown

TITLES = {
    "teacher_rank_48": "teacher, flat update of rank 48",
    "teacher_rank_12": "teacher, flat update of rank 12",
    "teacher_rank_4": "teacher, flat update of rank 4",
    "teacher_power_law": "teacher, power law",
    "autoencoder_digits": "autoencoder, clothes to digits",
    "digits": "MLP, clothes to digits",
    "vit_digits": "ViT, clothes to digits",
    "bbc": "MiniLM, BBC News",
    "newsgroups": "MiniLM, newsgroups",
    "rotten_tomatoes": "MiniLM, Rotten Tomatoes",
    "masked_newsgroups": "MiniLM, masked tokens of newsgroups",
}
HEADINGS = {
    "lora": "LoRA",
    "lora_4r": "LoRA, 4 × rank",
    "pissa": "PiSSA",
    "paper": "`paper`",
    "lora_restarts": "`lora_restarts`",
    "flat_loss": "behind a gate",
}
CURVE = (1, 2, 4, 8, 16, 32, 64)
LONG_CURVES = ("code_small", "code_6000_small", "posts_small", "imdb")
# Long runs with plenty of data, the default at LoRA's own best learning rate.
LONG = {
    "code": "GPT 96 wide, source code, 2,000 steps",
    "code_small": "GPT, source code, 2,000 steps",
    "code_small_8e": "GPT, an eighth of the text, 8 epochs",
    "code_6000_small": "GPT, source code, 6,000 steps",
    "posts_small": "GPT, newsgroups, 2,000 steps",
    "reviews_small": "GPT, more film reviews, 2,000 steps",
    "smollm2": "SmolLM2, source code, 1,200 steps",
    "smollm2_reviews": "SmolLM2, reviews to source code, 1,200 steps",
    "autoencoder_digits": "autoencoder, 1,488 steps",
    "teacher_power_law": "teacher, power law, 1,500 steps",
    "teacher_rank_48": "teacher of rank 48, 1,500 steps",
    "vit_clothes": "ViT, clothes, 3,560 steps",
    "imdb": "MiniLM, IMDB, 1,250 steps",
}
DEFAULT = "adaptive"
# Runs that have fewer than a million predictions, or than 1,000 steps.
SHORT = (
    "digits",
    "vit_digits",
    "bbc",
    "newsgroups",
    "rotten_tomatoes",
    "masked_newsgroups",
)
# The same model at batches of other sizes: task, title, predictions of a step,
# steps, and the method that the default was at that time, and its rate.
RESTARTS = "x:life={},stop=.85,slots=mean,q=1"
PREDICTIONS = (
    ("code_small_1", "GPT", 64, 2000, RESTARTS.format(200), 0.01),
    ("code_small_2", "GPT", 128, 2000, RESTARTS.format(200), 0.01),
    ("code_small_4", "GPT", 256, 2000, RESTARTS.format(200), 0.01),
    ("code_small", "GPT", 1024, 2000, "adaptive_shared", 0.03),
    ("code_small_8e", "GPT, 8 epochs", 1024, 2000, RESTARTS.format(200), 0.03),
    ("code_small_1_16000", "GPT", 64, 16_000, RESTARTS.format(1600), 0.01),
    (
        "vit_clothes",
        "ViT",
        64,
        3560,
        "x:life=356,stop=.85,slots=scaled",
        0.01,
    ),
)
# Labels of few classes: task, title, classes, steps.
LABELS = (
    ("code_classes_256", "GPT, source code", 256, 2000),
    ("code_classes_16", "GPT, source code", 16, 2000),
    ("code_classes_4", "GPT, source code", 4, 2000),
    ("code_classes_2", "GPT, source code", 2, 2000),
    ("code_classes_2_8000", "GPT, source code", 2, 8000),
    ("replaced_tokens", "MiniLM, replaced tokens", 2, 1250),
)
# Targets with so many times the variance that is to be learnt, as noise.
NOISES = (1, 10, 100)
# Short runs at several ranks: task, steps, rank, method, LoRA's best rate.
RANKS = (
    ("code_small_1000", 1000, 2, "adaptive", 0.03),
    ("code_small_1000", 1000, 4, "adaptive", 0.03),
    ("code_small_1000", 1000, 8, "adaptive_any", 0.01),
    ("code_small", 2000, 2, "adaptive", 0.03),
    ("code_small", 2000, 4, "adaptive", 0.03),
    ("code_small", 2000, 8, "adaptive", 0.01),
)
# Long runs, and those of a quarter of their steps: task, that of the quarter,
# title, steps.
QUARTERS = (
    ("code_small", "code_small_500", "GPT, source code", 2000),
    ("code_6000_small", "code_small_1500", "GPT, source code", 6000),
    ("posts_small", "posts_small_500", "GPT, newsgroups", 2000),
)
# Small data sets, many epochs: task, title, predictions of an epoch, epochs,
# rank, method, rate.
ANY = "adaptive_any"
REPEATED = (
    ("code_small_8e", "GPT", 256_000, 8, 2, "adaptive", 0.03),
    ("code_small_8e", "GPT", 256_000, 8, 8, "adaptive", 0.01),
    ("code_small_1_18e", "GPT", 56_832, 18, 2, ANY, 0.01),
    ("vit_clothes_18e", "ViT", 56_960, 18, 2, ANY, 0.01),
    ("autoencoder_1024", "autoencoder", 802_816, 94, 2, ANY, 0.01),
    ("autoencoder_256", "autoencoder", 200_704, 375, 2, ANY, 0.003),
    ("segmentation_512", "segmentation", 401_408, 188, 2, ANY, 0.003),
    ("segmentation_512", "segmentation", 401_408, 188, 8, ANY, 0.001),
    ("segmentation_256", "segmentation", 200_704, 375, 2, ANY, 0.003),
    ("segmentation_256", "segmentation", 200_704, 375, 8, ANY, 0.001),
)
# Task, rank, rate: LoRA's best rates, and one below that of the GPT.
PROTOTYPED = (
    ("code_small", 2, 0.03, "GPT at 3e-2"),
    ("code_small", 2, 0.01, "GPT at 1e-2"),
    ("vit_clothes", 2, 0.01, "ViT at 1e-2"),
    ("autoencoder_digits", 2, 0.03, "autoencoder at 3e-2"),
    ("autoencoder_digits", 4, 0.03, "the same at rank 4"),
    ("digits", 2, 0.03, "MLP at 3e-2"),
    ("smollm2", 2, 0.01, "SmolLM2 at 1e-2"),
)
# Task, title, rank, rate; then the prototypes and what they are.
PACED = (
    ("code_small", "GPT, source code", 1, 0.03),
    ("code_small", "GPT, source code", 2, 0.03),
    ("code_small", "GPT, source code", 8, 0.01),
    ("code_6000_small", "GPT, source code, 6,000 steps", 2, 0.03),
    ("posts_small", "GPT, newsgroups", 2, 0.01),
    ("smollm2", "SmolLM2, source code", 2, 0.03),
    ("autoencoder_digits", "autoencoder", 2, 0.03),
    ("autoencoder_digits", "autoencoder", 8, 0.01),
    ("teacher_power_law", "teacher, power law", 2, 0.003),
    ("teacher_power_law", "teacher, power law", 8, 0.01),
    ("teacher_rank_4", "teacher of rank 4", 4, 0.01),
    ("teacher_noise_10", "teacher, noise 10", 8, 0.003),
)
PACES = {
    "x:life=200,stop=.85,stagger=6,clock=2": "as a new optimizer",
    "x:life=200,stop=.85,stagger=6,factor=.5": "half",
    "x:life=150,stop=.85,stagger=6,factor=.5": "half, 150 steps",
    "x:life=125,stop=.85,stagger=6,factor=.5": "half, 125 steps",
    "x:life=125,stop=.85,stagger=6,factor=.3333": "a third, 125 steps",
}
LONG_METHODS = ("lora", "lora_4r", "paper", "lora_restarts")


def figures(tasks, done):
    """Of each task and rank, the test losses, and what became of the default.

    Where a method has too few seeds, none.
    """
    rows = [["task", "rank", *HEADINGS.values(), "default", "to LoRA"]]
    for task, title in TITLES.items():
        cells = tasks[task]
        for rank in ranks_of(cells):
            found = [method_of(cells, rank, method) for method in HEADINGS]
            default = default_runs(cells, done[task], task, rank)
            to_lora = verdict_on_default(cells, done[task], task, rank)
            to_lora = f"**{to_lora}**" if to_lora != "level" else to_lora
            losses = [*map(shown, found), shown(default)]
            rows.append([title, rank, *losses, to_lora])
            title = ""
    return markdown(rows)


def ranks_of(cells):
    """The ranks at which all methods were run."""
    return sorted(rank for rank, method in cells if method == "flat_loss")


def default_runs(cells, runs, task, rank):
    """`{seed: record}` of the default, at LoRA's own best learning rate.

    Where it was not run it is LoRA: the runs of that task have too few steps or
    predictions.
    """
    lora = cells[rank, "lora"]
    (rate,) = {record["rate"] for record in lora.values()}
    found = at_rate(runs, task, DEFAULT, rank, rate)
    return found or (lora if task in SHORT else {})


def verdict_on_default(cells, runs, task, rank):
    """Better or worse than LoRA, by the 95 % interval; else level."""
    default, lora = default_runs(cells, runs, task, rank), cells[rank, "lora"]
    return "level" if default is lora else verdict(differences(default, lora))


def verdicts(tasks, done):
    """In how many cells the default is better than LoRA, level, and worse."""
    found = [
        verdict_on_default(tasks[task], done[task], task, rank)
        for task in TITLES
        for rank in ranks_of(tasks[task])
    ]
    return {name: found.count(name) for name in VERDICTS}


def prototypes(done):
    """One row a prototype, one column a task at one rate; the first seed."""
    methods = ["lora", "lora_4r"]
    for task, rank, rate, _ in PROTOTYPED:
        methods += [
            method
            for _, method, r, lr, _ in done[task]
            if method.startswith("x:")
            and method not in PACES
            and (r, lr) == (rank, rate)
        ]
    rows = [["method", *(title for *_, title in PROTOTYPED)]]
    for method in dict.fromkeys(methods):
        row = [
            of_first_seed(done, task, method, rank, rate, ".4f")
            for task, rank, rate, _ in PROTOTYPED
        ]
        rows.append([described(method), *row])
    return markdown(rows)


def paces(done):
    """What the steps of new pairs do; the first seed."""
    rows = [["task", "rank", *PACES.values()]]
    for task, title, rank, rate in PACED:
        row = [
            of_first_seed(done, task, method, rank, rate, ".5g")
            for method in PACES
        ]
        rows.append([title, rank, *row])
    return markdown(rows)


def of_first_seed(done, task, method, rank, rate, digits):
    """The test loss of a run, or a dash."""
    found = at_rate(done.get(task, {}), task, method, rank, rate)
    return f"{found[0]['test_loss']:{digits}}" if 0 in found else "–"


def described(method):
    """A method's name in words; what is not said is a prototype's default."""
    if not method.startswith("x:"):
        return HEADINGS[method]
    return f"`{method.removeprefix('x:').replace(',', ' ')}`"


def long_runs(done):
    """The default at LoRA's best rate: losses, and the part of the gap.

    The gap is that to LoRA of four times the rank; that and all other methods
    are at their own best rates. The last column has the number of seeds.
    """
    header = ["task", "rank", "rate", *(HEADINGS[x] for x in LONG_METHODS)]
    rows = [[*header, "default", "of the gap", "seeds"]]
    for task, title in LONG.items():
        runs = done.get(task, {})
        for rank in sorted({key[2] for key in runs if key[1] == DEFAULT}):
            rate, default = at_loras_rate(runs, task, DEFAULT, rank)
            if not default:
                continue
            lora, quadruple, *others = (
                at_best_rate(runs, task, method, rank)
                for method in LONG_METHODS
            )
            # Of the same seeds, or their differences say nothing.
            cells = [
                {seed: x[seed] for seed in default if seed in x}
                for x in (lora, quadruple, *others, default)
            ]
            losses = map(loss_or_dash, cells)
            closed = gap_of_means(cells[0], default, cells[1])
            row = [title, rank, f"{rate:g}", *losses, closed, len(default)]
            rows.append(row)
            title = ""
    return markdown(rows)


def at_loras_rate(runs, task, method, rank):
    """LoRA's best rate, and `{seed: record}` of a method at that rate."""
    rate = best_rate(runs, (task, "lora", rank))
    return rate, at_rate(runs, task, method, rank, rate)


def at_best_rate(runs, task, method, rank):
    """`{seed: record}` of a method at its own best rate."""
    if method == "lora_4r" and not any(key[1] == method for key in runs):
        method, rank = "lora", 4 * rank
    if not any(key[1:3] == (method, rank) for key in runs):
        return {}
    best = best_rate(runs, (task, method, rank))
    return at_rate(runs, task, method, rank, best)


def predictions(done):
    """What restarts gain or cost, by the number of predictions; one seed."""
    header = ["predictions a step", "steps", "LoRA", "with restarts", "change"]
    rows = [["task", *header]]
    for task, title, count, steps, method, rate in PREDICTIONS:
        losses = with_and_without(done, task, method, 2, rate)
        rows.append([title, f"{count:,}", f"{steps:,}", *losses])
    return markdown(rows)


def labels(done):
    """What restarts gain or cost, by the classes of a label; rank 2.

    At LoRA's best learning rate; LoRA of four times the rank at its own.
    """
    header = ["classes", "steps", "LoRA", "LoRA, 4 × rank", "with restarts"]
    rows = [["task", *header, "change", "default", "seeds"]]
    for task, title, classes, steps in LABELS:
        runs = done.get(task, {})
        _, lora = at_loras_rate(runs, task, "lora", 2)
        _, restarts = at_loras_rate(runs, task, "adaptive_steps", 2)
        _, default = at_loras_rate(runs, task, DEFAULT, 2)
        lora = {seed: lora[seed] for seed in restarts}
        quadruple = at_best_rate(runs, task, "lora_4r", 2)
        losses = map(loss_or_dash, (lora, quadruple, restarts))
        changed = change(test_loss(lora), test_loss(restarts))
        cell = [title, classes, f"{steps:,}", *losses, changed]
        rows.append([*cell, loss_or_dash(default or lora), len(restarts)])
    return markdown(rows)


def noise(done):
    """What restarts gain or cost, by the noise of a regression's targets."""
    header = ["noise", "rank", "LoRA", "LoRA, 4 × rank", "default", "change"]
    rows = [[*header, "seeds"]]
    for variance in NOISES:
        task = f"teacher_noise_{variance}"
        for rank in (2, 8):
            runs = done.get(task, {})
            _, lora = at_loras_rate(runs, task, "lora", rank)
            _, default = at_loras_rate(runs, task, DEFAULT, rank)
            cells = lora, at_best_rate(runs, task, "lora_4r", rank), default
            changed = change(test_loss(lora), test_loss(default))
            cell = [variance, rank, *map(loss_or_dash, cells), changed]
            rows.append([*cell, len(default)])
    return markdown(rows)


def by_rank(done):
    """What restarts gain or cost, by the rank; one seed."""
    rows = [["steps", "rank", "LoRA", "with restarts", "change"]]
    for task, steps, rank, method, rate in RANKS:
        losses = with_and_without(done, task, method, rank, rate)
        rows.append([f"{steps:,}", rank, *losses])
    return markdown(rows)


def quarters(done):
    """The default, and LoRA of four times the rank in a quarter of its steps.

    The long runs are those of the table of long runs; the quarter has one seed.
    """
    header = ["steps", "rank", "LoRA", "default"]
    rows = [["task", *header, "LoRA, 4 × rank, in a quarter of the steps"]]
    for task, quarter, title, steps in QUARTERS:
        runs = done.get(task, {})
        for rank in sorted({key[2] for key in runs if key[1] == DEFAULT}):
            short = at_best_rate(
                done.get(quarter, {}), quarter, "lora_4r", rank
            )
            if short:
                _, default = at_loras_rate(runs, task, DEFAULT, rank)
                _, lora = at_loras_rate(runs, task, "lora", rank)
                lora = {seed: lora[seed] for seed in default}
                losses = [f"{test_loss(x):.4f}" for x in (lora, default, short)]
                rows.append([title, f"{steps:,}", rank, *losses])
    return markdown(rows)


def with_and_without(done, task, method, rank, rate):
    """Test losses of LoRA and of a method, and the change; the first seed."""
    lora, restarts = (
        at_rate(done[task], task, name, rank, rate)[0]["test_loss"]
        for name in ("lora", method)
    )
    return [f"{lora:.4f}", f"{restarts:.4f}", change(lora, restarts)]


def change(lora, loss):
    """By how much a test loss differs from LoRA's, for a table."""
    return f"{100 * (loss / lora - 1):+.1f} %"


def loss_or_dash(runs):
    """The mean test loss of any number of runs; a dash for none."""
    return f"{test_loss(runs):.4f}" if runs else "–"


def repeated(done):
    """Losses where the same examples come in many epochs."""
    losses = [
        f"{name}, {part}"
        for name in ("LoRA", "with restarts")
        for part in ("training", "test")
    ]
    header = ["task", "predictions an epoch", "epochs", "rank"]
    rows = [[*header, *losses, "seeds"]]
    for task, title, count, epochs, rank, method, rate in REPEATED:
        lora, restarts = (
            at_rate(done.get(task, {}), task, name, rank, rate)
            for name in ("lora", method)
        )
        seeds = lora.keys() & restarts.keys()
        means = [
            f"{np.mean([runs[seed][part] for seed in seeds]):.4f}"
            for runs in (lora, restarts)
            for part in ("train_loss", "test_loss")
        ]
        cell = [title, f"{count:,}", epochs, rank]
        rows.append([*cell, *means, len(seeds)])
    return markdown(rows)


def curve(tasks):
    """How LoRA's test loss depends on its rank."""
    rows = [["task", *CURVE]]
    for task, title in TITLES.items():
        found = [method_of(tasks[task], rank, "lora") for rank in CURVE]
        rows.append([title, *map(shown, found)])
    for task in LONG_CURVES:
        found = [method_of(tasks[task], rank, "lora") for rank in CURVE]
        rows.append([LONG[task], *map(loss_or_dash, found)])
    return markdown(rows)


def shown(runs):
    """The test loss for a table; a dash for too few seeds."""
    enough = runs and len(runs) >= FEWEST_SEEDS
    return loss_or_dash(runs if enough else None)
