"""From rollouts to rows that are trained on."""

from __future__ import annotations

import jax.numpy as jnp

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
