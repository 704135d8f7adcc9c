"""Importance ratios of the student to the behaviour policy, their truncations, and k1, k2, k3.

Every ratio is `rho = student(y) / behavior(y)`: the behaviour policy with its temperature and
filters, the student as it is now. As a weight of a loss it is detached. An untruncated ratio
makes stale tokens unbiased, at contexts sampled from the student, for every token that the
behaviour policy can sample; tokens removed by a filter stay missing. A truncation trades bias
for variance; dropped tokens stay in the denominator of the loss.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opdjax.ops.masked import running_sum, sequence_total, zero_where_masked

TOKEN_CORRECTIONS = ("token_truncate", "token_mask", "ppo_clip")
SEQUENCE_CORRECTIONS = ("sequence_mask", "prefix_truncate")
CLIP_LOW, CLIP_HIGH = 0.2, 0.28  # of ppo_clip: ratios from 0.8 to 1.28
_LARGEST_LOG_RATIO = 60.0  # e^60 of 10^10 tokens can still be summed in float32
# d e^d - (e^d - 1) = d^2 * sum of (n + 1) / (n + 2)! d^n; 14 terms are exact in float64 up to
# |d| = 1/2.
_STALENESS_SERIES = [(n + 1) / math.factorial(n + 2) for n in reversed(range(14))]


def token_ratio(
    student_logprobs: Float[Array, "*n"], behavior_logprobs: Float[Array, "*n"]
) -> Float[Array, "*n"]:
    """`rho = student(y) / behavior(y)`; detached. It is 1 for the student's own tokens."""
    return jnp.exp(jax.lax.stop_gradient(student_logprobs - behavior_logprobs))


def token_truncate(ratio: Float[Array, "*n"], cap: float) -> Float[Array, "*n"]:
    """`min(rho, cap)`: truncated importance sampling.

    In expectation every token counts `min(student(y), cap * behavior(y))`.
    """
    return jnp.minimum(ratio, cap)


def token_mask(ratio: Float[Array, "*n"], floor: float, cap: float) -> Float[Array, "*n"]:
    """`rho` inside the band `[floor, cap]`, 0 outside (IcePop): tokens outside are dropped."""
    return jnp.where((ratio >= floor) & (ratio <= cap), ratio, 0)


def prefix_truncate(
    log_ratio: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    cap: float,
    *,
    is_inclusive: bool,
) -> Float[Array, "B T"]:
    """`min(prod_{s <= t} rho_s, cap)`; with `is_inclusive` False the product over `s < t`.

    The exclusive product is the ratio of reaching the context. A policy gradient takes the
    inclusive one; an exact divergence samples no action at t and takes the exclusive one. Without a
    cap both are exact for the reward at t itself. Later rewards (discount, a task reward) also
    depend on later ratios: use `sequence_mask`.
    """
    summed = running_sum(log_ratio, mask, segment_ids)
    if not is_inclusive:
        summed = summed - zero_where_masked(log_ratio, mask)
    return jnp.exp(jnp.minimum(summed, jnp.log(cap)))


def sequence_mask(
    log_ratio: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    cap: float,
) -> Float[Array, "B T"]:
    """The product of all ratios of the sequence, at each of its columns; 0 above `cap`."""
    summed = sequence_total(zero_where_masked(log_ratio, mask), segment_ids)
    return jnp.where(summed <= jnp.log(cap), jnp.exp(jnp.minimum(summed, jnp.log(cap))), 0)


def k1(
    student_logprobs: Float[Array, "*n"], teacher_logprobs: Float[Array, "*n"]
) -> Float[Array, "*n"]:
    """`log student(y) - log teacher(y)`, nats: over y ~ student unbiased for their KL.

    A diagnostic of either sign. Differentiated directly, its expected gradient is 0: see
    `pitfalls`.
    """
    return student_logprobs - teacher_logprobs


def k2(
    student_logprobs: Float[Array, "*n"], teacher_logprobs: Float[Array, "*n"]
) -> Float[Array, "*n"]:
    """`k1^2 / 2`: biased as a value; its gradient is `k1 * grad log student(y)`, that of `opd`."""
    return jnp.square(k1(student_logprobs, teacher_logprobs)) / 2


def k3(
    student_logprobs: Float[Array, "*n"], teacher_logprobs: Float[Array, "*n"]
) -> Float[Array, "*n"]:
    """`exp(-k1) - 1 + k1`, nats, never negative; unbiased for KL(student || teacher) like k1.

    A diagnostic with less variance than k1. Differentiated directly, it descends KL(teacher ||
    student): see `pitfalls`.
    """
    gap = k1(student_logprobs, teacher_logprobs)
    return jnp.expm1(-gap) + gap


def kl_to_behavior(
    student_logprobs: Float[Array, "*n"], behavior_logprobs: Float[Array, "*n"]
) -> Float[Array, "*n"]:
    """`rho log rho - rho + 1`, nats: unbiased for KL(student || behavior) over y ~ behavior.

    Never negative, 0 at rho = 1: the counterpart of k3 for tokens of the behaviour policy. Tokens
    that it cannot sample (filters) are missing. A diagnostic; ratios above e^60 count as e^60.
    """
    gap = jnp.clip(student_logprobs - behavior_logprobs, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    # Near 1 the three terms cancel to d^2 / 2: of a gap of 1e-4 float32 would keep three digits.
    series = jnp.square(gap) * jnp.polyval(jnp.asarray(_STALENESS_SERIES, gap.dtype), gap)
    return jnp.where(jnp.abs(gap) < 0.5, series, gap * jnp.exp(gap) - jnp.expm1(gap))
