"""On-policy distillation from sampled tokens: reward, control-variate baselines, `opd` and `vopd`.

All functions treat one context and one token y sampled from the student. The objective is
KL(student || teacher). Its gradient is estimated by -A * grad log student(y) with the detached
advantage A = h(r) - baseline.
"""

from __future__ import annotations

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from opdjax.config.recipes import DEFAULT_CAPS, Baseline
from opdjax.estimators import importance as ratios
from opdjax.estimators.losses import clipped_policy_gradient_loss, policy_gradient_loss
from opdjax.ops.tile import VocabTile
from opdjax.ops.vocab import TokenInputs

BASELINES = get_args(Baseline)
REWARD_OPTIONS = ("reward_floor", "power_alpha")


def sampled_reward(
    teacher_logprobs: Float[Array, "*n"],
    student_logprobs: Float[Array, "*n"],
    *,
    reward_floor: float | None = None,
    power_alpha: float | None = None,
) -> Float[Array, "*n"]:
    """`h(r)` with r = log teacher(y) - log student(y), nats, both of the full softmax; detached.

    E_student[r] = -KL(student || teacher). Without options h(r) = r (vOPD, arXiv 2605.07865,
    section 3). `reward_floor`: `max(r, reward_floor)`, nats (REOPOLD, arXiv 2603.11137, whose floor
    is log(lambda / (1 - lambda))). `power_alpha`: `teacher(y)^a - student(y)^a`, between -1 and 1
    (PowerOPD, arXiv 2606.17199, as released: not divided by a).
    """
    if power_alpha is not None:
        return jax.lax.stop_gradient(
            jnp.exp(power_alpha * teacher_logprobs) - jnp.exp(power_alpha * student_logprobs)
        )
    reward = jax.lax.stop_gradient(teacher_logprobs - student_logprobs)
    return reward if reward_floor is None else jnp.maximum(reward, reward_floor)


def full_baseline(student: VocabTile, teacher: VocabTile, **reward_options) -> Float[Array, " n"]:
    """`b = E_student[h]`, detached; for the plain reward -KL(student || teacher), nats.

    The value of vOPD, arXiv 2605.07865, Proposition 3.1.
    """
    return jax.lax.stop_gradient(
        student.expect(sampled_reward(teacher.logprobs, student.logprobs, **reward_options))
    )


def student_topk_baseline(
    student: VocabTile, teacher: VocabTile, k: int, **reward_options
) -> Float[Array, " n"]:
    """`b = E[h]`, student and teacher both renormalised on the student's top k ids; detached.

    For the plain reward it is -KL there. k = 1 gives 0, which makes vOPD OPD; k >= V gives the full
    baseline. The top-k form of vOPD (arXiv 2605.07865).
    """
    ids = student.top_k(k)
    student_kept = jax.nn.log_softmax(student.logprob(ids), axis=-1)
    teacher_kept = jax.nn.log_softmax(teacher.logprob(ids), axis=-1)
    # An id at -inf in the student has weight 0, even where the teacher is -inf too.
    gain = jnp.where(
        student_kept > -jnp.inf, sampled_reward(teacher_kept, student_kept, **reward_options), 0
    )
    return jax.lax.stop_gradient(jnp.sum(jnp.exp(student_kept) * gain, axis=-1))


def score_norms(student: VocabTile) -> Float[Array, "n V"]:
    """`w_v = |grad log student(v)|^2` in logit space: `(1 - p_v)^2 + sum_{u != v} p_u^2`; detached.

    This form has no cancellation; `1 - 2 p_v + sum p^2` loses all digits where p_v is near 1.
    """
    is_live = student.logits > -jnp.inf
    p = jax.lax.stop_gradient(jnp.where(is_live, jnp.exp(student.logprobs), 0))
    is_top = student.ids == student.top_k(1)
    others = jnp.where(is_top, 0, p)
    mass = student.total(others)[:, None]
    squares = student.total(jnp.square(others))[:, None]
    top = student.largest(p)[:, None]
    other_squares = jnp.where(is_top, squares, jnp.square(top) + (squares - jnp.square(p)))
    return jnp.square(jnp.where(is_top, mass, 1 - p)) + other_squares


def optimal_baseline(
    student: VocabTile, teacher: VocabTile, **reward_options
) -> Float[Array, " n"]:
    """`b* = E[w h] / E[w]`, w = `score_norms`; detached: least action variance in logit space.

    vOPD (arXiv 2605.07865) derives it in equations 23 and 24 and uses E[h]. It is 0 where E[w] <
    1e-12: no variance is left to reduce.
    """
    weights = score_norms(student)
    reward = sampled_reward(teacher.logprobs, student.logprobs, **reward_options)
    total = student.expect(weights)
    is_sure = total < 1e-12
    return jax.lax.stop_gradient(
        jnp.where(is_sure, 0, student.expect(weights * reward) / jnp.where(is_sure, 1, total))
    )


def baseline_of(
    student: VocabTile,
    teacher: VocabTile | None,
    row: TokenInputs,
    baseline: str,
    top_k: int,
    **reward_options,
):
    """The baseline `[n]` of that name.

    ValueError on a name outside BASELINES, and where an input of the baseline is missing.
    """
    if baseline in ("full", "student_topk", "optimal"):
        needed(teacher, "teacher", f"baseline {baseline}")
    if baseline == "full":
        return full_baseline(student, teacher, **reward_options)
    if baseline == "student_topk":
        return student_topk_baseline(student, teacher, top_k, **reward_options)
    if baseline == "optimal":
        return optimal_baseline(student, teacher, **reward_options)
    if baseline == "batch_mean":
        return needed(row.mean_rewards, "mean_rewards", "baseline batch_mean")
    raise ValueError(f"vopd has no baseline {baseline!r}; expected one of {BASELINES}")


def opd(student: VocabTile, teacher: VocabTile | None, row: TokenInputs, **options):
    """Sampled-token on-policy distillation: a policy gradient on the teacher's log-ratio.

    Equation: loss(y) = -sg[A] log student(y), A = r = log teacher(y) - log student(y), nats, y
    sampled from the student. The expected gradient at a context is that of KL(student || teacher)
    with the distribution of contexts held fixed. Vanilla OPD of arXiv 2605.07865, section 1;
    elsewhere called "k1 in the reward".

    Detached: A, and with it the reward, every weight and every importance ratio. The teacher gets
    no gradient.

    Cost: one teacher log-prob a token, which an interface that scores text can give. The variance
    is that of one sample a context. `extra_draws` and `return_to_go` expected read the teacher's
    whole distribution.

    Use it when the teacher's distribution is not available. Where it is, `vopd` has less variance
    at the same cost, and `full_kl` has no sampling variance.

    Options:
      discount          0 (default): a token is credited with its own reward, as in the paper; 1:
                        with all later rewards of its sequence too, the gradient of the sequence KL
      return_to_go      sampled (default): later rewards as sampled; expected: -KL of each later
                        context instead, which has the same expectation
      reward_floor      None; max(r, floor), nats: descends a KL whose penalty of a token grows only
                        linearly where student(y) exceeds teacher(y) e^-floor (REOPOLD)
      power_alpha       None; teacher(y)^a - student(y)^a: descends sum_v p_v^(1+a) / (1+a) - p_v
                        q_v^a (PowerOPD)
      prefix_weight     0; gain of IW-OPD, 0.5 in its release: early tokens count up to 1 + gain
                        times. Biased
      extra_draws       0; m more tokens sampled at each scored context and averaged with the first:
                        action variance 1 / (m + 1), full_kl in the limit, no further forward pass
      task_reward_coef  0; adds coef * (reward - mean of the prompt's completions), reward 1 for a
                        right answer; never discounted
      importance        none (default), token_truncate, token_mask, sequence_mask, prefix_truncate
                        or ppo_clip: how rho = student(y) / behavior(y) corrects stale tokens
      importance_cap    largest ratio: 3 for sequence_mask, 2 for the others
      clip_low          ppo_clip: 0.2, ratios from 1 - clip_low
      clip_high         ppo_clip: 0.28, ratios to 1 + clip_high
    """
    return _estimate(student, teacher, row, 0.0, **options)


def vopd(
    student: VocabTile,
    teacher: VocabTile | None,
    row: TokenInputs,
    *,
    baseline: str = "full",
    support_top_k: int = 100,
    **options,
):
    """OPD with a control-variate baseline: the reward minus the expected reward of the context.

    Equation: loss(y) = -sg[h(r) - b] log student(y), r = log teacher(y) - log student(y), nats, y
    sampled from the student. b does not depend on y, so the expected gradient is that of `opd` for
    every b. With b = E[r] = -KL(student || teacher) the advantages of a context average to 0. vOPD,
    arXiv 2605.07865, equations 9 to 15. This is exact for the student's own tokens or under an
    untruncated ratio, and under the aggregation fixed_denominator. Other aggregations divide by
    sampled lengths and bias the gradient by O(1 / rows); a filter or a bounded ratio biases it too.

    Detached: reward, baseline, every weight and ratio. The teacher gets no gradient.

    Cost: the teacher's hidden states and its unembedding of every context (one more product of the
    size of the student's own), no gradient through the vocabulary. batch_mean needs only the
    teacher's log-prob of the sampled token, and one more forward pass where a step has several
    micro-batches.

    Use it for the expectation of `opd` with less variance. `full_kl` costs the same and has no
    sampling variance.

    Options:
      baseline        full (default): b = E[h]. student_topk: the same on the student's top k ids,
                      both sides renormalised there. optimal: b* = E[w h] / E[w], w the squared norm
                      of the score in logit space: least variance there, 0 where the student is
                      certain. batch_mean: mean reward of all other sequences, the plain control
      support_top_k  ids of student_topk, 100 as in the paper; 1 is opd, V is full
      ...             and all of opd
    """
    reward_options = {name: options.get(name) for name in REWARD_OPTIONS}
    value = baseline_of(student, teacher, row, baseline, support_top_k, **reward_options)
    loss, outputs = _estimate(student, teacher, row, value, **options)
    is_plain = baseline == "full" and all(given is None for given in reward_options.values())
    return loss, outputs | ({"kl": -value} if is_plain else {})


def advantages(
    student: VocabTile,
    teacher: VocabTile,
    *,
    baseline: str | None = None,
    support_top_k: int = 100,
    **reward_options,
) -> Float[Array, "n V"]:
    """The immediate advantage `h(r_v) - b` of every id v; no baseline for `opd`."""
    reward = sampled_reward(teacher.logprobs, student.logprobs, **reward_options)
    if baseline is None:
        return reward
    return (
        reward
        - baseline_of(
            student, teacher, TokenInputs(None), baseline, support_top_k, **reward_options
        )[:, None]
    )


def _estimate(
    student: VocabTile,
    teacher: VocabTile | None,
    row: TokenInputs,
    value: Float[Array, " n"] | float,
    *,
    discount: float = 0.0,
    reward_floor: float | None = None,
    power_alpha: float | None = None,
    extra_draws: int = 0,
    task_reward_coef: float = 0.0,
    importance: str = "none",
    importance_cap: float | None = None,
    clip_low: float = ratios.CLIP_LOW,
    clip_high: float = ratios.CLIP_HIGH,
):
    """(loss, outputs) of the sampled token and of the extra draws, with the baseline `value`."""
    h = partial(sampled_reward, reward_floor=reward_floor, power_alpha=power_alpha)
    student_logprobs = student.logprob(row.tokens)
    teacher_logprobs = (
        needed(row.teacher_logprobs, "teacher_logprobs", "a recipe")
        if teacher is None
        else teacher.logprob(row.tokens)
    )
    immediate = h(teacher_logprobs, student_logprobs) - value
    # These terms do not depend on the token alone, so the extra draws leave them out.
    later = jnp.zeros_like(immediate)
    if discount:
        later += needed(row.future_rewards, "future_rewards", "discount")
    if task_reward_coef:
        later += task_reward_coef * needed(row.advantages, "advantages", "task_reward_coef")
    share = 1 / (1 + extra_draws)
    bounds = (importance_cap, clip_low, clip_high)
    loss = _surrogate(share * immediate + later, student_logprobs, row, importance, *bounds)
    if extra_draws:
        ids = student.draw(needed(row.uniforms, "uniforms", "extra_draws"))
        drawn_logprob = student.logprob(ids)
        drawn = h(
            needed(teacher, "teacher", "extra_draws").logprob(ids), drawn_logprob
        ) - jnp.reshape(value, (-1, 1))
        loss += share * jnp.sum(policy_gradient_loss(drawn, drawn_logprob), axis=1)
    reward = sampled_reward(teacher_logprobs, student_logprobs)
    advantage = jax.lax.stop_gradient(immediate + later)
    return loss, {"rewards": reward, "advantages": advantage, "student_logprobs": student_logprobs}


def _surrogate(
    advantage, student_logprobs, row: TokenInputs, importance: str, cap, clip_low, clip_high
) -> Float[Array, " n"]:
    """The policy-gradient loss of one token, corrected by its own ratio.

    Corrections of whole sequences are `row.loss_weight` instead.
    """
    if importance == "none":
        return policy_gradient_loss(advantage, student_logprobs)
    if importance not in ratios.TOKEN_CORRECTIONS:
        raise ValueError(
            f"a token has no importance correction {importance!r}; expected one of "
            f"{ratios.TOKEN_CORRECTIONS}"
        )
    behavior_logprobs = needed(
        row.behavior_logprobs, "behavior_logprobs", f"importance {importance}"
    )
    if importance == "ppo_clip":
        return clipped_policy_gradient_loss(
            advantage, student_logprobs, behavior_logprobs, clip_low, clip_high
        )
    ratio = ratios.token_ratio(student_logprobs, behavior_logprobs)
    cap = DEFAULT_CAPS[importance] if cap is None else cap
    weight = (
        ratios.token_truncate(ratio, cap)
        if importance == "token_truncate"
        else ratios.token_mask(ratio, 1 / cap, cap)
    )
    return policy_gradient_loss(weight * advantage, student_logprobs)


def needed(value, name: str, reader: str):
    """The value; ValueError that names it where it is None."""
    if value is None:
        raise ValueError(f"{reader} reads {name!r}, which this batch does not carry")
    return value
