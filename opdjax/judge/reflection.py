"""What judges tell a model that is shown it: a rubric, verdicts in words, a reflection (RubricEM,
arXiv 2605.10899, section 3.4).

RubricEM puts reflections into later prompts; here they are privileged context of a teacher that
scores the same rollout (our extension: self-distillation with the existing divergences).
"""

from __future__ import annotations

import asyncio
import dataclasses

from opdjax.judge.judgement import Judgement
from opdjax.judge.prompts import fill
from opdjax.judge.replies import ApiRequestError, ApiUnavailableError
from opdjax.judge.schema import ReplyError, read_object
from opdjax.judge.scores import share
from opdjax.judge.structured_output import Judge, JudgeRequest, ask

_SCHEMA = {
    "type": "object",
    "properties": {"reflection": {"type": "string"}},
    "required": ["reflection"],
    "additionalProperties": False,
}

# By the share that is earned: a flaw that is absent is not "met".
_WORDS = {
    "positive": {0.0: "missed", 0.5: "met in part", 1.0: "met"},
    "negative": {0.0: "not avoided", 0.5: "avoided in part", 1.0: "avoided"},
}


def rubric_text(judgement: Judgement) -> str:
    """The criteria, one a line."""
    return "\n".join(
        f"- {'(to be avoided) ' if c.polarity == 'negative' else ''}{c.text}"
        for c in judgement.rubric.criteria
    )


def verdict_text(judgement: Judgement, place: int) -> str:
    """How one rollout did on each criterion, one a line."""
    pairs = zip(judgement.rubric.criteria, judgement.verdicts[place])
    return "\n".join(
        f"- {_WORDS[criterion.polarity][share(criterion, verdict)]}: {criterion.text}"
        for criterion, verdict in pairs
    )


async def reflect(judge: Judge, judgement: Judgement) -> Judgement:
    """The judgement with a reflection on each scored rollout; None for one that nobody could write,
    whose score goes with it.
    """
    places = range(len(judgement.scores))
    texts = await asyncio.gather(*(_of_one(judge, judgement, place) for place in places))
    scores = tuple(None if text is None else found for text, found in zip(texts, judgement.scores))
    return dataclasses.replace(judgement, reflections=tuple(texts), scores=scores)


async def _of_one(judge: Judge, judgement: Judgement, place: int) -> str | None:
    if judgement.scores[place] is None:
        return None
    group = judgement.group
    blocks = {
        "question": ("question", [group.question]),
        "reference": ("reference", group.references[:1]),
        "answer": ("answer", [group.answers[place]]),
        "verdicts": ("verdicts", [verdict_text(judgement, place)]),
    }
    asked = JudgeRequest(
        "rubricator", fill(judge.template("reflector"), {}, blocks), _SCHEMA, "reflection"
    )
    try:
        return await ask(judge, asked, _parse, judgement.tally)
    except (ReplyError, ApiUnavailableError, ApiRequestError):
        return None


def _parse(text: str) -> tuple[str, tuple[str, ...]]:
    found, repairs = read_object(text, "reflection")
    words = found["reflection"]
    if not isinstance(words, str) or not words.strip():
        raise ReplyError("schema_error", '"reflection" must be a text that is not empty')
    return words.encode("utf-8", "replace").decode("utf-8").strip(), tuple(sorted(repairs))
