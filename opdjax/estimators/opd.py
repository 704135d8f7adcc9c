"""On-policy distillation from sampled tokens: the reward, the control-variate baselines, the recipes `opd` and `vopd`.

All speak of one context c and one token y drawn from the student. The objective is KL(student || teacher); its gradient
is estimated by -A * grad log student(y | c) with the detached advantage A = reward - baseline.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opdjax.estimators.losses import policy_gradient_loss
from opdjax.ops.masked import reverse_discounted_sum
from opdjax.ops.vocab import Columns, VocabTile


def sampled_reward(teacher_logprob: Float[Array, "*n"], student_logprob: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """`r = log teacher(y) - log student(y)`, nats, both of the full softmax; detached. E_student[r] = -KL(student || teacher).

    vOPD (arXiv 2605.07865), section 3.
    """
    return jax.lax.stop_gradient(teacher_logprob - student_logprob)


def full_baseline(student: VocabTile, teacher: VocabTile) -> Float[Array, " n"]:
    """`b = E_student[r] = -KL(student || teacher)`, nats (at most 0); detached. The value function of vOPD, Proposition 3.1."""
    return jax.lax.stop_gradient(student.expect(teacher.logprobs - student.logprobs))


def student_topk_baseline(student: VocabTile, teacher: VocabTile, k: int) -> Float[Array, " n"]:
    """`b = -KL` between student and teacher, both renormalised on the student's top k ids; nats, detached.

    k = 1 gives 0 (then vOPD is OPD), k >= V the full baseline. vOPD (arXiv 2605.07865), its top-k form.
    """
    ids = student.top_k(k)
    student_kept = jax.nn.log_softmax(student.logprob(ids), axis=-1)
    teacher_kept = jax.nn.log_softmax(teacher.logprob(ids), axis=-1)
    # An id that the student cannot draw (-inf) weighs nothing, even where the teacher is -inf too.
    gap = jnp.where(student_kept > -jnp.inf, teacher_kept - student_kept, 0)
    return jax.lax.stop_gradient(jnp.sum(jnp.exp(student_kept) * gap, axis=-1))


def reward_to_go(
    reward: Float[Array, "B T"], mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"], discount: float
) -> Float[Array, "B T"]:
    """`G_t = sum_{s >= t} discount^(s - t) r_s` over the sampled tokens of one sequence, nats.

    discount 0 is the paper's token-level credit: the gradient of sum_t KL_t with the distribution of contexts held fixed.
    discount 1 is the gradient of the sequence KL.
    """
    return reverse_discounted_sum(reward, mask, segment_ids, discount)


def _outputs(reward, advantage, student_logprob, **more):
    return {"reward": reward, "advantage": advantage, "student_logprob": student_logprob} | more


def opd(student: VocabTile, teacher: VocabTile | None, row: Columns, *, discount: float = 0.0):
    """Vanilla sampled-token OPD: loss -sg[r] * log student(y).

    Unbiased for grad KL(student || teacher) at the sampled contexts, with the variance of one sample. Needs only the
    teacher's log-prob of the sampled token. `discount` > 0 replaces r by the reward to go (a column prepared beforehand).
    """
    student_logprob = student.logprob(row.token)
    teacher_logprob = row.teacher_logprob if teacher is None else teacher.logprob(row.token)
    reward = sampled_reward(teacher_logprob, student_logprob)
    advantage = reward if discount == 0 else row.reward_to_go
    loss = policy_gradient_loss(advantage, student_logprob)
    return loss, _outputs(reward, advantage, student_logprob)


def vopd(student: VocabTile, teacher: VocabTile, row: Columns, *, baseline: str = "full", baseline_top_k: int = 100, discount: float = 0.0):
    """OPD with a control-variate baseline: loss -sg[r - b] * log student(y); vOPD (arXiv 2605.07865).

    b depends on the context alone, so the expected gradient is that of `opd` whatever b is. `baseline` `full`:
    b = -KL(student || teacher), which (without discount) makes the advantage of every context average to 0; `student_topk`: the same on the
    student's `baseline_top_k` most likely ids, renormalised.
    """
    student_logprob = student.logprob(row.token)
    reward = sampled_reward(teacher.logprob(row.token), student_logprob)
    known = {}
    if baseline == "full":
        value = full_baseline(student, teacher)
        known = {"kl": -value}
    elif baseline == "student_topk":
        value = student_topk_baseline(student, teacher, baseline_top_k)
    else:
        raise ValueError(f"vopd has no baseline {baseline!r}; expected 'full' or 'student_topk'")
    advantage = (reward if discount == 0 else row.reward_to_go) - value
    loss = policy_gradient_loss(advantage, student_logprob)
    return loss, _outputs(reward, advantage, student_logprob, **known)
