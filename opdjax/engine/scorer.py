"""Scores of a batch under a decoder in this process: tokens in, TeacherScores out. Rows may be
padded or packed.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

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
    """The scores that a recipe needs. `token`: log-probs of the sampled tokens (nats, `[B, T]`).
    `top_k`: also the `min(top_k, V)` most likely ids of each context and their log-probs
    (`[B, T, K]`, most likely first). `vocabulary`: hidden states `[B, T, D]`, which are hundreds of
    times smaller than logits and lose nothing.

    Rows are scored in `parts`, one after the other, which bounds the memory of the forward pass.
    Parts after the last one with a sampled token are skipped; their scores are 0. ValueError if
    `top_k` does not match `needs`.
    """
    if (top_k > 0) != (needs == "top_k"):
        raise ValueError(
            f"top_k is {top_k} where needs is {needs!r}; expected at least 1 if needs is 'top_k', "
            "else 0"
        )

    def score_part(part: TrainBatch) -> TeacherScores:
        hidden = _hidden_by_student_column(params, config, part, mesh)
        if needs == "vocabulary":
            return TeacherScores(hidden=hidden)
        if needs == "top_k":
            return top_logprobs(hidden, head, part, top_k=top_k, tile=tile, mesh=mesh)
        return TeacherScores(
            teacher_logprobs=token_logprobs(hidden, head, part, tile=tile, mesh=mesh)
        )

    if parts == 1:
        return score_part(batch)
    return scan_parts(lambda _, part: (None, score_part(part)), None, batch, batch.mask, parts)[1]


def token_logprobs(
    hidden, head: Head, batch: TrainBatch, *, tile: int, mesh: Mesh | None = None
) -> Float[Array, "B T"]:
    """Log-probs of the batch's sampled tokens from a model's hidden states; nats, 0 elsewhere."""
    take = lambda model, _, row: model.logprob(row.tokens)
    inputs = TokenInputs(batch.tokens)
    return tiled_stats(take, hidden, head, batch.mask, inputs, tile=tile, mesh=mesh)


def top_logprobs(
    hidden, head: Head, batch: TrainBatch, *, top_k: int, tile: int, mesh: Mesh | None = None
) -> TeacherScores:
    """Log-probs of the batch's sampled tokens, and the model's `top_k` most likely ids at their
    contexts with log-probs.
    """

    def take(model, _, row):
        ids = model.top_k(top_k)
        return TeacherScores(
            teacher_logprobs=model.logprob(row.tokens),
            teacher_top_ids=ids,
            teacher_top_logprobs=model.logprob(ids),
        )

    inputs = TokenInputs(batch.tokens)
    return tiled_stats(take, hidden, head, batch.mask, inputs, tile=tile, mesh=mesh)


def _hidden_by_student_column(params, config, batch: TrainBatch, mesh: Mesh | None) -> Array:
    view = batch.teacher_view
    if view is None:
        return forward(params, config, batch.tokens, batch.segment_ids, mesh=mesh)
    hidden = forward(params, config, view.tokens, view.segment_ids, mesh=mesh)
    return jnp.take_along_axis(hidden, view.columns[:, :, None], axis=1)
