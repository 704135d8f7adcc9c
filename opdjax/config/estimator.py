"""The recipe of a run and its options."""

from typing import Any, Literal

from opdjax.config.recipes import (
    DEFAULT_RECIPE,
    RECIPES,
    ROPD_PRINTED,
    ROPD_RELEASE,
    Baseline,
    Convention,
    Correction,
    Divergence,
    RecipeName,
)
from opdjax.config.validation import Section


class EstimatorConfig(Section):
    """The recipe and its options. An option belongs to the recipes in parentheses, which name its
    defaults; None takes the recipe's default.
    """

    # The method. opd: reward log p_teacher - log p_student of each sampled token; vopd: that less a
    # baseline; full_kl, topk_kl: exact divergence on all ids, or on the most likely ones; npd: that
    # mixed with cross-entropy; sft: cross-entropy on given answers; grpo: reward 1 for a right
    # answer; ropd, ropd_stages: rubrics of answers, or of their stages; tjudge: a judge's score.
    recipe: RecipeName = DEFAULT_RECIPE
    # What the summed token losses are divided by, over the whole batch. token_mean: all tokens;
    # sequence_mean_token_mean: each sequence's tokens, then the sequences; sequence_mean_token_sum:
    # the sequences; fixed_denominator: the most tokens there can be; stage_token_mean (ropd_stages
    # alone): every stage has the same weight, whatever its length.
    aggregation: Literal[
        "token_mean",
        "sequence_mean_token_mean",
        "sequence_mean_token_sum",
        "fixed_denominator",
        "stage_token_mean",
    ] = "token_mean"
    # 0 credits a token with its own reward, 1 with all later ones too.
    discount: float | None = None
    # With a discount. sampled: later rewards as sampled; expected: their expectation, -KL.
    return_to_go: Literal["sampled", "expected"] | None = None
    # Lower bound of a token's reward, nats (REOPOLD: log(lambda / (1 - lambda))).
    reward_floor: float | None = None
    # The reward is teacher(y)^a - student(y)^a (PowerOPD).
    power_alpha: float | None = None
    # Gain of IW-OPD, 0.5 in its release; early tokens count up to 1 + gain times.
    prefix_weight: float | None = None
    # Further tokens sampled at each context and averaged with the first.
    extra_draws: int | None = None
    # Adds coef * (right answer - mean of the prompt's completions).
    task_reward_coef: float | None = None
    # Correction by the ratio of the student to the policy that sampled the tokens. token_truncate:
    # at most importance_cap; token_mask: tokens beyond it are dropped; sequence_mask: the product
    # over a sequence, which is dropped beyond it; prefix_truncate: the product up to the token, at
    # most the cap; ppo_clip: clipped to 1 - clip_low and 1 + clip_high. full_kl, topk_kl, npd:
    # prefix_truncate alone, of the tokens before.
    importance: Correction | None = None
    # Largest ratio; default 3 for sequence_mask, 2 for the others. token_mask: the smallest is its
    # inverse.
    importance_cap: float | None = None
    # Ratios below 1 - clip_low gain nothing. opd, vopd: with importance ppo_clip.
    clip_low: float | None = None
    # The same above 1 + clip_high.
    clip_high: float | None = None
    # mean: reward minus the mean of the prompt's completions; mean_std: that divided by their
    # standard deviation.
    advantage: Literal["mean", "mean_std"] | None = None
    # Upper bound of the ratio for negative advantages (dual clip); 0 is no bound.
    dual_clip: float | None = None
    # Coefficient of a penalty for leaving the student's start, of which a frozen copy is kept.
    reference_kl_coef: float | None = None
    # Form of that penalty: k2 descends KL(student || start), k3_direct KL(start || student).
    reference_kl: Literal["k2", "k3_direct"] | None = None
    # How later stages' scores are credited to a stage. identity: only its own counts; last: only
    # the last stage's; paper: RubricEM's weights of four stages, their default; decay: 1 for its
    # own, 0.8 for the last, 0.5 between, the default otherwise; or K * K numbers, row by row.
    stage_credit: Literal["paper", "identity", "last", "decay"] | tuple[float, ...] | None = None
    # The control variate. full: the exact expected reward; student_topk: the same on the student's
    # top k; optimal: least variance; batch_mean: mean reward of the other sequences.
    baseline: Baseline | None = None
    # reverse: KL(student || teacher); forward: KL(teacher || student); jsd: Jensen-Shannon;
    # skew_forward, skew_reverse: the same against a mixture. topk_kl, npd: reverse or forward.
    divergence: Divergence | None = None
    # With divergence jsd: 0 is the forward KL, 1 the reverse KL; default 0.5. With a skew
    # divergence: share of its first argument in the second; default 0.1.
    beta: float | None = None
    # Whose most likely ids the divergence is on: the student's, the teacher's, or the union,
    # intersection or symmetric difference of both sets.
    support: (
        Literal["student", "teacher", "union", "intersection", "symmetric_difference"] | None
    ) = None
    # topk_kl: ids of each side; npd: ids of the teacher; vopd with baseline student_topk: ids of
    # the student.
    support_top_k: int | None = None
    # Whose probabilities are renormalised on those ids: both, the teacher's alone, or none.
    renormalize: Literal["both", "teacher", "none"] | None = None
    # What the ids outside the support add. drop: nothing; tail: one term of their total
    # probability, needs renormalize none; floor: a smallest probability, teacher or none.
    outside: Literal["drop", "tail", "floor"] | None = None
    # A policy gradient over the support with this weight, in place of the divergence.
    weight: Literal["p_student", "p_teacher", "none"] | None = None
    # Lambda, the share of the divergence from the teacher; the rest is cross-entropy on the tokens.
    kd_weight: float | None = None
    # Sets all options of the support as another library does.
    convention: Convention | None = None

    def __post_init__(self):
        super().__post_init__()
        RECIPES[self.recipe].check(self.options, self.aggregation)

    @property
    def options(self) -> dict[str, Any]:
        """The recipe's options that were given."""
        shared = ("recipe", "aggregation")
        return {k: v for k, v in vars(self).items() if k not in shared and v is not None}


ROPD_CODE, ROPD_PAPER = EstimatorConfig(**ROPD_RELEASE), EstimatorConfig(**ROPD_PRINTED)
