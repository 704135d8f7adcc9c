"""Scores from a decoder in this process: tokens in, TeacherScores out. Rows may be padded or
packed.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opdjax.models.decoder import DecoderConfig, Params, forward
from opdjax.ops.sharding import scan_parts
from opdjax.ops.tile import Head
from opdjax.ops.vocab import TokenInputs, tiled_stats
from opdjax.types import TeacherScores, TrainBatch


@partial(jax.jit, static_argnames=("config", "needs", "tile", "top_k", "parts", "mesh"))
def score(
    params: Params,
    head: Head,
    batch: TrainBatch,
    *,
    config: DecoderConfig,
    needs: Literal["token", "top_k", "vocabulary"],
    tile: int,
    top_k: int = 0,
    parts: int = 1,
    mesh: Mesh | None = None,
) -> TeacherScores:
    """What a recipe needs of this model: log-probs of the sampled tokens (nats, `[B, T]`), these
    and the `min(top_k, V)` most likely ids of each context with theirs (`[B, T, K]`, most likely
    first), or hidden states `[B, T, D]`.

    Hidden states, not logits, leave the teacher: they are hundreds of times smaller and lose
    nothing. The rows are scored in `parts` one after the other, which bounds the memory of the
    forward pass; parts after the last that holds a sampled token are not scored and hold 0.
    ValueError where `top_k` is not what `needs` asks for.
    """
    if (top_k > 0) != (needs == "top_k"):
        raise ValueError(
            f"top_k is {top_k} where needs is {needs!r}; expected at least 1 where it is 'top_k', and 0 elsewhere"
        )

    def score_part(part: TrainBatch) -> TeacherScores:
        hidden = _hidden_by_student_column(params, config, part, mesh)
        if needs == "vocabulary":
            return TeacherScores(hidden=hidden)
        if needs == "top_k":
            return top_logprobs(hidden, head, part, top_k=top_k, tile=tile, mesh=mesh)
        return TeacherScores(
            token_logprobs=token_logprobs(hidden, head, part, tile=tile, mesh=mesh)
        )

    if parts == 1:
        return score_part(batch)
    return scan_parts(lambda _, part: (None, score_part(part)), None, batch, batch.mask, parts)[1]


def token_logprobs(
    hidden, head: Head, batch: TrainBatch, *, tile: int, mesh: Mesh | None = None
) -> jax.Array:
    """Log-probabilities `[B, T]` of the batch's sampled tokens from a model's hidden states; nats,
    0 elsewhere.
    """
    take = lambda model, _, row: model.logprob(row.token)
    return tiled_stats(
        take, hidden, head, batch.mask, TokenInputs(batch.tokens), tile=tile, mesh=mesh
    )


def top_logprobs(
    hidden, head: Head, batch: TrainBatch, *, top_k: int, tile: int, mesh: Mesh | None = None
) -> TeacherScores:
    """Log-probabilities of the batch's sampled tokens, and of the model's `top_k` most likely ids
    at each of their contexts.
    """

    def take(model, _, row):
        ids = model.top_k(top_k)
        return TeacherScores(
            token_logprobs=model.logprob(row.token), top_ids=ids, top_logprobs=model.logprob(ids)
        )

    return tiled_stats(
        take, hidden, head, batch.mask, TokenInputs(batch.tokens), tile=tile, mesh=mesh
    )


def _hidden_by_student_column(params, config, batch: TrainBatch, mesh: Mesh | None) -> jax.Array:
    view = batch.teacher_view
    if view is None:
        return forward(params, config, batch.tokens, batch.segment_ids, mesh=mesh)
    hidden = forward(params, config, view.tokens, view.segment_ids, mesh=mesh)
    return jnp.take_along_axis(hidden, view.columns[:, :, None], axis=1)
