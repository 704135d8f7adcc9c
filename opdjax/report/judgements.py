"""Judges' verdicts and scores of a run, read from rubrics.jsonl, and the statistics of them.

Only numbers; the sections draw them.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from opdjax.runs.results import is_number
from opdjax.runs.workdir import WorkdirError, read_lines

ROWS, SPENDING = "rubrics.jsonl", "spending.jsonl"
OTHER = "other"  # all categories that are too rare for a chart of their own
_CATEGORIES = 4
_TEXTS = ("question", "references", "answers", "is_truncated", "reflections")


# Reading


@dataclasses.dataclass(frozen=True)
class CriterionRow:
    """One criterion of a rubric. An answer meets a flaw by not having it."""

    category: str
    text: str
    weight: float
    is_flaw: bool
    is_graded: bool  # verdicts are 0, 1, 2 instead of 0, 1
    stage: str | None


@dataclasses.dataclass(frozen=True)
class JudgedRow:
    """One row: n rollouts of a prompt and m references, judged by one rubric of K criteria.

    NaN: judging failed.
    """

    step: int
    prompt_id: Any
    samples: tuple[int, ...]
    criteria: tuple[CriterionRow, ...]  # empty: scored without a rubric, or failed
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
        known = self.scores[np.isfinite(self.scores)]
        return None if self.is_failed else bool((known == known[0]).all())


Steps = dict[int, list[JudgedGroup]]  # by step, ascending


def read_judgements(workdir: pathlib.Path, stages: Sequence[str] = ()) -> Steps:
    """All judged groups; empty where nothing was judged.

    `stages` names the stage scores, for rows that do not name them. WorkdirError for a damaged
    row; an incomplete last line is skipped.
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
        if rows and _is_same_group(rows[-1], judged):
            rows[-1].append(judged)
        else:
            rows.append([judged])
    return {step: [JudgedGroup(tuple(rows)) for rows in found[step]] for step in sorted(found)}


def _is_same_group(rows: list[JudgedRow], judged: JudgedRow) -> bool:
    is_new = not any(set(row.samples) & set(judged.samples) for row in rows)
    return rows[-1].prompt_id == judged.prompt_id and is_new


def _wrong_fields(row: dict[str, Any]) -> list[str]:
    """The fields of a row that are missing or of the wrong type or length."""
    is_list = lambda value: isinstance(value, list)
    wrong = [name for name in ("samples", "scores") if not is_list(row.get(name))]
    wrong += [] if type(row.get("step")) is int else ["step"]
    wrong += [] if "prompt_id" in row else ["prompt_id"]
    rubric = row.get("rubric")
    is_criterion = lambda item: isinstance(item, dict) and is_number(item.get("weight"))
    if rubric is not None and not (is_list(rubric) and all(map(is_criterion, rubric))):
        wrong.append("rubric")
    if wrong:
        return wrong
    size, width = len(row["samples"]), len(rubric or ())
    for name in ("scores", "verdicts", "correct", "stage_scores"):
        value = row.get(name)
        if value is not None and not (is_list(value) and len(value) == size):
            wrong.append(f"{name} (one a sample)")
    is_verdict = lambda one: is_list(one) and len(one) == width and all(map(is_number, one))
    for name in ("verdicts", "reference_verdicts"):
        lists = [one for one in row.get(name) or () if one is not None]
        if rubric is not None and not all(map(is_verdict, lists)):
            wrong.append(f"{name} (one a criterion)")
    return wrong


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
        stage_scores=_stage_scores(row, criteria, row.get("stages") or stages),
        correct=None if correct is None or None in correct else np.array(correct, float) > 0.5,
        problems=_counts(row.get("problems")),
        repairs=_counts(row.get("repairs")),
        texts={name: row[name] for name in _TEXTS if row.get(name) is not None},
    )


def _criterion(item: dict[str, Any]) -> CriterionRow:
    return CriterionRow(
        category=" ".join(str(item.get("category", "")).casefold().split()) or "no category",
        text=str(item.get("text", "")),
        weight=float(item["weight"]),
        is_flaw=item.get("polarity") == "negative",
        is_graded=item.get("grade") == "graded",
        stage=item.get("stage"),
    )


def _met(criteria: Sequence[CriterionRow], verdicts: Sequence[list | None]) -> np.ndarray:
    """How far each criterion is met, 0 to 1; a graded verdict of 1 counts half."""
    width = len(criteria)
    known = [one if one is not None and criteria else [math.nan] * width for one in verdicts]
    found = np.array(known, float).reshape(len(verdicts), width)
    found = found / np.array([2.0 if criterion.is_graded else 1.0 for criterion in criteria])
    return np.where(np.array([criterion.is_flaw for criterion in criteria], bool), 1 - found, found)


def _stage_scores(
    row: dict[str, Any], criteria: Sequence[CriterionRow], stages: Sequence[str]
) -> np.ndarray | None:
    """The recorded scores; a stage without criteria has a recorded score of 0, here NaN."""
    lists = row.get("stage_scores")
    width = max((len(one) for one in lists or () if one), default=0)
    if not width:
        return None
    found = np.array([[math.nan] * width if one is None else _floats(one) for one in lists], float)
    judged = {criterion.stage for criterion in criteria}
    if len(stages) == width and judged - {None}:
        found[:, [stage not in judged for stage in stages]] = math.nan
    return found


def _floats(values: Sequence[Any]) -> np.ndarray:
    return np.array([value if is_number(value) else math.nan for value in values], float)


def _counts(values: Any) -> dict[str, int]:
    items = values.items() if isinstance(values, dict) else ()
    return {str(name): int(value) for name, value in items if is_number(value)}


def read_spending(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Requests and their cost by step and role, repeated steps included; empty if not recorded."""
    return [row for row in read_lines(workdir / SPENDING) if isinstance(row.get("role"), str)]


def all_groups(steps: Steps) -> list[JudgedGroup]:
    """The groups of all steps."""
    return [group for groups in steps.values() for group in groups]


def ends(steps: Steps, length: int) -> tuple[list[JudgedGroup], list[JudgedGroup]]:
    """The groups of the first and of the last `length` judged steps."""
    order = list(steps)
    parts = (order[:length], order[-length:] if length else [])
    first, last = ([group for step in part for group in steps[step]] for part in parts)
    return first, last


# Pass rates


@dataclasses.dataclass(frozen=True)
class Rate:
    """A mean, half its 95 % interval (infinite for one group) and its number of values."""

    value: float
    half_width: float
    count: int

    def less(self, other: Rate) -> Rate:
        """The difference of two rates that share no group."""
        half = math.hypot(self.half_width, other.half_width)
        return Rate(self.value - other.value, half, min(self.count, other.count))


def _half_width(variance: float, size: int) -> float:
    """Half a 95 % interval (Student's t) from the sum of squares over `size` groups."""
    if size < 2:
        return math.inf
    return float(stdtrit(size - 1, 0.975)) * math.sqrt(variance * size / (size - 1))


def ratio(sums: Sequence[float], counts: Sequence[int]) -> Rate | None:
    """Sum over count of all groups, with an interval for independent groups; None without counts.

    Verdicts on the rollouts of a prompt are correlated: an interval for independent verdicts would
    be several times too narrow.
    """
    pairs = [(total, count) for total, count in zip(sums, counts) if count]
    if not pairs:
        return None
    total, count = np.array(pairs, float).T
    value, size = total.sum() / count.sum(), len(pairs)
    half = _half_width((((total - value * count) / count.sum()) ** 2).sum(), size)
    return Rate(float(value), half, int(count.sum()))


def categories(groups: Iterable[JudgedGroup]) -> list[str]:
    """The categories of criteria, the most frequent first; rare ones are merged into OTHER."""
    rows = (row for group in groups for row in group.rows)
    found = collections.Counter(c.category for row in rows for c in row.criteria).most_common()
    names = [name for name, _ in found]
    return names if len(names) <= _CATEGORIES + 1 else [*names[:_CATEGORIES], OTHER]


def pass_rate(
    groups: Sequence[JudgedGroup],
    category: str | None = None,
    named: Sequence[str] = (),
    *,
    of_references: bool = False,
) -> Rate | None:
    """Share of criteria met, without weights, over rollouts (or references) with verdicts.

    `category`: only that one; OTHER: all that are not in `named`. None without verdicts.
    """
    sums, counts = [], []
    for group in groups:
        values = [
            (row.reference_met if of_references else row.met)[:, _chosen(row, category, named)]
            for row in group.rows
        ]
        values = np.concatenate([one.ravel() for one in values])
        known = values[np.isfinite(values)]
        sums.append(float(known.sum()))
        counts.append(known.size)
    return ratio(sums, counts)


def _chosen(row: JudgedRow, category: str | None, named: Sequence[str]) -> np.ndarray:
    """Which criteria belong to the category, `[K]`; None: all."""
    is_other = lambda name: category == OTHER and name not in named
    names = [criterion.category for criterion in row.criteria]
    return np.array([category in (None, name) or is_other(name) for name in names], bool)


def mean_score(groups: Sequence[JudgedGroup], *, of_references: bool = False) -> Rate | None:
    """Mean reward of the rollouts, or mean score of the references."""
    parts = [
        np.concatenate([row.reference_scores for row in group.rows])
        if of_references
        else group.scores
        for group in groups
    ]
    known = [one[np.isfinite(one)] for one in parts]
    return ratio([float(one.sum()) for one in known], [one.size for one in known])


def stage_means(groups: Sequence[JudgedGroup]) -> np.ndarray:
    """Mean score of each stage, `[stages]`; NaN for a stage without scores."""
    rows = (row.stage_scores for group in groups for row in group.rows)
    known = [scores for scores in rows if scores is not None]
    width = max((scores.shape[1] for scores in known), default=0)
    known = [scores for scores in known if scores.shape[1] == width] or [np.empty((0, width))]
    scores = np.concatenate(known)
    count = np.isfinite(scores).sum(axis=0)
    means = np.full(width, math.nan)
    return np.divide(np.nansum(scores, axis=0), count, out=means, where=count > 0)


# Signal


@dataclasses.dataclass(frozen=True)
class Signal:
    """Numbers of criteria of rubrics that judged at least two rollouts."""

    num_criteria: int
    met_by_all: int
    met_by_none: int
    alike: int  # the same verdict for all rollouts; includes the two above

    @property
    def share(self) -> float | None:
        """Share of the criteria without signal."""
        return self.alike / self.num_criteria if self.num_criteria else None


def signal(groups: Iterable[JudgedGroup]) -> Signal:
    """How many criteria give every rollout the same verdict, so that training cannot use them."""
    counts = np.zeros(4, int)
    for row in (row for group in groups for row in group.rows if row.criteria):
        known = row.met[np.isfinite(row.met).all(axis=1)]
        if len(known) > 1:  # a single rollout is always like itself
            alike = (known == known[0]).all(axis=0)
            all_, none = (alike & (known[0] == value) for value in (1, 0))
            counts += [alike.size, all_.sum(), none.sum(), alike.sum()]
    return Signal(*map(int, counts))


def tied_share(groups: Iterable[JudgedGroup]) -> float | None:
    """Share of the groups with scores in which all rollouts have the same score."""
    known = [group.is_tied for group in groups if group.is_tied is not None]
    return sum(known) / len(known) if known else None


def failed_share(groups: Sequence[JudgedGroup]) -> float | None:
    """Share of the groups in which fewer than two rollouts have a score."""
    return sum(group.is_failed for group in groups) / len(groups) if groups else None


def num_criteria(groups: Iterable[JudgedGroup]) -> float | None:
    """Mean number of criteria of a rubric."""
    found = [len(row.criteria) for group in groups for row in group.rows if row.criteria]
    return sum(found) / len(found) if found else None


def counted(groups: Iterable[JudgedGroup], field: str) -> collections.Counter:
    """The sum of `problems` or `repairs`."""
    total: collections.Counter = collections.Counter()
    for row in (row for group in groups for row in group.rows):
        total.update(getattr(row, field))
    return total


# Reward against truth


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of a right and a wrong answer to one prompt, by which one has the higher score."""

    right: int
    tied: int
    wrong: int

    @property
    def total(self) -> int:
        """The number of pairs."""
        return self.right + self.tied + self.wrong

    def shares(self) -> tuple[float, float, float] | None:
        """The shares of the three; None without pairs."""
        counts = (self.right, self.tied, self.wrong)
        return tuple(count / self.total for count in counts) if self.total else None


def pairs(groups: Iterable[JudgedGroup]) -> Pairs:
    """The pairs of all groups."""
    found = np.zeros(3, int)
    for scores, correct in _known(groups):
        sign = np.sign(scores[correct][:, None] - scores[~correct][None, :])
        found += [(sign > 0).sum(), (sign == 0).sum(), (sign < 0).sum()]
    return Pairs(*map(int, found))


def scores_by_truth(groups: Iterable[JudgedGroup]) -> tuple[np.ndarray, np.ndarray]:
    """(scores of right answers, scores of wrong answers)."""
    known = list(_known(groups))
    if not known:
        return np.empty(0), np.empty(0)
    scores, correct = (np.concatenate(part) for part in zip(*known))
    return scores[correct], scores[~correct]


def share_right(groups: Iterable[JudgedGroup]) -> float | None:
    """Share of right answers among rollouts whose correctness is known, scored or not."""
    known = [correct for group in groups if (correct := group.correct) is not None]
    return float(np.concatenate(known).mean()) if known and sum(map(len, known)) else None


def auc(groups: Iterable[JudgedGroup]) -> Rate | None:
    """Probability that a right answer scores above a wrong one, over all rollouts; ties count half.

    The interval is for independent groups (Obuchowski 1997), because rollouts of a prompt share a
    rubric. `count` is the number of right-wrong pairs. None without both kinds.
    """
    known = list(_known(groups))
    if not known:
        return None
    size = len(known)
    cluster = np.repeat(np.arange(size), [len(scores) for scores, _ in known])
    scores, correct = (np.concatenate(part) for part in zip(*known))
    right, wrong = scores[correct], scores[~correct]
    if not (right.size and wrong.size):
        return None
    beats, beaten = _placements(right, np.sort(wrong)), 1 - _placements(wrong, np.sort(right))
    value, influence = beats.mean(), np.zeros(size)
    np.add.at(influence, cluster[correct], (beats - value) / right.size)
    np.add.at(influence, cluster[~correct], (beaten - value) / wrong.size)
    half = _half_width((influence**2).sum(), size)
    return Rate(float(value), half, right.size * wrong.size)


def _placements(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each value, the share of the sorted others below it; equal ones count half."""
    sides = (np.searchsorted(others, values, side) for side in ("left", "right"))
    return sum(sides) / (2 * others.size)


def _known(groups: Iterable[JudgedGroup]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(scores, whether right) of the rollouts of each group that have both."""
    for group in groups:
        correct, scores = group.correct, group.scores
        if correct is not None and (has := np.isfinite(scores)).any():
            yield scores[has], correct[has]
