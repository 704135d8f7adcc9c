"""vOPD on the medium pair, which `scripts/make_medium_pair.py` trains: word problems whose worked
solutions differ in words, length and order.

Paper: "KL for a KL: On-Policy Distillation with Control Variate Baseline", arXiv 2605.07865.

    python scripts/make_medium_pair.py --workdir runs/medium
    python scripts/make_medium_pair.py --workdir runs/medium --pick
    opdjax train experiments/medium_vopd.py --workdir runs/medium_vopd

Hardware: two CPU cores; not yet measured.
"""

from opdjax.config import (
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        student=ModelConfig("runs/medium/student"),
        teacher=ModelConfig("runs/medium/teacher"),
        data=DataConfig("stories:train", max_prompt_length=160),
        sampling=SamplingConfig(num_generations=1, max_completion_length=224),
        estimator=EstimatorConfig("vopd", baseline="full", aggregation="token_mean"),
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="cosine", warmup_steps=5, b2=0.98),
        train=TrainConfig(num_steps=100, prompts_per_step=32),
        evaluation=EvaluationConfig(
            "stories:test", num_prompts=128, num_samples=4, max_completion_length=224
        ),
    )
