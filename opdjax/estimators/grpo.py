"""Policy gradients on rewards of whole answers: `grpo`, and with judges `ropd`, `tjudge`,
`ropd_stages`.

All four are one token loss; they differ in where a token's advantage comes from
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
# They turn a group's rewards into advantages before the pass; the token loss does not read them.
CREDIT_OPTIONS = ("advantage", "stage_credit")


def dual_clipped_loss(
    advantage: Float[Array, "*n"],
    student_logprobs: Float[Array, "*n"],
    behavior_logprobs: Float[Array, "*n"],
    low: float,
    high: float,
    dual: float,
) -> Float[Array, "*n"]:
    """`-min(rho A, clip(rho, 1 - low, 1 + high) A)`, for A < 0 at most `-dual A`; A detached.

    rho = student(y) / behavior(y). The bound (dual-clip PPO, arXiv 1912.09729, equation 5) stops
    the gradient of a token with A < 0 once rho exceeds `dual`; without it the loss grows with rho
    without limit. dual 0: no bound.
    """
    loss = clipped_policy_gradient_loss(advantage, student_logprobs, behavior_logprobs, low, high)
    if not dual:
        return loss
    advantage = jax.lax.stop_gradient(advantage)
    return jnp.where(advantage < 0, jnp.minimum(loss, -dual * advantage), loss)


def clipping(options: dict[str, Any]) -> dict[str, Any]:
    """The options as `diagnostics.applied_importance` reads them: which tokens this loss clips."""
    return {"dual_clip": DUAL_CLIP} | options | {"importance": "ppo_clip"}


def reference_penalty(
    student_logprobs: Float[Array, "*n"], reference_logprobs: Float[Array, "*n"], kind: str
) -> Float[Array, "*n"]:
    """A penalty, nats, for leaving the reference policy; d = log student(y) - log reference(y).

    It is differentiated as it stands. `k2`: d^2 / 2, whose expected gradient over y ~ student is
    that of KL(student || reference). `k3_direct`: e^-d - 1 + d, whose value estimates that KL but
    whose gradient descends KL(reference || student). ValueError on another kind.
    """
    reference_logprobs = jax.lax.stop_gradient(reference_logprobs)
    if kind == "k2":
        return ratios.k2(student_logprobs, reference_logprobs)
    if kind == "k3_direct":
        return ratios.k3(student_logprobs, reference_logprobs)
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
    """Clipped policy gradient on the group-relative advantage of a right answer; no teacher.

    Equation: loss(y) = -min(rho A, clip(rho, 1 - low, 1 + high) A), for A < 0 at most -c A; rho =
    student(y) / behavior(y). A is the reward of the whole completion (1 for a right answer) minus
    the mean over the prompt's completions: GRPO (arXiv 2402.03300), in the form of Dr. GRPO (arXiv
    2503.20783) unless `advantage` is mean_std. On-policy rho = 1, and the expected gradient of a
    group of n is -(1 - 1/n) times that of the expected reward, summed over tokens: the mean
    contains the completion's own reward.

    Detached: A and the behaviour and reference log-probs. The gradient flows through rho.

    Cost: no pass beyond the student's own; n completions a prompt. A prompt whose completions all
    get the same reward gives no gradient. A reference penalty takes a frozen copy of the student
    and its forward pass.

    Use it when answers can be checked and there is no teacher. It gives one number a completion,
    where `opd` gives one a token.

    Options:
      advantage          mean (default): A = r - mean; mean_std: divided by the group's population
                         std + 1e-6
      clip_low           0.2: ratios below 1 - clip_low gain nothing
      clip_high          0.28: ratios above 1 + clip_high gain nothing
      dual_clip          3: c above, for negative advantages; 0 off
      reference_kl_coef  0; adds coef * penalty for leaving the student's start, nats
      reference_kl       k3_direct (default), which descends KL(start || student), with a factor
                         start(y) / student(y) in its gradient that one token can blow up; k2:
                         KL(student || start)
    """
    student_logprobs = student.logprob(row.tokens)
    advantage = needed(row.advantages, "advantages", "a policy gradient on rewards")
    behavior_logprobs = needed(
        row.behavior_logprobs, "behavior_logprobs", "a policy gradient on rewards"
    )
    loss = dual_clipped_loss(
        advantage, student_logprobs, behavior_logprobs, clip_low, clip_high, dual_clip
    )
    outputs = {"advantages": jax.lax.stop_gradient(advantage), "student_logprobs": student_logprobs}
    if reference_kl_coef:
        reference_logprobs = needed(
            row.reference_logprobs, "reference_logprobs", "reference_kl_coef"
        )
        loss += reference_kl_coef * reference_penalty(
            student_logprobs, reference_logprobs, reference_kl
        )
    return loss, outputs


def ropd(student: VocabTile, teacher: VocabTile | None, row: TokenInputs, **options):
    """Rubric-based on-policy distillation: `grpo` with the score of a rubric as reward.

    Equation: r_i = sum_k w_k v_ik / sum_k w_k in [0, 1]. A judge writes criteria k and weights w
    anew at each visit of a prompt, from its rollouts and the teacher's references, and gives the
    verdicts v in one blind pool of both. A_i = r_i - mean r, then the loss of `grpo`. ROPD, arXiv
    2605.07396, equations 3 to 8, as released (ROPD_CODE); ROPD_PAPER has the advantage and the
    aggregation that the paper prints. A rollout that could not be judged counts in no sum and no
    denominator.

    Detached: as in `grpo`; scores are external numbers.

    Cost: two judge calls a prompt and step, each with all answers of the prompt (32 prompts: 64
    calls), and the teacher's references once. Calls of one part of a step overlap with sampling the
    next. No teacher logits.

    Use it when only the teacher's text is available, or the teacher has another tokenizer. Where
    log-probs are available, `opd` learns more from a completion.

    Options:
      ...  and all of grpo; the config section rubrics sets what judges are asked
    """
    return grpo(student, teacher, row, **options)


def tjudge(student: VocabTile, teacher: VocabTile | None, row: TokenInputs, **options):
    """Teacher as judge: `grpo` with a judge's score in [0, 1] as reward.

    Equation: r_i = the judge's score; A and the loss as in `grpo`. The baseline of ROPD (arXiv
    2605.07396, table 1); its prompt is not published, ours is assets/judge/scalar_judge.txt.

    Detached: as in `grpo`.

    Cost: one judge call a prompt and step.

    Use it when a rubric costs too much, or to measure what rubrics add. Scores are coarser and
    drift from prompt to prompt; the group mean removes the drift within a prompt only.

    Options:
      ...  and all of grpo
    """
    return grpo(student, teacher, row, **options)


def ropd_stages(student: VocabTile, teacher: VocabTile | None, row: TokenInputs, **options):
    """`ropd` with stage-structured credit: a stage is credited with its own score and later ones.

    Equation: G_ik = sum_{j >= k} lambda_kj R_ij, R_ij the share of stage j's criteria that rollout
    i meets. A_ik = G_ik minus its mean over the group's rollouts that have stage k, as `advantage`
    says; every token of stage k has A_ik. SS-GRPO of RubricEM, arXiv 2605.10899, section 3.3,
    without tools. A missing stage scores 0 and has no tokens.

    Detached: as in `grpo`.

    Cost: that of `ropd`: criteria carry the name of their stage, and no further call is made.

    Use it when early parts of an answer can be judged by themselves. With the credit `last` it is a
    policy gradient on the last stage's score.

    Options:
      stage_credit         lambda: paper (four stages), identity (own score), last (the last stage's
                           score for all), decay (1 for itself, 0.8 for the last, 0.5 between:
                           ours), or your own as K * K numbers, row by row; default paper for four
                           stages, else decay
      ...                  and all of grpo
    """
    return grpo(student, teacher, row, **options)
