"""The recipe of a run and its options, and which of them may stand together. Standard library only."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from opdjax.config.validation import require, require_types

REWARDED = ("grpo", "ropd", "tjudge", "ropd_stages")  # recipes whose reward is of a whole answer


@dataclasses.dataclass(frozen=True)
class EstimatorConfig:
    """The recipe and its options; an option that the recipe does not have is refused."""

    recipe: Literal[
        "opd", "vopd", "full_kl", "topk_kl", "npd", "sft", "grpo", "ropd", "tjudge", "ropd_stages"
    ] = "vopd"
    aggregation: Literal[
        "token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "fixed_denominator"
    ] = "token_mean"
    tile: int = 512  # tokens whose logits exist at a time, per device
    discount: float | None = (
        None  # opd, vopd: 0 credits a token with its own reward only, 1 with all that follow
    )
    return_to_go: Literal["sampled", "expected"] | None = (
        None  # opd, vopd with a discount: later rewards as drawn, or -KL in their place
    )
    reward_floor: float | None = (
        None  # opd, vopd: no token's reward is below it, nats (REOPOLD: log(lambda / (1 - lambda)))
    )
    power_alpha: float | None = (
        None  # opd, vopd: the reward is teacher(y)^a - student(y)^a (PowerOPD)
    )
    prefix_weight: float | None = (
        # opd, vopd: IW-OPD's gain, 0.5 in its release; early tokens count up to 1 + gain times
        None
    )
    extra_draws: int | None = (
        None  # opd, vopd: so many more tokens drawn at each context and averaged with the first
    )
    task_reward_coef: float | None = (
        None  # opd, vopd: adds coef * (right answer - mean of the prompt's completions)
    )
    # opd, vopd: ratio of the student to the policy that drew the tokens. full_kl, topk_kl:
    # prefix_truncate, of the tokens before
    importance: (
        Literal[
            "none", "token_truncate", "token_mask", "sequence_mask", "prefix_truncate", "ppo_clip"
        ]
        | None
    ) = None
    importance_cap: float | None = (
        None  # largest ratio; None: 3 for sequence_mask, 2 for the others
    )
    importance_floor: float | None = None  # token_mask: smallest ratio; None: 0.5
    clip_low: float | None = (
        None  # ppo_clip, grpo and its kin: ratios below 1 - clip_low gain nothing; None: 0.2
    )
    clip_high: float | None = None  # as clip_low: nor ratios above 1 + clip_high; None: 0.28
    # grpo, ropd, tjudge, ropd_stages: a reward less the mean of its prompt's completions, or that
    # over their standard deviation
    advantage: Literal["mean", "mean_std"] | None = None
    dual_clip: float | None = (
        None  # these: the loss of a punished token grows up to this ratio; None: 3; 0: without end
    )
    reference_kl_coef: float | None = (
        # these: adds coef * penalty for leaving the student's start, of which a frozen copy is kept
        None
    )
    reference_kl: Literal["k2", "k3_direct"] | None = (
        None  # its form: descends KL(student || start), or KL(start || student)
    )
    # ropd_stages: how much of later stages' scores a stage is credited with; None: paper for four
    # stages, else decay
    stage_credit: Literal["paper", "identity", "last", "decay"] | None = None
    stage_credit_matrix: tuple[float, ...] | None = (
        None  # ropd_stages: the same in numbers, row by row, in place of stage_credit
    )
    stage_token_mean: bool | None = (
        None  # ropd_stages: every stage weighs alike in a token mean, however long it is
    )
    baseline: Literal["full", "student_topk", "optimal", "batch_mean"] | None = None  # vopd
    baseline_top_k: int | None = None  # vopd with baseline student_topk
    divergence: Literal["reverse", "forward", "jsd", "skew_forward", "skew_reverse"] | None = (
        None  # full_kl; topk_kl, npd (the first two)
    )
    beta: float | None = None  # full_kl with divergence jsd: 0 forward KL, 1 reverse KL
    skew_alpha: float | None = (
        None  # full_kl with a skew divergence: the share of its first argument in the second
    )
    # topk_kl: the most likely ids of whom; of both: in one set or the other, in both, in exactly
    # one
    support: (
        Literal["student", "teacher", "union", "intersection", "symmetric_difference"] | None
    ) = None
    support_top_k: int | None = None  # topk_kl: how many ids of each side; npd: of the teacher
    renormalize: Literal["both", "teacher", "none"] | None = (
        None  # topk_kl, npd: which side is renormalised on those ids
    )
    outside: Literal["drop", "tail", "floor"] | None = (
        None  # topk_kl: the ids outside; tail needs renormalize none, floor teacher or none
    )
    clamp_at_zero: bool | None = None  # topk_kl: a token's negative value counts as 0
    weight: Literal["p_student", "p_teacher", "none"] | None = (
        None  # topk_kl as a policy gradient over the kept ids, weighted so
    )
    kd_weight: float | None = (
        # npd: lambda, the share of the divergence from the teacher; the rest is cross-entropy on
        # the tokens
        None
    )
    # topk_kl: all five options above as that system ships them; estimators/divergence.py has the
    # table
    convention: (
        Literal[
            "tunix", "verl", "nemo_rl", "nemo_rl_floor", "easydel", "trl", "thunlp", "distillkit"
        ]
        | None
    ) = None

    def __post_init__(self):
        require_types(self, "estimator.")
        require(self.tile > 0, "estimator.tile", self.tile, "at least 1")
        require(
            self.discount is None or 0 <= self.discount <= 1,
            "estimator.discount",
            self.discount,
            "from 0 to 1",
        )
        require(
            self.kd_weight is None or 0 <= self.kd_weight <= 1,
            "estimator.kd_weight",
            self.kd_weight,
            "from 0 to 1",
        )
        require(
            self.beta is None or 0 <= self.beta <= 1, "estimator.beta", self.beta, "from 0 to 1"
        )
        require(
            self.baseline_top_k is None or self.baseline_top_k > 0,
            "estimator.baseline_top_k",
            self.baseline_top_k,
            "at least 1",
        )
        has_topk, has_jsd = self.baseline == "student_topk", self.divergence == "jsd"
        require(
            has_topk or self.baseline_top_k is None,
            "estimator.baseline_top_k",
            self.baseline_top_k,
            "none unless baseline is student_topk",
        )
        require(
            has_jsd or self.beta is None,
            "estimator.beta",
            self.beta,
            "none unless divergence is jsd",
        )
        has_skew = self.divergence in ("skew_forward", "skew_reverse")
        require(
            has_skew or self.skew_alpha is None,
            "estimator.skew_alpha",
            self.skew_alpha,
            "none unless divergence is a skew one",
        )
        is_share = self.skew_alpha is None or 0 < self.skew_alpha < 1
        require(
            is_share,
            "estimator.skew_alpha",
            self.skew_alpha,
            "more than 0 (the plain KL) and less than 1 (nothing left)",
        )
        self._check_topk()
        self._check_reward()
        self._check_importance()
        self._check_rewarded()

    def _check_reward(self):
        floor, alpha, draws = self.reward_floor, self.power_alpha, self.extra_draws
        require(floor is None or floor < 0, "estimator.reward_floor", floor, "less than 0 (nats)")
        require(alpha is None or alpha > 0, "estimator.power_alpha", alpha, "more than 0")
        require(
            floor is None or alpha is None,
            "estimator.reward_floor",
            floor,
            "none where power_alpha is given: one transform of the reward",
        )
        require(
            self.prefix_weight is None or self.prefix_weight >= 0,
            "estimator.prefix_weight",
            self.prefix_weight,
            "0 (off) or more",
        )
        require(draws is None or draws >= 0, "estimator.extra_draws", draws, "0 (off) or more")
        is_discounted = bool(self.discount)
        require(
            is_discounted or self.return_to_go is None,
            "estimator.return_to_go",
            self.return_to_go,
            "none unless discount is more than 0",
        )

    def _check_importance(self):
        kind, recipe = self.importance or "none", self.recipe
        owners = {
            "importance_cap": ("token_truncate", "token_mask", "sequence_mask", "prefix_truncate"),
            "importance_floor": ("token_mask",),
        }
        owners |= (
            {} if recipe in REWARDED else {"clip_low": ("ppo_clip",), "clip_high": ("ppo_clip",)}
        )
        for name, kinds in owners.items():
            value = getattr(self, name)
            require(
                value is None or kind in kinds,
                f"estimator.{name}",
                value,
                f"none unless importance is {' or '.join(kinds)}",
            )
            require(value is None or value > 0, f"estimator.{name}", value, "more than 0")
        floor, cap = self.importance_floor or 0.5, self.importance_cap or 2.0
        require(
            kind != "token_mask" or floor < cap,
            "estimator.importance_floor",
            floor,
            f"less than importance_cap, which is {cap}",
        )
        for name in ("clip_low", "clip_high"):
            require(
                getattr(self, name) is None or getattr(self, name) > 0,
                f"estimator.{name}",
                getattr(self, name),
                "more than 0",
            )
        require((self.clip_low or 0) < 1, "estimator.clip_low", self.clip_low, "less than 1")
        if recipe in ("full_kl", "topk_kl", "npd"):
            expected = f"none or prefix_truncate: {recipe} draws no token, so that only how its contexts were reached can be stale"
            require(kind in ("none", "prefix_truncate"), "estimator.importance", kind, expected)
        expected = "0 where importance is given: extra tokens are drawn from the student as it is"
        require(
            kind == "none" or not self.extra_draws,
            "estimator.extra_draws",
            self.extra_draws,
            expected,
        )

    def _check_rewarded(self):
        dual, coef, matrix = self.dual_clip, self.reference_kl_coef, self.stage_credit_matrix
        require(not dual or dual > 1, "estimator.dual_clip", dual, "more than 1, or 0 (off)")
        require(coef is None or coef >= 0, "estimator.reference_kl_coef", coef, "0 (off) or more")
        expected = "none unless reference_kl_coef is more than 0"
        require(
            bool(coef) or self.reference_kl is None,
            "estimator.reference_kl",
            self.reference_kl,
            expected,
        )
        is_square = matrix is None or (
            len(matrix) > 1 and math.isqrt(len(matrix)) ** 2 == len(matrix)
        )
        require(
            is_square,
            "estimator.stage_credit_matrix",
            matrix,
            "K * K numbers, row by row, for K stages",
        )
        expected = "none where stage_credit_matrix is given"
        require(
            matrix is None or self.stage_credit is None,
            "estimator.stage_credit",
            self.stage_credit,
            expected,
        )
        is_mean = not self.stage_token_mean or self.aggregation == "token_mean"
        require(
            is_mean,
            "estimator.aggregation",
            self.aggregation,
            "token_mean where stage_token_mean is on",
        )

    def _check_topk(self):
        k, fixed = (
            self.support_top_k,
            ("support", "renormalize", "outside", "clamp_at_zero", "weight"),
        )
        require(k is None or k > 0, "estimator.support_top_k", k, "at least 1")
        has_divergence = self.recipe not in ("topk_kl", "npd") or self.divergence in (
            None,
            "reverse",
            "forward",
        )
        require(
            has_divergence,
            "estimator.divergence",
            self.divergence,
            f"reverse or forward where the recipe is {self.recipe}",
        )
        if self.convention in ("tunix", "verl", "easydel", "thunlp"):
            fixed += ("divergence",)
        for name in fixed if self.convention is not None else ():
            require(
                getattr(self, name) is None,
                f"estimator.{name}",
                getattr(self, name),
                f"none: convention {self.convention} sets it",
            )
        for name in ("support_top_k", "renormalize", "divergence") if self.kd_weight == 0 else ():
            require(
                getattr(self, name) is None,
                f"estimator.{name}",
                getattr(self, name),
                "none where kd_weight is 0: no teacher is read",
            )
        has_outside = {"none": ("tail", "floor"), "teacher": ("floor",)}.get(self.renormalize, ())
        expected = f"drop where renormalize is {self.renormalize or 'both'}"
        require(
            self.outside in (None, "drop", *has_outside),
            "estimator.outside",
            self.outside,
            expected,
        )
        if self.weight is not None:
            require(
                self.outside in (None, "drop"),
                "estimator.outside",
                self.outside,
                "drop where weight is given",
            )
            require(
                self.renormalize in (None, "none"),
                "estimator.renormalize",
                self.renormalize,
                "none where weight is given",
            )
            require(
                not self.clamp_at_zero,
                "estimator.clamp_at_zero",
                self.clamp_at_zero,
                "false where weight is given",
            )
            require(
                self.divergence in (None, "reverse"),
                "estimator.divergence",
                self.divergence,
                "reverse where weight is given",
            )

    @property
    def options(self) -> dict[str, Any]:
        """The recipe's options that were given."""
        shared = ("recipe", "aggregation", "tile")
        given = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in shared
        }
        return {name: value for name, value in given.items() if value is not None}


# ROPD as released, and as its paper prints it (arXiv 2605.07396, section 2.2 and algorithm 1).
ROPD_CODE = EstimatorConfig(
    "ropd", "token_mean", advantage="mean", clip_low=0.2, clip_high=0.28, dual_clip=3.0
)
ROPD_PAPER = EstimatorConfig(
    "ropd",
    "sequence_mean_token_mean",
    advantage="mean_std",
    clip_low=0.2,
    clip_high=0.28,
    dual_clip=0.0,
)
