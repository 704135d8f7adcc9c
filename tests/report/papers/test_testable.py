"""Which claims a sweep cannot judge, and why: a study for each computed reason, numbers by hand."""

import dataclasses
import json
import math

import pytest
import study

from opdjax.report.papers.compare import compare
from opdjax.report.papers.tables import PaperClaim, PaperColumn, PaperTable, Row
from opdjax.report.table import claims, counted
from opdjax.runs.results import read_points

A, B = Row("a", "opd"), Row("b", "vopd")
SCORE = PaperColumn("mini", pair="mini")
SCORES = {"opd": (0.50, 0.52, 0.54), "vopd": (0.47, 0.50, 0.50)}


def verdict(directory, kind="more", column=SCORE, margin=0.0, rows=(A, B), base=""):
    claim = PaperClaim(kind, "text", rows[0].label, rows[1].label, column.label, margin, base=base)
    table = PaperTable("t", "p", "title", "settings", (column,), rows, (claim,))
    (found,) = compare(table, read_points(directory)).verdicts
    return found


def test_evaluations_bound_a_ratio_of_costs(tmp_path):
    at_20 = {"ropd": 0.6, "lopd": 0.5}
    curve = {name: ((0, 0.3), (10, 0.4), (20, x), (40, 0.6)) for name, x in at_20.items()}
    study.make(tmp_path, dict.fromkeys(curve, (0.6,) * 6), curve=curve)
    rows = Row("slow", "lopd"), Row("fast", "ropd")
    column = PaperColumn("prompts", pair="mini", until="slow")
    found = verdict(tmp_path, "ratio", column, 9.6, rows)
    # All 40 steps against the first evaluation after 10.
    assert found.status == "not testable here"
    assert found.reason == "the evaluations bound the ratio at 4, below 9.6"
    assert verdict(tmp_path, "ratio", column, 4.0, rows).status != "not testable here"


def test_a_share_of_the_gap_that_no_arm_reaches(tmp_path):
    study.make(tmp_path / "a", {"opd": (0.4, 0.4), "vopd": (0.5, 0.6)}, start=0.3)
    study.make(tmp_path / "b", {"teacher": (0.95,)}, start=0.8)
    points = [*read_points(tmp_path / "a"), *read_points(tmp_path / "b")]
    rows = (Row("a", "opd"), Row("t", "teacher", when="before"), Row("s", "opd", when="before"))
    found = {}
    for margin in (0.49, 0.51):  # vopd closes (0.55 - 0.3) / (0.8 - 0.3) = 0.5, opd 0.2
        claim = PaperClaim("gap", "text", "a", "t", "mini", margin, base="s")
        table = PaperTable("t", "p", "title", "settings", (SCORE,), rows, (claim,))
        (found[margin],) = compare(table, points).verdicts
    assert found[0.49].status == "contradicted"
    assert found[0.51].reason == "no arm closes 0.51 of the gap; the best, vopd, closes 0.5"


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (None, "no record says whether the timed runs had the machine to themselves"),
        (lambda p: (0.0, 9.0), "timed runs overlapped in time with others on one machine"),
        (lambda p: (hash(p.id) % 10**6 * 10.0, hash(p.id) % 10**6 * 10.0 + 9), ""),
    ],
)
def test_times_of_a_loaded_machine(tmp_path, attempt, reason):
    study.make(tmp_path, SCORES, attempt=attempt)
    column = PaperColumn("seconds", "median:time/step", "mini")
    found = verdict(tmp_path, "ratio", column, 2.0)
    assert found.reason == reason
    assert found.status == ("not testable here" if reason else "contradicted")  # 0.5 s in both


def test_an_option_that_never_binds(tmp_path):
    same = {name: {"loss/objective": 1.0} for name in SCORES}
    study.make(tmp_path / "same", SCORES, metrics=same)
    reason = "the option never binds: all recorded metrics of both arms are identical"
    assert verdict(tmp_path / "same").reason == reason
    mass = {"overlap/student_mass": 0.9995, "overlap/teacher_mass": 0.9999}
    scores = {"vopd": SCORES["opd"], "vopd_k100": SCORES["vopd"]}
    rows = Row("a", "vopd"), Row("b", "vopd_k100")
    study.make(tmp_path / "k", scores, metrics=dict.fromkeys(scores, mass))
    reason = "k never binds: 16 ids hold 99.95% of the probability"
    assert verdict(tmp_path / "k", rows=rows).reason == reason
    less = dict.fromkeys(scores, dict.fromkeys(mass, 0.9))
    study.make(tmp_path / "less", scores, metrics=less)
    assert verdict(tmp_path / "less", rows=rows).status == "reproduced"
    # k = 5 is fewer ids than those whose mass is recorded.
    scores = {"vopd": SCORES["opd"], "opd_topk": SCORES["vopd"]}
    study.make(tmp_path / "few", scores, metrics=dict.fromkeys(scores, mass))
    assert verdict(tmp_path / "few", rows=(rows[0], Row("b", "opd_topk"))).reason == ""


def test_a_difference_of_exactly_0_in_every_seed(tmp_path):
    study.make(tmp_path, {"opd": (0.5, 0.6), "vopd": (0.5, 0.6)})
    found = verdict(tmp_path, "equal")
    assert found.reason == "every seed's difference is exactly 0"


def test_gradient_norms_compare_on_identical_rollouts_alone(tmp_path):
    drawn = {"rollout/length_mean": 20.0, "entropy/student": 1.5}
    norms = {"opd": {**drawn, "grad/norm": 8.0}, "vopd": {**drawn, "grad/norm": 2.0}}
    study.make(tmp_path / "same", SCORES, metrics=norms, grids={"opd": {}, "vopd": {}})
    first, median = (PaperColumn("g", f"{of}:grad/norm", "mini") for of in ("first", "median"))
    found = verdict(tmp_path / "same", "ratio", first, 3.0)
    assert (found.status, found.difference) == ("reproduced", (pytest.approx(4.0), 0.0))
    reason = "no gradient norms of identical rollouts are recorded"
    assert verdict(tmp_path / "same", "ratio", median, 3.0).reason == reason
    norms["vopd"]["entropy/student"] = 1.6
    study.make(tmp_path / "other", SCORES, metrics=norms)
    assert verdict(tmp_path / "other", "ratio", first, 3.0).reason == reason


# Equal tuning

RATE = study.GRID[1]
FAIR = dict(zip(study.GRID, (0.1, 0.2, 0.15)))


@pytest.mark.parametrize(
    ("grid", "problem", "shown"),
    [
        (FAIR, "", "1e-05 of 3, 1e-06 to 0.0001"),
        ({}, "no grid", "1e-05, no grid"),
        (FAIR | {1e-4: 0.3}, "the best rate is 0.0001", "best at an edge; the best rate is 0.0001"),
        (FAIR | {1e-4: None}, "its grid is not complete", "3, 1e-06 to 0.0001; its grid is not"),
        ({1e-6: 0.1, RATE: 0.2}, "a: 2 rates; b: 3 rates", "2, 1e-06 to 1e-05; best at an edge"),
        (FAIR | {1e-4: 0.2}, "", "1e-05 of 3"),  # a tie
    ],
)
def test_a_claim_is_judged_after_equal_tuning_alone(tmp_path, grid, problem, shown):
    study.make(tmp_path, SCORES, grids={"opd": grid})
    found = verdict(tmp_path)
    table = PaperTable("t", "p", "title", "settings", (SCORE,), (A, B), ())
    cell = compare(table, read_points(tmp_path)).cells["a"]["mini"]
    assert shown in str(cell.tuning)
    assert found.status == ("not judged" if problem else "reproduced")
    assert problem in found.reason
    assert found.reason.startswith("unequal tuning: ") == bool(problem)


def test_a_grid_of_another_batch_prompts_or_seed_is_not_that_of_the_arm(tmp_path):
    study.make(tmp_path / "one", {"opd": SCORES["opd"]})
    batch = dataclasses.replace(study.BASE.train, prompts_per_step=8)
    other = dataclasses.replace(study.BASE, train=batch)
    study.make(tmp_path / "other", {"vopd": ()}, base=other, seeds_of=1)
    study.make(tmp_path / "two", {"vopd": SCORES["vopd"]}, grids={"vopd": {}})
    points = [p for name in ("one", "other", "two") for p in read_points(tmp_path / name)]
    points = [p for p in points if "scored_on" in p.overrides or p.status == "done"]
    table = PaperTable("t", "p", "title", "settings", (SCORE,), (A, B), ())
    assert compare(table, points).cells["b"]["mini"].tuning.problem == "no grid"
    own = dataclasses.replace(study.BASE.evaluation, source="validation.jsonl")
    study.make(tmp_path / "leak", SCORES, base=dataclasses.replace(study.BASE, evaluation=own))
    assert "its grid has the prompts of the comparison" in verdict(tmp_path / "leak").reason


def test_an_untrained_student_needs_no_rate(tmp_path):
    study.make(tmp_path, {"opd": SCORES["opd"]}, start=0.3)
    assert verdict(tmp_path, rows=(A, Row("start", "opd", when="before"))).status == "reproduced"


# Statistics of a table


def test_an_interval_carries_seeds_and_prompts(tmp_path):
    right = {("opd", s): [8, 4, 8, 4 + 2 * s] for s in range(3)}
    right |= {("vopd", s): [8, 2, 4, 4] for s in range(3)}
    study.make(tmp_path, SCORES, per_prompt=right)
    found = verdict(tmp_path)
    # Differences of 1/4, 1/2 and 0, 1/4, 1/2 of three prompts, and 0 of the first, in each seed.
    assert (found.over, found.status) == ("seeds and prompts", "inconclusive")
    assert found.difference[0] == pytest.approx((0 + 0.25 + 0.5 + 0.25) / 4)
    # t with an error of half / t95: power 80 % needs (t95 + t80) errors.
    assert found.difference[1] < found.detectable < 2 * found.difference[1]


def test_greedy_answers_stand_beside_sampled_ones(tmp_path):
    study.make(tmp_path, SCORES)
    for arm, right in (("opd", [1, 1, 1, 0]), ("vopd", [1, 0, 1, 0])):
        for seed in range(3):
            file = tmp_path / f"pair=mini,arm={arm},seed={seed}" / "result.json"
            found = json.loads(file.read_text())
            greedy = {"greedy": sum(right) / 4, "per_prompt_greedy": right}
            found["eval_after"] |= greedy
            file.write_text(json.dumps(found))
    # 1 of 4 prompts differs, in every seed: a deviation of 1/2 over prompts, t of 3.
    found = verdict(tmp_path)
    assert found.greedy == (0.25, pytest.approx(3.182446 * 0.5 / 2))
    table = PaperTable("t", "p", "title", "settings", (SCORE,), (A, B), ())
    assert compare(table, read_points(tmp_path)).cells["a"]["mini"].greedy == (0.75, 0.0)


def test_holm_is_within_a_table_and_a_claim_of_two_tables_counts_once(tmp_path):
    study.make(tmp_path, SCORES)
    one = PaperClaim("more", "text", "a", "b", "mini")
    table = PaperTable("t", "p", "title", "settings", (SCORE,), (A, B), (one, one, one, one))
    found = compare(table, read_points(tmp_path))
    # t = 0.03 / (0.01 / sqrt 3) = 5.196, two degrees of freedom: p = 0.0351, times four.
    assert [each.status for each in found.verdicts] == ["reproduced"] * 4
    assert found.verdicts[0].p_value == pytest.approx(0.03510, abs=1e-5)
    assert [each.adjusted for each in found.verdicts] == pytest.approx([0.14040] * 4, abs=4e-5)
    assert claims([found])[1][0][-2] == "inconclusive, p = 0.14"
    renamed = tuple(dataclasses.replace(row, label=f"{row.label}2") for row in (A, B))
    again = dataclasses.replace(one, left="a2", right="b2", text="other words")
    table = PaperTable("u", "p", "title", "settings", (SCORE,), renamed, (again,))
    assert counted([found, compare(table, read_points(tmp_path))]) == "1 claims: 1 reproduced"


def test_the_p_value_is_that_of_the_nearest_end_of_the_claimed_range(tmp_path):
    study.make(tmp_path, SCORES)
    # t = (0.03 - 0.01) / (0.01 / sqrt 3) = 3.464 from above; from below 6.93.
    found = verdict(tmp_path, "equal")
    assert found.p_value == pytest.approx(0.07418, abs=1e-5)
    assert found.status == "inconclusive"


def test_wild_ratios_are_a_median_without_an_interval_of_four_seeds(tmp_path):
    right = {"opd": (0.427, 0.009, 0.009, 0.089), "vopd": (0.1, 0.1, 0.1, 0.1)}
    study.make(tmp_path, right)
    found = verdict(tmp_path, "ratio", margin=2.0)
    assert (found.status, found.over) == ("inconclusive", "median of seeds")
    # Of 4.27, 0.09, 0.09, 0.89: the root of 0.09 * 0.89, as half of the logarithms.
    assert found.difference == (pytest.approx(math.sqrt(0.09 * 0.89)), None)
    assert (found.interval, found.detectable) == (None, None)
