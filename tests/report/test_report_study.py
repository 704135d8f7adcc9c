"""The page of a study of papers: its numbers are those of compare(), and it copes with all that a
half-done study can hold.
"""

import json
import subprocess
import sys

import pytest
from test_report import (
    BARE,
    NASTY,
    config,
    evaluation,
    metric,
    read,
    row,
    write_run,
    write_sweep,
)

from opdjax.cli.sweeps import report
from opdjax.config import (
    MINI_TEACHER,
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    ModelConfig,
    NearPolicyConfig,
    OptimizerConfig,
    TrainConfig,
)
from opdjax.config.validation import to_dict
from opdjax.report.drawing import log_ticks
from opdjax.report.papers.compare import compare
from opdjax.report.papers.tables import paper_tables
from opdjax.report.sweep import label, sweep_facts
from opdjax.report.table import cells as cells_of
from opdjax.report.table import claims, counted
from opdjax.report.text import amount, plus_minus
from opdjax.runs.results import read_points
from opdjax.runs.statistics import seed_interval
from opdjax.runs.workdir import WorkdirError

SCORES = {"opd": (0.50, 0.51, 0.52), "vopd": (0.55, 0.56, 0.565), "full_kl": (0.60, 0.61, 0.605)}
ESTIMATORS = {
    "opd": EstimatorConfig("opd"),
    "vopd": EstimatorConfig("vopd", baseline="full"),
    "full_kl": EstimatorConfig("full_kl", divergence="reverse"),
}
ARITHMETIC = DataConfig(source="arithmetic:train", max_prompt_length=32)


def settings(arm="opd", seed=0, **changes):
    return Config(
        **{"estimator": ESTIMATORS.get(arm, ESTIMATORS["opd"]), "data": ARITHMETIC, "seed": seed}
        | changes
    )


def write_arm(directory, arm, seed, *, done=True, asked=None, **written):
    """A point of the study, as the runner leaves it."""
    asked = asked or settings(arm, seed)
    name = directory / f"pair=mini,arm={arm},seed={seed}"
    if done:
        write_run(
            name, asked, **{"after": SCORES.get(arm, SCORES["opd"])[seed], "samples": []} | written
        )
    name.mkdir(parents=True, exist_ok=True)
    point = {
        "id": name.name,
        "overrides": {"pair": "mini", "arm": arm, "seed": str(seed)},
        "config": to_dict(asked),
    }
    (name / "point.json").write_text(json.dumps(point))
    return name


def write_study(directory, **written):
    for arm in SCORES:
        for seed in range(3):
            write_arm(directory, arm, seed, done=(arm, seed) != ("full_kl", 2), **written)
    return directory


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    directory = write_study(tmp_path_factory.mktemp("study") / "study")
    return directory, read(directory)


# Papers


def test_the_numbers_of_a_table_are_those_of_compare(study):
    directory, page = study
    found = compare(paper_tables()["vopd_table1"], read_points(directory))
    for cells in cells_of(found)[1]:
        assert cells in page.rows
    assert row(page, "OPD", "29.8 [N]")[2] == "0.510 ± 0.025 (n=3)"
    assert "seed=2" in row(page, "OPD full", "")


def test_every_verdict_stands_in_the_overview_with_its_paired_difference(study):
    directory, page = study
    tables = [compare(table, read_points(directory)) for table in paper_tables().values()]
    verdicts = [
        (found.table.name, verdict)
        for found in tables
        if found.is_run
        for verdict in found.verdicts
    ]
    lines = page.rows[1 : len(verdicts) + 1]  # below the head of the first table
    assert len(verdicts) > 5
    for (name, verdict), (table, claim, *_, pairs, status, _, _) in zip(verdicts, lines):
        assert status.startswith(verdict.status)
        assert claim == f"{verdict.claim.text} [{verdict.claim.mark}]"
        assert (table, pairs) == (name, str(verdict.n))
    printed = claims([found for found in tables if found.is_run])[1]
    assert lines == [[*map(str, cells)] for cells in printed]
    # The study has no grids, and the same metrics in every arm.
    assert {verdict.status for _, verdict in verdicts} == {"not testable here", "not run"}
    assert counted([found for found in tables if found.is_run]) in page.all


@pytest.mark.usefixtures("words_alone")
def test_runs_of_two_configs_in_a_cell_are_told_and_not_averaged(tmp_path):
    write_study(tmp_path, **BARE)
    asked = settings(
        "opd", 0, data=DataConfig(source="arithmetic:train[:64]", max_prompt_length=32)
    )
    other = write_arm(tmp_path / "elsewhere", "opd", 0, asked=asked)
    other.rename(tmp_path / "twice")
    (tmp_path / "elsewhere").rmdir()
    point = json.loads((tmp_path / "twice" / "point.json").read_text())
    (tmp_path / "twice" / "point.json").write_text(json.dumps(point | {"id": "twice"}))
    page = read(tmp_path)
    assert "vopd_table1: its runs do not compare, so no number is shown." in page.all
    assert "fits runs of 2 configs" in page.all


@pytest.mark.usefixtures("words_alone")
def test_runs_of_several_commits_and_single_seeds_are_told(tmp_path):
    for arm in ("opd", "vopd"):
        directory = write_arm(tmp_path, arm, 0)
    described = json.loads((directory / "config.json").read_text())
    described["environment"]["commit"] = "deadbeef"
    (directory / "config.json").write_text(json.dumps(described))
    page = read(tmp_path)
    assert "The runs of this table are of several commits: c0ffee, deadbeef." in page.all
    assert "0.500 (n=1)" in page.all


@pytest.mark.usefixtures("words_alone")
def test_a_sweep_without_a_paper_has_no_such_section(tmp_path):
    source = read(write_sweep(tmp_path, seeds=(0,))).source
    assert 'id="claims"' not in source
    assert 'id="papers"' not in source


# Cost


@pytest.mark.usefixtures("words_alone")
def test_the_front_is_what_no_other_arm_beats_on_both(tmp_path):
    for arm, spent, score in (
        ("opd", 1.0, 0.5),
        ("vopd", 2.0, 0.6),
        ("full_kl", 3.0, 0.55),
        ("late", 4.0, 0.7),
    ):
        asked = settings(arm, 0, train=TrainConfig(num_steps=len(arm)))
        rows = [metric(step, **{"perf/generated_tokens": 100 * spent}) for step in range(1, 7)]
        write_arm(tmp_path, arm, 0, asked=asked, after=score, metrics=rows)
    facts = sweep_facts(read_points(tmp_path), "study")
    spent = {arm.name.split()[-1]: arm.costs["generated tokens"][0] for arm in facts["arms"]}
    assert spent == {"opd": 600.0, "vopd": 1200.0, "full_kl": 1800.0, "late": 2400.0}
    assert facts["fronts"]["generated tokens"] == ("opd", "vopd", "late")
    page = read(tmp_path)
    assert "On the front, the cheapest first: opd, vopd, late ." in page.all
    assert ["full_kl", "0.550 ± ∞", "1800 ± ∞", "1", ""] in page.rows


def test_equal_points_are_both_on_the_front(tmp_path):
    for arm in ("opd", "vopd"):
        write_arm(tmp_path, arm, 0, after=0.5, metrics=[])
    facts = sweep_facts(read_points(tmp_path), "study")
    assert facts["fronts"] == {"seconds": ("opd", "vopd")}


@pytest.mark.parametrize(("low", "high"), [(15.0, 220.0), (1e2, 1e9), (0.4, 2.6)])
def test_a_logarithmic_axis_has_a_few_round_ticks(low, high):
    found = log_ticks(low, high, 790)
    assert 2 <= len(found) <= 8
    assert all(low <= value <= high for value in found)


# Answers


def answered(score, text, is_right, step=6):
    given = {"prompt": f"1+1= {NASTY}", "answer": "2", "completion": text, "is_right": is_right}
    return evaluation(step, score) | {"answers": [given]}


def with_answers(directory, *rows):
    (directory / "eval.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))


def test_arms_answers_to_a_held_out_prompt_stand_side_by_side(tmp_path):
    for arm, text, is_right in (
        ("opd", f"1+1=3#3 {NASTY}", False),
        ("vopd", "1+1=2#2", True),
        ("full_kl", "1+1=2#2", True),
    ):
        with_answers(
            write_arm(tmp_path, arm, 0, metrics=[]),
            answered(0.4, "before", False, 0),
            answered(0.5, text, is_right),
        )
    page = read(tmp_path)
    assert row(page, "1+1=2#2")[1:] == ["✓ right", "full_kl, vopd"]
    assert row(page, f"1+1=3#3 {NASTY}")[1:] == ["✗ wrong", "opd"]
    assert "Right answer 2" in page.all
    assert page.source.count("<script") == 0


def test_a_run_shows_its_first_answers_beside_its_last(tmp_path):
    directory = write_run(tmp_path / "run", metrics=[])
    with_answers(
        directory,
        answered(0.4, "1+1=3#3", False, 0),
        answered(0.45, "1+1=1#1", False, 3),
        answered(0.5, "1+1=2#2", True, 6),
    )
    page = read(directory)
    assert row(page, "1+1=3#3")[1:] == ["✗ wrong", "step 0"]
    assert row(page, "1+1=2#2")[1:] == ["✓ right", "step 6"]
    assert "1+1=1#1" not in page.all
    assert 'id="answers"' not in read(write_run(tmp_path / "once", **BARE)).source


# Settings


def test_only_fields_in_which_arms_differ_are_listed_with_every_arms_value(study):
    page = study[1]
    assert row(page, "estimator.recipe")[1:] == ["full_kl: full_kl", "vopd: vopd; opd: opd"]
    assert row(page, "estimator.baseline")[1:] == ["none: full_kl, opd", "full: vopd"]
    assert row(page, "optimizer.b2") == ["optimizer.b2", "0.999"]


def test_two_runs_are_told_apart(tmp_path):
    one = write_run(tmp_path / "one", config("vopd"), after=0.6)
    two = write_run(tmp_path / "two", config("opd", rate=1e-4, seed=1), after=0.5)
    for directory, hits in ((one, [8, 8, 8, 4]), (two, [4, 4, 4, 4])):
        result = json.loads((directory / "result.json").read_text())
        result["eval_after"] |= {"per_prompt": hits}
        (directory / "result.json").write_text(json.dumps(result))
    described = json.loads((two / "config.json").read_text())
    described["environment"]["jax"], described["data"]["prompts"] = "0.11.0", "d9"
    (two / "config.json").write_text(json.dumps(described))
    page = read(one, against=two, output=tmp_path / "page.html")
    assert "They differ in 2 settings." in page.all
    assert row(page, "estimator.recipe") == ["estimator.recipe", "vopd", "opd"]
    assert row(page, "optimizer.learning_rate") == ["optimizer.learning_rate", "3e-4", "1e-4"]
    assert row(page, "jax") == ["jax", "0.10.2", "0.11.0"]
    assert row(page, "prompts") == ["prompts", "d1", "d9"]
    assert "The seed: 0 against 1." in page.all
    paired = plus_minus(*seed_interval([0.5, 0.5, 0.5, 0.0]), signed=True)
    assert row(page, "avg@k after training") == [
        "avg@k after training",
        "0.600 ± 0.021",
        "0.500 ± 0.021",
        paired,
    ]


def test_other_prompts_are_not_paired_and_unfinished_runs_are_told(tmp_path):
    one = write_run(tmp_path / "one", **BARE)
    two = write_run(tmp_path / "two", finished=False, **BARE)
    described = json.loads((two / "config.json").read_text())
    described["data"]["evaluation"] = "another"
    (two / "config.json").write_text(json.dumps(described))
    page = read(one, against=two, output=tmp_path / "page.html")
    assert "two is not finished" in page.all
    assert "their scores do not compare" in page.all
    with pytest.raises(WorkdirError, match="there is no directory"):
        read(one, against=tmp_path / "absent")
    with pytest.raises(WorkdirError, match=r"no config\.json"):
        read(one, against=tmp_path)


def test_a_run_without_an_evaluation_answered_no_other_prompts(tmp_path):
    one = write_run(tmp_path / "one", **BARE)
    two = write_run(tmp_path / "two", **BARE)
    described = json.loads((two / "config.json").read_text())
    del described["data"]["evaluation"]
    (two / "config.json").write_text(json.dumps(described))
    page = read(one, against=two, output=tmp_path / "page.html")
    assert "two had no evaluation: there are no scores to compare." in page.all
    assert "different prompts" not in page.all


@pytest.mark.usefixtures("words_alone")
def test_the_command_writes_each_page_under_a_name_of_its_own(study, tmp_path, capsys):
    directory, _ = study
    report([str(directory)])
    run, other = (directory / f"pair=mini,arm={arm},seed=0" for arm in ("opd", "vopd"))
    report([str(run), "--against", str(other)])
    out = capsys.readouterr().out
    assert f"wrote {directory / 'report.html'}" in out
    assert f"wrote {run / 'against-pair=mini,arm=vopd,seed=0.html'}" in out


def test_the_command_needs_no_jax():
    code = (
        "import sys, opdjax.cli.sweeps, opdjax.report.page; sys.exit(bool({'jax', 'flax', "
        "'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Judged arms, stale arms


@pytest.mark.usefixtures("words_alone")
def test_judged_arms_have_their_rewards_and_costs_side_by_side(tmp_path):
    for seed, reward in ((0, 0.5), (1, 0.7)):
        told = {
            "rubric/reward_mean": reward,
            "rubric/auc": 0.9,
            "rubric/tied_groups": 0.25,
            "rubric/no_signal_share": 0.5,
        }
        told |= {
            "rubric/failed_share": 0.0,
            "api/verifier/calls": 10.0,
            "api/rubricator/calls": 6.0,
            "api/verifier/dollars": 0.5,
        }
        told |= {"api/verifier/input_tokens": 1000.0, "api/verifier/output_tokens": 24.0}
        write_arm(
            tmp_path,
            "ropd",
            seed,
            asked=settings("full_kl", seed),
            metrics=[metric(step, **told) for step in range(1, 7)],
        )
        write_arm(tmp_path, "opd", seed)
    page = read(tmp_path)
    cells = row(page, "ropd", plus_minus(*seed_interval([0.5, 0.7])))
    assert cells[2:8] == [
        "0.900 ± 0.000",
        "0.250 ± 0.000",
        "0.000 ± 0.000",
        "16 ± 0",
        "1024 ± 0",
        "3 ± 0",
    ]


@pytest.mark.usefixtures("words_alone")
def test_arms_that_draw_ahead_have_their_staleness_side_by_side(tmp_path):
    ahead = NearPolicyConfig(schedule="continuous", max_staleness=4, filter="ifd")
    for seed in (0, 1):
        told = {
            "staleness/kl": 0.02 + 0.02 * seed,
            "staleness/mean": 2.0,
            "staleness/effective_sample_size": 0.8,
            "filter/keep_rate": 0.6,
        }
        rows = [metric(step, **told) for step in range(1, 7)]
        write_arm(
            tmp_path, "npd", seed, asked=settings("opd", seed, near_policy=ahead), metrics=rows
        )
    page = read(tmp_path)
    cells = row(page, "pair mini, npd", "2 ± 0")
    kl = amount(*seed_interval([0.02, 0.04]))
    assert cells[2:] == [kl, kl, "0.800 ± 0.000", "0.600 ± 0.000"]
    assert 'id="ahead"' in page.source


# What can be broken


def test_a_damaged_point_is_left_out_by_name_and_the_others_are_shown(tmp_path):
    write_study(tmp_path, **BARE)
    (tmp_path / "pair=mini,arm=opd,seed=1" / "result.json").write_text('{"torn": ')
    page = read(tmp_path)
    assert "pair=mini,arm=opd,seed=1 is left out, it cannot be read" in page.all
    assert "7 of 8 points done" in page.all
    newer = tmp_path / "pair=mini,arm=vopd,seed=0" / "point.json"
    asked = json.loads(newer.read_text())
    asked["config"]["evaluation"]["field_of_tomorrow"] = 1
    newer.write_text(json.dumps(asked))
    page = read(tmp_path)
    assert "6 of 7 points done" in page.all
    assert "unknown field 'evaluation.field_of_tomorrow'" in page.all
    for name in ("opd", "vopd", "full_kl"):
        for seed in range(3):
            (tmp_path / f"pair=mini,arm={name},seed={seed}" / "config.json").write_text("torn")
    with pytest.raises(WorkdirError, match=r"config\.json"):
        read(tmp_path)


@pytest.mark.usefixtures("words_alone")
def test_of_equal_scores_none_is_the_highest(tmp_path):
    for arm, after in {"opd": 0.0, "vopd": 0.0}.items():
        write_arm(tmp_path, arm, 0, after=after)
    assert "All 2 finished groups have the same avg@8: 0.000." in read(tmp_path).all
    write_arm(tmp_path, "full_kl", 0, after=-0.1)
    page = read(tmp_path)
    assert "2 of 3 finished groups share the highest avg@8, 0.000: " in page.all


@pytest.mark.usefixtures("words_alone")
def test_the_teachers_own_scores_are_no_arm(tmp_path):
    for arm in ("opd", "vopd"):
        write_arm(tmp_path, arm, 0)
    itself = settings("opd", 0, student=ModelConfig(MINI_TEACHER), train=TrainConfig(num_steps=1))
    write_arm(tmp_path, "teacher", 0, asked=itself, after=0.97)
    page = read(tmp_path)
    assert "Highest avg@8 of 2 finished groups: 0.550" in page.all
    assert [cells[0] for cells in page.rows if len(cells) > 9 and cells[1] == "1"] == [
        "vopd",
        "opd",
        "teacher",
    ]
    assert row(page, "teacher", "1")[2] == "0.970 ± ∞"
    assert row(page, "before training")[2] == "0.409"


def test_warnings_are_of_what_changes_scores_alone(tmp_path):
    write_arm(
        tmp_path,
        "opd",
        0,
        asked=settings("opd", 0, evaluation=EvaluationConfig(every=3)),
        metrics=[],
    )
    judged = write_arm(
        tmp_path,
        "vopd",
        0,
        asked=settings("vopd", 0, evaluation=EvaluationConfig(every=2)),
        metrics=[],
    )
    described = json.loads((judged / "config.json").read_text())
    described["data"]["teacher"] = None
    (judged / "config.json").write_text(json.dumps(described))
    assert "Warning" not in read(tmp_path).all
    write_arm(
        tmp_path,
        "full_kl",
        0,
        asked=settings("full_kl", 0, evaluation=EvaluationConfig(num_samples=4)),
        metrics=[],
    )
    assert "Warning. The points were evaluated with different settings" in read(tmp_path).all


def test_a_study_with_nothing_done_still_has_a_page(tmp_path):
    for arm in SCORES:
        write_arm(tmp_path, arm, 0, done=False)
    page = read(tmp_path)
    assert "0 of 3 points done (3 not begun)." in page.all
    assert "not run" in page.all
    assert 'id="pareto"' not in page.source


def test_thirty_arms_have_a_page_of_reasonable_size(tmp_path):
    for number in range(30):
        asked = settings("opd", 0, optimizer=OptimizerConfig(learning_rate=1e-5 * (number + 1)))
        write_arm(tmp_path, f"arm_{number}", 0, asked=asked, after=0.4 + 0.005 * number)
    page = read(tmp_path)
    assert len(page.source) < 1_000_000


def test_an_arm_is_named_without_the_word():
    assert label({"pair": "mini", "arm": "vopd"}) == "pair mini, vopd"
