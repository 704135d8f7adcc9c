"""The facts of judged rollouts: what a judge rewards, its signal, its accuracy and its cost."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from opdjax.config.rubrics import MAX_FAILED_SHARE
from opdjax.report import judgements, measures
from opdjax.report.judgements import JudgedGroup, JudgedRow, Pairs, Rate, Signal, Steps
from opdjax.report.text import spread
from opdjax.runs.results import Run, is_number, mean

_BINS = 10  # of a score from 0 to 1
_AUC_BINS, _AUC_GROUPS = 12, 24  # stretches of steps at most, groups per stretch at least
_EXAMPLES = 3  # steps
_ALL = "all criteria"


@dataclasses.dataclass(frozen=True)
class Truth:
    """Scores of right and wrong answers."""

    num_right: int
    num_wrong: int
    mean_right: float | None
    mean_wrong: float | None
    auc: Rate | None
    pairs: Pairs


@dataclasses.dataclass(frozen=True)
class PartFacts:
    """Numbers of the groups of some steps. Pass rates are by category, the last one of all
    criteria; pairs are (rollouts, references).
    """

    pass_rates: dict[str, tuple[Rate | None, Rate | None]]
    scores: tuple[Rate | None, Rate | None]
    truth: Truth
    stages: list[float]


@dataclasses.dataclass(frozen=True)
class Example:
    """A judged group with its texts; rows with rubrics of their own beyond two are left out."""

    rows: tuple[JudgedRow, ...]
    num_left_out: int
    group_mean: float | None


@dataclasses.dataclass(frozen=True)
class Cost:
    """Requests to judges by role; `is_whole`: with repeated steps, which metrics.jsonl lacks."""

    roles: dict[str, dict[str, float]]
    total: dict[str, float]
    is_whole: bool
    waited: float  # seconds that the learner waited for judges
    seconds: float  # of all steps


@dataclasses.dataclass(frozen=True)
class JudgedFacts:
    """All that the page states about judges. `series` has a value for each of `steps`."""

    is_reward: bool  # else the scores are only shown to a teacher
    has_rubrics: bool
    steps: list[int]
    end_length: int
    series: dict[str, list[float | None]]
    categories: list[str]
    parts: dict[str, PartFacts]  # first, last and all steps
    changes: dict[str, Rate]  # of the rollouts' pass rates, last minus first
    score_change: Rate | None
    signal: Signal
    tied: float | None
    auc_by_step: list[tuple[float, Rate]]
    auc_width: int  # steps at a time
    histogram: tuple[list[int], list[int]]  # right and wrong answers by tenth of the score
    stage_names: list[str]
    num_groups: int
    num_failed: int
    num_rollouts: int
    num_unscored: int
    problems: dict[str, int]
    repairs: dict[str, int]
    examples: dict[int, Example]  # by step
    num_logged: int  # steps with recorded texts


def judged_facts(run: Run) -> JudgedFacts | None:
    """None where rubrics.jsonl is missing or empty; WorkdirError for a damaged row."""
    stages = (run.config.get("rubrics") or {}).get("stages") or ()
    names = [stage.partition("=")[0] for stage in stages]
    steps = judgements.read_judgements(run.workdir, names)
    if not steps:
        return None
    groups, recipe = judgements.all_groups(steps), measures.recipe_of(run)
    length, categories = measures.end_length(len(steps)), judgements.categories(groups)
    categories = categories if len(categories) > 1 else []
    first, last = judgements.ends(steps, length)
    parts = {
        name: _part(part, categories)
        for name, part in (("first", first), ("last", last), ("all", groups))
    }
    early, late = parts["first"], parts["last"]
    right, wrong = judgements.scores_by_truth(groups)
    auc_by_step, auc_width = _auc_by_step(steps)
    num_stages = len(parts["all"].stages)
    if len(names) != num_stages:
        names = [f"stage {at + 1}" for at in range(num_stages)]
    logged = [step for step, found in steps.items() if any(map(_has_texts, found))]
    return JudgedFacts(
        is_reward=recipe is not None and recipe.is_judged,
        has_rubrics=any(row.criteria for group in groups for row in group.rows),
        steps=list(steps),
        end_length=length,
        series=_series(steps, categories, num_stages),
        categories=categories,
        parts=parts,
        changes={
            name: late.pass_rates[name][0].less(own)
            for name, (own, _) in early.pass_rates.items()
            if own and late.pass_rates[name][0]
        },
        score_change=late.scores[0].less(early.scores[0])
        if late.scores[0] and early.scores[0]
        else None,
        signal=judgements.signal(groups),
        tied=judgements.tied_share(groups),
        auc_by_step=auc_by_step,
        auc_width=auc_width,
        histogram=(_tenths(right), _tenths(wrong)),
        stage_names=names,
        num_groups=len(groups),
        num_failed=sum(group.is_failed for group in groups),
        num_rollouts=sum(group.scores.size for group in groups),
        num_unscored=sum(int((~np.isfinite(group.scores)).sum()) for group in groups),
        problems=dict(judgements.counted(groups, "problems").most_common()),
        repairs=dict(judgements.counted(groups, "repairs").most_common()),
        examples={step: _example(steps[step]) for step in spread(logged, _EXAMPLES)},
        num_logged=len(logged),
    )


def _part(groups: Sequence[JudgedGroup], categories: Sequence[str]) -> PartFacts:
    both = lambda measure: (measure(groups), measure(groups, of_references=True))
    right, wrong = judgements.scores_by_truth(groups)
    rates = {
        name: tuple(
            judgements.pass_rate(groups, name, categories, of_references=of) for of in (False, True)
        )
        for name in categories
    }
    return PartFacts(
        rates | {_ALL: both(judgements.pass_rate)},
        both(judgements.mean_score),
        Truth(
            right.size,
            wrong.size,
            *(mean(map(float, scores)) for scores in (right, wrong)),
            judgements.auc(groups),
            judgements.pairs(groups),
        ),
        judgements.stage_means(groups).tolist(),
    )


def _series(
    steps: Steps, categories: Sequence[str], num_stages: int
) -> dict[str, list[float | None]]:
    Measure = Callable[[list[JudgedGroup]], Any]
    share = lambda field: (
        lambda groups: (
            getattr(found, field) / found.num_criteria
            if (found := judgements.signal(groups)).num_criteria
            else None
        )
    )
    stage = lambda at: lambda groups: dict(enumerate(judgements.stage_means(groups))).get(at)
    measured: dict[str, Measure] = {
        "share right": judgements.share_right,
        "bad updates": lambda groups: (judgements.pairs(groups).shares() or (None,))[-1],
        "alike": share("alike"),
        "met by all": share("met_by_all"),
        "met by none": share("met_by_none"),
        "tied groups": judgements.tied_share,
        "criteria": judgements.num_criteria,
        "failed groups": judgements.failed_share,
    } | {f"stage {at}": stage(at) for at in range(num_stages)}
    problems = {
        kind for groups in steps.values() for kind in judgements.counted(groups, "problems")
    }
    for kind in problems:
        measured[f"problem {kind}"] = lambda groups, kind=kind: judgements.counted(
            groups, "problems"
        )[kind]
    for of in (False, True):
        prefix = "references: " if of else ""
        measured[f"{prefix}score"] = lambda groups, of=of: judgements.mean_score(
            groups, of_references=of
        )
        for name in [*categories, None]:
            measured[f"{prefix}met: {name or _ALL}"] = lambda groups, name=name, of=of: (
                judgements.pass_rate(groups, name, categories, of_references=of)
            )
    plain = lambda value: getattr(value, "value", value)  # of a Rate
    known = lambda value: float(value) if is_number(value) else None
    return {
        name: [known(plain(measure(groups))) for groups in steps.values()]
        for name, measure in measured.items()
    }


def _auc_by_step(steps: Steps) -> tuple[list[tuple[float, Rate]], int]:
    """((middle step, AUC) of stretches of steps, steps of the longest stretch)."""
    order, groups = list(steps), sum(map(len, steps.values()))
    size = max(1, min(_AUC_BINS, len(order), groups // _AUC_GROUPS))
    stretches = [part.tolist() for part in np.array_split(np.array(order), size)]
    found = [
        (sum(part) / len(part), judgements.auc(group for step in part for group in steps[step]))
        for part in stretches
    ]
    known = [(step, rate) for step, rate in found if rate is not None]
    return known, max(map(len, stretches))


def _tenths(scores: np.ndarray) -> list[int]:
    """Number of scores in each tenth; 1 is in the last, and rounding does not move 0.3 down."""
    tenths = np.clip(np.floor(scores * _BINS + 1e-6), 0, _BINS - 1).astype(int)
    return np.bincount(tenths, minlength=_BINS).tolist()


def _has_texts(group: JudgedGroup) -> bool:
    return "answers" in group.rows[0].texts or "question" in group.rows[0].texts


def _example(groups: Sequence[JudgedGroup]) -> Example:
    """The first group with texts whose scores differ; else the first with scores, or texts."""
    order = {False: 0, True: 1, None: 2}
    group = min(filter(_has_texts, groups), key=lambda group: order[group.is_tied])
    known = group.scores[np.isfinite(group.scores)]
    group_mean = float(known.mean()) if known.size > 1 else None
    return Example(group.rows[:2], len(group.rows[2:]), group_mean)


def cost_facts(run: Run) -> Cost | None:
    """Requests to judges and their cost; None where nothing was judged."""
    spending = judgements.read_spending(run.workdir)
    names = (re.fullmatch(r"api/([^/]+)/calls", name) for row in run.metrics for name in row)
    roles = sorted({match[1] for match in names if match} | {row["role"] for row in spending})
    if not roles and all(value is None for value in run.column("time/judge_wait")):
        return None
    rows: Iterable[tuple[str, dict[str, Any]]] = [(row["role"], row) for row in spending] or [
        (role, {name.removeprefix(f"api/{role}/"): value for name, value in row.items()})
        for role in roles
        for row in run.metrics
    ]
    found, total = {role: Counter() for role in roles}, Counter()
    for role, row in rows:
        used = {name: row[name] for name in _USED if is_number(row.get(name))}
        found[role].update(used)
        total.update(used)
    filled = lambda used: {name: float(used[name]) for name in _USED}
    waited, seconds = (
        sum(value for value in run.column(name) if value is not None)
        for name in ("time/judge_wait", "time/step")
    )
    return Cost(
        {role: filled(used) for role, used in found.items()},
        filled(total),
        bool(spending),
        waited,
        seconds,
    )


_USED = ("calls", "cached", "retries", "input_tokens", "output_tokens", "seconds", "dollars")


# For the template


def dollars(value: float) -> str:
    """Such as $12.30 or $0.0042."""
    if not value:
        return "$0"
    return f"${value:,.2f}" if value >= 0.1 else f"${float(f'{value:.2g}'):g}"


def added(*columns: Sequence[float | None]) -> list[float | None]:
    """The sums of the known values by step; None where none is known."""
    rows = ([value for value in values if value is not None] for values in zip(*columns))
    return [sum(known) if known else None for known in rows]


CONTEXT = {
    "dollars": dollars,
    "added": added,
    "ALL": _ALL,
    "is_number": is_number,
    "MAX_FAILED_SHARE": MAX_FAILED_SHARE,
}
