"""Tokens from uniform numbers, by inverting the cumulative distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def invert_cdf(
    weights: Float[Array, "B V"], uniform: Float[Array, " B"], axis: str | None = None
) -> Int[Array, " B"]:
    """The token whose share of the cumulative weight contains `uniform`; weights need not sum to 1.

    Works in two levels, block sums and then inside one block, so that no running sum over the whole
    vocabulary is formed. Never returns a token of weight 0. With an `axis`, each device along it
    holds a slice of the vocabulary, and all of them return the token.
    """
    batch, vocab = weights.shape
    block = 1 << max(3, (vocab.bit_length() + 1) // 2)
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % block))).reshape(batch, -1, block)
    totals = jnp.sum(blocks, axis=-1)
    sums = jnp.cumsum(totals, axis=-1)
    if axis is None:
        return _invert_blocks(blocks, totals, sums, uniform * sums[:, -1])
    number = jax.lax.axis_index(axis)
    place = jnp.arange(jax.lax.axis_size(axis)) == number
    slices = jax.lax.psum(jnp.where(place, sums[:, -1:], 0), axis)
    ends = jnp.cumsum(slices, axis=-1)
    target = uniform * ends[:, -1]
    chosen = _first_above(ends, slices > 0, target)
    before = jnp.where(number > 0, ends[:, jnp.maximum(number - 1, 0)], 0)
    token = number * vocab + _invert_blocks(blocks, totals, sums, target - before)
    return jax.lax.psum(jnp.where(chosen == number, token, 0), axis)


def _invert_blocks(blocks, totals, sums, target) -> Int[Array, " B"]:
    chosen = _first_above(sums, totals > 0, target)
    previous = jnp.take_along_axis(sums, jnp.maximum(chosen - 1, 0)[:, None], axis=-1)[:, 0]
    before = jnp.where(chosen > 0, previous, 0)
    inside = jnp.take_along_axis(blocks, chosen[:, None, None], axis=1)[:, 0]
    place = _first_above(jnp.cumsum(inside, axis=-1), inside > 0, target - before)
    return (chosen * blocks.shape[-1] + place).astype(jnp.int32)


def _first_above(
    sums: Float[Array, "B N"], is_live: Bool[Array, "B N"], target: Float[Array, " B"]
) -> Int[Array, " B"]:
    """First live index whose running sum exceeds the target; the last live index if rounding leaves
    none.

    XLA computes a long running sum as a tree, whose rounding can change the sum by an ulp where a
    weight of 0 is added.
    """
    is_found = is_live & (sums > target[:, None])
    last = jnp.max(jnp.where(is_live, jnp.arange(sums.shape[-1]), 0), axis=-1)
    return jnp.where(jnp.any(is_found, axis=-1), jnp.argmax(is_found, axis=-1), last)
