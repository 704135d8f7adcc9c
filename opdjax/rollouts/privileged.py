"""Privileged context from judges: the teacher of each rollout is shown its rubric, its verdicts, or
a reflection on it.

The prompts of a teacher are then as many as there are rollouts. Self-distillation is the case where
that teacher is the student itself: the same weights, told what was wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from opdjax.data.prompts import padded_width, teacher_prompt_ids
from opdjax.judge.judgement import Judgement
from opdjax.judge.reflection import rubric_text, verdict_text
from opdjax.ops.multihost import from_process_zero, on_process_zero
from opdjax.rollouts.setup import Setup
from opdjax.types import PromptBatch


def per_rollout(prompts: PromptBatch, size: int) -> PromptBatch:
    """The prompts, each as often as it has rollouts."""
    fields = ("tokens", "mask", "prompt_id")
    return PromptBatch(
        **{name: np.repeat(np.asarray(getattr(prompts, name)), size, axis=0) for name in fields}
    )


def with_context(
    setup: Setup, prompts: PromptBatch, judged: Sequence[Sequence[Judgement]] | None
) -> tuple[PromptBatch, np.ndarray]:
    """The prompts of the step by rollout with what the teacher is shown of each, and which rollouts
    have that; `judged` on the lead.
    """
    size = setup.config.sampling.num_generations
    rows = per_rollout(prompts, size)
    count = len(rows.prompt_id)
    # Whatever goes wrong with it ends all processes: the lead alone knows what was said.
    ids = on_process_zero(lambda: _context_ids(setup, rows, judged))
    width = int(
        from_process_zero(lambda: np.array(padded_width(max(map(len, ids)) or 1)), np.array(0))
    )

    def padded() -> np.ndarray:
        tokens = np.full((count, width), -1, np.int32)
        for row, found in enumerate(ids):
            tokens[row, width - len(found) :] = found
        return tokens

    tokens = from_process_zero(padded, np.zeros((count, width), np.int32))
    mask = tokens >= 0
    return dataclasses.replace(
        rows, teacher_tokens=np.maximum(tokens, 0), teacher_mask=mask
    ), mask.any(axis=1)


def _context_ids(
    setup: Setup, rows: PromptBatch, judged: Sequence[Sequence[Judgement]]
) -> list[tuple[int, ...]]:
    """Token ids of each rollout's teacher prompt; none where its judgement is missing, or longer
    than the config allows.
    """
    data, size = setup.config.data, setup.config.sampling.num_generations
    found: list[tuple[int, ...]] = [()] * len(rows.prompt_id)
    for place, judgements in enumerate(judged):
        for judgement in judgements:
            for number, sample in enumerate(judgement.group.samples):
                if judgement.scores[number] is None:
                    continue
                said = {
                    "rubric": rubric_text(judgement),
                    "verdicts": verdict_text(judgement, number),
                }
                said["reflection"] = judgement.reflections[number] if judgement.reflections else ""
                row = setup.prompts.prompts[int(rows.prompt_id[place * size + sample])]
                ids = teacher_prompt_ids(row, data, setup.teacher.tokenizer, said)
                found[place * size + sample] = (
                    ids if len(ids) <= data.max_teacher_prompt_length else ()
                )
    return found
