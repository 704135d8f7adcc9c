"""Rubric induction: criteria that tell the answers to one prompt apart (ROPD, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opdjax.judge.prompts import Block, list_example
from opdjax.judge.schema import Criterion, RolloutGroup, Rubric, parse_rubric, rubric_schema
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


async def induce(judge: Judge, group: RolloutGroup, tally: Tally) -> Rubric:
    """A rubric that contrasts the student's answers with the references.

    Identical answers are shown once and all texts are sorted, so that the rubric does not depend
    on their order. With existing criteria only new ones are requested, possibly none, and added.
    Raises ReplyError or ApiError if there is no usable reply.
    """
    config, stages = judge.config, judge.config.stage_names
    bounds = (0 if group.existing else config.num_criteria[0], config.num_criteria[1])
    item: dict[str, Any] = {"id": "c1", "category": "task", "text": "...", "weight": 5}
    item |= {"polarity": "positive"} if config.polarity == "signed" else {}
    item |= {"stage": stages[0]} if stages else {}
    names = "\n".join(f'- stage "{stage}"' for stage in stages)
    words = {
        "min_criteria": str(bounds[0]),
        "max_criteria": str(bounds[1]),
        "format": list_example("criteria", item),
        "signs": _SIGNED if config.polarity == "signed" else "",
        "stages": _STAGES.format(names) if stages else "",
        "existing_note": _EXISTING if group.existing else "",
    }
    blocks: dict[str, Block] = {
        "question": ("question", [group.question]),
        "references": ("reference", sorted(group.references)),
        "students": ("student", sorted(set(group.answers))),
        "existing": ("existing", [criterion.text for criterion in group.existing]),
    }
    schema = rubric_schema(config, stages)
    request = JudgeRequest("rubricator", "rubricator", words, blocks, schema, "rubric")
    parse = lambda text: parse_rubric(text, config, stages, bounds)
    rubric = await ask(judge, request, parse, tally)
    return joined(group.existing, rubric.criteria) if group.existing else rubric


def joined(existing: Sequence[Criterion], new: Sequence[Criterion]) -> Rubric:
    """All criteria with new ids; of several with the same text and stage the first."""
    unique: dict[tuple[str, str | None], Criterion] = {}
    for criterion in [*existing, *new]:
        unique.setdefault((criterion.text, criterion.stage), criterion)
    numbered = enumerate(unique.values(), 1)
    return Rubric(tuple(c.model_copy(update={"id": f"c{number}"}) for number, c in numbered))
