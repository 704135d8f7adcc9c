"""From rollouts, or given answers, to rows that are trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from opdjax.types import PromptBatch, Rollouts, TeacherView, TrainBatch


def to_train_batch(rollouts: Rollouts, prompts: PromptBatch) -> TrainBatch:
    """One row a rollout; where the teacher's template differs, its own rows come along."""
    return TrainBatch(
        tokens=rollouts.tokens,
        mask=rollouts.mask,
        segment_ids=rollouts.segment_ids,
        behavior_logprobs=rollouts.behavior_logprobs,
        teacher_view=None if prompts.teacher_tokens is None else _teacher_view(rollouts, prompts),
    )


def answer_rows(prompts: PromptBatch, answers: Sequence[Sequence[int]], length: int, policy_version: int) -> Rollouts:
    """Given answers (token ids, stop token included; B = P * G, those of a prompt side by side) in the form of rollouts.

    An answer longer than `length` tokens is cut there and counts as truncated.
    """
    repeats = len(answers) // prompts.tokens.shape[0]
    tokens, mask = np.zeros((len(answers), length), np.int32), np.zeros((len(answers), length), bool)
    for row, answer in enumerate(answers):
        kept = answer[:length]
        tokens[row, : len(kept)], mask[row, : len(kept)] = kept, True
    repeat = lambda x: np.repeat(np.asarray(x), repeats, axis=0)  # noqa: E731
    prompt_mask = repeat(prompts.mask)
    return Rollouts(
        tokens=np.concatenate([repeat(prompts.tokens), tokens], axis=1),
        mask=np.concatenate([np.zeros_like(prompt_mask), mask], axis=1),
        segment_ids=np.concatenate([prompt_mask, mask], axis=1).astype(np.int32),
        behavior_logprobs=None,
        unfiltered_logprobs=None,
        prompt_id=repeat(prompts.prompt_id),
        sample_id=np.tile(np.arange(repeats, dtype=np.int32), prompts.tokens.shape[0]),
        policy_version=np.full(len(answers), policy_version, np.int32),
        is_truncated=np.array([len(answer) > length for answer in answers]),
    )


def as_teacher_sees(prompts: PromptBatch) -> PromptBatch:
    """The prompts through the teacher's own template, where it has one."""
    if prompts.teacher_tokens is None:
        return prompts
    return dataclasses.replace(prompts, tokens=prompts.teacher_tokens, mask=prompts.teacher_mask)


def _teacher_view(rollouts: Rollouts, prompts: PromptBatch) -> TeacherView:
    """The teacher's prompt in front of the same completion. Both prompts end just before the completion's first column."""
    repeats = rollouts.tokens.shape[0] // prompts.tokens.shape[0]
    student_width, teacher_width = prompts.tokens.shape[1], prompts.teacher_tokens.shape[1]
    tokens = jnp.repeat(prompts.teacher_tokens, repeats, axis=0)
    segments = jnp.repeat(prompts.teacher_mask, repeats, axis=0).astype(jnp.int32)
    columns = jnp.arange(rollouts.tokens.shape[1]) - student_width + teacher_width
    return TeacherView(
        tokens=jnp.concatenate([tokens, rollouts.tokens[:, student_width:]], axis=1),
        segment_ids=jnp.concatenate([segments, rollouts.segment_ids[:, student_width:]], axis=1),
        columns=jnp.broadcast_to(jnp.maximum(columns, 0), rollouts.tokens.shape),
    )
