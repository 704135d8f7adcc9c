"""What a step tells of itself, token by token: pure functions of the tiles and columns that a
recipe sees; all detached.

None of it enters a loss. The reductions to one number a step, and when they are taken, are in
`opdjax/engine/step_metrics.py`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opdjax.estimators import coupling, importance
from opdjax.ops.masked import rank_in_sequence, sequence_total, zero_where_masked
from opdjax.ops.tile import VocabTile

OVERLAP_TOP_K = 16
_BLOCK = 128  # ids whose largest logit is taken first, where a vocabulary is long
_LONG_VOCAB = 4096


def entropy(tile: VocabTile) -> Float[Array, " n"]:
    """`-E[log p]` of each next-token distribution, nats; an id of probability 0 contributes 0."""
    return -tile.expect(tile.logprobs)


def squared_score(student: VocabTile, token: Int[Array, " n"]) -> Float[Array, " n"]:
    """`w_y = |grad log student(y)|^2` with respect to the logits, `1 - 2 p_y + sum p^2`, from 0 to
    2.

    `E[A^2 w_y]` is thus the second moment of one token's policy gradient in logit space: the noise
    of the drawn action, and what a baseline is there to shrink. Written as `(1 - p_y)^2 + sum_{u !=
    y} p_u^2`, in which nothing cancels.
    """
    others = jnp.where(student.ids == token[:, None], 0, jnp.exp(student.logprobs))
    return jnp.square(jnp.expm1(student.logprob(token))) + student.total(jnp.square(others))


def kth_largest(tile: VocabTile, k: int) -> Float[Array, " n"]:
    """The k-th largest logit of each token, equal ones counted once; -inf where there are fewer
    than k.

    Far cheaper than `lax.top_k` at either size: k passes over a short row; of a long one only the k
    blocks of ids with the largest maxima, which hold the k largest entries.
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
    """How far the two agree on what is likely (verl's and thunlp's names, on the student's ids as
    in thunlp).

    `overlap/ratio`: share of the student's k most likely ids that are among the teacher's k.
    `overlap/student_mass` and `overlap/teacher_mass`: the probability that each gives to the
    student's k. Ids that tie for the last place all count.
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
    """What takes the whole distributions: entropies and the squared score of the token, with the
    teacher's tile the overlap.
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
    """(weight that the correction leaves each token, whether its ratio was cut); `log_ratio` = log
    student(y) - log behavior(y).

    Cut is: truncated to the cap, dropped for being outside the band, or, with ppo_clip, beyond the
    bound in the advantage's favour or beyond `dual_clip` against it, where the gradient is 0. Of
    the corrections of whole sequences the ratio is the product.
    """
    kind, log_ratio = options["importance"], zero_where_masked(log_ratio, mask)
    ratio, cap = (
        jnp.exp(log_ratio),
        options.get("importance_cap", importance.DEFAULT_CAPS.get(options["importance"])),
    )
    if kind in importance.SEQUENCE_CORRECTIONS:
        of = lambda given: coupling.sequence_importance(
            log_ratio, mask, segment_ids, given, is_policy_gradient
        )
        weight, is_cut = of(options), of(options | {"importance_cap": math.inf}) > cap
    elif kind == "token_truncate":
        weight, is_cut = importance.token_truncate(ratio, cap), ratio > cap
    elif kind == "token_mask":
        floor = options.get("importance_floor", importance.DEFAULT_FLOOR)
        weight, is_cut = importance.token_mask(ratio, floor, cap), (ratio < floor) | (ratio > cap)
    else:
        low, high = (
            options.get("clip_low", importance.CLIP_LOW),
            options.get("clip_high", importance.CLIP_HIGH),
        )
        is_above = ratio > (options.get("dual_clip") or math.inf)
        is_cut = ((advantage > 0) & (ratio > 1 + high)) | (
            (advantage < 0) & ((ratio < 1 - low) | is_above)
        )
        weight = jnp.where(is_cut, 0, ratio)
    return zero_where_masked(weight, mask), is_cut & mask


def effective_sample_size(weight: Float[Array, "*n"], mask: Bool[Array, "*n"]) -> Float[Array, ""]:
    """`(sum w)^2 / (n sum w^2)` of the unmasked weights: the share of the n tokens that as many
    equal weights would make up.
    """
    weight = zero_where_masked(weight, mask)
    squares = jnp.sum(jnp.square(weight)) * jnp.sum(mask)
    return jnp.where(
        squares > 0, jnp.square(jnp.sum(weight)) / jnp.where(squares > 0, squares, 1), 0
    )


def sequence_sample_size(
    log_ratio: Float[Array, "B T"], mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Float[Array, ""]:
    """`effective_sample_size` of whole sequences, of which a row may hold several: the weight of
    each is the product of its ratios.

    `log_ratio` = log student(y) - log behavior(y). 1 where the behaviour policy is the student;
    towards 1 / n where a few of n sequences would carry an average over the student's. Sequences
    without a sampled token are none.
    """
    summed = sequence_total(zero_where_masked(log_ratio, mask), segment_ids)
    is_first = mask & (rank_in_sequence(mask, segment_ids) == 0)
    # The largest weight is 1: a product of many ratios is no number that has to be represented.
    largest = jnp.max(jnp.where(is_first, summed, -jnp.inf))
    return effective_sample_size(
        jnp.exp(summed - jnp.where(jnp.isfinite(largest), largest, 0)), is_first
    )


def largest_share(x: Float[Array, "*n"], mask: Bool[Array, "*n"], share: float) -> Float[Array, ""]:
    """What the `ceil(share n)` largest of the n unmasked entries make up of their sum; entries at
    least 0; NaN where the sum is 0.
    """
    descending = -jnp.sort(-zero_where_masked(x, mask).reshape(-1))
    is_counted = jnp.arange(descending.size) < jnp.ceil(share * jnp.sum(mask))
    return jnp.sum(jnp.where(is_counted, descending, 0)) / jnp.sum(descending)
