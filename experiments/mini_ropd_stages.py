"""Stage-structured credit on the mini pair: each step of a worked answer is scored by itself, and
credited with what follows from it.

Papers: SS-GRPO of RubricEM (arXiv 2605.10899, section 3.3) on the rubrics of ROPD (arXiv
2605.07396); no tools, no search, no bank. An answer such as 34-17=17;17+25=42#42 has three stages:
up to the semicolon, up to the #, and the rest.

    opdjax teach experiments/mini_ropd_stages.py
    opdjax train experiments/mini_ropd_stages.py --workdir runs/mini_ropd_stages

The paper's credit is made for four stages; of three, `decay` (1 for itself, 0.8 for the last, 0.5
between) is ours. Try
--estimator.stage-credit last (plain ROPD on the last stage's score), identity, or
--estimator.stage-token-mean True.

Two CPU cores, three minutes. Expected on 512 test problems, three seeds: avg@8 0.409 -> 0.541 ±
0.033, greedy 0.543 -> 0.895.
"""

from opdjax.config import (
    RULE_JUDGE,
    Config,
    DataConfig,
    EndpointConfig,
    EstimatorConfig,
    EvaluationConfig,
    OptimizerConfig,
    RubricsConfig,
    SamplingConfig,
    TeachConfig,
    TrainConfig,
)

JUDGE = EndpointConfig(RULE_JUDGE, "rules")


def get_config() -> Config:
    return Config(
        data=DataConfig(
            source="arithmetic:train[:1600]",
            max_prompt_length=32,
            references="runs/references/arithmetic.jsonl",
        ),
        sampling=SamplingConfig(num_generations=8, max_completion_length=24),
        estimator=EstimatorConfig("ropd_stages", stage_credit="decay"),
        rubrics=RubricsConfig(
            stage_names=("first step", "second step", "answer"), stage_markers=(";", "#")
        ),
        rubricator=JUDGE,
        verifier=JUDGE,
        teach=TeachConfig(num_answers=4, batch_size=400, max_completion_length=24),
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule="constant", b2=0.98),
        train=TrainConfig(num_steps=150, prompts_per_step=32),
        evaluation=EvaluationConfig(max_completion_length=24),
    )
