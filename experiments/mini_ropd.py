"""ROPD on the mini pair: rubrics written and verified by a judge behind HTTP, the teacher known by its text alone.

Paper: Rubric-based On-policy Distillation (arXiv 2605.07396), as released (mean-centred advantages, token mean).
"""

from opdjax.config import (
    ROPD_CODE,
    CheckpointConfig,
    Config,
    DataConfig,
    EndpointConfig,
    EvaluationConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)


def get_config() -> Config:
    judge = EndpointConfig("http://127.0.0.1:8321/v1", "rules")
    return Config(
        data=DataConfig(source="arithmetic:train[:1600]", max_prompt_length=32),
        sampling=SamplingConfig(num_generations=8, max_completion_length=24),
        estimator=ROPD_CODE,
        rubricator=judge,
        verifier=judge,
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule="constant"),
        train=TrainConfig(num_steps=150, prompts_per_step=32),
        evaluation=EvaluationConfig(max_completion_length=24, every=50),
        checkpoint=CheckpointConfig(every=50),
    )
