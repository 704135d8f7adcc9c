"""What runs say of a paper: means and verdicts by hand, and every way in which runs do not belong
together.
"""

import dataclasses
import json
import math

import pytest
import study

from opdjax.report.papers.cells import reader
from opdjax.report.papers.compare import compare
from opdjax.report.papers.tables import PaperClaim, PaperColumn, PaperTable, Row
from opdjax.runs.results import read_points
from opdjax.runs.workdir import WorkdirError

T_OF_2 = 4.302652729749464  # Student's t, two degrees of freedom, 0.975 (any table of it: 4.303)
MINI = PaperColumn("mini", pair="mini")


def table(*claims, columns=(MINI,), rows=None, **more):
    rows = rows or (Row("a", "opd"), Row("b", "vopd"))
    return PaperTable("t", "p", "title", "settings", *map(tuple, (columns, rows, claims)), **more)


def verdict(directory, claim, **more):
    (found,) = compare(table(claim, **more), read_points(directory)).verdicts
    return found


def test_a_cell_is_the_mean_over_seeds_with_students_interval(tmp_path):
    study.make(tmp_path, {"opd": (0.50, 0.52, 0.54), "vopd": (0.55,)})
    cells = compare(table(), read_points(tmp_path)).cells
    mean, half = cells["a"]["mini"].ours
    assert mean == pytest.approx(0.52)
    assert half == pytest.approx(T_OF_2 * 0.02 / math.sqrt(3))
    assert cells["b"]["mini"].ours == (0.55, None)
    assert cells["b"]["mini"].missing == ("pair=mini,arm=vopd,seed=1", "pair=mini,arm=vopd,seed=2")


@pytest.mark.parametrize(
    ("kind", "margin", "right", "status"),
    [
        # Differences 0.03, 0.02, 0.04: mean 0.03, deviation 0.01, half interval 4.303 * 0.01 / sqrt
        # 3 = 0.0248.
        ("more", 0.0, (0.47, 0.50, 0.50), "reproduced"),
        (
            "more",
            0.01,
            (0.47, 0.50, 0.50),
            "inconclusive",
        ),  # 0.005 is inside, by its interval from 0.0052 on
        ("more", 0.06, (0.47, 0.50, 0.50), "contradicted"),  # 0.0548 is its end
        ("less", 0.0, (0.47, 0.50, 0.50), "contradicted"),
        ("equal", 0.06, (0.47, 0.50, 0.50), "reproduced"),
        ("equal", 0.05, (0.47, 0.50, 0.50), "inconclusive"),
        ("equal", 0.005, (0.47, 0.50, 0.50), "contradicted"),
        ("more", 0.0, (0.50, 0.49, 0.53), "inconclusive"),  # 0, 0.03, 0.01
    ],
)
def test_verdicts_are_of_differences_paired_by_seed(tmp_path, kind, margin, right, status):
    study.make(tmp_path, {"opd": (0.50, 0.52, 0.54), "vopd": right})
    claim = PaperClaim(kind, "text", "a", "b", "mini", 0.0 if kind == "equal" else margin)
    found = verdict(tmp_path, claim, equivalence=margin)
    assert (found.status, found.n, found.over) == (status, 3, "seeds")
    if right[0] == 0.47:
        half = T_OF_2 * 0.01 / math.sqrt(3)
        assert found.difference == pytest.approx((0.03, half))
        assert found.interval == pytest.approx((0.03 - half, 0.03 + half))


def test_a_ratio_is_decided_on_its_logarithm(tmp_path):
    # 8, 8, 8: no spread; then 4, 8, 16, whose logarithms are ln 8 ± 4.303 * ln 2 / sqrt 3 = 2.079 ±
    # 1.722.
    study.make(tmp_path / "same", {"opd": (0.80, 0.80, 0.80), "vopd": (0.10, 0.10, 0.10)})
    found = verdict(tmp_path / "same", PaperClaim("ratio", "text", "a", "b", "mini", 7.9))
    assert found.status == "reproduced"
    assert found.difference == pytest.approx((8.0, 0.0))
    study.make(tmp_path / "wide", {"opd": (0.40, 0.80, 0.80), "vopd": (0.10, 0.10, 0.05)})
    for margin, status in (
        (1.42, "reproduced"),
        (1.45, "inconclusive"),
        (44.0, "inconclusive"),
        (45.0, "contradicted"),
    ):
        found = verdict(tmp_path / "wide", PaperClaim("ratio", "text", "a", "b", "mini", margin))
        assert found.status == status, margin
    assert found.difference[0] == pytest.approx(8.0)
    low, high = found.interval
    assert low * high == pytest.approx(8.0 * 8.0)  # symmetric in the logarithm
    assert high == pytest.approx(sum(found.difference))
    study.make(tmp_path / "zero", {"opd": (0.40,), "vopd": (0.0,)})
    found = verdict(tmp_path / "zero", PaperClaim("ratio", "text", "a", "b", "mini", 2.0))
    assert (found.status, found.difference) == ("inconclusive", None)


def test_the_share_of_a_gap_that_is_closed(tmp_path):
    rows = (
        Row("start", "opd", when="before"),
        Row("a", "opd"),
        Row("goal", "teacher", when="before"),
    )
    study.make(tmp_path / "students", {"opd": (0.5, 0.6, 0.7)}, start=0.2)
    study.make(tmp_path / "teachers", {"teacher": (0.9,)}, start=0.7)
    points = [*read_points(tmp_path / "students"), *read_points(tmp_path / "teachers")]
    claims = [
        PaperClaim("gap", "text", "a", "goal", "mini", margin, base="start")
        for margin in (0.2, 0.5, 1.5)
    ]
    found = compare(table(*claims, rows=rows), points).verdicts
    # (0.5 - 0.2) / (0.7 - 0.2) and so on: 0.6, 0.8, 1.0 ± 4.303 * 0.2 / sqrt 3 = 0.497; one teacher
    # stands for all seeds.
    assert found[0].difference == pytest.approx((0.8, T_OF_2 * 0.2 / math.sqrt(3)))
    assert [each.status for each in found] == ["reproduced", "inconclusive", "not testable here"]
    assert found[2].reason == "no arm closes 1.5 of the gap; the best, opd, closes 0.8"


def test_one_seed_decides_nothing_and_no_pair_is_not_run(tmp_path):
    study.make(tmp_path, {"opd": (0.5,), "vopd": (0.9,)})
    found = verdict(tmp_path, PaperClaim("less", "text", "a", "b", "mini"))
    assert (found.status, found.difference, found.interval) == ("inconclusive", (-0.4, None), None)
    assert found.claimed == (None, 0.0)
    (tmp_path / "pair=mini,arm=vopd,seed=0" / "result.json").unlink()
    found = verdict(tmp_path, PaperClaim("less", "text", "a", "b", "mini"))
    assert (found.status, found.n, found.difference) == ("not run", 0, None)


# What a run had spent when it first was as good as another's best.
SPENT = (
    PaperColumn("prompts", "avg@k", "mini", until="slow", spent="prompts"),
    PaperColumn("seconds", "avg@k", "mini", until="slow", spent="seconds"),
)
RACE = (Row("fast", "ropd"), Row("slow", "lopd"))


def race(directory, fast, slow=((0, 0.3), (10, 0.4), (20, 0.5), (30, 0.6), (40, 0.55)), margin=2.0):
    study.make(
        directory, {"ropd": (0.5,) * 6, "lopd": (0.5,) * 6}, curve={"ropd": fast, "lopd": slow}
    )
    claim = PaperClaim("ratio", "text", "slow", "fast", "prompts", margin)
    return compare(table(claim, columns=SPENT, rows=RACE), read_points(directory))


def test_what_was_spent_until_as_good_as_anothers_best(tmp_path):
    found = race(tmp_path, ((0, 0.3), (10, 0.61), (20, 0.2), (40, 0.7)))
    # The best of the slow one, 0.6, is after 30 steps of 16 prompts and half a second; the fast one
    # has it after 10.
    assert found.cells["slow"]["prompts"].ours[0] == 480
    assert found.cells["fast"]["prompts"].ours[0] == 160
    assert found.cells["fast"]["seconds"].ours[0] == pytest.approx(5.0)
    assert (found.verdicts[0].status, found.verdicts[0].difference[0]) == (
        "reproduced",
        pytest.approx(3.0),
    )


def test_a_run_that_never_was_as_good_is_told_and_decides_nothing(tmp_path):
    found = race(tmp_path, ((0, 0.3), (10, 0.4), (40, 0.5)))
    assert found.cells["fast"]["prompts"].by_seed == dict.fromkeys(range(6), 640)
    assert found.cells["fast"]["prompts"].censored == (0, 1, 2, 3, 4, 5)
    assert found.verdicts[0].status == "contradicted"  # 480 / 640 at most
    # 0.75 is above a half, but would not be had the fast one gone on for long.
    assert (
        race(tmp_path / "more", ((0, 0.3), (10, 0.4), (40, 0.5)), margin=0.5).verdicts[0].status
        == "inconclusive"
    )


def test_a_score_of_a_benchmark_and_of_the_start(tmp_path):
    study.make(
        tmp_path, {"opd": ({"MATH500": 0.6, "AMC23": 0.2},)}, start={"MATH500": 0.5, "AMC23": 0.1}
    )
    columns = [PaperColumn(name, f"avg@k:{name}", "mini") for name in ("MATH500", "mean", "GSM8K")]
    rows = (Row("a", "opd"), Row("start", "opd", when="before"))
    cells = compare(table(columns=columns, rows=rows), read_points(tmp_path)).cells
    assert cells["a"]["MATH500"].by_seed == {0: 0.6}
    assert cells["a"]["mean"].by_seed == {0: pytest.approx(0.4)}
    assert cells["start"]["MATH500"].by_seed == {0: 0.5}
    assert cells["a"]["GSM8K"].ours is None
    with pytest.raises(ValueError, match="expected a score"):
        reader("speed")


def test_no_mean_mixes_two_configs(tmp_path):
    study.make(tmp_path / "one", {"opd": (0.5,)})
    study.make(
        tmp_path / "other",
        {"opd": (0.5,)},
        base=dataclasses.replace(
            study.BASE, checkpoint=dataclasses.replace(study.BASE.checkpoint, keep=7)
        ),
    )
    points = [*read_points(tmp_path / "one"), *read_points(tmp_path / "other")]
    with pytest.raises(WorkdirError, match=r"fits runs of 2 configs(.|\n)*checkpoint.keep: 2 -> 7"):
        compare(table(), points)


def test_rows_that_were_evaluated_in_other_ways_do_not_compare(tmp_path):
    study.make(tmp_path / "one", {"opd": (0.5,)})
    study.make(
        tmp_path / "other", {"vopd": (0.5,)}, base=study.renamed(study.BASE, temperatures=(0.6,))
    )
    points = [*read_points(tmp_path / "one"), *read_points(tmp_path / "other")]
    with pytest.raises(
        WorkdirError,
        match=r"evaluated in other ways(.|\n)*evaluation.temperatures: \[1.0\] -> \[0.6\]",
    ):
        compare(table(), points)


def test_rows_that_answered_other_prompts_do_not_compare(tmp_path):
    study.make(tmp_path / "one", {"opd": (0.5,)})
    study.make(tmp_path / "other", {"vopd": (0.5,)}, data=study.DATA | {"evaluation": "others"})
    points = [*read_points(tmp_path / "one"), *read_points(tmp_path / "other")]
    with pytest.raises(WorkdirError, match="answered other prompts"):
        compare(table(), points)


def test_other_training_prompts_and_commits_are_told(tmp_path):
    study.make(tmp_path / "one", {"opd": (0.5,)})
    environment = study.ENVIRONMENT | {"commit": "beef"}
    study.make(
        tmp_path / "other",
        {"vopd": (0.5,)},
        data=study.DATA | {"prompts": "others"},
        environment=environment,
    )
    flags = compare(
        table(), [*read_points(tmp_path / "one"), *read_points(tmp_path / "other")]
    ).flags
    assert flags == (
        "rows 'a' and 'b' of t were trained on other prompts",
        "the runs of this table are of several commits: beef, c0ffee",
    )


def test_seconds_of_other_machines_are_told(tmp_path):
    study.make(tmp_path / "one", {"opd": (0.5,)})
    study.make(
        tmp_path / "other",
        {"vopd": (0.5,)},
        environment=study.ENVIRONMENT | {"devices": ["TPU v5e"]},
    )
    points = [*read_points(tmp_path / "one"), *read_points(tmp_path / "other")]
    assert compare(table(), points).flags == ()
    (flag,) = compare(table(columns=[PaperColumn("seconds", "seconds", "mini")]), points).flags
    assert (
        flag
        == "rows 'a' and 'b' of t ran on other machines, which affects seconds: devices: ['cpu'] "
        "-> ['TPU v5e']"
    )


def test_a_directory_that_holds_another_run_than_it_says_is_refused(tmp_path):
    study.make(tmp_path, {"opd": (0.5,)})
    file = tmp_path / "pair=mini,arm=opd,seed=0" / "config.json"
    found = json.loads(file.read_text())
    found["config"]["optimizer"]["learning_rate"] = 7.0
    file.write_text(json.dumps(found))
    with pytest.raises(WorkdirError, match="optimizer.learning_rate: 1e-05 -> 7.0"):
        compare(table(), read_points(tmp_path))


def test_points_of_before_a_field_are_of_one_config_with_those_of_after(tmp_path):
    study.make(tmp_path, {"opd": (0.5, 0.7)})
    for name in ("point.json", "config.json"):
        file = tmp_path / "pair=mini,arm=opd,seed=0" / name
        found = json.loads(file.read_text())
        del found["config"]["lora"]  # as a version without it wrote it
        file.write_text(json.dumps(found))
    assert compare(table(), read_points(tmp_path)).cells["a"]["mini"].ours[0] == pytest.approx(0.6)


def test_our_number_is_subtracted_from_the_papers_in_its_unit_alone(tmp_path):
    study.make(tmp_path, {"opd": (0.5,), "vopd": (0.6,)}, pair="hub")
    hub = PaperColumn("hub", pair="hub", unit="%")
    rows = (Row("a", "opd", ("48.5 P",)), Row("b", "vopd"))
    cells = compare(table(columns=(hub,), rows=rows), read_points(tmp_path)).cells
    assert cells["a"]["hub"].difference == pytest.approx(1.5)
    assert cells["b"]["hub"].difference is None
