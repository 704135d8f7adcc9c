"""What judges said of a run's rollouts, read back from rubrics.jsonl and measured. Numbers alone;
nothing is drawn here.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from opdjax.runs.results import is_number
from opdjax.runs.workdir import WorkdirError, read_lines

ROWS, SPENDING = "rubrics.jsonl", "spending.jsonl"
OTHER = "other"  # categories that are too rare for a chart of their own
_CATEGORIES = 4
_TEXTS = ("question", "references", "answers", "is_truncated", "reflections")


# Reading


@dataclasses.dataclass(frozen=True)
class CriterionRow:
    """One demand of a rubric; a flaw is met by an answer without it."""

    category: str
    text: str
    weight: float
    is_flaw: bool
    is_graded: bool  # verdicts 0, 1, 2 and not 0, 1
    stage: str | None


@dataclasses.dataclass(frozen=True)
class JudgedAnswer:
    """One row: n rollouts of a prompt that were held to one rubric of K criteria, with m
    references. NaN: nobody could say.
    """

    step: int
    prompt_id: Any
    samples: tuple[int, ...]
    criteria: tuple[CriterionRow, ...]  # empty: scored without a rubric, or failed
    met: np.ndarray  # [n, K], the share of each criterion that a rollout meets, 0 to 1
    reference_met: np.ndarray  # [m, K]
    scores: np.ndarray  # [n], 0 to 1: the rewards
    reference_scores: np.ndarray  # [m]
    stage_scores: np.ndarray | None  # [n, stages]; NaN too where no criterion looks at the stage
    correct: np.ndarray | None  # [n], whether the answer is right; None where that is not known
    problems: dict[str, int]  # replies that could not be used, by class
    repairs: dict[str, int]  # replies that were put right, by what
    texts: dict[str, Any]  # of _TEXTS those that were written down


@dataclasses.dataclass(frozen=True)
class JudgedGroup:
    """All rollouts of a prompt in a step: one row, or one of each rollout where each has a rubric
    of its own.
    """

    rows: tuple[JudgedAnswer, ...]

    @property
    def scores(self) -> np.ndarray:
        """Of all rollouts; NaN where there is none."""
        return np.concatenate([row.scores for row in self.rows])

    @property
    def correct(self) -> np.ndarray | None:
        """Of all rollouts; None where it is not known of all."""
        known = [row.correct for row in self.rows]
        return None if any(one is None for one in known) else np.concatenate(known)

    @property
    def is_failed(self) -> bool:
        """Whether fewer than two rollouts have a score, so that no advantage can be formed."""
        return int(np.isfinite(self.scores).sum()) < 2

    @property
    def is_tied(self) -> bool | None:
        """Whether all scores are one; None where the group failed."""
        known = self.scores[np.isfinite(self.scores)]
        return None if self.is_failed else bool((known == known[0]).all())


Steps = dict[int, list[JudgedGroup]]  # by step, rising


def read_judgements(workdir: pathlib.Path, stages: Sequence[str] = ()) -> Steps:
    """Every group that was judged; empty where none was. WorkdirError where a row is damaged; a
    torn last line is left out.

    `stages`: their names in the order of the stage scores, where the rows themselves do not tell.
    """
    file, found = workdir / ROWS, {}
    for number, row in enumerate(read_lines(file), 1):
        wrong = _wrong(row)
        if wrong:
            raise WorkdirError(
                f"{file}, row {number} is no judgement: {', '.join(wrong)} missing or of another kind: {json.dumps(row)[:80]}; the report "
                "alone needs this row, so it may be taken out"
            )
        judged = _judged(row, stages)
        rows = found.setdefault(judged.step, [])
        # Rubrics of single rollouts come in rows of their own, one after another; a prompt that
        # comes up twice starts anew.
        if (
            rows
            and rows[-1][-1].prompt_id == judged.prompt_id
            and not _shares_samples(rows[-1], judged)
        ):
            rows[-1].append(judged)
        else:
            rows.append([judged])
    return {step: [JudgedGroup(tuple(rows)) for rows in found[step]] for step in sorted(found)}


def _shares_samples(rows: Iterable[JudgedAnswer], judged: JudgedAnswer) -> bool:
    return any(set(row.samples) & set(judged.samples) for row in rows)


def _wrong(row: dict[str, Any]) -> list[str]:
    """The fields of a row that are not what they must be."""
    is_list = lambda value: isinstance(value, list)
    wrong = [name for name in ("samples", "scores") if not is_list(row.get(name))]
    wrong += [name for name in ("step",) if type(row.get(name)) is not int]
    wrong += ["prompt_id"] if "prompt_id" not in row else []
    rubric = row.get("rubric")
    if rubric is not None and not (
        is_list(rubric) and all(isinstance(c, dict) and is_number(c.get("weight")) for c in rubric)
    ):
        wrong.append("rubric")
    if wrong:
        return wrong
    size, width = len(row["samples"]), len(rubric or ())
    for name in ("scores", "verdicts", "correct", "stage_scores"):
        value = row.get(name)
        if value is not None and not (is_list(value) and len(value) == size):
            wrong.append(f"{name} (one a sample)")
    for name in ("verdicts", "reference_verdicts"):
        lists = [one for one in row.get(name) or () if one is not None]
        if rubric is not None and not all(
            is_list(one) and len(one) == width and all(map(is_number, one)) for one in lists
        ):
            wrong.append(f"{name} (one a criterion)")
    return wrong


def _judged(row: dict[str, Any], stages: Sequence[str]) -> JudgedAnswer:
    criteria = tuple(_criterion(item) for item in row.get("rubric") or ())
    size, correct = len(row["samples"]), row.get("correct")
    return JudgedAnswer(
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
    category = " ".join(str(item.get("category", "")).casefold().split()) or "no category"
    is_flaw, is_graded = item.get("polarity") == "negative", item.get("grade") == "graded"
    return CriterionRow(
        category,
        str(item.get("text", "")),
        float(item["weight"]),
        is_flaw,
        is_graded,
        item.get("stage"),
    )


def _met(
    criteria: Sequence[CriterionRow], verdicts: Sequence[Sequence[float] | None]
) -> np.ndarray:
    """What verdicts earn, 0 to 1: a graded criterion counts half at 1, and a flaw what is not
    there.
    """
    known = [
        one if one is not None and criteria else [math.nan] * len(criteria) for one in verdicts
    ]
    found = np.array(known, float).reshape(len(verdicts), len(criteria))
    found = found / np.array([2.0 if criterion.is_graded else 1.0 for criterion in criteria])
    return np.where(np.array([criterion.is_flaw for criterion in criteria], bool), 1 - found, found)


def _stage_scores(
    row: dict[str, Any], criteria: Sequence[CriterionRow], stages: Sequence[str]
) -> np.ndarray | None:
    """A stage that no criterion looks at was given 0, which is no verdict of anybody's."""
    lists = row.get("stage_scores")
    width = max((len(one) for one in lists or () if one), default=0)
    if not width:
        return None
    found = np.array([[math.nan] * width if one is None else _floats(one) for one in lists], float)
    looked_at = {criterion.stage for criterion in criteria}
    if len(stages) == width and looked_at - {None}:
        found[:, [stage not in looked_at for stage in stages]] = math.nan
    return found


def _floats(values: Sequence[Any]) -> np.ndarray:
    return np.array([value if is_number(value) else math.nan for value in values], float)


def _counts(values: Any) -> dict[str, int]:
    return (
        {str(name): int(value) for name, value in values.items() if is_number(value)}
        if isinstance(values, dict)
        else {}
    )


def read_spending(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """What was asked and what it cost, by step and role, of the whole run: also of steps that were
    done again; empty where not told.
    """
    return [row for row in read_lines(workdir / SPENDING) if isinstance(row.get("role"), str)]


def all_groups(steps: Steps) -> list[JudgedGroup]:
    """Those of every step."""
    return [group for groups in steps.values() for group in groups]


def ends(steps: Steps, length: int) -> tuple[list[JudgedGroup], list[JudgedGroup]]:
    """(groups of the first, of the last `length` steps that were judged)."""
    order = list(steps)
    first, last = order[:length], order[-length:] if length else []
    return [group for step in first for group in steps[step]], [
        group for step in last for group in steps[step]
    ]


# Pass rates


@dataclasses.dataclass(frozen=True)
class Rate:
    """A mean with half its 95 % interval (infinite from one group alone) and the number of values
    that it is of.
    """

    value: float
    half_width: float
    count: int

    def less(self, other: Rate) -> Rate:
        """The difference of two that share no group."""
        return Rate(
            self.value - other.value,
            math.hypot(self.half_width, other.half_width),
            min(self.count, other.count),
        )


def ratio(sums: Sequence[float], counts: Sequence[int]) -> Rate | None:
    """Sum over count of all groups; its interval takes groups as independent, and not what was said
    inside of one.
    """
    pairs = [(total, count) for total, count in zip(sums, counts) if count]
    if not pairs:
        return None
    total, count = np.array(pairs, float).T
    value, size = total.sum() / count.sum(), len(pairs)
    # Verdicts on one prompt's rollouts hang together: as independent ones they would make the
    # interval several times too narrow.
    spread = (
        math.sqrt(((total - value * count) ** 2).sum() * size / (size - 1)) / count.sum()
        if size > 1
        else math.inf
    )
    return Rate(
        float(value),
        float(stdtrit(size - 1, 0.975)) * spread if size > 1 else math.inf,
        int(count.sum()),
    )


def categories(groups: Iterable[JudgedGroup]) -> list[str]:
    """The kinds of criteria, the most frequent first; where there are many the rest is OTHER."""
    found = collections.Counter(
        c.category for group in groups for row in group.rows for c in row.criteria
    ).most_common()
    names = [name for name, _ in found]
    return names if len(names) <= _CATEGORIES + 1 else [*names[:_CATEGORIES], OTHER]


def pass_rate(
    groups: Sequence[JudgedGroup],
    category: str | None = None,
    named: Sequence[str] = (),
    *,
    of_references: bool = False,
) -> Rate | None:
    """Share of the criteria that is met, weights aside, over all rollouts (or references) that have
    verdicts.

    `category`: of that one alone; OTHER: of all that are not among `named`. None where there are no
    verdicts.
    """
    sums, counts = [], []
    for group in groups:
        values = [
            _of_category(row, category, named, row.reference_met if of_references else row.met)
            for row in group.rows
        ]
        values = np.concatenate([one.ravel() for one in values])
        known = values[np.isfinite(values)]
        sums.append(float(known.sum()))
        counts.append(known.size)
    return ratio(sums, counts)


def _of_category(
    row: JudgedAnswer, category: str | None, named: Sequence[str], met: np.ndarray
) -> np.ndarray:
    if category is None:
        return met
    keep = [
        c.category == category or (category == OTHER and c.category not in named)
        for c in row.criteria
    ]
    return met[:, np.array(keep, bool)]


def mean_score(groups: Sequence[JudgedGroup], *, of_references: bool = False) -> Rate | None:
    """The mean reward of the rollouts, or the mean score of the references."""
    parts = [
        np.concatenate([row.reference_scores for row in group.rows])
        if of_references
        else group.scores
        for group in groups
    ]
    known = [one[np.isfinite(one)] for one in parts]
    return ratio([float(one.sum()) for one in known], [one.size for one in known])


def stage_means(groups: Sequence[JudgedGroup]) -> np.ndarray:
    """`[stages]`: the mean score of each; NaN where nobody was scored."""
    known = [
        row.stage_scores for group in groups for row in group.rows if row.stage_scores is not None
    ]
    width = max((one.shape[1] for one in known), default=0)
    rows = (
        np.concatenate([one for one in known if one.shape[1] == width])
        if known
        else np.empty((0, 0))
    )
    count = np.isfinite(rows).sum(axis=0)
    return np.divide(np.nansum(rows, axis=0), count, out=np.full(width, math.nan), where=count > 0)


# Signal


@dataclasses.dataclass(frozen=True)
class Signal:
    """Criteria of rubrics that at least two rollouts were held to."""

    num_criteria: int
    met_by_all: int
    met_by_none: int
    alike: int  # all rollouts the same, those two included

    @property
    def share(self) -> float | None:
        """Of the criteria, those without signal."""
        return self.alike / self.num_criteria if self.num_criteria else None


def signal(groups: Iterable[JudgedGroup]) -> Signal:
    """How many criteria say the same of every rollout, and thus nothing that training could use."""
    counts = np.zeros(4, int)
    for row in (row for group in groups for row in group.rows if row.criteria):
        known = row.met[np.isfinite(row.met).all(axis=1)]
        if len(known) > 1:  # a rollout alone is always like itself
            alike = (known == known[0]).all(axis=0)
            counts += [
                alike.size,
                (alike & (known[0] == 1)).sum(),
                (alike & (known[0] == 0)).sum(),
                alike.sum(),
            ]
    return Signal(*map(int, counts))


def tied_share(groups: Iterable[JudgedGroup]) -> float | None:
    """Share of the groups, of those with scores, whose rollouts all have one score."""
    known = [group.is_tied for group in groups if group.is_tied is not None]
    return sum(known) / len(known) if known else None


def failed_share(groups: Sequence[JudgedGroup]) -> float | None:
    """Share of the groups in which fewer than two rollouts have a score."""
    return sum(group.is_failed for group in groups) / len(groups) if groups else None


def num_criteria(groups: Iterable[JudgedGroup]) -> float | None:
    """Mean over rubrics."""
    found = [len(row.criteria) for group in groups for row in group.rows if row.criteria]
    return sum(found) / len(found) if found else None


def counted(groups: Iterable[JudgedGroup], field: str) -> collections.Counter:
    """`problems` or `repairs` added up."""
    total: collections.Counter = collections.Counter()
    for group in groups:
        for row in group.rows:
            total.update(getattr(row, field))
    return total


# Reward against truth


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of a right and a wrong answer to one prompt in one step, by which has the higher score."""

    right: int
    tied: int
    wrong: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.right + self.tied + self.wrong


def pairs(groups: Iterable[JudgedGroup]) -> Pairs:
    """Of all groups. A pair whose wrong answer scores higher is pushed the wrong way by the update."""
    found = np.zeros(3, int)
    for _, scores, correct in _known(groups):
        sign = np.sign(scores[correct][:, None] - scores[~correct][None, :])
        found += [(sign > 0).sum(), (sign == 0).sum(), (sign < 0).sum()]
    return Pairs(*map(int, found))


def scores_by_truth(groups: Iterable[JudgedGroup]) -> tuple[np.ndarray, np.ndarray]:
    """(scores of right answers, of wrong ones)."""
    known = [(scores, correct) for _, scores, correct in _known(groups)]
    if not known:
        return np.empty(0), np.empty(0)
    scores, correct = (np.concatenate(part) for part in zip(*known))
    return scores[correct], scores[~correct]


def share_right(groups: Iterable[JudgedGroup]) -> float | None:
    """Of all rollouts whose answers are known to be right or wrong, scored or not."""
    known = [correct for group in groups if (correct := group.correct) is not None]
    return float(np.concatenate(known).mean()) if known and sum(map(len, known)) else None


def auc(groups: Iterable[JudgedGroup]) -> Rate | None:
    """The probability that a right answer's score beats a wrong one's, ties counting half, among
    all rollouts; None without either kind.

    Its interval takes groups as independent (Obuchowski 1997): rollouts of one prompt share a
    rubric. `count`: of right-wrong pairs.
    """
    known = list(_known(groups))
    if not known:
        return None
    sizes = [len(scores) for _, scores, _ in known]
    cluster = np.repeat(np.arange(len(known)), sizes)
    scores, correct = (np.concatenate([one[part] for one in known]) for part in (1, 2))
    right, wrong = scores[correct], scores[~correct]
    if not (right.size and wrong.size):
        return None
    beats, beaten = _placements(right, np.sort(wrong)), 1 - _placements(wrong, np.sort(right))
    value, pull = beats.mean(), np.zeros(len(known))
    np.add.at(pull, cluster[correct], (beats - value) / right.size)
    np.add.at(pull, cluster[~correct], (beaten - value) / wrong.size)
    size = len(known)
    half = (
        float(stdtrit(size - 1, 0.975)) * math.sqrt((pull**2).sum() * size / (size - 1))
        if size > 1
        else math.inf
    )
    return Rate(float(value), half, right.size * wrong.size)


def _placements(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of each value the share of the sorted others below it, equal ones counting half."""
    return (np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")) / (
        2 * others.size
    )


def _known(groups: Iterable[JudgedGroup]) -> Iterable[tuple[JudgedGroup, np.ndarray, np.ndarray]]:
    """(group, scores, whether right) of the rollouts that have both."""
    for group in groups:
        correct, scores = group.correct, group.scores
        if correct is not None and (has := np.isfinite(scores)).any():
            yield group, scores[has], correct[has]
