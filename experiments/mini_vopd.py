"""vOPD on the built-in mini pair: sampled-token distillation with the full-vocabulary baseline.

Paper: "KL for a KL: On-Policy Distillation with Control Variate Baseline", arXiv 2605.07865.
This is the quick start, and the base of mini_opd.py, mini_full_kl.py, mini_topk_kl.py and
mini_sft.py.

    opdjax train experiments/mini_vopd.py --workdir runs/mini_vopd

Hardware: two CPU cores, about two minutes. Expected on 512 test problems: avg@8 0.409 -> 0.570,
greedy 0.543 -> 0.957.
"""

from opdjax.config import (
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig("arithmetic:train", max_prompt_length=32),
        sampling=SamplingConfig(num_generations=1, max_completion_length=24),
        estimator=EstimatorConfig("vopd", baseline="full", aggregation="token_mean"),
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="cosine", warmup_steps=5, b2=0.98),
        train=TrainConfig(num_steps=200, prompts_per_step=128),
        evaluation=EvaluationConfig(
            num_prompts=512, num_samples=8, max_completion_length=24, temperatures=(1.0, 0.7, 0.5)
        ),
    )
