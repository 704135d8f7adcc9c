"""The part of a run's page about judged rewards: numbers by hand, one safe page, and every state
its files can be in.
"""

import collections
import json
import math
import random

import numpy as np
import pytest
from test_report import NASTY, metric, read, row, write_run

from opdjax.judge.judgement import Judgement, RolloutGroup, as_row, metrics_of
from opdjax.judge.schema import Criterion, Rubric
from opdjax.judge.structured_output import Tally
from opdjax.report import judgements
from opdjax.report.judgements import (
    pass_rate,
    read_judgements,
    summary,
)
from opdjax.report.page import write_report
from opdjax.runs.workdir import WorkdirError

STAGES = ("work", "answer")


# Runs of judges


def criterion(
    number, category="task", weight=2, polarity="positive", grade="binary", stage=None, text=None
):
    text = text or f"States the result of part {number}"
    return {
        "id": f"c{number}",
        "category": category,
        "text": text,
        "weight": weight,
        "polarity": polarity,
        "grade": grade,
        "stage": stage,
    }


def judged(step, prompt_id=0, verdicts=((1, 0), (0, 0)), criteria=None, correct=None, **changes):
    """A row with its scores made of the verdicts, as the run makes them."""
    criteria = criteria or [
        criterion(at + 1) for at in range(len(next(v for v in verdicts if v is not None)))
    ]

    def score(found):
        if found is None:
            return None
        earned = [v / 2 if c["grade"] == "graded" else v for c, v in zip(criteria, found)]
        earned = [1 - v if c["polarity"] == "negative" else v for c, v in zip(criteria, earned)]
        return round(
            sum(c["weight"] * v for c, v in zip(criteria, earned))
            / sum(c["weight"] for c in criteria),
            6,
        )

    references = changes.pop("references_met", ((1,) * len(criteria),))
    found = {
        "step": step,
        "prompt_id": prompt_id,
        "status": "scored",
        "samples": list(range(len(verdicts))),
        "rubric": criteria,
    }
    found |= {
        "verdicts": verdicts,
        "reference_verdicts": references,
        "scores": [score(v) for v in verdicts],
    }
    found |= {
        "reference_scores": [score(v) for v in references],
        "stage_scores": None,
        "correct": correct,
    }
    return found | {"problems": {}, "repairs": {}, "reasks": 0} | changes


def failed(step, prompt_id=0, size=4, num_references=1, **changes):
    found = {
        "step": step,
        "prompt_id": prompt_id,
        "status": "failed",
        "samples": list(range(size)),
        "rubric": None,
    }
    found |= {
        "verdicts": [None] * size,
        "reference_verdicts": [None] * num_references,
        "scores": [None] * size,
    }
    found |= {
        "reference_scores": [None] * num_references,
        "stage_scores": None,
        "correct": [0] * size,
    }
    return found | {"problems": {"unavailable": 1}, "repairs": {}, "reasks": 0} | changes


def random_group(rng, step, prompt_id, skill, size=4, *, has_texts=False, stages=()):
    """A prompt of random difficulty, answers of random worth, and a judge who is often right about
    them.
    """
    kinds = rng.sample(["task", "task", "quality", "reasoning", "reasoning"], rng.randint(3, 5))
    criteria = [criterion(at + 1, kind, rng.choice([1, 2, 4, 5])) for at, kind in enumerate(kinds)]
    if rng.random() < 0.5:
        criteria[-1] |= {"polarity": "negative", "text": "Repeats a step without need"}
    for at, one in enumerate(criteria if stages else ()):
        one["stage"] = stages[at % len(stages)]
    hard = rng.gauss(0, 0.8)
    correct = [int(rng.random() < 1 / (1 + math.exp(-(skill - hard)))) for _ in range(size)]

    def verdicts(worth):
        met = [int(rng.random() < min(0.97, max(0.03, worth - 0.12 * hard))) for _ in criteria]
        return [1 - v if c["polarity"] == "negative" else v for c, v in zip(criteria, met)]

    found = [verdicts(0.3 + 0.4 * right + 0.08 * skill) for right in correct]
    extra = {
        "problems": {"parse_error": 1} if rng.random() < 0.2 else {},
        "repairs": {"fence": 1} if rng.random() < 0.3 else {},
    }
    if stages:
        extra["stage_scores"] = [[round(rng.random(), 3) for _ in stages] for _ in correct]
    if has_texts:
        extra["question"] = (
            f"Compute {34 + prompt_id}-17+25. Show each step and end with the result."
        )
        extra["answers"] = [
            f"{34 + prompt_id}-17={17 + prompt_id};"
            f" {17 + prompt_id}+25={42 + prompt_id + (not right)}"
            for right in correct
        ]
        extra["references"] = [
            f"First {34 + prompt_id}-17={17 + prompt_id}, then +25 gives {42 + prompt_id}."
        ] * 2
    both = [verdicts(0.9), verdicts(0.85)]
    return judged(step, prompt_id, found, criteria, correct, references_met=both, **extra)


def random_rows(num_steps=24, prompts=6, seed=0, *, stages=(), fail=0.06):
    rng, rows = random.Random(seed), []
    for step in range(1, num_steps + 1):
        for at in range(prompts):
            prompt_id = (step * prompts + at) % 40
            if rng.random() < fail:
                rows.append(failed(step, prompt_id, num_references=2))
                continue
            has_texts = step == 1 or step % 5 == 0
            rows.append(
                random_group(
                    rng,
                    step,
                    prompt_id,
                    skill=-1 + 2.5 * step / num_steps,
                    has_texts=has_texts,
                    stages=stages,
                )
            )
    return rows


def judge_metric(step, **changes):
    found = {
        "rubric/reward_mean": 0.4 + 0.01 * step,
        "rubric/reference_score_mean": 0.85,
        "rubric/failed_share": 0.0,
    }
    found |= {
        "rubric/no_signal_share": 0.3,
        "rubric/tied_groups": 0.1,
        "rubric/num_criteria": 5.0,
        "rubric/auc": 0.8,
    }
    for role, dollars in (("rubricator", 0.02), ("verifier", 0.01)):
        found |= {
            f"api/{role}/{name}": value
            for name, value in (
                ("calls", 6.0),
                ("cached", 2.0),
                ("retries", 1.0),
                ("dollars", dollars),
            )
        }
        found |= {
            f"api/{role}/input_tokens": 12000.0,
            f"api/{role}/output_tokens": 1500.0,
            f"api/{role}/seconds": 9.0,
        }
    return metric(step) | found | {"time/judge_wait": 0.2} | changes


def write_judged(
    directory, rows, *, recipe="ropd", metrics=None, torn="", rubrics_config=None, spending=None
):
    steps = max((found["step"] for found in rows), default=6)
    metrics = [judge_metric(step) for step in range(1, steps + 1)] if metrics is None else metrics
    write_run(directory, metrics=metrics, samples=[], evaluations=False, steps=steps)
    document = json.loads((directory / "config.json").read_text())
    document["config"]["estimator"] = {"recipe": recipe, "aggregation": "token_mean"}
    document["config"]["verifier"] = {"model": "judge-32b"}
    document["config"]["rubrics"] = {"stages": []} | (rubrics_config or {})
    (directory / "config.json").write_text(json.dumps(document))
    if rows or torn:
        (directory / judgements.ROWS).write_text(
            "".join(json.dumps(found) + "\n" for found in rows) + torn
        )
    if spending is None:
        spending = spending_of(metrics)
    (directory / judgements.SPENDING).write_text(
        "".join(json.dumps(found) + "\n" for found in spending)
    )
    return directory


def spending_of(metrics):
    """The rows of spending.jsonl, which repeat the metrics of a step by role."""
    rows = {}
    for found in metrics:
        for name, value in found.items():
            if name.startswith("api/"):
                role, _, kind = name.removeprefix("api/").rpartition("/")
                rows.setdefault((found["step"], role), {})[kind] = value
    return [{"step": step, "role": role} | used for (step, role), used in rows.items()]


def groups_of(tmp_path, rows, stages=()):
    directory = tmp_path / "run"
    directory.mkdir(exist_ok=True)
    (directory / judgements.ROWS).write_text("".join(json.dumps(found) + "\n" for found in rows))
    return judgements.all_groups(read_judgements(directory, stages))


def pairs_of(groups):
    """Pairs of a right and a wrong answer by which one is higher: right, tied, wrong."""
    found = summary(groups)
    names = ("right higher", "tied pairs", "bad updates")
    return tuple(round(found["num_pairs"] * found[name], 9) for name in names)


@pytest.fixture(scope="module")
def random_run(tmp_path_factory):
    return read(write_judged(tmp_path_factory.mktemp("judged") / "run", random_rows()))


# Numbers by hand


def test_a_pass_rate_counts_criteria_and_not_weights(tmp_path):
    criteria = [criterion(1, "task", 5), criterion(2, "quality", 1), criterion(3, "quality", 1)]
    (group,) = groups_of(
        tmp_path,
        [
            judged(
                1,
                verdicts=((1, 0, 0), (1, 1, 0), None),
                criteria=criteria,
                references_met=((1, 1, 0),),
            )
        ],
    )
    assert pass_rate([group]).value == pytest.approx(3 / 6)
    assert pass_rate([group], of_references=True).value == pytest.approx(2 / 3)
    assert pass_rate([group]).count == 6  # the rollout without verdicts is no zero
    assert group.scores[:2].tolist() == pytest.approx([5 / 7, 6 / 7], abs=1e-6)
    assert math.isnan(group.scores[2])


def test_a_flaw_is_met_by_its_absence_and_a_graded_criterion_by_halves(tmp_path):
    criteria = [
        criterion(1, polarity="negative"),
        criterion(2, grade="graded"),
        criterion(3, grade="graded", polarity="negative"),
    ]
    (group,) = groups_of(
        tmp_path, [judged(1, verdicts=((1, 1, 2), (0, 2, 1)), criteria=criteria, references_met=())]
    )
    np.testing.assert_array_equal(group.rows[0].met, [[0, 0.5, 0], [1, 1, 0.5]])
    assert pass_rate([group], of_references=True) is None


def test_criteria_that_all_rollouts_meet_alike_have_no_signal(tmp_path):
    rows = [
        judged(1, 0, ((1, 0, 1), (1, 0, 0), None)),  # met by all who have verdicts, by none, by one
        judged(1, 1, ((1, 1), (1, 0))),
        judged(1, 2, ((1, 1, 1, 1),)),  # one rollout alone cannot be told from another
        failed(1, 3),
    ]
    found = summary(groups_of(tmp_path, rows))
    names = ("met by all", "met by none", "alike")
    assert [found[name] for name in names] == pytest.approx([2 / 5, 1 / 5, 3 / 5])


def test_tied_and_failed_groups(tmp_path):
    rows = [
        judged(1, 0, ((1, 0), (0, 1))),
        judged(1, 1, ((1, 0), (0, 0))),
        judged(1, 2, ((1, 0), None)),
        failed(1, 3),
    ]
    groups = groups_of(tmp_path, rows)
    assert [group.is_failed for group in groups] == [
        False,
        False,
        True,
        True,
    ]  # one score is nothing to compare
    assert summary(groups)["tied groups"] == 0.5
    assert summary(groups)["num_failed"] == 2


def test_the_auc_counts_pairs_of_all_prompts_and_ties_by_half(tmp_path):
    rows = [
        judged(
            1, 0, ((1, 1), (1, 0), (0, 0)), correct=[1, 0, 1]
        ),  # scores 1, 0.5, 0: right 1 and 0, wrong 0.5
        judged(
            2, 1, ((1, 0), (0, 0), None), correct=[1, 0, 0]
        ),  # right 0.5, wrong 0; the third has no score
    ]
    groups = groups_of(tmp_path, rows)
    # right 1, 0, 0.5 against wrong 0.5, 0: 1 + 1, 0 + 0.5, 0.5 + 1 of six.
    assert summary(groups)["auc"].value == pytest.approx(4 / 6)
    assert summary(groups)["auc"].count == 6
    assert summary(groups[:1])["auc"].value == pytest.approx(1 / 2)
    assert pairs_of(groups) == (2, 0, 1)
    assert summary(groups)["share right"] == 0.5


def test_the_interval_of_an_auc_is_about_as_wide_as_repeated_draws_are(tmp_path):
    rng, values, widths = np.random.default_rng(0), [], []
    for _ in range(200):
        correct = rng.random((30, 4)) < 0.5
        scores = np.round(rng.normal(0.5 + 0.1 * correct + rng.normal(0, 0.1, (30, 1)), 0.1), 3)
        rows = [
            judgements.JudgedRow(
                1,
                at,
                (0, 1, 2, 3),
                (),
                np.empty((4, 0)),
                np.empty((0, 0)),
                scores[at],
                np.empty(0),
                None,
                correct[at],
                {},
                {},
                {},
            )
            for at in range(30)
        ]
        found = summary([judgements.JudgedGroup((one,)) for one in rows])["auc"]
        values.append(found.value)
        widths.append(found.half_width)
    assert 0.9 < np.mean(np.abs(np.array(values) - np.mean(values)) < widths) < 0.99


def test_a_bad_update_is_a_pair_whose_wrong_answer_scores_higher(tmp_path):
    verdicts = ((1, 1, 1), (1, 0, 0), (1, 0, 0), (1, 1, 0))
    (group,) = groups_of(tmp_path, [judged(1, 0, verdicts, correct=[1, 1, 0, 0])])
    assert pairs_of([group]) == (2, 1, 1)


def test_rubrics_of_single_rollouts_make_one_group(tmp_path):
    rows = [judged(1, 5, ((1, at),), correct=[at], samples=[at]) for at in (0, 1)]
    rows += [judged(1, 5, ((1, 0),), correct=[0], samples=[0])]  # the same prompt once more
    groups = groups_of(tmp_path, rows)
    assert [len(group.scores) for group in groups] == [2, 1]
    assert pairs_of(groups[:1])[0] == 1
    assert summary(groups)["alike"] is None


def test_a_stage_that_no_criterion_looks_at_has_no_score(tmp_path):
    criteria = [criterion(1, stage="answer"), criterion(2, stage="answer")]
    rows = [judged(1, 0, ((1, 0), (0, 0)), criteria, stage_scores=[[0.0, 0.5], [0.0, 0.0]])]
    both = [criterion(1, stage="work"), criterion(2, stage="answer")]
    rows.append(judged(1, 1, ((1, 0), None), both, stage_scores=[[1.0, 0.0], None]))
    means = summary(groups_of(tmp_path, rows, STAGES))["stages"]
    assert means == pytest.approx([1.0, 0.5 / 3])


def test_what_is_read_back_is_what_the_run_has_told(tmp_path):
    """The producer's own rows and numbers, of random verdicts: graded, with flaws, some missing."""
    rng, told = random.Random(1), []
    for prompt_id in range(12):
        kinds = [(rng.choice(["positive", "negative"]), rng.randint(1, 5)) for _ in range(4)]
        of = tuple(
            Criterion(id=f"c{at}", category="task", text="t", weight=w, polarity=p, grade="graded")
            for at, (p, w) in enumerate(kinds)
        )
        verdicts = tuple(
            None if rng.random() < 0.1 else tuple(rng.choice([0, 0, 1, 2]) for _ in of)
            for _ in range(3)
        )
        rubric = Rubric(of)
        scores = tuple(None if found is None else rubric.score(found) for found in verdicts)
        group = RolloutGroup(prompt_id, "q", ("r",), ("a", "b", "c"), (0, 1, 2))
        tally = Tally(collections.Counter(empty=1), collections.Counter(prose=2), 1)
        told.append(
            Judgement(
                group,
                rubric,
                verdicts,
                ((2,) * 4,),
                scores,
                (rubric.score((2,) * 4),),
                None,
                tally,
            )
        )
    right = [[rng.randint(0, 1) for _ in range(3)] for _ in told]
    rows = [as_row(one, 1, correct, has_texts=True) for one, correct in zip(told, right)]
    groups, expected = groups_of(tmp_path, rows), metrics_of(told, right)
    assert summary(groups)["rates"]["score"][0].value == pytest.approx(
        expected["rubric/reward_mean"], abs=1e-5
    )
    assert summary(groups)["rates"]["score"][1].value == pytest.approx(
        expected["rubric/reference_score_mean"], abs=1e-5
    )
    assert summary(groups)["auc"].value == pytest.approx(expected["rubric/auc"])
    assert summary(groups)["criteria"] == expected["rubric/num_criteria"]
    several = [
        one for one in told if sum(found is not None for found in one.scores) > 1
    ]  # of one rollout nothing can be alike
    assert summary(groups)["alike"] == pytest.approx(
        metrics_of(several, None)["rubric/no_signal_share"]
    )
    assert summary(groups)["tied groups"] == pytest.approx(
        metrics_of(several, None)["rubric/tied_groups"]
    )
    assert summary(groups)["problems"] == {"empty": 12}
    assert summary(groups)["repairs"] == {"prose": 24}


# The page


@pytest.mark.usefixtures("words_alone")
def test_start_and_end_stand_side_by_side(tmp_path):
    early = [judged(step, step, ((1, 0), (0, 0), (1, 0), (0, 0))) for step in (1, 2)]
    late = [judged(step, step, ((1, 1), (1, 0), (1, 1), (1, 0))) for step in (3, 4)]
    parser = read(write_judged(tmp_path / "run", early + late))
    assert row(parser, "rollouts") == ["rollouts", "25.0 ± 0.0", "75.0 ± 0.0", "+50.0 ± 0.0"]
    assert row(parser, "references") == ["references", "100.0 ± 0.0", "100.0 ± 0.0", ""]
    assert (
        "Rollouts met 25 % of the criteria in the first 2 steps and 75 % in the last 2:"
        " a clear rise." in parser.all
    )


def test_the_page_of_a_random_run(random_run):
    assert {"rubrics", "signal", "truth", "failures", "judge-cost", "judged"} <= set(random_run.ids)
    assert "stages" not in random_run.ids
    labels = {
        attributes.get("aria-label", "") for name, attributes in random_run.tags if name == "svg"
    }
    for expected in (
        "Score: mean score against step",
        "Pass rate: share met against step",
        "Criteria without signal: share of the criteria against step",
        "Bad updates: share of the pairs against step",
        "Waited for judges: seconds against step",
    ):
        assert expected in labels
    assert "judged by judge-32b" in random_run.all
    assert "The loss used no probabilities of a teacher." in random_run.all
    assert row(random_run, "unavailable")[1] != "0"


@pytest.mark.usefixtures("words_alone")
def test_an_example_shows_who_meets_what(tmp_path):
    criteria = [
        criterion(1, "task", 5, text="Names the capital"),
        criterion(2, "quality", 2, "negative", text="Guesses"),
    ]
    texts = {
        "question": "What is the capital?",
        "references": ["Bern."],
        "answers": ["Bern", "Zürich"],
    }
    rows = [judged(1, 3, ((1, 1), (0, 1)), criteria, [1, 0], references_met=((1, 0),), **texts)]
    parser = read(write_judged(tmp_path / "run", rows))
    assert row(parser, "Names the capital") == [
        "Names the capital",
        "task",
        "5",
        "✓",
        "✓",
        "✗",
        "1 of 2",
    ]
    assert row(parser, "flaw Guesses") == [
        "flaw Guesses",
        "quality",
        "2",
        "✓",
        "✗",
        "✗",
        "0 of 2, all alike",
    ]
    assert row(parser, "score", "", "")[3:6] == ["1.00", "0.71", "0.00"]
    assert row(parser, "the final answer is")[4:6] == ["right", "wrong"]
    assert "Rollout 1: score 0.00; wrong answer" in parser.all


def test_what_judges_and_students_write_is_never_html(tmp_path):
    criteria = [criterion(1, NASTY, text=NASTY, stage=NASTY), criterion(2)]
    texts = {
        "question": NASTY,
        "references": [NASTY],
        "answers": [NASTY, NASTY],
        "reflections": [NASTY, None],
    }
    rows = [
        judged(
            1,
            NASTY,
            ((1, 0), (0, 1)),
            criteria,
            [1, 0],
            problems={NASTY: 1},
            repairs={NASTY: 2},
            **texts,
        )
    ]
    stages = [judged(2, 1, ((1, 0), (0, 1)), criteria, stage_scores=[[1.0, 0.0], [0.0, 1.0]])]
    spent = {f"api/{NASTY}/calls": 1.0, f"api/{NASTY}/dollars": 0.0}
    metrics = [judge_metric(1, **spent), judge_metric(2)]
    parser = read(
        write_judged(
            tmp_path / "run",
            rows + stages,
            metrics=metrics,
            rubrics_config={"stages": [NASTY, "answer=;"]},
        )
    )
    assert "<script>alert" not in parser.source
    assert parser.all.count("alert(1)") > 8


def test_stages_have_a_chart_and_a_table(tmp_path):
    rows = random_rows(6, 2, stages=STAGES, fail=0)
    parser = read(
        write_judged(
            tmp_path / "run",
            rows,
            recipe="ropd_stages",
            rubrics_config={"stages": ["work", "answer=#"]},
        )
    )
    assert "stages" in parser.ids
    assert len(row(parser, "work")) == 4


@pytest.mark.usefixtures("words_alone")
def test_a_judge_without_rubrics(tmp_path):
    rows = [
        failed(
            step, status="scored", scores=[0.2, 0.8, 0.5, None], correct=[0, 1, 0, 0], problems={}
        )
        for step in (1, 2)
    ]
    parser = read(write_judged(tmp_path / "run", rows, recipe="tjudge"))
    assert "Rollouts scored 0.500 on average in the first 1 step" in parser.all
    assert row(parser, "all steps")[5].startswith("1.000")
    assert "Pass rate" not in parser.all


@pytest.mark.usefixtures("words_alone")
def test_cost_by_role_and_the_share_of_the_cache(tmp_path):
    parser = read(write_judged(tmp_path / "run", random_rows(4, 2)))
    verifier = row(parser, "verifier")
    assert verifier == [
        "verifier",
        "24",
        "8 (25 %)",
        "4",
        "48,000",
        "6,000",
        "1.50",
        "$0.04",
        "$0.01",
    ]
    assert row(parser, "all", "48")[-2:] == ["$0.12", "$0.03"]
    assert row(parser, "all", "48")[2:6] == ["16 (25 %)", "8", "96,000", "12,000"]
    assert "The learner waited for judges 40 % of its time (1 s)" in parser.all


@pytest.mark.usefixtures("words_alone")
def test_the_cost_of_steps_that_were_done_again_is_counted(tmp_path):
    spending = [
        {"step": step, "role": "verifier", "calls": 10, "cached": 0, "retries": 0, "dollars": 0.5}
        for step in (0, 1, 2, 2)
    ]
    parser = read(write_judged(tmp_path / "run", random_rows(2, 2), spending=spending))
    assert row(parser, "verifier")[1] == "40"
    assert "The whole run, with repeated steps." in parser.all


# Files


@pytest.mark.usefixtures("words_alone")
def test_a_torn_last_line_and_unknown_keys_are_no_error(tmp_path):
    rows = [judged(1, 0) | {"from": "a later version"}]
    directory = write_judged(tmp_path / "run", rows, torn='{"step": 2, "prom')
    assert list(read_judgements(directory)) == [1]
    assert "rubrics" in read(directory).ids


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"step": "one"}, "step"),
        ({"scores": [0.5]}, "scores"),
        ({"verdicts": [[1], [0]]}, "verdicts"),
        ({"rubric": "c1"}, "rubric"),
        ({"correct": [1]}, "correct"),
        ({"stage_scores": 3}, "stage_scores"),
        ({"samples": None}, "samples"),
    ],
)
def test_a_damaged_row_is_named(tmp_path, changes, named):
    directory = write_judged(
        tmp_path / "run", [judged(1)], torn=json.dumps(judged(1) | changes) + "\n", metrics=[]
    )
    with pytest.raises(WorkdirError, match=f"row 2 is no judgement: {named}"):
        write_report(directory)


def test_a_judged_run_that_has_only_begun(tmp_path):
    parser = read(write_judged(tmp_path / "run", [], metrics=[]))
    assert not {"rubrics", "judge-cost", "failures"} & set(parser.ids)


def test_a_run_in_which_every_group_failed(tmp_path):
    parser = read(
        write_judged(tmp_path / "run", [failed(step, at) for step in (1, 2) for at in range(3)])
    )
    assert "6 of 6 groups failed (100 %); 24 of 24 rollouts have no score." in parser.all
    assert "truth" not in parser.ids


def test_one_step_alone(tmp_path):
    parser = read(write_judged(tmp_path / "run", random_rows(1, 3, fail=0)))
    assert "in the one step so far" in parser.all


@pytest.mark.usefixtures("words_alone")
def test_other_runs_say_nothing_of_judges(tmp_path):
    parser = read(write_run(tmp_path / "run"))
    assert not {"rubrics", "signal", "truth", "judge-cost", "failures", "judged"} & set(parser.ids)


@pytest.mark.usefixtures("words_alone")
def test_what_is_shown_to_a_teacher_is_called_no_reward(tmp_path):
    parser = read(write_judged(tmp_path / "run", random_rows(2, 2, fail=0), recipe="opd"))
    assert "is no reward here" in parser.all
