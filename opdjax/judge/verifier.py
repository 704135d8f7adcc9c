"""Verification: answers held to a rubric, or scored without one, as one anonymous pool in the order
of their content (ROPD, section 2.2).

A verdict depends on the set of texts in the pool and never on who wrote which, or on the order they
came in: identical texts are judged once. References stand in every pool, as an anchor of what can
be reached.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from opdjax.judge.prompts import fill
from opdjax.judge.replies import ApiRequestError, ApiUnavailableError
from opdjax.judge.schema import (
    Criterion,
    Read,
    ReplyError,
    Rubric,
    parse_scores,
    parse_verdicts,
    score_schema,
    verdict_schema,
)
from opdjax.judge.structured_output import Judge, JudgeRequest, Tally, ask

_GRADED = """- A verdict is 2 where the criterion is fully met, 1 where it is met in part, 0 where it is not.
"""
_SIGNED = """- A criterion marked "flaw" is met by an answer that shows the flaw.
"""
_KNOWN = "- The first [[num_references]] answers are references by a strong model; the others are a student's.\n"
Verdicts = tuple[int, ...]


async def verify(
    judge: Judge,
    question: str,
    rubric: Rubric,
    references: Sequence[str],
    answers: Sequence[str],
    tally: Tally,
) -> tuple[list[Verdicts | None], list[Verdicts | None]]:
    """Verdicts of each answer and of each reference; None where the verifier gave none, after
    asking for that answer alone.

    ReplyError or ApiError where nothing can be had of any pool.
    """
    is_graded = judge.config.grades == "graded"
    schema, width = verdict_schema(is_graded), len(rubric.criteria)

    def asked(texts: Sequence[str]) -> JudgeRequest:
        words = {"format": _verdict_format(is_graded, width), "grades": _notes(judge, references)}
        blocks = {
            "question": ("question", [question]),
            "criteria": ("criterion", [_shown(criterion) for criterion in rubric.criteria]),
            "answers": ("answer", texts),
        }
        return JudgeRequest(
            "verifier", fill(judge.template("verifier"), words, blocks), schema, "verdicts"
        )

    return await _of_pool(
        judge,
        asked,
        lambda text, count: parse_verdicts(text, count, width, is_graded),
        references,
        answers,
        tally,
    )


async def rate(
    judge: Judge, question: str, references: Sequence[str], answers: Sequence[str], tally: Tally
) -> tuple[list[float | None], list[float | None]]:
    """A score in [0, 1] of each answer and of each reference, by the judge's own standard; as
    `verify`.
    """

    def asked(texts: Sequence[str]) -> JudgeRequest:
        words = {"format": '{"answers": [{"answer_index": 1, "score": 0.7}, ...]}'}
        blocks = {"question": ("question", [question]), "answers": ("answer", texts)}
        return JudgeRequest(
            "verifier",
            fill(judge.template("scalar_judge"), words, blocks),
            score_schema(),
            "scores",
        )

    return await _of_pool(judge, asked, parse_scores, references, answers, tally)


async def _of_pool(
    judge: Judge,
    asked: Callable[[Sequence[str]], JudgeRequest],
    parse: Callable[[str, int], Read],
    references: Sequence[str],
    answers: Sequence[str],
    tally: Tally,
) -> tuple[list[Any], list[Any]]:
    """What the verifier says of every answer and reference, pool by pool; what it leaves out is
    asked for again, each alone.

    A pool that it cannot judge leaves its answers without a word, and the other pools as they are.
    """
    found: dict[str, Any] = {}
    failed = None
    for pool in pools(
        references, answers, judge.config.answers_per_call, is_blind=judge.config.blind
    ):
        try:
            read = await ask(
                judge, asked(pool), lambda text, pool=pool: _whole(parse(text, len(pool))), tally
            )
        except (ReplyError, ApiUnavailableError, ApiRequestError) as error:
            failed = error
            continue
        found |= {
            pool[place]: value for place, value in read.found.items() if pool[place] not in found
        }
        missing = [
            pool[place]
            for place in read.problems
            if pool[place] in set(answers) and pool[place] not in found
        ]
        tally.problems["missing_answer"] += len(set(missing))
        for text in dict.fromkeys(missing):
            value = await _alone(judge, asked, parse, references, text, tally)
            if value is not None:
                found[text] = value
    if failed is not None and not found:
        raise failed
    return [found.get(text) for text in answers], [found.get(text) for text in references]


async def _alone(
    judge: Judge, asked, parse, references: Sequence[str], text: str, tally: Tally
) -> Any:
    """What the verifier says of one answer beside the references; None where it cannot say."""
    (pool,) = pools(references, [text], 0, is_blind=judge.config.blind)
    place = len(pool) - 1 if not judge.config.blind else pool.index(text)

    def of_one(reply: str) -> tuple[Any, tuple[str, ...]]:
        read = parse(reply, len(pool))
        if place not in read.found:
            raise ReplyError("validation_error", read.problems[place])
        return read.found[place], read.repairs

    tally.num_reasks += 1
    try:
        return await ask(judge, asked(pool), of_one, tally)
    except (ReplyError, ApiUnavailableError, ApiRequestError):
        return None


def _whole(read: Read) -> tuple[Read, tuple[str, ...]]:
    """The reading; ReplyError where not one answer could be read."""
    if not read.found:
        raise ReplyError("validation_error", "; ".join(list(read.problems.values())[:3]))
    return read, read.repairs


def pools(
    references: Sequence[str], answers: Sequence[str], size: int, *, is_blind: bool
) -> list[list[str]]:
    """The texts of each call: at most `size` answers (0: all), and every reference.

    Blind: in the order of a hash of their content. Else the references first, then the answers, as
    the verifier is told.
    """
    unique = (
        sorted(set(answers) - set(references), key=_digest)
        if is_blind
        else list(dict.fromkeys(answers))
    )
    size = size or max(len(unique), 1)
    chunks = [unique[start : start + size] for start in range(0, len(unique), size)] or [[]]
    if is_blind:
        return [sorted({*references, *chunk}, key=_digest) for chunk in chunks]
    return [[*dict.fromkeys(references), *chunk] for chunk in chunks]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _shown(criterion: Criterion) -> str:
    marks = [f"stage {criterion.stage!r}"] if criterion.stage else []
    marks += ["flaw"] if criterion.polarity == "negative" else []
    return f"{criterion.id} ({', '.join([criterion.category, *marks])}): {criterion.text}"


def _notes(judge: Judge, references: Sequence[str]) -> str:
    signed = _SIGNED if judge.config.polarity == "signed" else ""
    known = (
        ""
        if judge.config.blind
        else _KNOWN.replace("[[num_references]]", str(len(set(references))))
    )
    return signed + (_GRADED if judge.config.grades == "graded" else "") + known


def _verdict_format(is_graded: bool, width: int) -> str:
    verdicts = ([2, 0, 1] if is_graded else [True, False, True])[: min(width, 3)]
    return json.dumps({"answers": [{"answer_index": 1, "verdicts": verdicts}]}).replace(
        "}]}", "}, ...]}"
    )
