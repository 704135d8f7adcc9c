"""Reductions that take a mask as an argument. Masked slots may hold anything, NaN included: they
change neither value nor gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def zero_where_masked(x: Float[Array, ...], mask: Bool[Array, ...]) -> Float[Array, ...]:
    """`x` with exact zeros, and zero gradient, where `mask` is False."""
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def masked_sum(x: Float[Array, ...], mask: Bool[Array, ...], axis=None) -> Float[Array, ...]:
    """Sum of the unmasked entries, in at least float32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.sum(zero_where_masked(x, mask), axis=axis, dtype=wide)


def masked_mean(x: Float[Array, ...], mask: Bool[Array, ...], axis=None) -> Float[Array, ...]:
    """Mean of the unmasked entries; 0 if there are none."""
    return masked_sum(x, mask, axis) / jnp.maximum(jnp.sum(mask, axis=axis), 1)


def masked_std(x: Float[Array, ...], mask: Bool[Array, ...]) -> Float[Array, ""]:
    """Population standard deviation of the unmasked entries; 0 if there are none."""
    x = zero_where_masked(x, mask)
    variance = masked_mean(jnp.square(x - masked_mean(x, mask)), mask)
    # The square root has an infinite slope at 0: without the inner guard, the gradient of equal
    # entries would be NaN.
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)


def masked_quantiles(
    x: Float[Array, ...], mask: Bool[Array, ...], shares: tuple[float, ...]
) -> Float[Array, " Q"]:
    """Quantiles of the unmasked entries, with linear interpolation (numpy's default); NaN if there
    are none.
    """
    count = jnp.sum(mask)
    ascending = jnp.sort(jnp.where(mask, x, jnp.inf).reshape(-1))
    place = jnp.asarray(shares, ascending.dtype) * jnp.maximum(count - 1, 0)
    below = jnp.floor(place).astype(jnp.int32)
    low, high = ascending[below], ascending[jnp.minimum(below + 1, jnp.maximum(count - 1, 0))]
    # Equal neighbours need no interpolation: the difference of two infinities would be NaN.
    found = jnp.where(low == high, low, low + (place - below) * (high - low))
    return jnp.where(count > 0, found, jnp.nan)


def starts_sequence(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True where a column starts a new segment; padding counts as a segment."""
    differs = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.concatenate([jnp.ones_like(differs[:, :1]), differs], axis=1)


def sequence_index(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """At every column, the number of its sequence within the row, from 0."""
    return jnp.cumsum(starts_sequence(segment_ids), axis=1) - 1


def sequence_total(x: Float[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """At every column, the sum of `x` over the column's sequence."""
    index = sequence_index(segment_ids)
    sums = jax.vmap(lambda row, at: jax.ops.segment_sum(row, at, num_segments=row.shape[0]))
    return jnp.take_along_axis(sums(x, index), index, axis=1)


def rank_in_sequence(mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """At every column, the number of unmasked columns before it in the same sequence."""
    before = jnp.cumsum(mask, axis=1) - mask
    return before - jax.lax.cummax(jnp.where(starts_sequence(segment_ids), before, 0), axis=1)


def running_sum(
    x: Float[Array, "B T"], mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """At every column, the sum of the unmasked entries of its sequence up to and including it."""

    # Not a difference of two sums over the row: its rounding would depend on the values of earlier
    # sequences.
    def add(earlier, later):
        (before, was_started), (total, is_started) = earlier, later
        return jnp.where(is_started, total, before + total), was_started | is_started

    values = zero_where_masked(x, mask), starts_sequence(segment_ids)
    return jax.lax.associative_scan(add, values, axis=1)[0]


def reverse_discounted_sum(
    x: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    discount: float,
) -> Float[Array, "B T"]:
    """`y[b, t] = x[b, t] + discount * y[b, t + 1]` over the unmasked columns of one segment.

    Masked columns contribute 0 and neither reset nor decay the sum; the result there is 0.
    """
    x = zero_where_masked(x, mask)

    def step(carry, column):
        following, following_segment = carry
        value, is_live, segment = column
        following = jnp.where(segment == following_segment, following, 0)
        total = jnp.where(is_live, value + discount * following, following)
        return (total, segment), jnp.where(is_live, total, 0)

    start = (jnp.zeros_like(x[:, 0]), jnp.zeros_like(segment_ids[:, 0]))
    _, sums = jax.lax.scan(step, start, (x.T, mask.T, segment_ids.T), reverse=True)
    return sums.T
