"""NPD."""

from opdjax.config import (
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    LogConfig,
    NearPolicyConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(source="arithmetic:train", max_prompt_length=32),
        sampling=SamplingConfig(num_generations=1, max_completion_length=24),
        near_policy=NearPolicyConfig(schedule="refresh", num_epochs=10, refresh_epochs=(5,), filter="ifd", ifd_min=0.0, ifd_max=0.8),
        estimator=EstimatorConfig(recipe="npd", kd_weight=0.9, support_top_k=10, aggregation="token_mean"),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=5, b2=0.98, max_grad_norm=1.0),
        train=TrainConfig(num_steps=200, prompts_per_step=128, pack_length=256),
        evaluation=EvaluationConfig(num_prompts=512, num_samples=8, max_completion_length=24, extra_temperatures=(0.7, 0.5)),
        log=LogConfig(samples_every=50),
    )
