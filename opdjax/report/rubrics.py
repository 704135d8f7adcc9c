"""The part of a run's page that is about rewards that judges gave: what they praise, whether it is
true, what it took to have them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from opdjax.config.recipes import RECIPES
from opdjax.report import judgements, measures
from opdjax.report.charts import Chart, grid, legend
from opdjax.report.judgements import JudgedGroup, Rate, Steps
from opdjax.report.markup import Html, count, details, fixed, notice, section, table, table_row, tag
from opdjax.report.rollouts import percent
from opdjax.report.rubrics_charts import (
    auc_chart,
    from_columns,
    over_steps,
    smoothed,
    truth_histogram,
    truth_key,
    truth_table,
)
from opdjax.report.rubrics_cost import cost_section, failures_section
from opdjax.report.rubrics_examples import examples_section
from opdjax.runs.results import Run, is_number, mean

_STUDENT, _REFERENCES = 0, 1  # colours


def is_rewarded(run: Run) -> bool:
    """Whether the run's rewards are what a judge says of whole answers; a judge may also be asked
    for what a teacher is shown.
    """
    return RECIPES[run.config["estimator"]["recipe"]].is_judged


def judge_name(run: Run) -> str:
    """The model that gives the verdicts; "a judge" where the config does not tell."""
    return (run.config.get("verifier") or {}).get("model") or "a judge"


def judged_sections(run: Run) -> list[Html | None]:
    """Everything about rewards that judges gave; empty where the run has none."""
    steps = judgements.read_judgements(run.workdir, _stage_names(run))
    if not steps:
        return [_of_metrics(run), cost_section(run)]
    what = [
        rubrics_section(steps, is_reward=is_rewarded(run)),
        signal_section(steps),
        truth_section(steps),
        stages_section(run, steps),
    ]
    return [*what, failures_section(run, steps), cost_section(run), examples_section(steps)]


def _stage_names(run: Run) -> list[str]:
    return list((run.config.get("rubrics") or {}).get("stage_names") or ())


def end_length(steps: Steps) -> int:
    """Steps at the start, and as many at the end, that are compared; they never overlap where there
    are two.
    """
    return max(1, min(measures.end_length(len(steps)), len(steps) // 2))


# What is rewarded


def rubrics_section(steps: Steps, *, is_reward: bool) -> Html:
    """How many criteria rollouts and references meet, by kind, and the scores that come of it."""
    groups = judgements.all_groups(steps)
    has_rubrics = any(row.criteria for group in groups for row in group.rows)
    return section(
        "rubrics",
        "What the judge rewards" if is_reward else "What the judge says",
        tag("p", progress_sentence(steps), class_="told"),
        tag("p", _about(has_rubrics, is_reward), smoothed(len(steps)), class_="quiet"),
        legend([("rollouts of the student", _STUDENT), ("references", _REFERENCES)]),
        grid(figure for figure in _pass_charts(steps, groups, has_rubrics) if figure is not None),
        _pass_table(steps, groups, has_rubrics),
    )


def _about(has_rubrics: bool, is_reward: bool) -> str:
    use = (
        "is the reward"
        if is_reward
        else "is no reward here: a teacher that scores the tokens is shown what the judge said"
    )
    good = (
        "References, answers of a stronger model, are judged in the same way and never trained on: they show what the same judge gives a "
        "strong answer. Good: the student's line climbs towards theirs."
    )
    # The sections that follow speak of rewards and updates.
    good += (
        ""
        if is_reward
        else " What is said below of rewards is true of these scores, and no update is made of them."
    )
    if not has_rubrics:
        return f"A judge reads the rollouts of a prompt and gives each a score from 0 to 1, which {use}. {good}"
    return (
        "For each prompt a judge reads the student's rollouts beside the references and writes a rubric: criteria that tell better answers "
        "from worse, each with a weight. It then checks every answer against them. The score, the share of the weights whose criteria are "
        f"met, {use}. {good} Rubrics are usually written anew at every visit and aim at what the rollouts still lack, so a flat line need "
        "not mean that nothing was learned: look at the gap to the references as well."
    )


def progress_sentence(steps: Steps) -> str:
    """How the student's pass rate (without rubrics: its score) and its gap to the references went
    from start to end.
    """
    groups, length = judgements.all_groups(steps), end_length(steps)
    has_rubrics = judgements.pass_rate(groups) is not None
    measure = judgements.pass_rate if has_rubrics else judgements.mean_score
    what = "Rollouts met {} of the criteria" if has_rubrics else "Rollouts scored {} on average"
    shown = percent if has_rubrics else fixed
    if len(steps) < 2:
        rate = measure(groups)
        return (
            f"{what.format(shown(rate.value))} in the one step so far."
            if rate
            else "No rollout has a score yet."
        )
    early, late = (measure(part) for part in judgements.ends(steps, length))
    if early is None or late is None:
        rate = measure(groups)
        return f"{what.format(shown(rate.value))}." if rate else "No rollout has a score."
    change = late.less(early)
    is_clear = abs(change.value) > change.half_width
    verdict = (
        ("a clear rise" if change.value > 0 else "a clear fall") if is_clear else "no clear change"
    )
    over = f"in the first {count(length, 'step')} and {shown(late.value)} in the last {length:,}: {verdict}"
    return f"{what.format(shown(early.value))} {over}.{_gap_words(steps, length, measure, has_rubrics)}"


def _gap_words(steps: Steps, length: int, measure: Any, has_rubrics: bool) -> str:
    ends = judgements.ends(steps, length)
    gaps = [
        (other.value - own.value)
        for part in ends
        if (own := measure(part)) and (other := measure(part, of_references=True))
    ]
    if len(gaps) < 2:
        return ""
    first, last = (
        f"{100 * gap:.1f}".replace("-", "−") if has_rubrics else fixed(gap) for gap in gaps
    )
    return f" The references' lead went from {first} to {last}{' points' if has_rubrics else ''}."


def _pass_charts(
    steps: Steps, groups: Sequence[JudgedGroup], has_rubrics: bool
) -> list[Html | None]:
    def both(measure: Any) -> list[tuple[int, Any]]:
        return [(_STUDENT, measure), (_REFERENCES, lambda part: measure(part, of_references=True))]

    score = Chart(
        "Score",
        "step",
        "mean score",
        "Weights included; 1 where every criterion is met." if has_rubrics else None,
        y_range=(-0.02, 1.02),
    )
    found = [over_steps(score, steps, both(judgements.mean_score))]
    if not has_rubrics:
        return found
    about = "Share of the criteria that are met, each counted once whatever its weight."
    found.append(
        over_steps(
            _share_chart("Pass rate, all criteria", about), steps, both(judgements.pass_rate)
        )
    )
    named = judgements.categories(groups)
    for name in named if len(named) > 1 else ():
        chart = _share_chart(f"Pass rate, {name}", None)
        found.append(
            over_steps(
                chart,
                steps,
                both(lambda part, name=name, **kw: judgements.pass_rate(part, name, named, **kw)),
            )
        )
    return found


def _share_chart(title: str, about: str | None) -> Chart:
    return Chart(title, "step", "share met", about, y_range=(-0.02, 1.02))


def _pass_table(steps: Steps, groups: Sequence[JudgedGroup], has_rubrics: bool) -> Html | None:
    """Start against end, by kind of criterion (as Table 5 of the ROPD paper has it)."""
    if not has_rubrics or len(steps) < 2:
        return None
    length, named = end_length(steps), judgements.categories(groups)
    rows = [
        _pass_row(name, steps, length, name, named) for name in (named if len(named) > 1 else ())
    ]
    rows.append(_pass_row("all criteria", steps, length, None, named, class_="main"))
    head = [
        "criteria",
        f"rollouts: first {length:,}",
        f"last {length:,}",
        "change",
        f"references: first {length:,}",
        f"last {length:,}",
    ]
    caption = (
        f"Percent of criteria met in the first and in the last {count(length, 'step')} of {len(steps):,}. ± is half a 95 % interval that "
        "takes groups (the rollouts of one prompt) as independent. For scale: ROPD (arXiv 2605.07396, Table 5) reports 52.5 → 65.6 for a "
        "student of 4 B parameters."
    )
    return table([*head, "share of the criteria"], [*rows], caption=caption)


def _pass_row(
    label: str,
    steps: Steps,
    length: int,
    category: str | None,
    named: Sequence[str],
    **attributes: Any,
) -> Html:
    parts = judgements.ends(steps, length)
    own, other = (
        [judgements.pass_rate(part, category, named, of_references=kind) for part in parts]
        for kind in (False, True)
    )
    change = own[1].less(own[0]) if all(own) else None
    part, whole = (
        judgements.pass_rate(judgements.all_groups(steps), name, named) for name in (category, None)
    )
    share = percent(part.count / whole.count) if part and whole else "–"
    return table_row(
        [label, *map(_points, own), _points(change, signed=True), *map(_points, other), share],
        **attributes,
    )


def _points(rate: Rate | None, *, signed: bool = False) -> str:
    """Percent with half an interval, such as 54.0 ± 3.1."""
    if rate is None:
        return "–"
    sign = "+" if signed and rate.value > 0 else ""
    half = fixed(100 * rate.half_width, 1) if is_number(rate.half_width) else "∞"
    return f"{sign}{fixed(100 * rate.value, 1)} ± {half}"


# How much they tell apart


def signal_section(steps: Steps) -> Html | None:
    """What part of the judging says nothing that training could use."""
    groups = judgements.all_groups(steps)
    found, tied = judgements.signal(groups), judgements.tied_share(groups)
    if found.share is None and tied is None:
        return None
    told = []
    if found.share is not None:
        all_, none = (
            percent(found.met_by_all / found.num_criteria),
            percent(found.met_by_none / found.num_criteria),
        )
        told.append(
            f"{percent(found.share)} of the criteria told no rollout from another ({all_} were met by all of a group, {none} by none)"
        )
    if tied is not None:
        told.append(
            f"{percent(tied)} of the groups had one score for all rollouts and taught nothing"
        )
    about = (
        "Training compares the rollouts of one prompt. A criterion that all of them meet, or none, shifts every score alike and drops out; "
        "a group whose scores are all the same has no gradient at all. Good: low and steady. A growing share met by all means that prompts "
        "or rubrics have become too easy, one met by none that they are too hard."
    )
    key = (
        legend([("all alike", 0), ("met by all rollouts", 2), ("met by none", 1)])
        if found.share is not None
        else None
    )
    return section(
        "signal",
        "How much the judge tells apart",
        tag("p", "; ".join(told) + ".", class_="told"),
        tag("p", about, smoothed(len(steps)), class_="quiet"),
        key,
        grid(figure for figure in _signal_charts(steps) if figure is not None),
    )


def _signal_charts(steps: Steps) -> list[Html | None]:
    def share(field: str) -> Any:
        return lambda part: (
            lambda s: getattr(s, field) / s.num_criteria if s.num_criteria else None
        )(judgements.signal(part))

    alike = Chart(
        "Criteria without signal",
        "step",
        "share of the criteria",
        "Criteria on which all rollouts of their group got the same verdict.",
        bounds=(0, 1),
    )
    tied = Chart(
        "Tied groups",
        "step",
        "share of the groups",
        "Groups whose rollouts all have the same score.",
        bounds=(0, 1),
    )
    size = Chart(
        "Criteria in a rubric",
        "step",
        "criteria, mean",
        "More cost more tokens, and only those that tell apart help.",
    )
    return [
        over_steps(
            alike, steps, [(0, share("alike")), (2, share("met_by_all")), (1, share("met_by_none"))]
        ),
        over_steps(tied, steps, [(0, judgements.tied_share)]),
        over_steps(size, steps, [(0, judgements.num_criteria)]),
    ]


# Reward against truth


def truth_section(steps: Steps) -> Html | None:
    """Whether the reward prefers right answers; None where nobody knows which are."""
    groups = judgements.all_groups(steps)
    right, wrong = judgements.scores_by_truth(groups)
    if not right.size + wrong.size:
        return None
    about = (
        "The right answers of this run's prompts are known. They play no part in training, so they can tell whether the judge's reward is "
        "earned: whether a right final answer scores above a wrong one. Only differences inside of a group (rollouts of the same prompt) "
        "move the student, so the pairs of a group count most. A pair whose wrong answer scores higher is a bad update: it pushes the "
        "student towards what is wrong. Good: AUC near 1, few bad updates, and the share of right answers rising along with the reward. A "
        "reward that rises alone is being exploited."
    )
    figures = [
        _reward_and_truth(steps),
        auc_chart(steps),
        _pairs_chart(steps),
        truth_histogram(right, wrong),
    ]
    key = legend([("mean reward", 0), ("share of right answers", 2)])
    return section(
        "truth",
        "Reward against right answers",
        tag("p", truth_sentence(groups), class_="told"),
        tag("p", about, smoothed(len(steps)), class_="quiet"),
        key,
        truth_key(),
        grid(figure for figure in figures if figure is not None),
        _truth_rows(steps),
        details("Answers by score", truth_table(right, wrong)),
    )


def truth_sentence(groups: Sequence[JudgedGroup]) -> str:
    """AUC and bad updates in words."""
    rate, pairs = judgements.auc(groups), judgements.pairs(groups)
    if rate is None:
        only = "right" if judgements.scores_by_truth(groups)[0].size else "wrong"
        return f"All scored answers are {only}, so that there is nothing to compare."
    first = f"A right answer scored above a wrong one with probability {_with_half(rate)} (AUC; 0.5 is chance)."
    if not pairs.total:
        return f"{first} No group held right and wrong answers together."
    return (
        f"{first} Of {count(pairs.total, 'pair')} of a right and a wrong answer to the same prompt, the right one scored higher in "
        f"{percent(pairs.right / pairs.total)}, the wrong one in {percent(pairs.wrong / pairs.total)} (bad updates), and "
        f"{percent(pairs.tied / pairs.total)} were tied."
    )


def _with_half(rate: Rate) -> str:
    return f"{fixed(rate.value)} ± {fixed(rate.half_width) if is_number(rate.half_width) else '∞'}"


def _reward_and_truth(steps: Steps) -> Html | None:
    about = "They should rise together; a reward that leaves the right answers behind is being exploited."
    chart = Chart(
        "Reward and right answers", "step", "mean reward, share right", about, bounds=(0, 1)
    )
    return over_steps(chart, steps, [(0, judgements.mean_score), (2, judgements.share_right)])


def _pairs_chart(steps: Steps) -> Html | None:
    def bad(part: list[JudgedGroup]) -> float | None:
        found = judgements.pairs(part)
        return found.wrong / found.total if found.total else None

    about = "Of all pairs of a right and a wrong answer to one prompt, those whose wrong answer scored higher. Good: near 0."
    return over_steps(
        Chart("Bad updates", "step", "share of the pairs", about, bounds=(0, 1)), steps, [(0, bad)]
    )


def _truth_rows(steps: Steps) -> Html:
    length, whole = end_length(steps), judgements.all_groups(steps)
    parts = {"all steps": whole}
    if len(steps) > 1:
        early, late = judgements.ends(steps, length)
        parts = {
            f"first {count(length, 'step')}": early,
            f"last {count(length, 'step')}": late,
        } | parts
    head = [
        "",
        "scored answers",
        "share right",
        "mean score: right",
        "wrong",
        "AUC",
        "pairs in groups",
        "right higher",
        "tied",
        "bad updates",
    ]
    rows = [
        table_row(
            _truth_row(name, part),
            class_="main" if name == "all steps" and len(parts) > 1 else None,
        )
        for name, part in parts.items()
    ]
    caption = (
        "AUC: over all pairs of a right and a wrong answer, of whatever prompt; ± is half a 95 % interval that takes groups as independent."
        " For scale: ROPD (arXiv 2605.07396, Table A4) reports an AUC of 0.90 and 15 % of bad updates over its own checkpoints."
    )
    return table(head, rows, caption=caption, class_="dense")


def _truth_row(name: str, groups: Sequence[JudgedGroup]) -> list[Any]:
    right, wrong = judgements.scores_by_truth(groups)
    rate, pairs = judgements.auc(groups), judgements.pairs(groups)
    shares = [
        percent(part / pairs.total) if pairs.total else "–"
        for part in (pairs.right, pairs.tied, pairs.wrong)
    ]
    means = [fixed(mean(map(float, scores))) for scores in (right, wrong)]
    amount = right.size + wrong.size
    share = percent(right.size / amount) if amount else "–"
    return [
        name,
        f"{amount:,}",
        share,
        *means,
        "–" if rate is None else _with_half(rate),
        f"{pairs.total:,}",
        *shares,
    ]


# Stages


def stages_section(run: Run, steps: Steps) -> Html | None:
    """The scores of an answer's stages; None where answers are not divided."""
    means = judgements.stage_means(judgements.all_groups(steps))
    if not means.size:
        return None
    names = _stage_names(run)
    names = (
        names if len(names) == means.size else [f"stage {place + 1}" for place in range(means.size)]
    )
    parts = [
        (place, lambda groups, place=place: _at(judgements.stage_means(groups), place))
        for place in range(min(len(names), 6))
    ]
    about = (
        "Answers are divided into stages, and each stage is scored by the criteria that look at it, so that credit goes to the tokens that "
        "earned it (RubricEM, arXiv 2605.10899). A stage that stays low while the others rise is where the student is stuck."
    )
    chart = Chart(
        "Score of each stage",
        "step",
        "mean score",
        "Over rollouts whose rubric looks at the stage.",
        y_range=(-0.02, 1.02),
    )
    ends = [judgements.stage_means(part) for part in judgements.ends(steps, end_length(steps))]
    rows = [
        [name, *(fixed(_at(one, place)) for one in ends), fixed(_at(means, place))]
        for place, name in enumerate(names)
    ]
    length = end_length(steps)
    head = ["stage", f"first {count(length, 'step')}", f"last {count(length, 'step')}", "all"]
    figure = over_steps(chart, steps, parts)
    return section(
        "stages",
        "Stages of an answer",
        tag("p", about, smoothed(len(steps)), class_="quiet"),
        legend([(name, place) for place, name in enumerate(names[:6])]),
        grid([figure] if figure is not None else []),
        table(head, rows),
    )


def _at(values: np.ndarray, place: int) -> float:
    return float(values[place]) if place < values.size else math.nan


# Without rows


def _of_metrics(run: Run) -> Html | None:
    """What metrics.jsonl alone tells where rubrics.jsonl is missing; None where it tells nothing."""
    order = measures.steps_of(run)
    charts = {
        "Score": (
            "mean score",
            ("rubric/reward_mean", "rubric/reference_score_mean"),
            "The reward, and the score of the references.",
        ),
        "Criteria without signal": (
            "share",
            ("rubric/no_signal_share",),
            "Criteria that all rollouts of a group meet alike.",
        ),
        "Tied groups": (
            "share",
            ("rubric/tied_groups",),
            "Groups whose rollouts all have the same score.",
        ),
        "Criteria in a rubric": ("criteria, mean", ("rubric/num_criteria",), None),
        "AUC": (
            "AUC",
            ("rubric/auc",),
            "The chance that a right answer scores above a wrong one of the same step.",
        ),
        "Failed groups": ("share", ("rubric/failed_share",), "Groups that have no reward."),
    }
    figures = [
        from_columns(
            Chart(title, "step", label, about),
            order,
            [(slot, run.column(name)) for slot, name in enumerate(names)],
        )
        for title, (label, names, about) in charts.items()
    ]
    if all(figure is None for figure in figures):
        return None
    missing = notice(
        f"{judgements.ROWS} is missing or empty, so this is what metrics.jsonl tells by itself."
    )
    key = legend([("rollouts of the student", _STUDENT), ("references", _REFERENCES)])
    return section(
        "rubrics",
        "What the judge rewards",
        missing,
        tag("p", smoothed(len(order)).strip() or None, class_="quiet"),
        key,
        grid(figure for figure in figures if figure is not None),
    )
