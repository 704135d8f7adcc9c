"""The facts of judged rollouts: what a judge rewards, its signal, its accuracy and its cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opdjax.report import judgements, measures
from opdjax.report.judgements import JudgedGroup, summary
from opdjax.report.text import spread
from opdjax.runs.results import Run

_EXAMPLES = 3  # steps


def judged_facts(run: Run) -> dict[str, Any] | None:
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
    early, late = parts["first"]["rates"], parts["last"]["rates"]
    logged = [step for step, found in steps.items() if any(map(_has_texts, found))]
    changes = {name: (late[name][0], first) for name, (first, _) in early.items()}
    return {
        "is_reward": recipe is not None and recipe.is_judged,  # else only shown to a teacher
        "has_rubrics": any(row.criteria for group in groups for row in group.rows),
        "steps": order,
        "end_length": length,
        "series": _series([summary(found, categories) for found in steps.values()]),  # by step
        "categories": categories,
        "parts": parts,  # summaries of first, last and all steps
        # Of the rollouts' rates, last minus first.
        "changes": {name: two.less(one) for name, (two, one) in changes.items() if two and one},
        "stage_names": names or [f"stage {at}" for at, _ in enumerate(parts["all"]["stages"], 1)],
        "examples": {step: _example(steps[step]) for step in spread(logged, _EXAMPLES)},
        "num_logged": len(logged),  # steps with recorded texts
    }


_BY_STEP = ("share right", "bad updates", "tied groups", "criteria", "failed groups", "alike")
_BY_STEP += ("met by all", "met by none")


def _series(parts: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    """The numbers of each step by name."""
    rows = [
        {name: part[name] for name in _BY_STEP}
        | {f"stage {at}": value for at, value in enumerate(part["stages"])}
        | {name: own and own.value for name, (own, _) in part["rates"].items()}
        | {f"references: {name}": of and of.value for name, (_, of) in part["rates"].items()}
        for part in parts
    ]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _has_texts(group: JudgedGroup) -> bool:
    return "answers" in group.rows[0].texts or "question" in group.rows[0].texts


def _example(groups: Sequence[JudgedGroup]) -> JudgedGroup:
    """The first group with texts whose scores differ; else the first with scores, or texts."""
    order = {False: 0, True: 1, None: 2}
    return min(filter(_has_texts, groups), key=lambda group: order[group.is_tied])


_USED = ("calls", "cached", "retries", "input_tokens", "output_tokens", "seconds", "dollars")


def cost_facts(run: Run) -> dict[str, Any] | None:
    """Requests to judges by role, repeated steps included, and the seconds that the learner waited
    for judges and of all steps; None where nothing was judged.
    """
    rows, waits = judgements.read_spending(run.workdir), run.column("time/judge_wait")
    if not rows and all(value is None for value in waits):
        return None
    used = lambda some: {name: float(sum(row.get(name) or 0 for row in some)) for name in _USED}
    roles = sorted({row["role"] for row in rows})
    waited, seconds = (sum(filter(None, values)) for values in (waits, run.column("time/step")))
    by_role = {role: used([row for row in rows if row["role"] == role]) for role in roles}
    return {"roles": by_role, "total": used(rows), "waited": waited, "seconds": seconds}


# For the template


def dollars(value: float) -> str:
    """Such as $12.30 or $0.0042."""
    if not value:
        return "$0"
    return f"${value:,.2f}" if value >= 0.1 else f"${float(f'{value:.2g}'):g}"
