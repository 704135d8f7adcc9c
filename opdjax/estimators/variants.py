"""Estimators that are worth comparing: recipes with the options that `opdjax audit` measures."""

from __future__ import annotations

from opdjax.estimators import Estimator, bind

SAMPLED = bind("opd")  # the plain estimator, to which all others are compared
WITH_BASELINE = bind("vopd")
EXACT = bind("full_kl")


def varied(estimator: Estimator, **options) -> Estimator:
    """Return the estimator with more options."""
    return bind(estimator.name, estimator.options | options)


_TOP_8 = bind("topk_kl", {"support": "student", "support_top_k": 8})
UNCOUPLED = (
    SAMPLED,
    varied(WITH_BASELINE, baseline="full"),
    *(varied(WITH_BASELINE, baseline="student_topk", baseline_top_k=k) for k in (5, 20, 100)),
    varied(WITH_BASELINE, baseline="optimal"),
    varied(WITH_BASELINE, baseline="batch_mean"),
    varied(SAMPLED, extra_draws=3),
    varied(SAMPLED, reward_floor=-2.0),
    varied(SAMPLED, power_alpha=0.5),
    *(varied(EXACT, divergence=name) for name in ("reverse", "forward", "jsd")),
    *(varied(EXACT, divergence=name) for name in ("skew_forward", "skew_reverse")),
    _TOP_8,
    varied(_TOP_8, renormalize="none"),
    varied(_TOP_8, renormalize="none", outside="tail"),
    varied(_TOP_8, support="union", renormalize="none", outside="tail"),
    bind("topk_kl", {"convention": "verl", "support_top_k": 8}),
    bind("topk_kl", {"convention": "tunix", "support_top_k": 8}),
    bind("topk_kl", {"convention": "trl", "support_top_k": 8, "divergence": "forward"}),
    bind("topk_kl", {"convention": "thunlp", "support_top_k": 8}),
    bind("npd"),
    bind("npd", {"kd_weight": 1.0}),
    bind("sft"),
)
# Options that couple the tokens of a sequence: a single context does not define their gradient.
COUPLED = (
    varied(SAMPLED, discount=1.0),
    varied(SAMPLED, discount=1.0, return_to_go="expected"),
    varied(WITH_BASELINE, baseline="full", discount=1.0, return_to_go="expected"),
    varied(SAMPLED, prefix_weight=0.5),
)
