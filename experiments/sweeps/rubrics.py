"""Black-box distillation on the built-in mini pair: ROPD, its ablations and stage credit beside
what reads logits, three seeds each.

    opdjax teach experiments/mini_ropd.py
    python scripts/serve_rule_judge.py -- opdjax sweep experiments/sweeps/rubrics.py --workdir
    runs/rubrics --jobs 2
    python scripts/rubrics_study.py runs/rubrics        # writes experiments/results/rubrics.*

Every method takes 150 updates of 32 prompts x 8 rollouts, three passes over the same 1,600 prompts.
Those that see the teacher's text alone learn at 1e-4, the best of 1e-4, 3e-4 and 1e-3 for `ropd`,
one seed each; those that read its log-probs at 3e-4, the best of five in white_box.py. Papers: ROPD
(arXiv 2605.07396), table 6 for the ablations; RubricEM (arXiv 2605.10899), section 3.3, for the
stages. Two CPU cores: about two minutes a run.
"""

from opdjax.config import (
    ROPD_CODE,
    ROPD_PAPER,
    Config,
    DataConfig,
    EndpointConfig,
    EstimatorConfig,
    EvaluationConfig,
    LogConfig,
    OptimizerConfig,
    RubricsConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.config.grid import SweepPoint, chain, points, product, seeds, vary, zipped

JUDGE = EndpointConfig("http://127.0.0.1:8321/v1", "rules")
STAGES = RubricsConfig(
    stage_names=("first step", "second step", "answer"), stage_markers=(";", "#")
)
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
    "grpo": (EstimatorConfig("grpo"), RubricsConfig()),  # rewarded by right answers, no teacher
    "evolving": (ROPD_CODE, RubricsConfig(refresh="evolving")),
}


def judged(variants: dict[str, tuple[EstimatorConfig, RubricsConfig]]) -> list:
    """What each variant sets."""
    estimators = vary("estimator", {name: estimator for name, (estimator, _) in variants.items()})
    return zipped(
        estimators, vary("rubrics", {name: rubrics for name, (_, rubrics) in variants.items()})
    )


def get_sweep() -> list[SweepPoint]:
    base = Config(
        data=DataConfig(
            source="arithmetic:train[:1600]",
            max_prompt_length=32,
            references="runs/references/arithmetic.jsonl",
        ),
        sampling=SamplingConfig(num_generations=8, max_completion_length=24),
        rubricator=JUDGE,
        verifier=JUDGE,
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule="constant", b2=0.98),
        train=TrainConfig(num_steps=150, prompts_per_step=32),
        evaluation=EvaluationConfig(max_completion_length=24, every=75),
        log=LogConfig(samples_every=75),
    )
    white_box = product(vary("estimator", WHITE_BOX), vary("optimizer.learning_rate", (3e-4,)))
    asked = product(seeds(3), chain(judged(TEXT_ONLY), white_box))
    return points(base, chain(asked, product(seeds(3), judged(MORE))))
