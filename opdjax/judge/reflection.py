"""Texts from judges for a model to read: rubric, verdicts, reflection (RubricEM, arXiv 2605.10899).

RubricEM (section 3.4) puts reflections into later prompts; here a teacher reads them.
"""

from __future__ import annotations

import asyncio
import dataclasses

from opdjax.judge.judgement import Judgement
from opdjax.judge.reply_object import ReplyError, is_written, read_object
from opdjax.judge.schema import object_schema
from opdjax.judge.structured_output import NO_USABLE_REPLY, Judge, JudgeRequest, ask

# Words by earned share: an absent flaw is "avoided", not "met".
_WORDS = {
    "positive": {0.0: "missed", 0.5: "met in part", 1.0: "met"},
    "negative": {0.0: "not avoided", 0.5: "avoided in part", 1.0: "avoided"},
}


def rubric_text(judgement: Judgement) -> str:
    """The criteria, one per line."""
    mark = {"positive": "", "negative": "(to be avoided) "}
    return "\n".join(f"- {mark[c.polarity]}{c.text}" for c in judgement.rubric.criteria)


def verdict_text(judgement: Judgement, place: int) -> str:
    """The verdicts on the rollout at `place`, one criterion per line."""
    pairs = zip(judgement.rubric.criteria, judgement.verdicts[place])
    return "\n".join(f"- {_WORDS[c.polarity][c.share(verdict)]}: {c.text}" for c, verdict in pairs)


async def reflect(judge: Judge, judgement: Judgement) -> Judgement:
    """The judgement with a reflection on each scored rollout.

    If a reflection fails, it is None and so is the rollout's score.
    """
    places = range(len(judgement.scores))
    texts = await asyncio.gather(*(_reflect_one(judge, judgement, place) for place in places))
    scores = tuple(None if text is None else score for text, score in zip(texts, judgement.scores))
    return dataclasses.replace(judgement, reflections=tuple(texts), scores=scores)


async def _reflect_one(judge: Judge, judgement: Judgement, place: int) -> str | None:
    if judgement.scores[place] is None:
        return None
    group = judgement.group
    blocks = {
        "question": ("question", [group.question]),
        "reference": ("reference", group.references[:1]),
        "answer": ("answer", [group.answers[place]]),
        "verdicts": ("verdicts", [verdict_text(judgement, place)]),
    }
    schema = object_schema({"reflection": {"type": "string"}})
    request = JudgeRequest("rubricator", "reflector", {}, blocks, schema, "reflection")
    try:
        return await ask(judge, request, _parse, judgement.tally)
    except NO_USABLE_REPLY:
        return None


def _parse(text: str) -> tuple[str, tuple[str, ...]]:
    found, repairs = read_object(text, "reflection")
    reflection = found["reflection"]
    if not isinstance(reflection, str) or not is_written(reflection):
        raise ReplyError("schema_error", '"reflection" must be a text that is not empty')
    reflection = reflection.encode("utf-8", "replace").decode("utf-8")
    return reflection.strip(), tuple(sorted(repairs))
