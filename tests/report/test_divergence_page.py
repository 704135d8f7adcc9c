"""Held-out divergences stand in the page of a run, in a sweep's table and beside another run."""

import json

import pytest
from test_report import BARE, config, read, row, write_point, write_run

from opdjax.report.page import write_report
from opdjax.report.table import table
from opdjax.report.text import plus_minus
from opdjax.runs.results import DIVERGENCES
from opdjax.runs.statistics import paired_ratios, seed_interval

OWN = "on the student's answers"


def measured(step, kl):
    """A row of divergence.jsonl; on the teacher's answers, all is 1 more."""
    means = {name: kl + at / 8 for at, name in enumerate(DIVERGENCES)}
    halves = {f"{name}_interval": 0.0313 for name in DIVERGENCES}
    found = {"step": step, "temperature": 0.7, "num_prompts": 3, "n": 2}
    for writer, more in (("student", 0), ("teacher", 1)):
        sums = [[round((kl + more + at / 8) * 10, 5), 10] for at in (-1, 0, 1)]
        found[writer] = {name: value + more for name, value in means.items()} | halves
        found[writer]["per_prompt"] = sums
    return found


def measure(directory, *after, finished=True):
    """Gives a run the divergences 1.0 at step 0 and `after` at steps 3, 6 and so on."""
    rows = [measured(3 * at, kl) for at, kl in enumerate((1.0, *after))]
    (directory / "divergence.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    if finished:
        file = directory / "result.json"
        both = {"divergence_before": rows[0], "divergence_after": rows[-1]}
        file.write_text(json.dumps(json.loads(file.read_text()) | both))
    return directory


def test_a_run_shows_its_divergences_first_and_last_and_over_steps(tmp_path):
    parser = read(measure(write_run(tmp_path / "run", **BARE), 0.75, 0.5))
    text = "KL(student || teacher) on held-out prompts went from 1.000 ± 0.031 to 0.500 ± 0.031"
    assert f"{text} nats a token (step 6);" in parser.all
    cells = lambda kl: [f"{kl + at / 8:.3f} ± 0.031" for at in range(len(DIVERGENCES))]
    assert row(parser, OWN, "0")[2:] == cells(1.0)
    assert row(parser, OWN, "6")[2:] == cells(0.5)
    assert row(parser, "on the teacher's answers", "6")[2:] == cells(1.5)
    charts = [attributes.get("aria-label") for name, attributes in parser.tags if name == "svg"]
    for name, unit in (("KL(S || T)", "nats a token"), ("same top", "share of the tokens")):
        assert f"{name}: {unit} against step" in charts
    facts = json.loads(write_report(tmp_path / "run", as_json=True).read_text())
    assert [each["student"]["reverse_kl"] for each in facts["divergences"]] == [1.0, 0.75, 0.5]
    assert "per_prompt" not in facts["divergences"][0]["student"]


@pytest.mark.usefixtures("words_alone")
def test_a_run_before_its_second_measurement(tmp_path):
    parser = read(measure(write_run(tmp_path / "run", finished=False, **BARE), finished=False))
    assert "on held-out prompts was 1.000 ± 0.031 nats a token (step 0)" in parser.all
    assert [cells[1] for cells in parser.rows if cells[0] == OWN] == ["0"]


@pytest.mark.usefixtures("words_alone")
def test_a_sweep_has_the_means_over_seeds_and_the_paired_change(tmp_path):
    ends = {"vopd": (0.5, 0.6), "opd": (0.7, 0.7)}
    for recipe, values in ends.items():
        for seed, kl in enumerate(values):
            point = write_point(tmp_path, config(recipe, seed=seed), recipe=recipe, seed=seed)
            (point / "eval.jsonl").unlink()
            (point / "result.json").write_text(json.dumps({"num_steps": 3, "student": "s"}))
            measure(point, kl)
    found = {each["overrides"]["recipe"]: each for each in json.loads(table(tmp_path, "json"))}
    for recipe, values in ends.items():
        numbers = found[recipe]["values"]
        assert numbers["KL(S || T)"] == pytest.approx(seed_interval(values))
        change = seed_interval([kl - 1.0 for kl in values])
        assert numbers["change in KL(S || T)"] == pytest.approx(change)
        of_teacher = seed_interval([kl + 1.375 for kl in values])
        assert numbers["same top, T's answers"] == pytest.approx(of_teacher)
    printed = table(tmp_path)
    assert "nats a token, and same top" in printed
    assert f"{plus_minus(*seed_interval(ends['vopd']))} |" in printed
    page = read(tmp_path)
    at = next(cells for cells in page.rows if "KL(S || T)" in cells).index("KL(S || T)")
    shown = [cells[at] for cells in page.rows if cells[0] in ends and len(cells) > at]
    assert shown == [plus_minus(*seed_interval(ends[name])) for name in ("vopd", "opd")]


def test_two_runs_are_compared_on_the_prompts_that_they_share(tmp_path):
    one, two = (measure(write_run(tmp_path / f"{kl}", **BARE), kl) for kl in (0.5, 0.75))
    page = read(one, against=two, output=tmp_path / "page.html")
    name = "KL(S || T) after training, student's answers"
    pairs = [measured(3, kl)["student"]["per_prompt"] for kl in (0.5, 0.75)]
    difference = plus_minus(*paired_ratios(*pairs), signed=True)
    assert row(page, name)[1:] == ["0.500 ± 0.031", "0.750 ± 0.031", difference]
    described = json.loads((two / "config.json").read_text())
    described["config"]["evaluation"]["source"] = "elsewhere.jsonl"
    (two / "config.json").write_text(json.dumps(described))
    page = read(one, against=two, output=tmp_path / "page.html")
    assert row(page, name)[1:] == ["0.500 ± 0.031", "0.750 ± 0.031", ""]
