"""The judgement of one prompt's rollouts (rubric, verdicts, scores) and its metrics.

Everything here is text and plain numbers.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any, Literal

from opdjax.judge.prompts import shown_answer
from opdjax.judge.reply_object import ERRORS
from opdjax.judge.rubricator import induce
from opdjax.judge.schema import RolloutGroup, Rubric
from opdjax.judge.structured_output import NO_USABLE_REPLY, UNANSWERED, Judge, Tally
from opdjax.judge.verifier import rate, verify

# Longest part of an answer that a judge is shown, in characters: about 8,000 tokens, so that a pool
# of eight rollouts and four references fits into a context of 131,072 tokens.
MAX_ANSWER_CHARS = 24_000

Kind = Literal["rubric", "scalar"]


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Result for a group, or for one rollout with a rubric of its own; None: judging failed."""

    group: RolloutGroup
    rubric: Rubric | None
    verdicts: tuple[tuple[int, ...] | None, ...]  # by rollout
    reference_verdicts: tuple[tuple[int, ...] | None, ...]
    scores: tuple[float | None, ...]  # in [0, 1], by rollout
    reference_scores: tuple[float | None, ...]
    # By rollout and stage; None if answers have no stages.
    stage_scores: tuple[tuple[float, ...] | None, ...] | None
    tally: Tally
    reflections: tuple[str | None, ...] | None = None  # by rollout, if requested

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
    """The group as judges see it: texts without reasoning, the first `num_references` references.

    Identical references are kept: a rubric may rely on what a teacher says repeatedly.
    """
    limit, count = MAX_ANSWER_CHARS, judge.config.num_references
    shown = tuple(shown_answer(text, False, limit) for text in references[:count])
    texts = tuple(shown_answer(text, is_cut, limit) for text, is_cut in zip(answers, is_truncated))
    return RolloutGroup(prompt_id, question, shown, texts, tuple(range(len(texts))))


async def judge_group(judge: Judge, group: RolloutGroup, kind: Kind) -> list[Judgement]:
    """One judgement of all rollouts, or one per rollout if each has a rubric of its own.

    If there is no usable reply, the judgement's scores are None. Errors that must stop the run are
    raised: a refused key, the spending cap, a missing reply offline.
    """
    if kind == "rubric" and judge.config.rubric_of == "student":
        singles = (
            dataclasses.replace(group, answers=(answer,), samples=(sample,))
            for answer, sample in zip(group.answers, group.samples)
        )
        return list(await asyncio.gather(*(_judgement(judge, one, kind) for one in singles)))
    return [await _judgement(judge, group, kind)]


async def _judgement(judge: Judge, group: RolloutGroup, kind: Kind) -> Judgement:
    tally, none = Tally(), [(None,) * len(texts) for texts in (group.answers, group.references)]
    failed = Judgement(group, None, *none, *none, stage_scores=None, tally=tally)
    try:
        if kind == "scalar":
            scores, of_references = map(tuple, await rate(judge, group, tally))
            return dataclasses.replace(failed, scores=scores, reference_scores=of_references)
        rubric = group.rubric or await induce(judge, group, tally)
        verdicts, of_references = map(tuple, await verify(judge, group, rubric, tally))
    except NO_USABLE_REPLY:
        return failed
    of_each = lambda function, rows: tuple(None if row is None else function(row) for row in rows)
    stages = judge.config.stage_names
    by_stage = lambda row: tuple(rubric.score(row, stage) for stage in stages)
    return Judgement(
        group,
        rubric,
        verdicts,
        of_references,
        of_each(rubric.score, verdicts),
        of_each(rubric.score, of_references),
        of_each(by_stage, verdicts) if stages else None,
        tally,
    )


async def induce_or_none(judge: Judge, group: RolloutGroup, tally: Tally) -> Rubric | None:
    """The rubric of a group, without verdicts; None if there is no usable reply."""
    try:
        return await induce(judge, group, tally)
    except NO_USABLE_REPLY:
        return None


def as_row(
    judgement: Judgement, step: int, correct: Sequence[int] | None, *, has_texts: bool
) -> dict[str, Any]:
    """The judgement as a row of rubrics.jsonl.

    `correct`: 1 for each right answer, by rollout; None: unknown. `has_texts`: include the texts.
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
        row |= {"question": group.question, "references": list(group.references)}
        row |= {"answers": list(group.answers)}
        row |= {} if judgement.reflections is None else {"reflections": list(judgement.reflections)}
    return row


def metrics_of(
    judgements: Sequence[Judgement], correct: Sequence[Sequence[int]] | None
) -> dict[str, float]:
    """Metrics of a step. `correct`: 1 for each right answer, by judgement and rollout, or None.

    Rewards and scores are in [0, 1]. `no_signal_share`: the share of criteria whose verdict is the
    same for all rollouts of the group; `tied_groups`: the share of scored groups in which all
    rollouts have the same score; `auc`: see `auc`, over the step. NaN if there is nothing to
    average or compare.
    """
    scored = [judgement for judgement in judgements if judgement.is_scored]
    with_rubric = [judgement for judgement in scored if judgement.rubric is not None]
    present = lambda values: [value for value in values if value is not None]
    flat = lambda rows: [value for row in rows for value in row]
    rewards = [present(judgement.scores) for judgement in scored]
    references = [present(judgement.reference_scores) for judgement in scored]
    has_several = [len(judgement.scores) > 1 for judgement in scored]
    is_tied = [len(set(values)) < 2 for values, several in zip(rewards, has_several) if several]
    by_criterion = [row for judgement in with_rubric for row in zip(*present(judgement.verdicts))]
    is_alike = [len(set(row)) < 2 for row in by_criterion if len(row) > 1]
    num_unscored = sum(value is None for judgement in judgements for value in judgement.scores)
    metrics = {
        "rubric/reward_mean": _mean(flat(rewards)),
        "rubric/reference_score_mean": _mean(flat(references)),
        "rubric/num_criteria": _mean([len(judgement.rubric.criteria) for judgement in with_rubric]),
        "rubric/no_signal_share": _mean(is_alike),
        "rubric/tied_groups": _mean(is_tied),
        "rubric/unscored_rollouts": float(num_unscored),
        "rubric/reasks": float(sum(judgement.tally.num_reasks for judgement in judgements)),
    }
    for problem in (*ERRORS, "missing_answer", *UNANSWERED.values()):
        count = sum(judgement.tally.problems[problem] for judgement in judgements)
        metrics[f"rubric/problems/{problem}"] = float(count)
    if correct is not None:
        values = flat(judgement.scores for judgement in judgements)
        pairs = [pair for pair in zip(values, flat(correct), strict=True) if pair[0] is not None]
        right = [value for value, is_right in pairs if is_right]
        metrics["rubric/auc"] = auc(right, [value for value, is_right in pairs if not is_right])
    return metrics


def auc(right: Sequence[float], wrong: Sequence[float]) -> float:
    """The probability that a value of `right` exceeds one of `wrong`; a tie counts half.

    NaN if one of them is empty.
    """
    if not right or not wrong:
        return float("nan")
    return statistics.fmean((a > b) + 0.5 * (a == b) for a in right for b in wrong)


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else float("nan")
