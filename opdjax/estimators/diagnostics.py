"""Diagnostics of each token: pure functions of the tiles and columns of a recipe; all detached.

None of them enters a loss. `opdjax/engine/step_metrics.py` reduces them to one number a step.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opdjax.config.recipes import DEFAULT_CAPS
from opdjax.estimators import coupling, importance
from opdjax.ops.masked import rank_in_sequence, sequence_total, zero_where_masked
from opdjax.ops.tile import VocabTile

OVERLAP_TOP_K = 16
_BLOCK = 128  # ids of a block, whose maximum is taken first in a long vocabulary
_LONG_VOCAB = 4096


def entropy(tile: VocabTile) -> Float[Array, " n"]:
    """`-E[log p]` of each next-token distribution, nats; ids of probability 0 add 0."""
    return -tile.expect(tile.logprobs)


def squared_score(student: VocabTile, token: Int[Array, " n"]) -> Float[Array, " n"]:
    """`w_y = |grad log student(y)|^2` in logit space, `1 - 2 p_y + sum p^2`, from 0 to 2.

    `E[A^2 w_y]` is the second moment of one token's policy gradient in logit space: the action
    variance that a baseline reduces. Computed as `(1 - p_y)^2 + sum_{u != y} p_u^2`, which has no
    cancellation.
    """
    others = jnp.where(student.ids == token[:, None], 0, jnp.exp(student.logprobs))
    return jnp.square(jnp.expm1(student.logprob(token))) + student.total(jnp.square(others))


def kth_largest(tile: VocabTile, k: int) -> Float[Array, " n"]:
    """The k-th largest logit of each token, ties counted once; -inf if there are fewer than k.

    Much cheaper than `lax.top_k`: k passes over a short row; for a long one, over the k blocks of
    ids with the largest maxima, which hold the k largest entries.
    """
    x = tile.logits
    if x.shape[-1] > _LONG_VOCAB:
        blocks = jnp.pad(x, ((0, 0), (0, -x.shape[-1] % _BLOCK)), constant_values=-jnp.inf).reshape(
            x.shape[0], -1, _BLOCK
        )
        best = jax.lax.top_k(jnp.max(blocks, axis=-1), k)[1]
        x = jnp.take_along_axis(blocks, best[:, :, None], axis=1).reshape(x.shape[0], -1)

    def lower(_, bound):
        return tile.largest(jnp.where(x < bound[:, None], x, -jnp.inf))

    return jax.lax.fori_loop(0, k - 1, lower, tile.largest(x))


def top_k_overlap(
    student: VocabTile, teacher: VocabTile, k: int = OVERLAP_TOP_K
) -> dict[str, Float[Array, " n"]]:
    """How far student and teacher agree on likely ids (names of verl and thunlp, ids as in thunlp).

    `overlap/ratio`: share of the student's k most likely ids that are among the teacher's k.
    `overlap/student_mass`, `overlap/teacher_mass`: the probability that each gives to the student's
    k. Ids that tie for the last place all count.
    """
    among = lambda tile: (tile.logits > -jnp.inf) & (tile.logits >= kth_largest(tile, k)[:, None])
    kept = among(student)
    count = lambda x: student.total(x.astype(student.logits.dtype))
    return {
        "overlap/ratio": count(kept & among(teacher)) / jnp.maximum(count(kept), 1),
        "overlap/student_mass": _mass(student, kept),
        "overlap/teacher_mass": _mass(teacher, kept),
    }


def _mass(tile: VocabTile, kept: Bool[Array, "n V"]) -> Float[Array, " n"]:
    return tile.total(jnp.where(kept, jnp.exp(tile.logprobs), 0))


def vocabulary_stats(
    student: VocabTile, teacher: VocabTile | None, token: Int[Array, " n"]
) -> dict[str, Float[Array, " n"]]:
    """Statistics of whole distributions: entropies, squared score; with the teacher's tile the
    overlap.
    """
    student, teacher = jax.lax.stop_gradient((student, teacher))
    stats = {"entropy/student": entropy(student), "squared_score": squared_score(student, token)}
    if teacher is not None:
        stats |= {"entropy/teacher": entropy(teacher)} | top_k_overlap(student, teacher)
    return stats


def applied_importance(
    log_ratio: Float[Array, "B T"],
    advantage: Float[Array, "B T"] | None,
    mask: Bool[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    options: dict[str, Any],
    *,
    is_policy_gradient: bool,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """(weight of each token under the correction, whether its ratio was cut).

    `log_ratio` = log student(y) - log behavior(y). A ratio is cut if it is truncated to the cap,
    dropped outside the band, or with ppo_clip beyond the bound in the advantage's favour or beyond
    `dual_clip` against it, where the gradient is 0. For corrections of whole sequences the ratio is
    the product.
    """
    kind, log_ratio = options["importance"], zero_where_masked(log_ratio, mask)
    ratio = jnp.exp(log_ratio)
    cap = options.get("importance_cap", DEFAULT_CAPS.get(options["importance"]))
    if kind in importance.SEQUENCE_CORRECTIONS:
        of = lambda given: coupling.sequence_importance(
            log_ratio, mask, segment_ids, given, is_policy_gradient
        )
        weight, is_cut = of(options), of(options | {"importance_cap": math.inf}) > cap
    elif kind == "token_truncate":
        weight, is_cut = importance.token_truncate(ratio, cap), ratio > cap
    elif kind == "token_mask":
        weight = importance.token_mask(ratio, 1 / cap, cap)
        is_cut = (ratio < 1 / cap) | (ratio > cap)
    else:
        low = options.get("clip_low", importance.CLIP_LOW)
        high = options.get("clip_high", importance.CLIP_HIGH)
        is_above = ratio > (options.get("dual_clip") or math.inf)
        is_cut = ((advantage > 0) & (ratio > 1 + high)) | (
            (advantage < 0) & ((ratio < 1 - low) | is_above)
        )
        weight = jnp.where(is_cut, 0, ratio)
    return zero_where_masked(weight, mask), is_cut & mask


def effective_sample_size(weight: Float[Array, "*n"], mask: Bool[Array, "*n"]) -> Float[Array, ""]:
    """`(sum w)^2 / (n sum w^2)` of the n unmasked weights: 1 for equal weights, 1 / n for a single
    one.
    """
    weight = zero_where_masked(weight, mask)
    squares = jnp.sum(jnp.square(weight)) * jnp.sum(mask)
    return jnp.where(
        squares > 0, jnp.square(jnp.sum(weight)) / jnp.where(squares > 0, squares, 1), 0
    )


def sequence_sample_size(
    log_ratio: Float[Array, "B T"], mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Float[Array, ""]:
    """`effective_sample_size` of whole sequences; a sequence's weight is the product of its ratios.

    `log_ratio` = log student(y) - log behavior(y); a row may hold several sequences. It is 1 where
    the behaviour policy is the student. Sequences without a sampled token do not count.
    """
    summed = sequence_total(zero_where_masked(log_ratio, mask), segment_ids)
    is_first = mask & (rank_in_sequence(mask, segment_ids) == 0)
    # Scaled so that the largest weight is 1: a product of many ratios may overflow.
    largest = jnp.max(jnp.where(is_first, summed, -jnp.inf))
    return effective_sample_size(
        jnp.exp(summed - jnp.where(jnp.isfinite(largest), largest, 0)), is_first
    )


def largest_share(x: Float[Array, "*n"], mask: Bool[Array, "*n"], share: float) -> Float[Array, ""]:
    """Share of the sum held by the `ceil(share n)` largest of the n unmasked entries.

    Entries are at least 0; NaN where the sum is 0.
    """
    descending = -jnp.sort(-zero_where_masked(x, mask).reshape(-1))
    is_counted = jnp.arange(descending.size) < jnp.ceil(share * jnp.sum(mask))
    return jnp.sum(jnp.where(is_counted, descending, 0)) / jnp.sum(descending)
