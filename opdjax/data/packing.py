"""Rollouts, or given answers, as training rows: one rollout per row, or several packed into one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from opdjax.ops.sharding import to_host
from opdjax.types import Metrics, PromptBatch, Rollouts, TeacherView, TrainBatch


def to_train_batch(rollouts: Rollouts, prompts: PromptBatch) -> TrainBatch:
    """One rollout per row, with the teacher's own rows if its prompts differ."""
    return TrainBatch(
        tokens=rollouts.tokens,
        mask=rollouts.mask,
        segment_ids=rollouts.segment_ids,
        behavior_logprobs=rollouts.behavior_logprobs,
        teacher_view=None if prompts.teacher_tokens is None else _teacher_view(rollouts, prompts),
    )


def answer_rows(
    prompts: PromptBatch, answers: Sequence[Sequence[int]], length: int, policy_version: int
) -> Rollouts:
    """Given answers in the form of rollouts.

    `answers`: token ids with the stop token, `B = P * G`, those of a prompt next to each other. An
    answer longer than `length` tokens is cut there and counts as truncated.
    """
    num_answers, num_prompts = len(answers), prompts.tokens.shape[0]
    repeats = num_answers // num_prompts
    tokens, mask = np.zeros((num_answers, length), np.int32), np.zeros((num_answers, length), bool)
    for row, answer in enumerate(answers):
        kept = answer[:length]
        tokens[row, : len(kept)], mask[row, : len(kept)] = kept, True
    repeat = lambda x: np.repeat(np.asarray(x), repeats, axis=0)
    prompt_mask = repeat(prompts.mask)
    return Rollouts(
        tokens=np.concatenate([repeat(prompts.tokens), tokens], axis=1),
        mask=np.concatenate([np.zeros_like(prompt_mask), mask], axis=1),
        segment_ids=np.concatenate([prompt_mask, mask], axis=1).astype(np.int32),
        behavior_logprobs=None,
        unfiltered_logprobs=None,
        prompt_id=repeat(prompts.prompt_id),
        sample_id=np.tile(np.arange(repeats, dtype=np.int32), num_prompts),
        policy_version=np.full(num_answers, policy_version, np.int32),
        is_truncated=np.array([len(answer) > length for answer in answers]),
    )


def for_teacher(prompts: PromptBatch) -> PromptBatch:
    """The teacher's prompts, if they differ from the student's."""
    if prompts.teacher_tokens is None:
        return prompts
    return dataclasses.replace(prompts, tokens=prompts.teacher_tokens, mask=prompts.teacher_mask)


def _teacher_view(rollouts: Rollouts, prompts: PromptBatch) -> TeacherView:
    """The teacher's prompt before the same completion: left-padded prompts end where it begins."""
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


def pack(
    batch: TrainBatch,
    length: int,
    *,
    parts: int = 1,
    shards: int = 1,
    rows: np.ndarray | None = None,
    num_rows: int | None = None,
) -> tuple[TrainBatch, np.ndarray]:
    """Packs a batch `[B, T]` of one rollout per row into `num_rows` rows of `length` tokens.

    Returns (batch, origins): `origins [num_rows, length]` is each column's flat index among the
    `B * T` given ones, -1 in empty columns. Every field `[B, T, ...]` is packed.

    `rows [B]`: the row of each rollout. None: `first_fit_decreasing` by the longer of the two
    views, so that a rollout is in the same row for student and teacher. `num_rows`: None: B.

    The columns of a rollout are adjacent; the segments of a row are numbered 1, 2, 3 ... Filled
    rows are placed such that `split_rows` finds them in as few of the `parts` micro-batches as
    hold them, spread evenly over these and over each one's `shards`.

    Runs on the host and does not depend on the mesh. Raises ValueError if a row's rollouts are
    longer than `length`, or if `num_rows` is no multiple of `parts * shards`.
    """
    batch = to_host(batch)
    lengths = packed_lengths(batch)
    rows = first_fit_decreasing(lengths, length) if rows is None else rows
    starts, segments = _layout(rows, lengths, length)
    num_rows = num_rows or len(lengths)
    rows = _spread(rows, parts, shards, num_rows)
    origins_of = lambda ids: _origins(ids, rows, starts, (num_rows, length))
    renumbered = lambda ids: np.where(ids > 0, segments[:, None], 0)
    origins = origins_of(batch.segment_ids)
    take = lambda x: _gather(x, origins)
    packed = jax.tree.map(take, dataclasses.replace(batch, teacher_view=None))
    packed = dataclasses.replace(packed, segment_ids=take(renumbered(batch.segment_ids)))
    if batch.teacher_view is None:
        return packed, origins
    view = batch.teacher_view
    view_origins = origins_of(view.segment_ids)
    places = np.take_along_axis(_rank(view.segment_ids), view.columns, axis=1)
    view = TeacherView(
        tokens=_gather(view.tokens, view_origins),
        segment_ids=_gather(renumbered(view.segment_ids), view_origins),
        columns=take((starts[:, None] + np.maximum(places, 0)).astype(np.int32)),
    )
    return dataclasses.replace(packed, teacher_view=view), origins


def unpack(x: np.ndarray, origins: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """`x [rows, length, ...]` of packed rows, back in its columns of `shape = (B, T)`; else 0."""
    is_live = origins >= 0
    found = np.zeros((shape[0] * shape[1], *x.shape[2:]), x.dtype)
    found[origins[is_live]] = x[is_live]
    return found.reshape(*shape, *x.shape[2:])


def packed_lengths(batch: TrainBatch) -> np.ndarray:
    """Tokens `[B]` that each rollout needs in a row, prompt included, in the longer view."""
    views = [batch] if batch.teacher_view is None else [batch, batch.teacher_view]
    return np.max([np.count_nonzero(view.segment_ids, axis=1) for view in views], axis=0)


def packing_metrics(origins: np.ndarray) -> Metrics:
    """The number of filled rows of `pack`, and the share of their columns that hold a token."""
    is_live = origins >= 0
    used = int(np.count_nonzero(is_live.any(axis=1)))
    efficiency = float(np.count_nonzero(is_live)) / max(used * origins.shape[1], 1)
    return {"perf/packed_rows": float(used), "perf/packing_efficiency": efficiency}


def first_fit_decreasing(lengths: np.ndarray, length: int) -> np.ndarray:
    """The row of each rollout `[B]`: longest first, each in the first row with enough room.

    Rows are numbered in the order they are opened. ValueError if a rollout exceeds `length`.
    """
    if lengths.max(initial=0) > length:
        raise ValueError(
            f"a rollout with its prompt has {lengths.max()} tokens; expected at most {length}, "
            "the length of a packed row"
        )
    rows, room = np.zeros(len(lengths), np.int32), np.full(len(lengths), length)
    for rollout in np.argsort(-lengths, kind="stable"):
        rows[rollout] = row = int(np.argmax(room >= lengths[rollout]))
        room[row] -= lengths[rollout]
    return rows


def _layout(rows: np.ndarray, lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """First column and segment number of each rollout in its row, longest first."""
    order = np.lexsort((-lengths, rows))
    before = np.cumsum(lengths[order]) - lengths[order]
    first = np.searchsorted(rows[order], rows[order])  # of each one's row
    starts, segments = np.zeros((2, len(rows)), np.int32)
    starts[order], segments[order] = before - before[first], np.arange(len(rows)) - first + 1
    if (used := (starts + lengths).max(initial=0)) > length:
        raise ValueError(f"the rollouts of a row have {used} tokens; expected at most {length}")
    return starts, segments


def _spread(rows: np.ndarray, parts: int, shards: int, num_rows: int) -> np.ndarray:
    """The final index of rows numbered from 0; inverts the order in which `split_rows` cuts."""
    size, rest = divmod(num_rows, parts)
    if rest or size % shards:
        raise ValueError(
            f"{num_rows} rows do not divide into {parts} micro-batches on {shards} shards"
        )
    num_filled = -(-(int(rows.max(initial=0)) + 1) // size)
    turn, part = np.divmod(rows, num_filled)
    place = turn % shards * (size // shards) + turn // shards
    return place * parts + part


def _rank(segment_ids: np.ndarray) -> np.ndarray:
    """Each column's index among its row's tokens; -1 before the first."""
    return np.cumsum(segment_ids > 0, axis=1) - 1


def _origins(
    segment_ids: np.ndarray, rows: np.ndarray, starts: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """For every packed column the flat index of the column it takes; -1 if it is empty."""
    origins = np.full(shape, -1)
    rollout, column = np.nonzero(segment_ids)
    target = rows[rollout], starts[rollout] + _rank(segment_ids)[rollout, column]
    origins[target] = rollout * segment_ids.shape[1] + column
    return origins


def _gather(x: np.ndarray, origins: np.ndarray) -> np.ndarray:
    """`x [B, T, ...]` in the packed columns; 0 in empty ones."""
    x = np.asarray(x)
    taken = x.reshape(-1, *x.shape[2:])[np.maximum(origins, 0)]
    taken[origins < 0] = 0
    return taken
