"""Verification: answers graded against a rubric, or scored without one, in blinded pools.

A pool is sorted by a hash of the texts and identical texts are judged once, so a verdict depends on
the set of texts and never on their order or author. Every pool contains the references, as anchors
(ROPD, section 2.2).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from opdjax.judge.prompts import fill
from opdjax.judge.schema import (
    Criterion,
    ParsedAnswers,
    ReplyError,
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
_SCORE_EXAMPLE = '{"answers": [{"answer_index": 1, "score": 0.7}, ...]}'
Verdicts = tuple[int, ...]


async def verify(
    judge: Judge,
    question: str,
    rubric: Rubric,
    references: Sequence[str],
    answers: Sequence[str],
    tally: Tally,
) -> tuple[list[Verdicts | None], list[Verdicts | None]]:
    """Verdicts of each answer and of each reference.

    An answer without verdicts is sent once more on its own; None if that fails too. Raises
    ReplyError or ApiError if no pool has a usable reply.
    """
    is_graded, width = judge.config.grades == "graded", len(rubric.criteria)
    words = {"format": _verdict_example(is_graded, width), "grades": _notes(judge, references)}
    criteria = [_criterion_line(criterion) for criterion in rubric.criteria]

    def request(texts: Sequence[str]) -> JudgeRequest:
        blocks = {
            "question": ("question", [question]),
            "criteria": ("criterion", criteria),
            "answers": ("answer", texts),
        }
        prompt = fill(judge.template("verifier"), words, blocks)
        return JudgeRequest("verifier", prompt, verdict_schema(is_graded), "verdicts")

    def parse(text: str, count: int) -> ParsedAnswers:
        return parse_verdicts(text, count, width, is_graded)

    return await _judge_pools(judge, request, parse, references, answers, tally)


async def rate(
    judge: Judge, question: str, references: Sequence[str], answers: Sequence[str], tally: Tally
) -> tuple[list[float | None], list[float | None]]:
    """A score in [0, 1] of each answer and reference, without a rubric; errors as in `verify`."""

    def request(texts: Sequence[str]) -> JudgeRequest:
        blocks = {"question": ("question", [question]), "answers": ("answer", texts)}
        prompt = fill(judge.template("scalar_judge"), {"format": _SCORE_EXAMPLE}, blocks)
        return JudgeRequest("verifier", prompt, score_schema(), "scores")

    return await _judge_pools(judge, request, parse_scores, references, answers, tally)


async def _judge_pools(
    judge: Judge,
    request: Callable[[Sequence[str]], JudgeRequest],
    parse: Callable[[str, int], ParsedAnswers],
    references: Sequence[str],
    answers: Sequence[str],
    tally: Tally,
) -> tuple[list[Any], list[Any]]:
    """The value of every answer and reference, pool by pool; missing answers are sent alone.

    A pool that fails leaves its answers at None and the other pools as they are.
    """
    values: dict[str, Any] = {}
    failure, config = None, judge.config
    for pool in pools(references, answers, config.answers_per_call, is_blind=config.blind):

        def parse_pool(text: str, size: int = len(pool)) -> tuple[ParsedAnswers, tuple[str, ...]]:
            return _require_any(parse(text, size))

        try:
            parsed = await ask(judge, request(pool), parse_pool, tally)
        except NO_USABLE_REPLY as error:
            failure = error
            continue
        found = {pool[place]: value for place, value in parsed.values.items()}
        values = found | values
        unread = (pool[place] for place in parsed.problems)
        missing = dict.fromkeys(text for text in unread if text in answers and text not in values)
        tally.problems["missing_answer"] += len(missing)
        for text in missing:
            value = await _judge_alone(judge, request, parse, references, text, tally)
            if value is not None:
                values[text] = value
    if failure is not None and not values:
        raise failure
    return [values.get(text) for text in answers], [values.get(text) for text in references]


async def _judge_alone(
    judge: Judge, request, parse, references: Sequence[str], text: str, tally: Tally
) -> Any:
    """The value of one answer in a pool with the references; None if there is no usable reply."""
    (pool,) = pools(references, [text], 0, is_blind=judge.config.blind)
    place = pool.index(text) if judge.config.blind else len(pool) - 1

    def parse_one(reply: str) -> tuple[Any, tuple[str, ...]]:
        parsed = parse(reply, len(pool))
        if place not in parsed.values:
            raise ReplyError("validation_error", parsed.problems[place])
        return parsed.values[place], parsed.repairs

    tally.num_reasks += 1
    try:
        return await ask(judge, request(pool), parse_one, tally)
    except NO_USABLE_REPLY:
        return None


def _require_any(parsed: ParsedAnswers) -> tuple[ParsedAnswers, tuple[str, ...]]:
    if not parsed.values:
        raise ReplyError("validation_error", "; ".join(list(parsed.problems.values())[:3]))
    return parsed, parsed.repairs


def pools(
    references: Sequence[str], answers: Sequence[str], size: int, *, is_blind: bool
) -> list[list[str]]:
    """The texts of each request: all references and at most `size` answers (0: all).

    Blind: sorted by a hash of the text. Otherwise the references come first, as the prompt says.
    """
    if is_blind:
        unique = sorted(set(answers) - set(references), key=_digest)
    else:
        unique = list(dict.fromkeys(answers))
    size = size or max(len(unique), 1)
    chunks = [unique[start : start + size] for start in range(0, len(unique), size)] or [[]]
    if is_blind:
        return [sorted({*references, *chunk}, key=_digest) for chunk in chunks]
    return [[*dict.fromkeys(references), *chunk] for chunk in chunks]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _criterion_line(criterion: Criterion) -> str:
    marks = [criterion.category]
    marks += [f"stage {criterion.stage!r}"] if criterion.stage else []
    marks += ["flaw"] if criterion.polarity == "negative" else []
    return f"{criterion.id} ({', '.join(marks)}): {criterion.text}"


def _notes(judge: Judge, references: Sequence[str]) -> str:
    notes = _SIGNED if judge.config.polarity == "signed" else ""
    notes += _GRADED if judge.config.grades == "graded" else ""
    return notes + ("" if judge.config.blind else _OPEN.format(len(set(references))))


def _verdict_example(is_graded: bool, width: int) -> str:
    verdicts = ([2, 0, 1] if is_graded else [True, False, True])[: min(width, 3)]
    example = json.dumps({"answers": [{"answer_index": 1, "verdicts": verdicts}]})
    return example.replace("}]}", "}, ...]}")
