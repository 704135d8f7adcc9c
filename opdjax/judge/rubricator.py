"""Rubric induction: what sets the answers of one prompt apart, as criteria that each can be held to
(ROPD, section 2.2).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from opdjax.config.rubrics import RubricsConfig
from opdjax.judge.prompts import Block, fill
from opdjax.judge.schema import Criterion, Rubric, parse_rubric, rubric_schema
from opdjax.judge.structured_output import Judge, JudgeRequest, Tally, ask

_EXISTING = "\nCriteria that are in use already, and kept. Write only criteria that see what these do not:\n\n"
_SIGNED = """
A criterion may also name a flaw ("polarity": "negative"): an answer that shows it loses the points. Use few of them, only for flaws that
can be seen beyond doubt, and never as the mirror image of a positive one.
"""


async def induce(
    judge: Judge,
    question: str,
    references: Sequence[str],
    answers: Sequence[str],
    tally: Tally,
    existing: Sequence[Criterion] = (),
) -> Rubric:
    """A rubric for the student's answers, contrasted with the references; ReplyError or ApiError
    where none can be had.

    Identical rollouts are shown once, and all in the order of their text: the rubric does not
    depend on the order they came in. With `existing` criteria only new ones are asked for, and none
    may come.
    """
    config, stages = judge.config, judge.config.stage_names
    words = {
        "min_criteria": str(_bounds(config, existing)[0]),
        "max_criteria": str(_bounds(config, existing)[1]),
        "format": _format(config, stages),
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
    asked = JudgeRequest("rubricator", prompt, rubric_schema(config, stages), "rubric")
    bounds = _bounds(config, existing)
    return await ask(judge, asked, lambda text: parse_rubric(text, config, stages, bounds), tally)


def _bounds(config: RubricsConfig, existing: Sequence[Criterion]) -> tuple[int, int]:
    return (0, config.max_criteria) if existing else (config.min_criteria, config.max_criteria)


def _stage_note(stages: Sequence[str]) -> str:
    if not stages:
        return ""
    lines = "\n".join(f'- stage "{stage}"' for stage in stages)
    return (
        f"\nAn answer has stages, in this order:\n{lines}\n"
        "Every criterion looks at one stage, which it names, and at nothing outside it: what the stage is for and how well it serves\n"
        "those that follow, never whether a heading or a tag is there. Write a few criteria for each stage.\n"
    )


def _format(config: RubricsConfig, stages: Sequence[str]) -> str:
    """An example of the reply, in the fields that are asked for."""
    item: dict[str, Any] = {"id": "c1", "category": "task", "text": "...", "weight": 5}
    if config.polarity == "signed":
        item["polarity"] = "positive"
    if stages:
        item["stage"] = stages[0]
    return json.dumps({"criteria": [item]}, ensure_ascii=False).replace("}]}", "}, ...]}")
