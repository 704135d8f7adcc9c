"""The facts of judged rollouts: what a judge rewards, its signal, its accuracy and its cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from opdjax.report import judgements, measures
from opdjax.report.judgements import JudgedGroup, Rate, Steps, Summary, summary
from opdjax.report.text import spread
from opdjax.runs.results import Run

_AUC_BINS, _AUC_GROUPS = 12, 24  # stretches of steps at most, groups per stretch at least
_EXAMPLES = 3  # steps


@dataclasses.dataclass(frozen=True)
class Cost:
    """Requests to judges by role in the whole run, with repeated steps."""

    roles: dict[str, dict[str, float]]
    total: dict[str, float]
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
    parts: dict[str, Summary]  # first, last and all steps
    changes: dict[str, Rate]  # of the rollouts' rates, last minus first
    auc_by_step: list[tuple[float, Rate]]
    auc_width: int  # steps at a time
    stage_names: list[str]
    examples: dict[int, JudgedGroup]  # by step
    num_logged: int  # steps with recorded texts


def judged_facts(run: Run) -> JudgedFacts | None:
    """None where rubrics.jsonl is missing or empty; WorkdirError for a damaged row."""
    stages = (run.config.get("rubrics") or {}).get("stages") or ()
    names = [stage.partition("=")[0] for stage in stages]
    steps = judgements.read_judgements(run.workdir, names)
    if not steps:
        return None
    groups, recipe, order = judgements.all_groups(steps), measures.recipe_of(run), list(steps)
    length, categories = measures.end_length(len(steps)), judgements.categories(groups)
    categories = categories if len(categories) > 1 else []
    ends = {"first": order[:length], "last": order[-length:], "all": order}
    parts = {
        name: summary([group for step in part for group in steps[step]], categories)
        for name, part in ends.items()
    }
    early, late = parts["first"].rates, parts["last"].rates
    auc_by_step, auc_width = _auc_by_step(steps)
    logged = [step for step, found in steps.items() if any(map(_has_texts, found))]
    return JudgedFacts(
        is_reward=recipe is not None and recipe.is_judged,
        has_rubrics=any(row.criteria for group in groups for row in group.rows),
        steps=order,
        end_length=length,
        series=_series([summary(found, categories) for found in steps.values()]),
        categories=categories,
        parts=parts,
        changes={
            name: late[name][0].less(first)
            for name, (first, _) in early.items()
            if first and late[name][0]
        },
        auc_by_step=auc_by_step,
        auc_width=auc_width,
        stage_names=names or [f"stage {at}" for at, _ in enumerate(parts["all"].stages, 1)],
        examples={step: _example(steps[step]) for step in spread(logged, _EXAMPLES)},
        num_logged=len(logged),
    )


def _series(parts: Sequence[Summary]) -> dict[str, list[float | None]]:
    """The numbers of each step by name."""
    rows = [*map(_numbers, parts)]
    # A step without a problem has no count of it.
    value = lambda row, name: row.get(name, 0.0 if name.startswith("problem") else None)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [value(row, name) for row in rows] for name in names}


def _numbers(part: Summary) -> dict[str, float | None]:
    over = lambda amount, whole: amount / whole if whole else None
    signal, pairs = part.signal, part.truth.pairs
    return {
        "share right": part.share_right,
        "bad updates": over(pairs.wrong, pairs.total),
        "tied groups": part.tied,
        "criteria": part.num_criteria,
        "failed groups": over(part.num_failed, part.num_groups),
        "alike": signal.share,
        "met by all": over(signal.met_by_all, signal.num_criteria),
        "met by none": over(signal.met_by_none, signal.num_criteria),
        **{f"stage {at}": value for at, value in enumerate(part.stages)},
        **{f"problem {kind}": float(amount) for kind, amount in part.problems.items()},
        **{name: own and own.value for name, (own, _) in part.rates.items()},
        **{f"references: {name}": of and of.value for name, (_, of) in part.rates.items()},
    }


def _auc_by_step(steps: Steps) -> tuple[list[tuple[float, Rate]], int]:
    """((middle step, AUC) of stretches of steps, steps of the longest stretch)."""
    order, groups = list(steps), sum(map(len, steps.values()))
    size = max(1, min(_AUC_BINS, len(order), groups // _AUC_GROUPS))
    stretches = [part.tolist() for part in np.array_split(np.array(order), size)]
    auc = lambda part: summary([group for step in part for group in steps[step]]).truth.auc
    found = [(sum(part) / len(part), auc(part)) for part in stretches]
    known = [(step, rate) for step, rate in found if rate is not None]
    return known, max(map(len, stretches))


def _has_texts(group: JudgedGroup) -> bool:
    return "answers" in group.rows[0].texts or "question" in group.rows[0].texts


def _example(groups: Sequence[JudgedGroup]) -> JudgedGroup:
    """The first group with texts whose scores differ; else the first with scores, or texts."""
    order = {False: 0, True: 1, None: 2}
    return min(filter(_has_texts, groups), key=lambda group: order[group.is_tied])


_USED = ("calls", "cached", "retries", "input_tokens", "output_tokens", "seconds", "dollars")


def cost_facts(run: Run) -> Cost | None:
    """Requests to judges and their cost; None where nothing was judged."""
    rows, waits = judgements.read_spending(run.workdir), run.column("time/judge_wait")
    if not rows and all(value is None for value in waits):
        return None
    used = lambda some: {name: float(sum(row.get(name) or 0 for row in some)) for name in _USED}
    roles = sorted({row["role"] for row in rows})
    waited, seconds = (sum(filter(None, values)) for values in (waits, run.column("time/step")))
    return Cost(
        {role: used([row for row in rows if row["role"] == role]) for role in roles},
        used(rows),
        waited,
        seconds,
    )


# For the template


def dollars(value: float) -> str:
    """Such as $12.30 or $0.0042."""
    if not value:
        return "$0"
    return f"${value:,.2f}" if value >= 0.1 else f"${float(f'{value:.2g}'):g}"


def role_columns(
    metrics: Mapping[str, Sequence[float | None]], roles: Sequence[str], *names: str
) -> list[tuple[int, list[float | None]]]:
    """`(slot, values by step)` of each role: the sum of its metrics, None where none is known."""
    found = []
    for slot, role in enumerate(roles):
        parts = [metrics[key] for name in names if (key := f"api/{role}/{name}") in metrics]
        rows = ([value for value in values if value is not None] for values in zip(*parts))
        found.append((slot, [sum(known) if known else None for known in rows]))
    return found
