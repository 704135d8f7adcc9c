"""Rubric induction: criteria that tell the answers to one prompt apart (ROPD, section 2.2)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from opdjax.config.rubrics import RubricsConfig
from opdjax.judge.prompts import Block, fill
from opdjax.judge.schema import Criterion, Rubric, parse_rubric, rubric_schema
from opdjax.judge.structured_output import Judge, JudgeRequest, Tally, ask

# Parts of the prompt. Replies are cached by the prompt's bytes: a changed word is a cache miss.
_EXISTING = (
    "\nCriteria that are in use already, and kept. Write only criteria that see what these do "
    "not:\n\n"
)
_SIGNED = (
    '\nA criterion may also name a flaw ("polarity": "negative"): an answer that shows it loses '
    "the points. Use few of them, only for flaws that\ncan be seen beyond doubt, and never as the "
    "mirror image of a positive one.\n"
)
_STAGES = (
    "\nAn answer has stages, in this order:\n{}\n"
    "Every criterion looks at one stage, which it names, and at nothing outside it: what the stage "
    "is for and how well it serves\nthose that follow, never whether a heading or a tag is there. "
    "Write a few criteria for each stage.\n"
)


async def induce(
    judge: Judge,
    question: str,
    references: Sequence[str],
    answers: Sequence[str],
    tally: Tally,
    existing: Sequence[Criterion] = (),
) -> Rubric:
    """A rubric that contrasts the student's answers with the references.

    Identical answers are shown once and all texts are sorted, so that the rubric does not depend
    on their order. With `existing` criteria only new ones are requested, possibly none. Raises
    ReplyError or ApiError if there is no usable reply.
    """
    config, stages = judge.config, judge.config.stage_names
    bounds = (0 if existing else config.num_criteria[0], config.num_criteria[1])
    words = {
        "min_criteria": str(bounds[0]),
        "max_criteria": str(bounds[1]),
        "format": _example(config, stages),
        "signs": _SIGNED if config.polarity == "signed" else "",
        "stages": _stage_note(stages),
        "existing_note": _EXISTING if existing else "",
    }
    blocks: dict[str, Block] = {
        "question": ("question", [question]),
        "references": ("reference", sorted(references)),
        "students": ("student", sorted(set(answers))),
        "existing": ("existing", [criterion.text for criterion in existing]),
    }
    prompt = fill(judge.template("rubricator"), words, blocks)
    request = JudgeRequest("rubricator", prompt, rubric_schema(config, stages), "rubric")
    return await ask(judge, request, lambda text: parse_rubric(text, config, stages, bounds), tally)


def _stage_note(stages: Sequence[str]) -> str:
    return _STAGES.format("\n".join(f'- stage "{stage}"' for stage in stages)) if stages else ""


def _example(config: RubricsConfig, stages: Sequence[str]) -> str:
    """An example of the reply with the requested fields."""
    item: dict[str, Any] = {"id": "c1", "category": "task", "text": "...", "weight": 5}
    if config.polarity == "signed":
        item["polarity"] = "positive"
    if stages:
        item["stage"] = stages[0]
    return json.dumps({"criteria": [item]}, ensure_ascii=False).replace("}]}", "}, ...]}")
