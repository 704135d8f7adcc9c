"""Verification: answers graded against a rubric, or scored without one, in blinded pools: sorted by
a hash and without duplicates, so that a verdict never depends on the order or the author of texts.
Every pool contains the references, as anchors (ROPD, section 2.2).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from opdjax.judge.prompts import list_example
from opdjax.judge.reply_object import ReplyError
from opdjax.judge.schema import (
    Criterion,
    ParsedAnswers,
    RolloutGroup,
    Rubric,
    parse_scores,
    parse_verdicts,
    score_schema,
    verdict_schema,
)
from opdjax.judge.structured_output import NO_USABLE_REPLY, Judge, JudgeRequest, Tally, ask

# Parts of the prompt. Replies are cached by the prompt's bytes: a changed word is a cache miss.
_GRADED = (
    "- A verdict is 2 where the criterion is fully met, 1 where it is met in part, 0 where it is "
    "not.\n"
)
_SIGNED = '- A criterion marked "flaw" is met by an answer that shows the flaw.\n'
_OPEN = "- The first {} answers are references by a strong model; the others are a student's.\n"
Verdicts = tuple[int, ...]


async def verify(
    judge: Judge, group: RolloutGroup, rubric: Rubric, tally: Tally
) -> tuple[list[Verdicts | None], list[Verdicts | None]]:
    """Verdicts of each answer and of each reference.

    An answer without verdicts is sent once more on its own; None if that fails too. Raises
    ReplyError or ApiError if no pool has a usable reply.
    """
    is_graded, width = judge.config.grades == "graded", len(rubric.criteria)
    verdicts = ([2, 0, 1] if is_graded else [True, False, True])[: min(width, 3)]
    example = list_example("answers", {"answer_index": 1, "verdicts": verdicts})
    words = {"format": example, "grades": _notes(judge, group.references)}
    criteria = [_criterion_line(criterion) for criterion in rubric.criteria]
    blocks = {"question": ("question", [group.question]), "criteria": ("criterion", criteria)}
    schema = verdict_schema(is_graded)
    request = JudgeRequest("verifier", "verifier", words, blocks, schema, "verdicts")
    parse = lambda text, count: parse_verdicts(text, count, width, is_graded)
    return await _judge_pools(judge, request, parse, group, tally)


async def rate(
    judge: Judge, group: RolloutGroup, tally: Tally
) -> tuple[list[float | None], list[float | None]]:
    """A score in [0, 1] of each answer and reference, without a rubric; errors as in `verify`."""
    words = {"format": list_example("answers", {"answer_index": 1, "score": 0.7})}
    blocks = {"question": ("question", [group.question])}
    request = JudgeRequest("verifier", "scalar_judge", words, blocks, score_schema(), "scores")
    return await _judge_pools(judge, request, parse_scores, group, tally)


async def _judge_pools(
    judge: Judge,
    request: JudgeRequest,
    parse: Callable[[str, int], ParsedAnswers],
    group: RolloutGroup,
    tally: Tally,
) -> tuple[list[Any], list[Any]]:
    """Values of answers and references, None where a pool fails; missing ones are sent alone."""

    async def judged(pool: list[str], wanted: str | None = None) -> dict[str, Any]:
        """Values by text, from a reply that has one for the wanted text (None: for any)."""

        def read(reply: str) -> tuple[dict[str, Any], tuple[str, ...]]:
            parsed = parse(reply, len(pool))
            values = {pool[place]: value for place, value in parsed.values.items()}
            if not values if wanted is None else wanted not in values:
                places = parsed.problems if wanted is None else [pool.index(wanted)]
                problems = [parsed.problems[place] for place in places]
                raise ReplyError("validation_error", "; ".join(problems[:3]))
            return values, parsed.repairs

        blocks = {**request.blocks, "answers": ("answer", pool)}
        return await ask(judge, dataclasses.replace(request, blocks=blocks), read, tally)

    references, answers, config = group.references, group.answers, judge.config
    values: dict[str, Any] = {}
    failure = None
    for pool in pools(references, answers, config.answers_per_call, is_blind=config.blind):
        try:
            values = await judged(pool) | values
        except NO_USABLE_REPLY as error:
            failure = error
            is_alone = len(set(pool) - set(references)) < 2
            # A judge that miscounts several answers may get a single one right.
            if is_alone or getattr(error, "kind", "") != "answer_index":
                continue
        missing = [text for text in dict.fromkeys(pool) if text in answers and text not in values]
        tally.problems["missing_answer"] += len(missing)
        for text in missing:
            tally.num_reasks += 1
            (alone,) = pools(references, [text], 0, is_blind=config.blind)
            with contextlib.suppress(*NO_USABLE_REPLY):
                values[text] = (await judged(alone, text))[text]
    if failure is not None and not values:
        raise failure
    return [values.get(text) for text in answers], [values.get(text) for text in references]


def pools(
    references: Sequence[str], answers: Sequence[str], size: int, *, is_blind: bool
) -> list[list[str]]:
    """The texts of each request: all references and at most `size` answers (0: all).

    Blind: sorted by a hash of the text. Otherwise the references come first, as the prompt says.
    """
    digest = lambda text: hashlib.sha256(text.encode()).digest()
    unique = list(dict.fromkeys(answers))
    if is_blind:
        unique = sorted(set(unique) - set(references), key=digest)
    size = size or max(len(unique), 1)
    chunks = [unique[start : start + size] for start in range(0, len(unique), size)] or [[]]
    if is_blind:
        return [sorted({*references, *chunk}, key=digest) for chunk in chunks]
    return [[*dict.fromkeys(references), *chunk] for chunk in chunks]


def _criterion_line(criterion: Criterion) -> str:
    stage = f"stage {criterion.stage!r}" if criterion.stage else ""
    marks = criterion.category, stage, "flaw" if criterion.polarity == "negative" else ""
    return f"{criterion.id} ({', '.join(filter(None, marks))}): {criterion.text}"


def _notes(judge: Judge, references: Sequence[str]) -> str:
    notes = _SIGNED if judge.config.polarity == "signed" else ""
    notes += _GRADED if judge.config.grades == "graded" else ""
    return notes + ("" if judge.config.blind else _OPEN.format(len(set(references))))
