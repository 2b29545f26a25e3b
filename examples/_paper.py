"""The code that the scripts of the paper's experiments share.

A script defines a function that makes a task, and the rows of its table.
"""

import _compare
import _outcome


def make_parser(description, methods, **defaults):
    """The command line of `_compare`, with `--offline`."""
    parser = _compare.make_parser(
        description,
        methods,
        recipe="paper",
        train_examples=0,
        validation_examples=0,
        **defaults,
    )
    parser.add_argument(
        "--offline", action="store_true", help="local data, no download"
    )
    return parser


def run(names, make_task, args):
    """Trains each method on each task; returns `{(name, method): Run}`."""
    runs = {}
    for name in names:
        task = make_task(name)
        print(f"\n=== {_compare.sizes(task)}", flush=True)
        for method in args.method:
            result, _, model = _compare.run(method, task, args)
            if method == "srlora":
                _, validation = _compare.make_batches(task, args)
                _compare.merge_and_check(model, validation)
            runs[name, method] = result
        of_task = [runs[name, method] for method in args.method]
        _outcome.show(of_task)
        _outcome.save(of_task, task.title, f"{args.output}/{name}")
    return runs


def report(rows, note, args):
    """Prints and saves the table in the paper's layout, with a note on it."""
    outcome = f"{_outcome.table(rows)}\n\n{note}"
    print(f"\n=== The table of the paper\n\n{outcome}")
    _outcome.save_text(outcome, args.output)
