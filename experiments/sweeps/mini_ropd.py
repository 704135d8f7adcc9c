"""Tables of the ROPD and RubricEM papers on the built-in mini pair: text against logits, ablations,
stage credit.

    opdjax sweep experiments/sweeps/mini_ropd.py --workdir runs/mini_ropd --jobs 2
    opdjax table runs/mini_ropd --paper ropd_table2
        # also ropd_table1, ropd_table6, ropd_efficiency, rubricem_stages

Papers: arXiv 2605.07396, 2605.10899. 100 updates of 16 prompts x 8 rollouts, one pass over 1,600
prompts, which the teacher answers four times before training. The rule-based judge writes the
rubrics and grades the answers; it computes the score of `tjudge`, which is therefore an oracle
here. The grid has five learning rates for every arm, on validation prompts with a seed of its own.
The comparison uses 1e-4 for arms with a judge (results/rubrics.md) and 3e-4 for `lopd` and
`ropd_sft`, which a grid with another schedule and batch chose (results/white_box.md); a table
judges no arm whose rate is not the best of its grid here. Then four paired seeds. Ours: the loss of
the release with its clip of 0.2 / 0.28, as the paper gives no value; references at temperature 1;
100 steps, not the 531 of the paper or the 500 of its release. Hardware: two CPU cores, about a
minute per run and core.
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
from opdjax.config.grid import SweepPoint, arms, points, product, rate_grid, seeds

ROPD = config_beside(__file__, "../mini_ropd.py")
STAGES = config_beside(__file__, "../mini_ropd_stages.py").rubrics
JUDGES = {"rubricator": ROPD.rubricator, "verifier": ROPD.verifier}


def judged(estimator: EstimatorConfig = ROPD_CODE, **rubrics) -> dict:
    """An arm that learns from a judge."""
    return {"estimator": estimator, "rubrics": RubricsConfig(**rubrics), **JUDGES}


def unjudged(recipe: str, **more) -> dict:
    """An arm without a judge."""
    return {"estimator": EstimatorConfig(recipe), **more}


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

GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
RATE = {"lopd": 3e-4, "ropd_sft": 3e-4}  # all others: 1e-4
VALIDATION = {"source": "arithmetic:validation", "every": 0}


def get_sweep() -> list[SweepPoint]:
    base = replace(
        ROPD,
        estimator=EstimatorConfig(),
        rubricator=JudgeConfig(),
        verifier=JudgeConfig(),
        train=TrainConfig(num_steps=100, prompts_per_step=16),
        evaluation=EvaluationConfig(max_completion_length=24, every=25),
    )
    compared = {
        name: fields | {"optimizer.learning_rate": RATE.get(name, 1e-4)}
        for name, fields in ARMS.items()
    }
    teacher = config_beside(__file__, "../mini_teacher.py")
    mini = arms({"mini": {}}, "pair")
    return [
        *points(base, rate_grid(product(mini, arms(ARMS)), GRID, VALIDATION, seed=100)),
        *points(base, product(mini, arms(compared), seeds(4))),
        *points(teacher, product(mini, arms({"teacher": {}}), seeds(1))),
    ]
