"""Black-box distillation on the built-in mini pair: ROPD, its ablations and stage credit against
recipes that read logits, three seeds each.

    opdjax references experiments/mini_ropd.py
    python scripts/serve_rule_judge.py -- \
        opdjax sweep experiments/sweeps/rubrics.py --workdir runs/rubrics --jobs 2
    opdjax table runs/rubrics

Papers: ROPD (arXiv 2605.07396), table 6 for the ablations; RubricEM (arXiv 2605.10899), section
3.3, for the stages. Every method takes 150 updates of 32 prompts x 8 rollouts, three passes over
the same 1,600 prompts. Methods that see only the teacher's text learn at 1e-4, the best of 1e-4,
3e-4 and 1e-3 for `ropd` with one seed each. Methods that read its log-probs learn at 3e-4, the best
of five in white_box.py. Hardware: two CPU cores, about two minutes per run.
"""

from dataclasses import replace

from opdjax.config import (
    ROPD_CODE,
    ROPD_PAPER,
    ApiConfig,
    EstimatorConfig,
    EvaluationConfig,
    JudgeConfig,
    LogConfig,
    RubricsConfig,
    TeachConfig,
)
from opdjax.config.experiments import config_beside
from opdjax.config.grid import SweepPoint, chain, points, product, seeds, vary, zipped

JUDGE = JudgeConfig("rules")
STAGES = config_beside(__file__, "../mini_ropd_stages.py").rubrics
TEXT_ONLY = {
    "ropd": (ROPD_CODE, RubricsConfig()),
    "tjudge": (EstimatorConfig("tjudge"), RubricsConfig()),
    "ropd_stages": (EstimatorConfig("ropd_stages"), STAGES),
    "one_reference": (ROPD_CODE, RubricsConfig(num_references=1)),
    "rubric_per_student": (ROPD_CODE, RubricsConfig(rubric_of="student")),
    "frozen": (ROPD_CODE, RubricsConfig(refresh="frozen")),
}
WHITE_BOX = {"opd": EstimatorConfig("opd"), "vopd": EstimatorConfig("vopd", baseline="full")}
MORE = {
    "not_blind": (ROPD_CODE, RubricsConfig(blind=False)),
    "ropd_paper": (ROPD_PAPER, RubricsConfig()),
    "grpo": (EstimatorConfig("grpo"), RubricsConfig()),  # rewards right answers, without a teacher
    "evolving": (ROPD_CODE, RubricsConfig(refresh="evolving")),
}


def judged(variants: dict[str, tuple[EstimatorConfig, RubricsConfig]]) -> list:
    """The estimator and the rubrics of each variant."""
    estimators, rubrics = zip(*variants.values())
    return zipped(
        vary("estimator", dict(zip(variants, estimators))),
        vary("rubrics", dict(zip(variants, rubrics))),
    )


def get_sweep() -> list[SweepPoint]:
    base = replace(
        config_beside(__file__, "../mini_ropd.py"),
        rubricator=JUDGE,
        verifier=JUDGE,
        api=ApiConfig("http://127.0.0.1:8321/v1"),
        teach=TeachConfig(),
        evaluation=EvaluationConfig(max_completion_length=24, every=75),
        log=LogConfig(samples_every=75),
    )
    white_box = product(vary("estimator", WHITE_BOX), vary("optimizer.learning_rate", (3e-4,)))
    wanted = product(seeds(3), chain(judged(TEXT_ONLY), white_box))
    return points(base, chain(wanted, product(seeds(3), judged(MORE))))
