"""Tables of the ROPD and RubricEM papers on the built-in mini pair: text beside logits, what each
part is worth, credit by stages.

    opdjax sweep experiments/sweeps/mini_ropd.py --workdir runs/mini_ropd --jobs 2
    opdjax table runs/mini_ropd --paper ropd_table2        # ropd_table1, ropd_table6, ropd_efficiency, rubricem_stages

100 updates of 16 prompts x 8 rollouts, one pass over 1,600 prompts, which the teacher answers four
times beforehand. Rubrics are written and held by the judge that goes by rules, so that `tjudge`,
whose score it computes, is an oracle here. What learns from judges does so at 1e-4, what learns
from log-probs at 3e-4, `sft` at 3e-4: the best rates of results/rubrics.md and
results/white_box.md. Four paired seeds. Papers: arXiv 2605.07396, 2605.10899. Two CPU cores: about
a minute a run and core.
"""

from opdjax.config import (
    MINI_TEACHER,
    ROPD_CODE,
    RULE_JUDGE,
    Config,
    DataConfig,
    EndpointConfig,
    EstimatorConfig,
    EvaluationConfig,
    LogConfig,
    OptimizerConfig,
    RubricsConfig,
    SamplingConfig,
    TeachConfig,
    TrainConfig,
)
from opdjax.config.grid import SweepPoint, arms, chain, points, product, seeds

JUDGE = EndpointConfig(RULE_JUDGE, "rules")
STAGES = RubricsConfig(
    stage_names=("first step", "second step", "answer"), stage_markers=(";", "#")
)


def judged(
    estimator: EstimatorConfig = ROPD_CODE, rubrics: RubricsConfig = RubricsConfig()
) -> dict:
    """What learns from a judge."""
    return {"estimator": estimator, "rubrics": rubrics, "rubricator": JUDGE, "verifier": JUDGE}


ARMS = {
    "ropd": judged(),
    "ropd_tjudge": judged(EstimatorConfig("tjudge")),
    "ropd_one_reference": judged(rubrics=RubricsConfig(num_references=1)),
    "ropd_per_student": judged(rubrics=RubricsConfig(rubric_of="student")),
    "ropd_not_blind": judged(rubrics=RubricsConfig(blind=False)),
    "ropd_stages": judged(EstimatorConfig("ropd_stages"), STAGES),
    "lopd": {"estimator": EstimatorConfig("opd"), "optimizer.learning_rate": 3e-4},
    "ropd_sft": {
        "estimator": EstimatorConfig("sft"),
        "sampling.completions_from": "teacher",
        "optimizer.learning_rate": 3e-4,
    },
}

# Its scores before any update are the teacher's; the same run in all twins.
TEACHER = {
    "student.path": MINI_TEACHER,
    "estimator": EstimatorConfig("opd"),
    "data": DataConfig(source="arithmetic:train", max_prompt_length=32),
    "sampling": SamplingConfig(num_generations=1, max_completion_length=24),
    "optimizer": OptimizerConfig(),
    "train": TrainConfig(num_steps=1, prompts_per_step=1),
    "teach": TeachConfig(),
    "evaluation": EvaluationConfig(num_prompts=512, num_samples=8, max_completion_length=24),
    "log": LogConfig(samples_every=0),
}


def get_sweep() -> list[SweepPoint]:
    base = Config(
        data=DataConfig(
            source="arithmetic:train[:1600]",
            max_prompt_length=32,
            references="runs/references/arithmetic.jsonl",
        ),
        sampling=SamplingConfig(num_generations=8, max_completion_length=24),
        teach=TeachConfig(num_answers=4, batch_size=400, max_completion_length=24),
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule="constant", b2=0.98),
        train=TrainConfig(num_steps=100, prompts_per_step=16),
        evaluation=EvaluationConfig(
            num_prompts=512, num_samples=8, max_completion_length=24, every=25
        ),
        log=LogConfig(samples_every=50),
    )
    runs = chain(product(arms(ARMS), seeds(4)), product(arms({"teacher": TEACHER}), seeds(1)))
    return points(base, product(arms({"mini": {}}, "pair"), runs))
