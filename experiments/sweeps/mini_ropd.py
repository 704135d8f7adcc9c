"""Tables of the ROPD and RubricEM papers on the built-in mini pair: text against logits, ablations,
stage credit.

    opdjax sweep experiments/sweeps/mini_ropd.py --workdir runs/mini_ropd --jobs 2
    opdjax table runs/mini_ropd --paper ropd_table2
        # also ropd_table1, ropd_table6, ropd_efficiency, rubricem_stages

Papers: arXiv 2605.07396, 2605.10899. 100 updates of 16 prompts x 8 rollouts, one pass over 1,600
prompts, which the teacher answers four times before training. The rule-based judge writes the
rubrics and grades the answers; it computes the score of `tjudge`, which is therefore an oracle
here. Learning rates are the best of results/rubrics.md and results/white_box.md: 1e-4 for arms with
a judge, 3e-4 for `lopd` and `sft`. Four paired seeds. Hardware: two CPU cores, about a minute per
run and core.
"""

from dataclasses import replace

from opdjax.config import (
    ROPD_CODE,
    EstimatorConfig,
    EvaluationConfig,
    JudgeConfig,
    RubricsConfig,
    TrainConfig,
)
from opdjax.config.experiments import config_beside
from opdjax.config.grid import SweepPoint, arms, points, product, seeds

ROPD = config_beside(__file__, "../mini_ropd.py")
STAGES = config_beside(__file__, "../mini_ropd_stages.py").rubrics
JUDGES = {"rubricator": ROPD.rubricator, "verifier": ROPD.verifier}


def judged(estimator: EstimatorConfig = ROPD_CODE, **rubrics) -> dict:
    """An arm that learns from a judge."""
    return {"estimator": estimator, "rubrics": RubricsConfig(**rubrics), **JUDGES}


def unjudged(recipe: str, **more) -> dict:
    """An arm without a judge."""
    return {"estimator": EstimatorConfig(recipe), "optimizer.learning_rate": 3e-4, **more}


ARMS = {
    "ropd": judged(),
    "ropd_tjudge": judged(EstimatorConfig("tjudge")),
    "ropd_one_reference": judged(num_references=1),
    "ropd_per_student": judged(rubric_of="student"),
    "ropd_not_blind": judged(blind=False),
    "ropd_stages": {"estimator": EstimatorConfig("ropd_stages"), "rubrics": STAGES, **JUDGES},
    "lopd": unjudged("opd"),
    "ropd_sft": unjudged("sft", **{"sampling.completions_from": "teacher"}),
}


def get_sweep() -> list[SweepPoint]:
    base = replace(
        ROPD,
        estimator=EstimatorConfig(),
        rubricator=JudgeConfig(),
        verifier=JudgeConfig(),
        train=TrainConfig(num_steps=100, prompts_per_step=16),
        evaluation=EvaluationConfig(max_completion_length=24, every=25),
    )
    teacher = config_beside(__file__, "../mini_teacher.py")
    mini = arms({"mini": {}}, "pair")
    return [
        *points(base, product(mini, arms(ARMS), seeds(4))),
        *points(teacher, product(mini, arms({"teacher": {}}), seeds(1))),
    ]
