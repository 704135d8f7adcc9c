"""Scores of a batch under a decoder in this process: tokens in, TeacherScores out. Rows may be
padded or packed.
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
from opdjax.ops.vocab import TILE, TokenInputs, tiled_stats
from opdjax.types import TeacherScores, TrainBatch


@partial(jax.jit, static_argnames=("config", "needs", "tile", "top_k", "parts", "mesh"))
def score(
    params: Params,
    head: Head,
    batch: TrainBatch,
    *,
    config: DecoderConfig,
    needs: Literal["token", "top_k", "vocabulary"],
    tile: int = TILE,
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
        view = part.teacher_view
        rows = part if view is None else view
        hidden = forward(params, config, rows.tokens, rows.segment_ids, mesh=mesh)
        if view is not None:  # from the teacher's columns to the student's
            hidden = jnp.take_along_axis(hidden, view.columns[:, :, None], axis=1)
        if needs == "vocabulary":
            return TeacherScores(hidden=hidden)
        return token_scores(hidden, head, part, tile=tile, top_k=top_k, mesh=mesh)

    if parts == 1:
        return score_part(batch)
    return scan_parts(lambda _, part: (None, score_part(part)), None, batch, batch.mask, parts)[1]


def token_scores(
    hidden, head: Head, batch: TrainBatch, *, tile: int, top_k: int = 0, mesh: Mesh | None = None
) -> TeacherScores:
    """From a model's hidden states: the log-probs of the batch's sampled tokens (nats, 0 elsewhere)
    and, unless `top_k` is 0, the most likely ids at their contexts with log-probs.
    """

    def take(model, _, row):
        ids = model.top_k(top_k) if top_k else None
        return TeacherScores(
            teacher_logprobs=model.logprob(row.tokens),
            teacher_top_ids=ids,
            teacher_top_logprobs=model.logprob(ids) if top_k else None,
        )

    inputs = TokenInputs(batch.tokens)
    return tiled_stats(take, hidden, head, batch.mask, inputs, tile=tile, mesh=mesh)
