"""One prompt's rollouts, judged: rubric, verdicts, scores, and what to tell of them. Everything
here is text and plain numbers.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from opdjax.judge.prompts import shown_answer
from opdjax.judge.replies import ApiRequestError, ApiUnavailableError
from opdjax.judge.rubricator import induce
from opdjax.judge.schema import Criterion, ReplyError, Rubric
from opdjax.judge.scores import score, stage_scores
from opdjax.judge.structured_output import Judge, Tally
from opdjax.judge.verifier import rate, verify

Kind = Literal["rubric", "scalar"]


@dataclasses.dataclass(frozen=True)
class RolloutGroup:
    """One prompt with its references and rollouts, as judges see them (`group_of`)."""

    prompt_id: int
    question: str
    references: tuple[str, ...]
    answers: tuple[str, ...]  # by rollout
    samples: tuple[int, ...]  # the numbers of the rollouts
    rubric: Rubric | None = None  # one that is given, and not induced anew
    existing: tuple[Criterion, ...] = ()  # criteria that stay, beside which new ones are induced


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What came of a group, or of the one rollout that a rubric of its own was made for; None
    stands for what nobody could say.
    """

    group: RolloutGroup
    rubric: Rubric | None
    verdicts: tuple[tuple[int, ...] | None, ...]  # by rollout
    reference_verdicts: tuple[tuple[int, ...] | None, ...]
    scores: tuple[float | None, ...]  # in [0, 1], by rollout
    reference_scores: tuple[float | None, ...]
    stage_scores: (
        tuple[tuple[float, ...] | None, ...] | None
    )  # by rollout and stage; None where answers are not divided
    tally: Tally
    reflections: tuple[str | None, ...] | None = None  # by rollout, where they are asked for

    @property
    def is_scored(self) -> bool:
        """Whether at least one rollout has a score."""
        return any(value is not None for value in self.scores)


def group_of(
    judge: Judge,
    prompt_id: int,
    question: str,
    references: Sequence[str],
    answers: Sequence[str],
    is_truncated: Sequence[bool],
) -> RolloutGroup:
    """The group as it is shown: what was thought aloud is left out, and of the references the first
    `num_references`.

    Identical references stay as many as they are: what a teacher says again and again, a rubric may
    rely on.
    """
    limit, count = judge.config.max_answer_chars, judge.config.num_references
    shown = tuple(shown_answer(text, False, limit) for text in references[:count])
    texts = tuple(shown_answer(text, is_cut, limit) for text, is_cut in zip(answers, is_truncated))
    return RolloutGroup(prompt_id, question, shown, texts, tuple(range(len(texts))))


async def judge_group(judge: Judge, group: RolloutGroup, kind: Kind) -> list[Judgement]:
    """The judgement of all rollouts together, or one of each where each has a rubric of its own.

    A reply that cannot be had or used fails the judgement, whose scores are then None; what must
    stop the run (a refused key, the spending cap, a reply missing offline) is raised.
    """
    if kind == "rubric" and judge.config.rubric_of == "student":
        each = (
            dataclasses.replace(group, answers=(answer,), samples=(sample,))
            for answer, sample in zip(group.answers, group.samples)
        )
        return list(await asyncio.gather(*(_judged(judge, one, kind) for one in each)))
    return [await _judged(judge, group, kind)]


async def _judged(judge: Judge, group: RolloutGroup, kind: Kind) -> Judgement:
    tally = Tally()
    try:
        if kind == "scalar":
            scores, reference_scores = await rate(
                judge, group.question, group.references, group.answers, tally
            )
            return _failed(
                group, tally, scores=tuple(scores), reference_scores=tuple(reference_scores)
            )
        rubric = group.rubric or await induce(
            judge, group.question, group.references, group.answers, tally, group.existing
        )
        rubric = (
            rubric
            if group.rubric or not group.existing
            else joined(group.existing, rubric.criteria)
        )
        verdicts, reference_verdicts = await verify(
            judge, group.question, rubric, group.references, group.answers, tally
        )
    except (ReplyError, ApiUnavailableError, ApiRequestError):
        return _failed(group, tally)
    return _scored(judge, group, rubric, tuple(verdicts), tuple(reference_verdicts), tally)


def _failed(group: RolloutGroup, tally: Tally, **known: Any) -> Judgement:
    nobody, none = (None,) * len(group.answers), (None,) * len(group.references)
    found = {
        "verdicts": nobody,
        "reference_verdicts": none,
        "scores": nobody,
        "reference_scores": none,
    } | known
    return Judgement(group, None, **found, stage_scores=None, tally=tally)


def _scored(
    judge: Judge, group: RolloutGroup, rubric: Rubric, verdicts, reference_verdicts, tally: Tally
) -> Judgement:
    of = lambda found: tuple(None if v is None else score(rubric.criteria, v) for v in found)
    stages = judge.config.stage_names
    by_stage = (
        tuple(None if v is None else stage_scores(rubric, v, stages) for v in verdicts)
        if stages
        else None
    )
    return Judgement(
        group,
        rubric,
        verdicts,
        reference_verdicts,
        of(verdicts),
        of(reference_verdicts),
        by_stage,
        tally,
    )


async def induce_or_none(judge: Judge, group: RolloutGroup) -> Rubric | None:
    """The rubric alone; None where none can be had."""
    try:
        rubric = await induce(
            judge, group.question, group.references, group.answers, Tally(), group.existing
        )
        return joined(group.existing, rubric.criteria) if group.existing else rubric
    except (ReplyError, ApiUnavailableError, ApiRequestError):
        return None


def joined(existing: Sequence[Criterion], new: Sequence[Criterion]) -> Rubric:
    """All criteria, numbered anew; of two with the same text and stage the first."""
    unique = {
        (criterion.text, criterion.stage): criterion for criterion in reversed([*existing, *new])
    }
    ordered = [
        criterion
        for criterion in [*existing, *new]
        if unique.get((criterion.text, criterion.stage)) is criterion
    ]
    return Rubric(
        tuple(
            criterion.model_copy(update={"id": f"c{place + 1}"})
            for place, criterion in enumerate(ordered)
        )
    )


def as_row(
    judgement: Judgement, step: int, correct: Sequence[int] | None, *, has_texts: bool
) -> dict[str, Any]:
    """The judgement as a row of rubrics.jsonl; `correct` by its rollouts, texts only where they are
    asked for.
    """
    group, rubric, tally = judgement.group, judgement.rubric, judgement.tally
    rounded = lambda values: [None if v is None else round(v, 6) for v in values]
    row = {
        "step": step,
        "prompt_id": group.prompt_id,
        "status": "scored" if judgement.is_scored else "failed",
        "samples": list(group.samples),
        "rubric": None if rubric is None else [c.model_dump() for c in rubric.criteria],
        "verdicts": judgement.verdicts,
        "reference_verdicts": judgement.reference_verdicts,
        "scores": rounded(judgement.scores),
        "reference_scores": rounded(judgement.reference_scores),
        "stage_scores": judgement.stage_scores
        and [None if v is None else rounded(v) for v in judgement.stage_scores],
        "correct": None if correct is None else [int(is_right) for is_right in correct],
        "problems": dict(+tally.problems),
        "repairs": dict(tally.repairs),
        "reasks": tally.num_reasks,
    }
    if has_texts:
        row |= {
            "question": group.question,
            "references": list(group.references),
            "answers": list(group.answers),
        }
        row |= {} if judgement.reflections is None else {"reflections": list(judgement.reflections)}
    return row


def metrics_of(
    judgements: Sequence[Judgement], correct: Sequence[Sequence[int]] | None
) -> dict[str, float]:
    """Numbers of a step. `correct`: 1 for each right answer, by judgement and rollout; None where
    nobody knows.

    Rewards and scores are in [0, 1]; `no_signal_share`: of the criteria, those that all rollouts of
    the group meet alike; `tied_groups`: share of scored groups whose rollouts all have one score;
    `auc`: how often a right answer scores above a wrong one of the same step, ties counting half;
    NaN where there is nothing to compare.
    """
    scored = [judgement for judgement in judgements if judgement.is_scored]
    rewards = [value for judgement in scored for value in judgement.scores if value is not None]
    references = [
        value for judgement in scored for value in judgement.reference_scores if value is not None
    ]
    with_rubric = [judgement for judgement in scored if judgement.rubric is not None]
    is_tied = [
        len({v for v in judgement.scores if v is not None}) < 2
        for judgement in scored
        if len(judgement.scores) > 1
    ]
    alike = [
        len(set(column)) < 2
        for judgement in with_rubric
        for column in _columns(judgement)
        if len(column) > 1
    ]
    found = {
        "rubric/reward_mean": _mean(rewards),
        "rubric/reference_score_mean": _mean(references),
        "rubric/num_criteria": _mean([len(judgement.rubric.criteria) for judgement in with_rubric]),
        "rubric/no_signal_share": _mean(alike),
        "rubric/tied_groups": _mean(is_tied),
        "rubric/unscored_rollouts": float(
            sum(value is None for judgement in judgements for value in judgement.scores)
        ),
        "rubric/reasks": float(sum(judgement.tally.num_reasks for judgement in judgements)),
    }
    for problem in (
        "empty",
        "truncated",
        "parse_error",
        "schema_error",
        "validation_error",
        "missing_answer",
        "unavailable",
        "refused",
    ):
        found[f"rubric/problems/{problem}"] = float(
            sum(judgement.tally.problems[problem] for judgement in judgements)
        )
    if correct is not None:
        pairs = [
            pair
            for judgement, right in zip(judgements, correct)
            for pair in zip(judgement.scores, right)
            if pair[0] is not None
        ]
        found["rubric/auc"] = auc(
            [v for v, is_right in pairs if is_right], [v for v, is_right in pairs if not is_right]
        )
    return found


def auc(right: Sequence[float], wrong: Sequence[float]) -> float:
    """The probability that a value of `right` is above one of `wrong`, ties counting half; NaN
    where one of them is empty.
    """
    if not right or not wrong:
        return float("nan")
    wins = sum((a > b) + 0.5 * (a == b) for a in right for b in wrong)
    return wins / (len(right) * len(wrong))


def _columns(judgement: Judgement) -> list[tuple[int, ...]]:
    """Verdicts by criterion."""
    return list(zip(*(verdicts for verdicts in judgement.verdicts if verdicts is not None)))


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else float("nan")
