"""Policy gradients on a reward of whole answers: `grpo`, and what judges' scores make of it,
`ropd`, `tjudge`, `ropd_stages`.

All four are one token loss; they differ in where the advantage of a token comes from
(`advantage.py`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from opdjax.estimators import importance as ratios
from opdjax.estimators.losses import clipped_policy_gradient_loss
from opdjax.estimators.opd import needed
from opdjax.ops.tile import VocabTile
from opdjax.ops.vocab import TokenInputs

DUAL_CLIP = 3.0
# What a group's rewards become before the pass; the token loss does not read them.
CREDIT_OPTIONS = ("advantage", "stage_credit", "stage_credit_matrix", "stage_token_mean")


def dual_clipped_loss(
    advantage: Float[Array, "*n"],
    student_logprob: Float[Array, "*n"],
    behavior_logprob: Float[Array, "*n"],
    low: float,
    high: float,
    dual: float,
) -> Float[Array, "*n"]:
    """`-min(rho A, clip(rho, 1 - low, 1 + high) A)`, for A < 0 no more than `-dual A`; rho =
    student(y) / behavior(y), A detached.

    The bound (dual-clip PPO, arXiv 1912.09729, equation 5) ends the gradient of a token that A
    punishes once the student finds it `dual` times as likely as whoever drew it: the loss grows
    with rho without end otherwise. dual 0: no bound.
    """
    loss = clipped_policy_gradient_loss(advantage, student_logprob, behavior_logprob, low, high)
    if not dual:
        return loss
    advantage = jax.lax.stop_gradient(advantage)
    return jnp.where(advantage < 0, jnp.minimum(loss, -dual * advantage), loss)


def clipping(options: dict[str, Any]) -> dict[str, Any]:
    """What `diagnostics.applied_importance` is asked to see which tokens the loss of these options
    cuts.
    """
    return {"dual_clip": DUAL_CLIP} | options | {"importance": "ppo_clip"}


def reference_penalty(
    student_logprob: Float[Array, "*n"], reference_logprob: Float[Array, "*n"], kind: str
) -> Float[Array, "*n"]:
    """A penalty, nats, on leaving the reference policy, differentiated as it stands; d = log
    student(y) - log reference(y).

    `k2`: d^2 / 2, whose expected gradient over y ~ student is that of KL(student || reference).
    `k3_direct`: e^-d - 1 + d, whose value estimates that KL but whose gradient, taken directly,
    descends KL(reference || student) instead.
    """
    reference_logprob = jax.lax.stop_gradient(reference_logprob)
    if kind == "k2":
        return ratios.k2(student_logprob, reference_logprob)
    if kind == "k3_direct":
        return ratios.k3(student_logprob, reference_logprob)
    raise ValueError(f"there is no reference penalty {kind!r}; expected k2 or k3_direct")


def grpo(
    student: VocabTile,
    teacher: VocabTile | None,
    row: TokenInputs,
    *,
    clip_low: float = ratios.CLIP_LOW,
    clip_high: float = ratios.CLIP_HIGH,
    dual_clip: float = DUAL_CLIP,
    reference_kl_coef: float = 0.0,
    reference_kl: str = "k3_direct",
):
    """Clipped policy gradient on the group-relative advantage of a right answer: reinforcement
    learning, no teacher.

    Equation: loss(y) = -min(rho A, clip(rho, 1 - low, 1 + high) A), for A < 0 at most -c A; rho =
    student(y) / behavior(y). A is the reward of the whole completion (1 for a right answer) less
    the mean over the prompt's completions: GRPO (arXiv 2402.03300), in the form of Dr. GRPO (arXiv
    2503.20783) unless `advantage` is mean_std. On-policy rho = 1 and the expected gradient of a
    group of n is -(1 - 1/n) that of the expected reward, summed over the tokens: the mean contains
    the completion's own reward.

    Detached: A and the behaviour and reference log-probs; the gradient flows through rho.

    Cost: none but the forward pass that every recipe has; n completions a prompt, and a prompt
    whose completions all fare alike teaches nothing. A reference penalty takes a second, frozen
    copy of the student and its forward pass.

    Use it when answers can be checked and nobody can be asked. One number a completion is little: a
    teacher's log-probs (`opd`) say as much of every token.

    Options:
      advantage          mean (default): A = r - mean; mean_std: divided by the group's population std + 1e-6
      clip_low           0.2: ratios below 1 - clip_low gain nothing
      clip_high          0.28: nor ratios above 1 + clip_high
      dual_clip          3: c above, for punished tokens; 0 off
      reference_kl_coef  0; adds coef * penalty for leaving the student's start, nats
      reference_kl       k3_direct (default), which descends KL(start || student) when differentiated, its gradient with
                         a factor start(y) / student(y) that one token can blow up; k2: KL(student
                         || start)
    """
    student_logprob, advantage = (
        student.logprob(row.token),
        needed(row.advantage, "advantage", "a policy gradient on rewards"),
    )
    behavior_logprob = needed(
        row.behavior_logprob, "behavior_logprob", "a policy gradient on rewards"
    )
    loss = dual_clipped_loss(
        advantage, student_logprob, behavior_logprob, clip_low, clip_high, dual_clip
    )
    outputs = {"advantage": jax.lax.stop_gradient(advantage), "student_logprob": student_logprob}
    if reference_kl_coef:
        reference_logprob = needed(row.reference_logprob, "reference_logprob", "reference_kl_coef")
        loss += reference_kl_coef * reference_penalty(
            student_logprob, reference_logprob, reference_kl
        )
    return loss, outputs


def ropd(student: VocabTile, teacher: VocabTile | None, row: TokenInputs, **options):
    """Rubric-based on-policy distillation: `grpo` whose reward is the share of a rubric that an
    answer meets.

    Equation: r_i = sum_k w_k v_ik / sum_k w_k in [0, 1], the criteria k and weights w written anew
    at each visit of a prompt from its rollouts and the teacher's references, the verdicts v from
    one blind pool of both; A_i = r_i - mean r, then the loss of `grpo`. ROPD, arXiv 2605.07396,
    equations 3 to 8, as released (ROPD_CODE); ROPD_PAPER has the advantage and the aggregation that
    the paper prints. A rollout that nobody could judge counts in no sum and no denominator.

    Detached: as in `grpo`; scores are numbers from outside.

    Cost: two calls of a judge a prompt and step, each reading all its answers (32 prompts: 64
    calls), and the teacher's references once. Calls of one part of a step run while the next is
    drawn. No logit of the teacher's.

    Use it when the teacher is known by its text alone, or has another tokenizer. `opd` learns more
    from a completion wherever log-probs can be had.

    Options:
      ...  and all of grpo; what judges are asked is the config's section rubrics
    """
    return grpo(student, teacher, row, **options)


def tjudge(student: VocabTile, teacher: VocabTile | None, row: TokenInputs, **options):
    """Teacher as judge: `grpo` whose reward is one score in [0, 1] that the judge gives an answer
    by its own standard.

    Equation: r_i = the judge's score; A and the loss as in `grpo`. The baseline that ROPD (arXiv
    2605.07396, table 1) is measured against; its prompt is not published, ours is
    rubrics/templates/scalar_judge.txt.

    Detached: as in `grpo`.

    Cost: one call a prompt and step.

    Use it when a rubric costs too much, or to tell what rubrics are worth. Scores are coarser and
    drift from prompt to prompt, which the mean over a group takes away only within it.

    Options:
      ...  and all of grpo
    """
    return grpo(student, teacher, row, **options)


def ropd_stages(student: VocabTile, teacher: VocabTile | None, row: TokenInputs, **options):
    """`ropd` with stage-structured credit: every stage of an answer is credited with its own score
    and later ones.

    Equation: G_ik = sum_{j >= k} lambda_kj R_ij, R_ij the share of stage j's criteria that rollout
    i meets; A_ik = G_ik less its mean over the group's rollouts that have stage k, as `advantage`
    says; every token of stage k has A_ik. SS-GRPO of RubricEM, arXiv 2605.10899, section 3.3,
    without its tools; a missing stage scores 0 and has no tokens.

    Detached: as in `grpo`.

    Cost: that of `ropd`: criteria carry the name of their stage, and no further call is made.

    Use it when answers have parts of which early ones can be judged by themselves. With the credit
    `last` it is a policy gradient on the last stage's score.

    Options:
      stage_credit         lambda: paper (four stages), identity (its own score alone), last (the last stage's for all),
                           decay (1 for itself, 0.8 for the last, 0.5 between: ours); paper for four
                           stages, else decay
      stage_credit_matrix  a lambda of your own, row by row, in place of stage_credit
      stage_token_mean     false; true: each stage weighs alike in the loss, however many tokens it has
      ...                  and all of grpo
    """
    return grpo(student, teacher, row, **options)
