"""Credit that reaches beyond one token: rewards to come, the mean of the batch, a reward of the task."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opdjax.ops.masked import reverse_discounted_sum, sequence_total, zero_where_masked


def future_reward(
    reward: Float[Array, "B T"], mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"], discount: float
) -> Float[Array, "B T"]:
    """`sum_{s > t} discount^(s - t) R_s` over the later sampled tokens of the same sequence, nats.

    Added to the immediate reward it is the reward to go. discount 0 is vOPD's token-level credit: the gradient of
    sum_t KL_t with the distribution of contexts held fixed. discount 1 is the gradient of the sequence KL. With `reward`
    the expectation over each context's tokens (-KL) in place of the reward of the token drawn there, the same in
    expectation and with less noise.
    """
    return reverse_discounted_sum(reward, mask, segment_ids, discount) - zero_where_masked(reward, mask)


def mean_of_other_sequences(
    reward: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    totals: tuple[Float[Array, ""], Float[Array, ""]] | None = None,
) -> Float[Array, "B T"]:
    """At each column, the mean reward of the sampled tokens of all other sequences; 0 where there is no other.

    The whole sequence is left out and not the token alone: what follows a token was written because of it, and a baseline
    must not depend on its token. `totals`: (sum of rewards, tokens) of the whole batch where these rows are a part of it.
    """
    reward = zero_where_masked(reward, mask)
    live = mask.astype(reward.dtype)
    total, count = batch_totals(reward, mask) if totals is None else totals
    others = count - sequence_total(live, segment_ids)
    return jnp.where(others > 0, (total - sequence_total(reward, segment_ids)) / jnp.maximum(others, 1), 0)


def batch_totals(reward: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of rewards, number of sampled tokens)."""
    return jnp.sum(zero_where_masked(reward, mask)), jnp.sum(mask).astype(reward.dtype)


def prefix_weight(
    reward: Float[Array, "B T"], mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"], gain: float
) -> Float[Array, "B T"]:
    """`1 + gain * (1 - F_t)`, F_t the share of the sequence's disagreement `sum |r|` that lies before token t.

    IW-OPD (arXiv 2606.22600), its released form: 1 + gain at the first token, then ever nearer 1. The weight of a token depends
    on what follows it, so that the expected gradient is no longer that of the KL.
    """
    gaps = zero_where_masked(jnp.abs(reward), mask)
    total = sequence_total(gaps, segment_ids)
    # What lies at t and after, rather than 1 minus what lies before.
    remaining = reverse_discounted_sum(gaps, mask, segment_ids, 1.0)
    return jnp.where(mask & (total > 0), 1 + gain * remaining / jnp.where(total > 0, total, 1), 1 + gain * mask)


def group_centred(reward: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """`reward - mean` over the completions of the same prompt, which stand side by side; in the unit of the reward."""
    groups = reward.reshape(-1, group_size)
    return (groups - jnp.mean(groups, axis=1, keepdims=True)).reshape(-1)
