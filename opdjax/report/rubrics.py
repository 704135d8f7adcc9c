"""The sections of a run's page on judges' scores: what they reward, their signal and accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from opdjax.report import judgements, measures
from opdjax.report.charts import SERIES, by_step, draw_columns, grid, legend
from opdjax.report.judgements import JudgedGroup, Rate, Steps
from opdjax.report.markup import (
    Html,
    count,
    details,
    fixed,
    notice,
    percent,
    section,
    table,
    table_row,
)
from opdjax.report.rubrics_charts import (
    Measure,
    auc_chart,
    over_steps,
    truth_histogram,
    truth_key,
    truth_table,
)
from opdjax.report.rubrics_cost import cost_section, failures_section
from opdjax.report.rubrics_examples import examples_section
from opdjax.runs.results import Run, is_number, mean

_STUDENT, _REFERENCES = 0, 1  # colours
_WRITERS = [("rollouts of the student", _STUDENT), ("references", _REFERENCES)]
_UNIT = {"y_range": (-0.02, 1.02)}
_SHARE = {"bounds": (0, 1)}


def judge_name(run: Run) -> str:
    """The model that gives the verdicts; "a judge" where the config does not name it."""
    return (run.config.get("verifier") or {}).get("model") or "a judge"


def judged_sections(run: Run) -> list[Html | None]:
    """All sections on judges' scores; only None where the run has none."""
    steps = judgements.read_judgements(run.workdir, _stage_names(run))
    if not steps:
        return [_metrics_section(run), cost_section(run)]
    recipe = measures.recipe_of(run)
    return [
        rubrics_section(steps, is_reward=recipe is not None and recipe.is_judged),
        signal_section(steps),
        truth_section(steps),
        stages_section(run, steps),
        failures_section(run, steps),
        cost_section(run),
        examples_section(steps),
    ]


def _stage_names(run: Run) -> list[str]:
    stages = (run.config.get("rubrics") or {}).get("stages") or ()
    return [stage.partition("=")[0] for stage in stages]


# What is rewarded


def rubrics_section(steps: Steps, *, is_reward: bool) -> Html:
    """Scores, and the share of criteria that rollouts and references meet, by category."""
    groups = judgements.all_groups(steps)
    has_rubrics = any(row.criteria for group in groups for row in group.rows)
    return section(
        "rubrics",
        "What the judge rewards" if is_reward else "What the judge says",
        legend(_WRITERS),
        grid(_pass_charts(steps, groups, has_rubrics)),
        _pass_table(steps, groups) if has_rubrics and len(steps) > 1 else None,
        lead=progress_sentence(steps),
        about=_about(has_rubrics, is_reward) + measures.smoothing_note(len(steps)),
    )


def _about(has_rubrics: bool, is_reward: bool) -> str:
    use = "The score is the reward."
    if not is_reward:
        use = (
            "The score is no reward here: it is shown to a teacher that scores the tokens. The"
            " sections below call it the reward, but no update uses it."
        )
    how = "A judge reads the rollouts of a prompt and gives each a score from 0 to 1."
    hint = ""
    if has_rubrics:
        how = (
            "For each prompt, a judge compares the student's rollouts with the references and"
            " writes a rubric: weighted criteria that separate better answers from worse. It then"
            " checks every answer. The score is the weighted share of the criteria that are met."
        )
        hint = (
            " Rubrics are usually rewritten for every rollout and target what the rollouts lack, so"
            " a flat line does not prove that nothing was learned: compare with the references."
        )
    return (
        f"{how} {use} References are answers of a stronger model. They are judged in the same way"
        " and show what the judge gives a strong answer; they are never trained on. Good: the"
        f" student's line approaches theirs.{hint}"
    )


def progress_sentence(steps: Steps) -> str:
    """How the student's pass rate (or score) and its gap to the references changed."""
    groups, length = judgements.all_groups(steps), measures.end_length(len(steps))
    has_rubrics = judgements.pass_rate(groups) is not None
    measure = judgements.pass_rate if has_rubrics else judgements.mean_score
    what = "Rollouts met {} of the criteria" if has_rubrics else "Rollouts scored {} on average"
    shown = percent if has_rubrics else fixed
    ends = judgements.ends(steps, length)
    early, late = map(measure, ends)
    if len(steps) < 2 or early is None or late is None:
        rate = measure(groups)
        if rate is None:
            return "No rollout has a score."
        when = " in the one step so far" if len(steps) < 2 else ""
        return f"{what.format(shown(rate.value))}{when}."
    change = late.less(early)
    verdict = "no clear change"
    if abs(change.value) > change.half_width:
        verdict = "a clear rise" if change.value > 0 else "a clear fall"
    first = f"in the first {count(length, 'step')}"
    last = f"{shown(late.value)} in the last {length:,}"
    text = f"{what.format(shown(early.value))} {first} and {last}: {verdict}."
    pairs = [(measure(part), measure(part, of_references=True)) for part in ends]
    if not all(own and other for own, other in pairs):
        return text
    gaps = [other.value - own.value for own, other in pairs]
    first, last = (fixed(100 * gap, 1) if has_rubrics else fixed(gap) for gap in gaps)
    unit = " points" if has_rubrics else ""
    return f"{text} The references' lead went from {first} to {last}{unit}."


def _pass_charts(
    steps: Steps, groups: Sequence[JudgedGroup], has_rubrics: bool
) -> list[Html | None]:
    def both(measure: Any) -> list[tuple[int, Measure]]:
        return [(_STUDENT, measure), (_REFERENCES, lambda part: measure(part, of_references=True))]

    about = "With weights; 1 where every criterion is met." if has_rubrics else None
    score = by_step("Score", "mean score", about, **_UNIT)
    found = [over_steps(score, steps, both(judgements.mean_score))]
    if not has_rubrics:
        return found
    about = "Share of the criteria that are met, without weights."
    whole = by_step("Pass rate, all criteria", "share met", about, **_UNIT)
    found.append(over_steps(whole, steps, both(judgements.pass_rate)))
    named = judgements.categories(groups)
    for name in named if len(named) > 1 else ():
        chart = by_step(f"Pass rate, {name}", "share met", **_UNIT)
        of = lambda part, name=name, **kw: judgements.pass_rate(part, name, named, **kw)
        found.append(over_steps(chart, steps, both(of)))
    return found


def _pass_table(steps: Steps, groups: Sequence[JudgedGroup]) -> Html:
    """Start against end, by category (as in Table 5 of the ROPD paper)."""
    length, named = measures.end_length(len(steps)), judgements.categories(groups)
    names = named if len(named) > 1 else []
    rows = [table_row(_pass_row(name, steps, name, named)) for name in names]
    rows.append(table_row(_pass_row("all criteria", steps, None, named), class_="main"))
    last = f"last {length:,}"
    head = ["criteria", f"rollouts: first {length:,}", last, "change"]
    head += [f"references: first {length:,}", last, "share of the criteria"]
    caption = (
        f"Percent of criteria met in the first and last {count(length, 'step')} of {len(steps):,}."
        " ± is half a 95 % interval for independent groups (the rollouts of one prompt). For"
        " comparison: ROPD (arXiv 2605.07396, Table 5) reports 52.5 → 65.6 for a student of 4 B"
        " parameters."
    )
    return table(head, rows, caption=caption)


def _pass_row(label: str, steps: Steps, category: str | None, named: Sequence[str]) -> list[str]:
    parts, groups = (
        judgements.ends(steps, measures.end_length(len(steps))),
        judgements.all_groups(steps),
    )
    rate = lambda part, **kw: judgements.pass_rate(part, category, named, **kw)
    own, other = [*map(rate, parts)], [rate(part, of_references=True) for part in parts]
    change = own[1].less(own[0]) if all(own) else None
    part, whole = rate(groups), judgements.pass_rate(groups)
    share = percent(part.count / whole.count) if part and whole else "–"
    return [label, *map(_points, own), _points(change, signed=True), *map(_points, other), share]


def _points(rate: Rate | None, *, signed: bool = False) -> str:
    """Percent with half an interval, such as 54.0 ± 3.1."""
    if rate is None:
        return "–"
    sign = "+" if signed and rate.value > 0 else ""
    return sign + _with_interval(100 * rate.value, 100 * rate.half_width, 1)


def _with_interval(value: float, half_width: float, digits: int = 3) -> str:
    half = fixed(half_width, digits) if is_number(half_width) else "∞"
    return f"{fixed(value, digits)} ± {half}"


# Signal


def signal_section(steps: Steps) -> Html | None:
    """The share of criteria and groups that training cannot use; None where it is unknown."""
    groups = judgements.all_groups(steps)
    found, tied = judgements.signal(groups), judgements.tied_share(groups)
    if found.share is None and tied is None:
        return None
    leads, key = [], None
    if found.share is not None:
        key = legend([("same verdict for all", 0), ("met by all rollouts", 2), ("met by none", 1)])
        amounts = (found.met_by_all, found.met_by_none)
        all_, none = (percent(amount / found.num_criteria) for amount in amounts)
        same = f"{percent(found.share)} of the criteria gave all rollouts of a group one verdict"
        leads.append(f"{same} ({all_} were met by all, {none} by none)")
    if tied is not None:
        leads.append(f"{percent(tied)} of the groups had one score for all rollouts")
    about = (
        "Training compares the rollouts of one prompt. A criterion that all of them meet, or none,"
        " shifts every score alike and has no effect; a group with equal scores has no gradient."
        " Good: low and steady. A growing share met by all means that prompts or rubrics have"
        " become too easy; a growing share met by none, too hard."
        + measures.smoothing_note(len(steps))
    )
    figures = grid(_signal_charts(steps))
    title = "How well the judge separates answers"
    return section("signal", title, key, figures, lead="; ".join(leads) + ".", about=about)


def _signal_charts(steps: Steps) -> list[Html | None]:
    def share(field: str) -> Measure:
        def of(part: list[JudgedGroup]) -> float | None:
            found = judgements.signal(part)
            return getattr(found, field) / found.num_criteria if found.num_criteria else None

        return of

    alike = "Criteria with the same verdict for all rollouts of their group."
    tied = "Groups whose rollouts all have the same score."
    size = "More criteria cost more tokens; only those that separate rollouts help."
    shares = [(0, share("alike")), (2, share("met_by_all")), (1, share("met_by_none"))]
    charts = [
        (by_step("Criteria without signal", "share of the criteria", alike, **_SHARE), shares),
        (
            by_step("Tied groups", "share of the groups", tied, **_SHARE),
            [(0, judgements.tied_share)],
        ),
        (by_step("Criteria in a rubric", "criteria, mean", size), [(0, judgements.num_criteria)]),
    ]
    return [over_steps(chart, steps, parts) for chart, parts in charts]


# Reward against truth


def truth_section(steps: Steps) -> Html | None:
    """Whether the reward prefers right answers; None where right answers are unknown."""
    groups = judgements.all_groups(steps)
    right, wrong = judgements.scores_by_truth(groups)
    if not right.size + wrong.size:
        return None
    about = (
        "The right answers to this run's prompts are known and play no part in training, so they"
        " show whether a right final answer scores above a wrong one. Only differences inside a"
        " group (the rollouts of one prompt) move the student, so the pairs of a group matter most."
        " A pair whose wrong answer scores higher is a bad update. Good: AUC near 1, few bad"
        " updates, and a share of right answers that rises with the reward. A reward that rises"
        " alone is being exploited." + measures.smoothing_note(len(steps))
    )
    charts = (_reward_and_truth(steps), auc_chart(steps), _pairs_chart(steps))
    return section(
        "truth",
        "Reward against right answers",
        legend([("mean reward", 0), ("share of right answers", 2)]),
        truth_key(),
        grid([*charts, truth_histogram(right, wrong)]),
        _truth_rows(steps),
        details("Answers by score", truth_table(right, wrong)),
        lead=truth_sentence(groups),
        about=about,
    )


def truth_sentence(groups: Sequence[JudgedGroup]) -> str:
    """AUC and bad updates in words."""
    rate, pairs = judgements.auc(groups), judgements.pairs(groups)
    if rate is None:
        only = "right" if judgements.scores_by_truth(groups)[0].size else "wrong"
        return f"All scored answers are {only}, so the reward cannot be compared."
    value = _with_interval(rate.value, rate.half_width)
    text = f"A right answer scored above a wrong one with probability {value} (AUC; 0.5 is chance)."
    if not pairs.total:
        return f"{text} No group has both right and wrong answers."
    right, tied, wrong = map(percent, pairs.shares())
    return (
        f"{text} Of {count(pairs.total, 'pair')} of a right and a wrong answer to one prompt, the"
        f" right one scored higher in {right}, the wrong one in {wrong} (bad updates), and {tied}"
        " were tied."
    )


def _reward_and_truth(steps: Steps) -> Html | None:
    about = "They should rise together. A reward that rises alone is being exploited."
    title, label = "Reward and right answers", "mean reward, share right"
    parts = [(0, judgements.mean_score), (2, judgements.share_right)]
    return over_steps(by_step(title, label, about, **_SHARE), steps, parts)


def _pairs_chart(steps: Steps) -> Html | None:
    bad = lambda part: (judgements.pairs(part).shares() or (None,))[-1]
    about = (
        "Pairs of a right and a wrong answer to one prompt whose wrong answer scored higher. Good:"
        " near 0."
    )
    chart = by_step("Bad updates", "share of the pairs", about, **_SHARE)
    return over_steps(chart, steps, [(0, bad)])


def _truth_rows(steps: Steps) -> Html:
    parts = {}
    if len(steps) > 1:
        length = measures.end_length(len(steps))
        names = (f"{which} {count(length, 'step')}" for which in ("first", "last"))
        parts = dict(zip(names, judgements.ends(steps, length)))
    rows = [table_row(_truth_row(name, part)) for name, part in parts.items()]
    whole = _truth_row("all steps", judgements.all_groups(steps))
    rows.append(table_row(whole, class_="main" if parts else None))
    head = ["", "scored answers", "share right", "mean score: right", "wrong", "AUC"]
    head += ["pairs in groups", "right higher", "tied", "bad updates"]
    caption = (
        "AUC: over all pairs of a right and a wrong answer, of any prompts; ± is half a 95 %"
        " interval for independent groups. For comparison: ROPD (arXiv 2605.07396, Table A4)"
        " reports an AUC of 0.90 and 15 % of bad updates over its checkpoints."
    )
    return table(head, rows, caption=caption, class_="dense")


def _truth_row(name: str, groups: Sequence[JudgedGroup]) -> list[Any]:
    right, wrong = judgements.scores_by_truth(groups)
    rate, pairs = judgements.auc(groups), judgements.pairs(groups)
    amount = right.size + wrong.size
    return [
        name,
        f"{amount:,}",
        percent(right.size / amount) if amount else "–",
        *(fixed(mean(map(float, scores))) for scores in (right, wrong)),
        "–" if rate is None else _with_interval(rate.value, rate.half_width),
        f"{pairs.total:,}",
        *map(percent, pairs.shares() or (None,) * 3),
    ]


# Stages


def stages_section(run: Run, steps: Steps) -> Html | None:
    """The scores of an answer's stages; None where answers have no stages."""
    means = judgements.stage_means(judgements.all_groups(steps))
    if not means.size:
        return None
    names = _stage_names(run)
    if len(names) != means.size:
        names = [f"stage {at + 1}" for at in range(means.size)]
    about = (
        "Answers are divided into stages. Each stage is scored by its own criteria, so that credit"
        " goes to the tokens that earned it (RubricEM, arXiv 2605.10899). A stage that stays low"
        " while the others rise is where the student is stuck."
        + measures.smoothing_note(len(steps))
    )
    of: Callable[[int], Measure] = lambda at: lambda part: _at(judgements.stage_means(part), at)
    lines = [(at, of(at)) for at in range(min(len(names), SERIES))]
    caption = "Over rollouts whose rubric has criteria for the stage."
    chart = by_step("Score of each stage", "mean score", caption, **_UNIT)
    length = measures.end_length(len(steps))
    parts = [*map(judgements.stage_means, judgements.ends(steps, length)), means]
    rows = [[name, *(fixed(_at(part, at)) for part in parts)] for at, name in enumerate(names)]
    head = ["stage", f"first {count(length, 'step')}", f"last {count(length, 'step')}", "all"]
    return section(
        "stages",
        "Stages of an answer",
        legend([(name, at) for at, name in enumerate(names[:SERIES])]),
        grid([over_steps(chart, steps, lines)]),
        table(head, rows),
        about=about,
    )


def _at(values: np.ndarray, place: int) -> float:
    return float(values[place]) if place < values.size else math.nan


# Without rubrics.jsonl


def _metrics_section(run: Run) -> Html | None:
    """The judges' metrics of metrics.jsonl, without rubrics.jsonl; None where there are none."""
    alike, tied = "Criteria with one verdict for a whole group.", "Groups with equal scores."
    auc = "Probability that a right answer scores above a wrong one of the step."
    scores = ("reward_mean", "reference_score_mean")
    charts = [
        ("Score", "mean score", "The reward, and the score of the references.", scores),
        ("Criteria without signal", "share", alike, ("no_signal_share",)),
        ("Tied groups", "share", tied, ("tied_groups",)),
        ("Criteria in a rubric", "criteria, mean", None, ("num_criteria",)),
        ("AUC", "AUC", auc, ("auc",)),
        ("Failed groups", "share", "Groups without a reward.", ("failed_share",)),
    ]
    steps = measures.steps_of(run)
    columns = lambda names: enumerate(run.column(f"rubric/{name}") for name in names)
    figures = [
        draw_columns(by_step(title, label, about), steps, columns(names))
        for title, label, about, names in charts
    ]
    if all(one is None for one in figures):
        return None
    return section(
        "rubrics",
        "What the judge rewards",
        notice(f"{judgements.ROWS} is missing or empty; these charts come from metrics.jsonl."),
        legend(_WRITERS),
        grid(figures),
        about=measures.smoothing_note(len(steps)).strip(),
    )
