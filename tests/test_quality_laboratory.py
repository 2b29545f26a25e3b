"""How the laboratory chooses learning rates: no figure is better than that.

And whether the figures of the documentation are those of its results.
"""

import argparse
import pathlib

import pytest

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[1]
CELL = ("digits", "lora", 4)


@pytest.fixture(scope="module")
def run():
    from benchmarks.quality import run

    return run


@pytest.fixture(scope="module")
def report():
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    from benchmarks.quality import report

    return report


@pytest.fixture(scope="module")
def tasks(report):
    """The chosen runs of each task that the documentation shows."""
    return {
        task: report.chosen_runs(report.read(report.RESULTS / f"{task}.jsonl"))
        for task in (*report.pages.TITLES, *report.pages.LONG_CURVES)
    }


def results(**losses):
    """Records of two seeds, from validation losses by learning rate."""
    return {
        (*CELL, float(rate), seed): {"validation_loss": loss + 0.1 * seed}
        for rate, loss in losses.items()
        for seed in range(2)
    }


def next_rates(run, done, seeds=5):
    arguments = argparse.Namespace(rates=None, seeds=seeds)
    jobs = run.missing(done, [CELL], arguments)
    return sorted({(job[3], job[4]) for job in jobs})


def test_a_cell_starts_with_three_half_decades_and_two_seeds(run):
    expected = [(r, s) for r in (0.001, 0.003, 0.01) for s in (0, 1)]
    assert next_rates(run, {}) == expected


def test_a_best_rate_on_the_edge_extends_the_grid(run):
    done = results(**{"0.001": 0.5, "0.003": 0.4, "0.01": 0.3})
    assert next_rates(run, done) == [(0.03, 0), (0.03, 1)]
    done = results(**{"0.001": 0.2, "0.003": 0.4, "0.01": 0.3})
    assert next_rates(run, done) == [(0.0003, 0), (0.0003, 1)]


def test_the_other_seeds_run_at_the_best_rate(run):
    done = results(**{"0.001": 0.5, "0.003": 0.3, "0.01": 0.4})
    assert next_rates(run, done) == [(0.003, 2), (0.003, 3), (0.003, 4)]
    done |= {(*CELL, 0.003, s): {"validation_loss": 0.3} for s in (2, 3, 4)}
    assert next_rates(run, done) == []


def test_seeds_that_did_not_choose_do_not_count(run):
    done = results(**{"0.001": 0.5, "0.003": 0.3, "0.01": 0.4})
    done[(*CELL, 0.01, 2)] = {"validation_loss": 0.0}
    assert run.best_rate(done, CELL) == 0.003


def test_another_rank_starts_around_its_neighbours_best(run):
    done = results(**{"0.001": 0.5, "0.003": 0.4, "0.01": 0.3, "0.03": 0.4})
    arguments = argparse.Namespace(rates=None, seeds=2)
    jobs = run.missing(done, [("digits", "lora", 8)], arguments)
    assert sorted({job[3] for job in jobs}) == [0.003, 0.01, 0.03]


def test_the_documentation_shows_the_results(report, tasks):
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    done = {path.stem: report.read(path) for path in results_of(report)}
    assert report.pages.figures(tasks, done) in page
    assert report.pages.curve(tasks) in page
    better, level, worse = report.pages.verdicts(tasks, done).values()
    count = f"better in {better} of the {better + level + worse} rows, level in"
    assert f"{count} {level} and worse in {worse}." in " ".join(page.split())


def test_the_documentation_shows_the_long_runs_and_the_prototypes(report):
    done = {path.stem: report.read(path) for path in results_of(report)}
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert report.pages.long_runs(done) in page
    assert report.pages.prototypes(done) in page
    assert report.pages.paces(done) in page
    assert report.pages.predictions(done) in page
    assert report.pages.by_rank(done) in page
    assert report.pages.labels(done) in page
    assert report.pages.noise(done) in page
    assert report.pages.quarters(done) in page
    assert report.pages.repeated(done) in page


def results_of(report):
    return sorted(report.RESULTS.glob("*.jsonl"))


@pytest.mark.parametrize(
    "method, title",
    [
        ("pissa", "PiSSA"),
        ("adalora_like", "AdaLoRA-like pruning"),
        ("rslora", "rsLoRA"),
        ("paper", 'SRLoRA, `"paper"`'),
        ("lora_restarts", 'SRLoRA, `"lora_restarts"`'),
    ],
)
def test_the_comparison_counts_the_cells(method, title, report, tasks):
    _, rows = report.summary(tasks).split("|---" * 6 + "|")
    row = next(x for x in rows.splitlines() if f"`{method}` | `lora`" in x)
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    counts = " | ".join(cell.strip() for cell in row.split("|")[3:7])
    assert f"| {title} | {counts} |" in page
