"""The facts of judged rollouts: what a judge rewards, its signal, its accuracy and its cost."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from opdjax.config.recipes import RECIPES
from opdjax.report import measures
from opdjax.report.text import spread
from opdjax.runs.results import Run, is_number, mean
from opdjax.runs.statistics import clustered_auc, clustered_ratio
from opdjax.runs.workdir import WorkdirError, read_lines

ROWS, SPENDING = "rubrics.jsonl", "spending.jsonl"
MET = "met: all criteria"  # name of a rate
_EXAMPLES = 3  # steps
_TEXTS = ("question", "references", "answers", "reflections")


# Reading


@dataclasses.dataclass(frozen=True)
class JudgedRow:
    """One row: n rollouts of a prompt and m references, judged by one rubric of K criteria.

    NaN: judging failed.
    """

    step: int
    prompt_id: Any
    samples: tuple[int, ...]
    criteria: tuple[dict[str, Any], ...]  # empty: scored without a rubric, or failed
    met: np.ndarray  # [n, K], how far a rollout meets a criterion, 0 to 1
    reference_met: np.ndarray  # [m, K]
    scores: np.ndarray  # [n], 0 to 1: the rewards
    reference_scores: np.ndarray  # [m]
    stage_scores: np.ndarray | None  # [n, stages]; NaN also for a stage without criteria
    correct: np.ndarray | None  # [n], whether the answer is right; None: unknown
    problems: dict[str, int]  # unusable replies by kind
    repairs: dict[str, int]  # repaired replies by kind of repair
    texts: dict[str, Any]  # those of _TEXTS that were recorded


@dataclasses.dataclass(frozen=True)
class JudgedGroup:
    """All rollouts of a prompt in a step: one row, or one row per rollout with its own rubric."""

    rows: tuple[JudgedRow, ...]

    @property
    def scores(self) -> np.ndarray:
        """Of all rollouts; NaN where judging failed."""
        return np.concatenate([row.scores for row in self.rows])

    @property
    def correct(self) -> np.ndarray | None:
        """Of all rollouts; None unless known of all."""
        known = [row.correct for row in self.rows]
        return None if any(one is None for one in known) else np.concatenate(known)

    @property
    def is_failed(self) -> bool:
        """Whether fewer than two rollouts have a score, so that there is no advantage."""
        return int(np.isfinite(self.scores).sum()) < 2

    @property
    def is_tied(self) -> bool | None:
        """Whether all scores are equal; None where the group failed."""
        return None if self.is_failed else np.unique(self.scores[~np.isnan(self.scores)]).size == 1


Steps = dict[int, list[JudgedGroup]]  # by step, ascending


def read_judgements(workdir: pathlib.Path, stages: Sequence[str] = ()) -> Steps:
    """All judged groups; empty where nothing was judged.

    `stages` names the stage scores. WorkdirError for a damaged row; an incomplete last line is
    skipped.
    """
    file, found = workdir / ROWS, {}
    for number, row in enumerate(read_lines(file), 1):
        wrong = _wrong_fields(row)
        if wrong:
            raise WorkdirError(
                f"{file}, row {number} is no judgement: {', '.join(wrong)} missing or of the wrong"
                f" type: {json.dumps(row)[:80]}; only the report reads this row: it may be deleted"
            )
        judged = _judged(row, stages)
        rows = found.setdefault(judged.step, [])
        # Rubrics of single rollouts come in consecutive rows. A repeated sample starts a new group.
        own = rows[-1] if rows and rows[-1][0].prompt_id == judged.prompt_id else []
        if not own or any(set(row.samples) & set(judged.samples) for row in own):
            rows.append(own := [])
        own.append(judged)
    return {step: [JudgedGroup(tuple(rows)) for rows in found[step]] for step in sorted(found)}


def _wrong_fields(row: dict[str, Any]) -> list[str]:
    """The fields of a row that are missing or of the wrong type or length."""
    rubric, samples = row.get("rubric"), row.get("samples")
    is_list = lambda value, size=None: isinstance(value, list) and size in (None, len(value))
    is_criterion = lambda item: isinstance(item, dict) and is_number(item.get("weight"))
    is_right = {"step": type(row.get("step")) is int, "prompt_id": "prompt_id" in row}
    is_right |= {"samples": is_list(samples), "scores": is_list(row.get("scores"))}
    is_right["rubric"] = rubric is None or (is_list(rubric) and all(map(is_criterion, rubric)))
    if all(is_right.values()):
        for name in ("scores", "verdicts", "correct", "stage_scores"):
            is_own = row.get(name) is None or is_list(row[name], len(samples))
            is_right[f"{name} (one a sample)"] = is_own
        is_verdict = lambda one: is_list(one, len(rubric)) and all(map(is_number, one))
        for name in ("verdicts", "reference_verdicts") if rubric is not None else ():
            lists = [one for one in row.get(name) or () if one is not None]
            is_right[f"{name} (one a criterion)"] = all(map(is_verdict, lists))
    return [name for name, right in is_right.items() if not right]


def _judged(row: dict[str, Any], stages: Sequence[str]) -> JudgedRow:
    criteria = tuple(_criterion(item) for item in row.get("rubric") or ())
    size, correct = len(row["samples"]), row.get("correct")
    return JudgedRow(
        step=row["step"],
        prompt_id=row["prompt_id"],
        samples=tuple(row["samples"]),
        criteria=criteria,
        met=_met(criteria, row.get("verdicts") or [None] * size),
        reference_met=_met(criteria, row.get("reference_verdicts") or []),
        scores=_floats(row["scores"]),
        reference_scores=_floats(row.get("reference_scores") or ()),
        stage_scores=_stage_scores(row, criteria, stages),
        correct=None if correct is None else np.array(correct, bool),
        problems=row.get("problems") or {},
        repairs=row.get("repairs") or {},
        texts={name: row[name] for name in _TEXTS if row.get(name) is not None},
    )


def _criterion(item: dict[str, Any]) -> dict[str, Any]:
    """An answer meets a flaw by not having it; graded verdicts are 0, 1, 2 instead of 0, 1."""
    return {
        "category": " ".join(str(item.get("category", "")).casefold().split()) or "no category",
        "text": str(item.get("text", "")),
        "weight": float(item["weight"]),
        "is_flaw": item.get("polarity") == "negative",
        "is_graded": item.get("grade") == "graded",
        "stage": item.get("stage"),
    }


def _met(criteria: Sequence[dict[str, Any]], verdicts: Sequence[list | None]) -> np.ndarray:
    """How far each criterion is met, 0 to 1; a graded verdict of 1 counts half."""
    width = len(criteria)
    known = [one if one is not None and criteria else [math.nan] * width for one in verdicts]
    found = np.array(known, float).reshape(len(verdicts), width)
    found = found / np.array([2.0 if each["is_graded"] else 1.0 for each in criteria])
    return np.where(np.array([each["is_flaw"] for each in criteria], bool), 1 - found, found)


def _stage_scores(
    row: dict[str, Any], criteria: Sequence[dict[str, Any]], stages: Sequence[str]
) -> np.ndarray | None:
    """The recorded scores; a stage without criteria has a recorded score of 0, here NaN."""
    lists = row.get("stage_scores")
    width = max((len(one) for one in lists or () if one), default=0)
    if not width:
        return None
    found = np.array([[math.nan] * width if one is None else _floats(one) for one in lists], float)
    judged = {criterion["stage"] for criterion in criteria}
    if len(stages) == width and judged - {None}:
        found[:, [stage not in judged for stage in stages]] = math.nan
    return found


def _floats(values: Sequence[Any]) -> np.ndarray:
    return np.array([value if is_number(value) else math.nan for value in values], float)


def all_groups(steps: Steps) -> list[JudgedGroup]:
    """The groups of all steps."""
    return [group for groups in steps.values() for group in groups]


# The facts of a run


def judged_facts(run: Run) -> dict[str, Any] | None:
    """None where rubrics.jsonl is missing or empty; WorkdirError for a damaged row."""
    stages = (run.config.get("rubrics") or {}).get("stages") or ()
    names = [stage.partition("=")[0] for stage in stages]
    steps = read_judgements(run.workdir, names)
    if not steps:
        return None
    groups, recipe, order = (
        all_groups(steps),
        RECIPES.get(run.config["estimator"]["recipe"]),
        list(steps),
    )
    length = measures.end_length(len(steps))
    ends = {"first": order[:length], "last": order[-length:], "all": order}
    parts = {
        name: summary([group for step in part for group in steps[step]])
        for name, part in ends.items()
    }
    early, late = parts["first"]["rates"], parts["last"]["rates"]
    logged = [step for step, some in steps.items() if any(map(_has_texts, some))]
    changes = {name: (late[name][0], first) for name, (first, _) in early.items()}
    return {
        "is_reward": recipe is not None and recipe.is_judged,  # else only shown to a teacher
        "has_rubrics": any(row.criteria for group in groups for row in group.rows),
        "steps": order,
        "end_length": length,
        "series": _series([summary(some) for some in steps.values()]),  # by step
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
    rows = [row for row in read_lines(run.workdir / SPENDING) if isinstance(row.get("role"), str)]
    waits = run.column("time/judge_wait")
    if not rows and all(value is None for value in waits):
        return None
    used = lambda some: {name: float(sum(row.get(name) or 0 for row in some)) for name in _USED}
    roles = sorted({row["role"] for row in rows})
    waited, seconds = (sum(filter(None, values)) for values in (waits, run.column("time/step")))
    by_role = {role: used([row for row in rows if row["role"] == role]) for role in roles}
    return {"roles": by_role, "total": used(rows), "waited": waited, "seconds": seconds}


def dollars(value: float) -> str:
    """Such as $12.30 or $0.0042."""
    if not value:
        return "$0"
    return f"${value:,.2f}" if value >= 0.1 else f"${float(f'{value:.2g}'):g}"


# Numbers of some groups


class Rate(NamedTuple):
    """A mean, half its 95 % interval (infinite for one group) and its number of values."""

    value: float
    half_width: float
    count: int

    def less(self, other: Rate) -> Rate:
        """The difference of two rates that share no group."""
        half = math.hypot(self.half_width, other.half_width)
        return Rate(self.value - other.value, half, min(self.count, other.count))


def summary(groups: Sequence[JudgedGroup]) -> dict[str, Any]:
    """The numbers of the groups; None: not known.

    `rates` of (rollouts, references): the mean `score`, and MET, the share of criteria met, without
    weights. The others are counts and shares.
    """
    rows = [row for group in groups for row in group.rows]
    met = tuple(pass_rate(groups, of_references=of) for of in (False, True))
    tally = lambda name: sum((Counter(getattr(row, name)) for row in rows), Counter())
    scores = _rate(groups, lambda row: row.scores), _rate(groups, lambda row: row.reference_scores)
    correct = [right for group in groups if (right := group.correct) is not None]
    failed = [group.is_failed for group in groups]
    return {
        "num_groups": len(groups),
        "num_failed": sum(failed),
        "failed groups": mean(map(float, failed)),
        "num_rollouts": sum(group.scores.size for group in groups),
        "num_unscored": sum(int((~np.isfinite(group.scores)).sum()) for group in groups),
        "rates": {"score": scores, MET: met},
        "stages": _stage_means(rows),
        # Groups with scores whose rollouts all have the same score.
        "tied groups": mean(float(group.is_tied) for group in groups if not group.is_failed),
        "criteria": mean(len(row.criteria) for row in rows if row.criteria),  # in a rubric
        # Of rollouts whose correctness is known, scored or not.
        "share right": mean(np.concatenate(correct).astype(float).tolist()) if correct else None,
        **_signal(rows),
        **_truth(groups),
        "problems": dict(tally("problems").most_common()),
        "repairs": dict(tally("repairs").most_common()),
    }


def pass_rate(groups: Sequence[JudgedGroup], *, of_references: bool = False) -> Rate | None:
    """Share of criteria that rollouts (or references) meet, unweighted; None without verdicts."""
    return _rate(groups, lambda row: (row.reference_met if of_references else row.met).ravel())


def _rate(groups: Sequence[JudgedGroup], values: Callable[[JudgedRow], np.ndarray]) -> Rate | None:
    """The mean of the finite values; the values of a group are correlated."""
    known = (np.concatenate([values(row) for row in group.rows]) for group in groups)
    known = [one[np.isfinite(one)] for one in known]
    known = [one for one in known if one.size]
    if not known:
        return None
    counts = [one.size for one in known]
    return Rate(*clustered_ratio([one.sum() for one in known], counts), sum(counts))


def _stage_means(rows: Iterable[JudgedRow]) -> list[float | None]:
    known = [row.stage_scores for row in rows if row.stage_scores is not None]
    return [mean(column.tolist()) for column in np.concatenate(known).T] if known else []


def _signal(rows: Iterable[JudgedRow]) -> dict[str, float | None]:
    """Shares of the criteria that judged at least two rollouts and gave all the same verdict."""
    counts = np.zeros(4)
    for row in rows:
        known = row.met[np.isfinite(row.met).all(axis=1)]
        if row.criteria and len(known) > 1:  # a single rollout is always like itself
            alike = (known == known[0]).all(axis=0)
            by_all, by_none = (alike & (known[0] == value) for value in (1, 0))
            counts += [alike.size, alike.sum(), by_all.sum(), by_none.sum()]
    total, *found = counts.tolist()
    names = ("alike", "met by all", "met by none")
    return {name: number / total if total else None for name, number in zip(names, found)}


def _truth(groups: Iterable[JudgedGroup]) -> dict[str, Any]:
    """Scores of right and wrong answers: `auc` of all pairs, shares of the pairs of one group."""
    known = [
        (group.scores[has], correct[has])
        for group in groups
        if (correct := group.correct) is not None and (has := np.isfinite(group.scores)).any()
    ]
    empty = np.empty(0), np.empty(0, bool)
    scores, is_right = map(np.concatenate, zip(empty, *known))
    right, wrong = scores[is_right], scores[~is_right]
    auc, count = None, right.size * wrong.size
    if count:
        group = np.repeat(np.arange(len(known)), [own.size for own, _ in known])
        auc = Rate(*clustered_auc(scores, is_right, group), count)
    pairs = [np.sign(own[good][:, None] - own[~good]).ravel() for own, good in known]
    signs = np.concatenate([empty[0], *pairs])
    share = lambda sign: mean((signs == sign).astype(float).tolist())
    return {
        "num_right": right.size,
        "num_wrong": wrong.size,
        "mean_right": mean(right.tolist()),
        "mean_wrong": mean(wrong.tolist()),
        "auc": auc,
        "num_pairs": signs.size,
        "right higher": share(1),
        "tied pairs": share(0),
        "bad updates": share(-1),
    }
