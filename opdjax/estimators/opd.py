"""On-policy distillation from sampled tokens: the reward, the control-variate baselines, the
recipes `opd` and `vopd`.

All speak of one context c and one token y drawn from the student. The objective is KL(student ||
teacher); its gradient is estimated by -A * grad log student(y | c) with the detached advantage A =
h(r) - baseline.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from opdjax.estimators import importance as ratios
from opdjax.estimators.losses import clipped_policy_gradient_loss, policy_gradient_loss
from opdjax.ops.tile import VocabTile
from opdjax.ops.vocab import TokenInputs

BASELINES = ("full", "student_topk", "optimal", "batch_mean")
REWARD_OPTIONS = ("reward_floor", "power_alpha")


def sampled_reward(
    teacher_logprob: Float[Array, "*n"],
    student_logprob: Float[Array, "*n"],
    *,
    reward_floor: float | None = None,
    power_alpha: float | None = None,
) -> Float[Array, "*n"]:
    """`h(r)`, r = log teacher(y) - log student(y), both of the full softmax; detached. E_student[r]
    = -KL(student || teacher).

    Without options h(r) = r, nats (vOPD, arXiv 2605.07865, section 3). `reward_floor`: `max(r,
    reward_floor)`, nats (REOPOLD, arXiv 2603.11137, whose floor is log(lambda / (1 - lambda))).
    `power_alpha`: `teacher(y)^a - student(y)^a`, between -1 and 1 (PowerOPD, arXiv 2606.17199, as
    released: not divided by a). Given over the vocabulary, the options say what each token would be
    worth.
    """
    if power_alpha is not None:
        return jax.lax.stop_gradient(
            jnp.exp(power_alpha * teacher_logprob) - jnp.exp(power_alpha * student_logprob)
        )
    reward = jax.lax.stop_gradient(teacher_logprob - student_logprob)
    return reward if reward_floor is None else jnp.maximum(reward, reward_floor)


def full_baseline(student: VocabTile, teacher: VocabTile, **reward_options) -> Float[Array, " n"]:
    """`b = E_student[h]`, detached; -KL(student || teacher), nats, for the plain reward. vOPD's
    value, Proposition 3.1.
    """
    return jax.lax.stop_gradient(
        student.expect(sampled_reward(teacher.logprobs, student.logprobs, **reward_options))
    )


def student_topk_baseline(
    student: VocabTile, teacher: VocabTile, k: int, **reward_options
) -> Float[Array, " n"]:
    """`b = E[h]` with student and teacher both renormalised on the student's top k ids; detached.
    Plain reward: -KL there.

    k = 1 gives 0 (then vOPD is OPD), k >= V the full baseline. vOPD (arXiv 2605.07865), its top-k
    form.
    """
    ids = student.top_k(k)
    student_kept = jax.nn.log_softmax(student.logprob(ids), axis=-1)
    teacher_kept = jax.nn.log_softmax(teacher.logprob(ids), axis=-1)
    # An id that the student cannot draw (-inf) weighs nothing, even where the teacher is -inf too.
    gain = jnp.where(
        student_kept > -jnp.inf, sampled_reward(teacher_kept, student_kept, **reward_options), 0
    )
    return jax.lax.stop_gradient(jnp.sum(jnp.exp(student_kept) * gain, axis=-1))


def score_norms(student: VocabTile) -> Float[Array, "n V"]:
    """`w_v = |grad log student(v)|^2` with respect to the logits: `(1 - p_v)^2 + sum_{u != v}
    p_u^2`; detached.

    Nothing cancels: `1 - 2 p_v + sum p^2` would lose all its digits where the student is nearly
    sure of v.
    """
    is_live = student.logits > -jnp.inf
    p = jax.lax.stop_gradient(jnp.where(is_live, jnp.exp(student.logprobs), 0))
    is_top = student.ids == student.top_k(1)
    others = jnp.where(is_top, 0, p)
    mass, squares, top = (
        student.total(others)[:, None],
        student.total(jnp.square(others))[:, None],
        student.largest(p)[:, None],
    )
    beside = jnp.where(is_top, squares, jnp.square(top) + (squares - jnp.square(p)))
    return jnp.square(jnp.where(is_top, mass, 1 - p)) + beside


def optimal_baseline(
    student: VocabTile, teacher: VocabTile, **reward_options
) -> Float[Array, " n"]:
    """`b* = E[w h] / E[w]`, w the squared norms of the score in logit space: no constant has less
    action variance there; detached.

    vOPD (arXiv 2605.07865) derives it (equations 23 and 24) and uses E[h]. 0 where E[w] < 1e-12:
    nothing is left to reduce.
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
    """The baseline `[n]` of that name; ValueError on a name that is not one of BASELINES, or where
    what it reads is missing.
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
        return needed(row.mean_reward, "mean_reward", "baseline batch_mean")
    raise ValueError(f"vopd has no baseline {baseline!r}; expected one of {BASELINES}")


def opd(student: VocabTile, teacher: VocabTile | None, row: TokenInputs, **options):
    """Vanilla sampled-token on-policy distillation: a policy gradient whose reward is the teacher's
    opinion of a token.

    Equation: loss(y) = -sg[A] log student(y), A = r = log teacher(y) - log student(y), nats, y
    drawn from the student. The expected gradient at a context is that of KL(student || teacher),
    the distribution of contexts held fixed. Vanilla OPD of arXiv 2605.07865, section 1; elsewhere
    "k1 in the reward".

    Detached: A, and with it the reward, every weight and every importance ratio; nothing reaches
    the teacher.

    Cost: one log-prob of the teacher a token, so that a teacher behind an interface that scores
    text is enough; the variance of one draw a context. `extra_draws` and `return_to_go` expected
    read the teacher's whole distribution.

    Use it when the teacher's distribution is out of reach. Where it is at hand, `vopd` has less
    variance at the same cost, and `full_kl` has none of the draws.

    Options:
      discount          0 (default): a token is credited with its own reward alone, as in the paper; 1: with all that
                        follow in its sequence, the gradient of the sequence KL
      return_to_go      sampled (default): later rewards as drawn; expected: -KL of each later context in their place, the
                        same expectation
      reward_floor      None; max(r, floor), nats: descends a KL whose penalty of a token grows but linearly where
                        student(y) exceeds teacher(y) e^-floor (REOPOLD)
      power_alpha       None; teacher(y)^a - student(y)^a: descends sum_v p_v^(1+a) / (1+a) - p_v q_v^a (PowerOPD)
      prefix_weight     0; IW-OPD's gain, 0.5 in its release: early tokens count up to 1 + gain times. Biased
      extra_draws       0; m more tokens drawn at each context already scored, averaged with the first: action variance
                        1 / (m + 1), and full_kl in the limit; the forward passes stay as they are
      task_reward_coef  0; adds coef * (reward - mean of its prompt's completions), 1 for a right
      answer, undiscounted
      importance        none (default), token_truncate, token_mask, sequence_mask, prefix_truncate or ppo_clip: what is
                        made of rho = student(y) / behavior(y) where another policy drew the tokens
      importance_cap    largest ratio: 3 for sequence_mask, 2 for the others
      importance_floor  smallest ratio that token_mask keeps, 0.5
      clip_low          ppo_clip: 0.2, from 1 - clip_low
      clip_high         ppo_clip: 0.28, to 1 + clip_high
    """
    return _estimate(student, teacher, row, 0.0, **options)


def vopd(
    student: VocabTile,
    teacher: VocabTile | None,
    row: TokenInputs,
    *,
    baseline: str = "full",
    baseline_top_k: int = 100,
    **options,
):
    """OPD with a control-variate baseline: what a token is worth beside what its context is worth
    on average.

    Equation: loss(y) = -sg[h(r) - b] log student(y), r = log teacher(y) - log student(y), nats, y
    drawn from the student. b does not depend on y, so that the expected gradient is that of `opd`,
    whatever b is; with b = E[r] =
    -KL(student || teacher) the advantages of a context average to 0. vOPD, arXiv 2605.07865,
    equations 9 to 15. Exactly so for tokens of the student itself or under an untruncated ratio,
    and under the aggregation fixed_denominator: others divide by sampled lengths and let b leak in
    by O(1 / rows); a filter or a bounded ratio lets it leak in as well.

    Detached: reward, baseline, every weight and ratio; nothing reaches the teacher.

    Cost: the teacher's hidden states and its unembedding of every context (one more product of the
    size of the student's own), no gradient through the vocabulary. batch_mean needs but the
    teacher's log-prob of the sampled token, and one more forward pass where a step has several
    micro-batches.

    Use it when the expectation of `opd` is wanted with less noise. `full_kl` costs the same and has
    no noise of draws.

    Options:
      baseline        full (default): b = E[h]. student_topk: the same on the student's top k ids, both sides
                      renormalised there. optimal: b* = E[w h] / E[w], w the squared norm of the
                      score in logit space: least variance there, and 0 where the student is sure.
                      batch_mean: the mean reward of all other sequences' tokens, the plain control
      baseline_top_k  ids of student_topk, 100 as in the paper; 1 is opd, V is full
      ...             and all of opd
    """
    reward_options = {name: options.get(name) for name in REWARD_OPTIONS}
    value = baseline_of(student, teacher, row, baseline, baseline_top_k, **reward_options)
    loss, outputs = _estimate(student, teacher, row, value, **options)
    is_plain = baseline == "full" and all(given is None for given in reward_options.values())
    return loss, outputs | ({"kl": -value} if is_plain else {})


def advantages(
    student: VocabTile,
    teacher: VocabTile,
    *,
    baseline: str | None = None,
    baseline_top_k: int = 100,
    **reward_options,
) -> Float[Array, "n V"]:
    """The immediate advantage `h(r_v) - b` of every token of the vocabulary: what `opd` (no
    baseline) and `vopd` give each draw.
    """
    reward = sampled_reward(teacher.logprobs, student.logprobs, **reward_options)
    if baseline is None:
        return reward
    return (
        reward
        - baseline_of(
            student, teacher, TokenInputs(None), baseline, baseline_top_k, **reward_options
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
    importance_floor: float = ratios.DEFAULT_FLOOR,
    clip_low: float = ratios.CLIP_LOW,
    clip_high: float = ratios.CLIP_HIGH,
):
    """(loss, outputs) of the sampled token, and of the extra draws, with the baseline `value`."""
    h = partial(sampled_reward, reward_floor=reward_floor, power_alpha=power_alpha)
    student_logprob = student.logprob(row.token)
    teacher_logprob = (
        needed(row.teacher_logprob, "teacher_logprob", "a recipe")
        if teacher is None
        else teacher.logprob(row.token)
    )
    immediate = h(teacher_logprob, student_logprob) - value
    # What does not depend on this context's distribution alone; extra draws know nothing of it.
    later = jnp.zeros_like(immediate)
    if discount:
        later += needed(row.future_reward, "future_reward", "discount")
    if task_reward_coef:
        later += task_reward_coef * needed(row.advantage, "advantage", "task_reward_coef")
    share = 1 / (1 + extra_draws)
    bounds = (importance_cap, importance_floor, clip_low, clip_high)
    loss = _surrogate(share * immediate + later, student_logprob, row, importance, *bounds)
    if extra_draws:
        ids = student.draw(needed(row.uniform, "uniform", "extra_draws"))
        drawn_logprob = student.logprob(ids)
        drawn = h(
            needed(teacher, "teacher", "extra_draws").logprob(ids), drawn_logprob
        ) - jnp.reshape(value, (-1, 1))
        loss += share * jnp.sum(policy_gradient_loss(drawn, drawn_logprob), axis=1)
    reward, advantage = (
        sampled_reward(teacher_logprob, student_logprob),
        jax.lax.stop_gradient(immediate + later),
    )
    return loss, {"reward": reward, "advantage": advantage, "student_logprob": student_logprob}


def _surrogate(
    advantage, student_logprob, row: TokenInputs, importance: str, cap, floor, clip_low, clip_high
) -> Float[Array, " n"]:
    """The policy-gradient loss of one token under a correction by its own ratio; those of whole
    sequences weigh it from outside.
    """
    if importance == "none":
        return policy_gradient_loss(advantage, student_logprob)
    if importance not in ratios.TOKEN_CORRECTIONS:
        raise ValueError(
            f"a token has no importance correction {importance!r}; expected one of {ratios.TOKEN_CORRECTIONS}"
        )
    behavior_logprob = needed(row.behavior_logprob, "behavior_logprob", f"importance {importance}")
    if importance == "ppo_clip":
        return clipped_policy_gradient_loss(
            advantage, student_logprob, behavior_logprob, clip_low, clip_high
        )
    ratio = ratios.token_ratio(student_logprob, behavior_logprob)
    cap = ratios.DEFAULT_CAPS[importance] if cap is None else cap
    weight = (
        ratios.token_truncate(ratio, cap)
        if importance == "token_truncate"
        else ratios.token_mask(ratio, floor, cap)
    )
    return policy_gradient_loss(weight * advantage, student_logprob)


def needed(value, name: str, reader: str):
    """The value; ValueError where there is none, rather than an operation on None deep inside the
    pass.
    """
    if value is None:
        raise ValueError(f"{reader} reads {name!r}, which this batch does not carry")
    return value
