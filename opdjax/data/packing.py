"""From rollouts, or given answers, to rows that are trained on: one row a rollout, or packed rows
that several share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from opdjax.ops.sharding import to_host
from opdjax.types import Metrics, PromptBatch, Rollouts, TeacherView, TrainBatch


def to_train_batch(rollouts: Rollouts, prompts: PromptBatch) -> TrainBatch:
    """One row a rollout; where the teacher's template differs, its own rows come along."""
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
    """Given answers (token ids, stop token included; B = P * G, those of a prompt side by side) in
    the form of rollouts.

    An answer longer than `length` tokens is cut there and counts as truncated.
    """
    repeats = len(answers) // prompts.tokens.shape[0]
    tokens, mask = (
        np.zeros((len(answers), length), np.int32),
        np.zeros((len(answers), length), bool),
    )
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
        sample_id=np.tile(np.arange(repeats, dtype=np.int32), prompts.tokens.shape[0]),
        policy_version=np.full(len(answers), policy_version, np.int32),
        is_truncated=np.array([len(answer) > length for answer in answers]),
    )


def for_teacher(prompts: PromptBatch) -> PromptBatch:
    """The prompts through the teacher's own template, where it has one."""
    if prompts.teacher_tokens is None:
        return prompts
    return dataclasses.replace(prompts, tokens=prompts.teacher_tokens, mask=prompts.teacher_mask)


def _teacher_view(rollouts: Rollouts, prompts: PromptBatch) -> TeacherView:
    """The teacher's prompt in front of the same completion. Both prompts end just before the
    completion's first column.
    """
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
    """A batch of one rollout a row `[B, T]` in rows of `length` tokens that rollouts share, and
    where each column came from.

    `rows [B]`: the row of each rollout; None: `first_fit_decreasing` by the longer of the two
    views, so that a rollout stands in the same row for student and teacher. The columns of a
    rollout lie side by side, and the segments of a row are numbered 1, 2, 3 ... There are
    `num_rows` rows (None: B), of which the filled ones may be few; they lie so that `split_rows`
    finds them in as few of the `parts` micro-batches as hold them, dealt evenly over these and,
    within each, over the `shards` of its rows. Every field `[B, T, ...]` goes along. `source
    [num_rows, length]` is the place of each column among the `B * T` given ones, -1 where nothing
    stands.

    On the host, and the same whatever the mesh. ValueError where the rollouts of a row are longer
    than it, or the rows are no multiple of `parts * shards`.
    """
    batch = to_host(batch)
    lengths = packed_lengths(batch)
    rows = first_fit_decreasing(lengths, length) if rows is None else rows
    starts, numbers = _places(rows, lengths, length)
    rows = _dealt(rows, parts, shards, num_rows or len(lengths))
    shape = (num_rows or len(lengths), length)
    source = _sources(batch.segment_ids, rows, starts, shape)
    take = lambda x: _gather(x, source)
    segment_ids = take(np.where(batch.segment_ids > 0, numbers[:, None], 0))
    packed = dataclasses.replace(
        jax.tree.map(take, dataclasses.replace(batch, teacher_view=None)), segment_ids=segment_ids
    )
    if batch.teacher_view is None:
        return packed, source
    view = batch.teacher_view
    seen = _sources(view.segment_ids, rows, starts, shape)
    places = np.take_along_axis(_rank(view.segment_ids), view.columns, axis=1)
    view = TeacherView(
        tokens=_gather(view.tokens, seen),
        segment_ids=_gather(np.where(view.segment_ids > 0, numbers[:, None], 0), seen),
        columns=take((starts[:, None] + np.maximum(places, 0)).astype(np.int32)),
    )
    return dataclasses.replace(packed, teacher_view=view), source


def unpack(x: np.ndarray, source: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """`x [rows, length, ...]` of packed rows back in the columns `shape = (B, T)` that they came
    from; 0 in the others.
    """
    is_live = source >= 0
    found = np.zeros((shape[0] * shape[1], *x.shape[2:]), x.dtype)
    found[source[is_live]] = x[is_live]
    return found.reshape(*shape, *x.shape[2:])


def packed_lengths(batch: TrainBatch) -> np.ndarray:
    """Tokens that each rollout takes in a row, prompt included: those of the longer of the two
    views.
    """
    views = [batch] if batch.teacher_view is None else [batch, batch.teacher_view]
    return np.max([np.count_nonzero(view.segment_ids, axis=1) for view in views], axis=0)


def packing_metrics(source: np.ndarray) -> Metrics:
    """How well the rows of `pack` are filled: their number, and the share of their columns in which
    a token stands.
    """
    is_live = source >= 0
    used = int(np.count_nonzero(is_live.any(axis=1)))
    efficiency = float(np.count_nonzero(is_live)) / max(used * source.shape[1], 1)
    return {"perf/packed_rows": float(used), "perf/packing_efficiency": efficiency}


def first_fit_decreasing(lengths: np.ndarray, length: int) -> np.ndarray:
    """The row of each rollout: the longest first, each in the first row that has room. Rows are
    numbered as they are opened.

    ValueError where a rollout is longer than a row.
    """
    if lengths.max(initial=0) > length:
        raise ValueError(
            f"a rollout with its prompt has {lengths.max()} tokens; expected at most {length}, those of a packed row"
        )
    rows, room = np.zeros(len(lengths), np.int32), np.full(len(lengths), length)
    for rollout in np.argsort(-lengths, kind="stable"):
        rows[rollout] = row = int(np.argmax(room >= lengths[rollout]))
        room[row] -= lengths[rollout]
    return rows


def _places(rows: np.ndarray, lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """First column and segment number of each rollout in its row, the longest first."""
    starts, numbers = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.int32)
    used, count = (
        np.zeros(rows.max(initial=0) + 1, np.int32),
        np.zeros(rows.max(initial=0) + 1, np.int32),
    )
    for rollout in np.argsort(-lengths, kind="stable"):
        row = rows[rollout]
        count[row] += 1
        starts[rollout], numbers[rollout] = used[row], count[row]
        used[row] += lengths[rollout]
    if used.max(initial=0) > length:
        raise ValueError(
            f"the rollouts of a row have {used.max()} tokens; expected at most {length}"
        )
    return starts, numbers


def _dealt(rows: np.ndarray, parts: int, shards: int, num_rows: int) -> np.ndarray:
    """Where the rows numbered from 0 lie among `num_rows`; the inverse of how `split_rows` cuts
    them.
    """
    size, rest = divmod(num_rows, parts)
    if rest or size % shards:
        raise ValueError(
            f"{num_rows} rows do not divide into {parts} micro-batches on {shards} shards"
        )
    filled = -(-(int(rows.max(initial=0)) + 1) // size)
    turn, part = np.divmod(rows, filled)
    place = turn % shards * (size // shards) + turn // shards
    return place * parts + part


def _rank(segment_ids: np.ndarray) -> np.ndarray:
    """The number of each column among the row's own tokens; -1 before the first."""
    return np.cumsum(segment_ids > 0, axis=1) - 1


def _sources(
    segment_ids: np.ndarray, rows: np.ndarray, starts: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """For every packed column, the flat place of the column that it takes; -1 where it takes none."""
    source = np.full(shape, -1)
    rollout, column = np.nonzero(segment_ids)
    source[rows[rollout], starts[rollout] + _rank(segment_ids)[rollout, column]] = (
        rollout * segment_ids.shape[1] + column
    )
    return source


def _gather(x: np.ndarray, source: np.ndarray) -> np.ndarray:
    """`x [B, T, ...]` in the packed columns, 0 where nothing stands."""
    x = np.asarray(x)
    taken = x.reshape(-1, *x.shape[2:])[np.maximum(source, 0)]
    taken[source < 0] = 0
    return taken
