"""Privileged context from judges: the teacher of each rollout reads its rubric, its verdicts, or a
reflection on it.

There is then one teacher prompt per rollout. In self-distillation that teacher is the student: the
same weights, but with the judge's text in the prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from opdjax.data.prompts import padded_width, prompt_ids
from opdjax.judge.judgement import Judgement
from opdjax.judge.reflection import rubric_text, verdict_text
from opdjax.ops.multihost import from_process_zero, on_process_zero
from opdjax.rollouts.setup import Setup
from opdjax.types import PromptBatch


def with_context(
    setup: Setup, prompts: PromptBatch, judgements: Sequence[Sequence[Judgement]] | None
) -> tuple[PromptBatch, np.ndarray]:
    """The prompts by rollout `[B]` with their teacher prompts, and which rollouts have one.

    `judgements` are given on process zero, and None in the others.
    """
    repeat = lambda x: np.repeat(np.asarray(x), setup.config.sampling.num_generations, axis=0)
    rows = PromptBatch(repeat(prompts.tokens), repeat(prompts.mask), repeat(prompts.prompt_id))
    count = len(rows.prompt_id)
    ids = on_process_zero(lambda: _context_ids(setup, rows, judgements))
    width = from_process_zero(lambda: np.array(padded_width(max(map(len, ids)) or 1)), np.array(0))

    def padded() -> np.ndarray:
        tokens = np.full((count, int(width)), -1, np.int32)
        for row, found in enumerate(ids):
            tokens[row, int(width) - len(found) :] = found
        return tokens

    tokens = from_process_zero(padded, np.zeros((count, int(width)), np.int32))
    mask = tokens >= 0
    rows = dataclasses.replace(rows, teacher_tokens=np.maximum(tokens, 0), teacher_mask=mask)
    return rows, mask.any(axis=1)


def _context_ids(
    setup: Setup, rows: PromptBatch, judgements: Sequence[Sequence[Judgement]]
) -> list[tuple[int, ...]]:
    """Token ids of each rollout's teacher prompt; () if it was not judged or if the prompt is
    longer than `DataConfig.max_teacher_prompt_length`.
    """
    data, size = setup.config.data, setup.config.sampling.num_generations
    found: list[tuple[int, ...]] = [()] * len(rows.prompt_id)
    for place, group in enumerate(judgements):
        for judgement in group:
            for number, sample in enumerate(judgement.group.samples):
                if judgement.scores[number] is None:
                    continue
                texts = {
                    "rubric": rubric_text(judgement),
                    "verdicts": verdict_text(judgement, number),
                    "reflection": judgement.reflections[number] if judgement.reflections else "",
                }
                rollout = place * size + sample
                row = setup.prompts.prompts[int(rows.prompt_id[rollout])]
                where, tokenizer = f"a prompt of {data.source}", setup.teacher.tokenizer
                ids = prompt_ids(row, data, tokenizer, where, of_teacher=True, judge_texts=texts)
                found[rollout] = ids if len(ids) <= data.max_teacher_prompt_length else ()
    return found
