"""vOPD on a pretrained pair that two cores can train: SmolLM2-135M-Instruct, and the same model
without three of its thirty layers as the student, on built-in instructions.

Paper: "KL for a KL: On-Policy Distillation with Control Variate Baseline", arXiv 2605.07865. The
models, the data, the lengths and the rates are choices of this project. The other real_*.py differ
from this file in the estimator and in where the text comes from.

    ./scripts/make_real_pair.sh
    opdjax train experiments/real_vopd.py --workdir runs/real_vopd

What is measured is the divergence from the teacher on instructions whose topics and templates no
training prompt has, on the student's own answers and on the teacher's.

Hardware: two CPU cores and 8 GiB of memory.
"""

from opdjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        student=ModelConfig("runs/real_pair/student"),
        teacher=ModelConfig("runs/real_pair/teacher"),
        data=DataConfig("instructions:train", max_prompt_length=96),
        sampling=SamplingConfig(max_completion_length=64),
        estimator=EstimatorConfig("vopd", baseline="full", aggregation="token_mean"),
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule="cosine", warmup_steps=5),
        train=TrainConfig(num_steps=60, prompts_per_step=16),
        evaluation=EvaluationConfig(
            "instructions:test",
            num_prompts=64,
            num_samples=1,
            max_completion_length=64,
            every=20,
            kind="divergence",
        ),
        checkpoint=CheckpointConfig(every=20, keep=1),
        log=LogConfig(samples_every=20),
    )
