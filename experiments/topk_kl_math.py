"""KL(student || teacher) on the student's top 100 ids, both sides renormalised, at the scale of
vOPD's paper.

The row "OPD top-k" of "KL for a KL: On-Policy Distillation with Control Variate Baseline", arXiv
2605.07865: biased, as it does not see the student's mass outside the ids. `--estimator.renormalize
none --estimator.outside tail` repairs that. Everything but the estimator is as in vopd_math.py,
whose docstring tells the settings, the data and the deviations.

    opdjax train experiments/topk_kl_math.py --workdir runs/topk_kl_math \
        --data.source dapo14k.jsonl --evaluation.source math500.jsonl

Hardware: the paper reports one H200 or A100 a run, 2 to 6 hours. Expected by the paper: about 0.4
points over OPD on the average of four benchmarks (vOPD: 3.2 over it). Not run here yet.
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
        student=ModelConfig("Qwen/Qwen3-1.7B-Base"),
        teacher=ModelConfig("Qwen/Qwen3-1.7B"),
        data=DataConfig(
            source="dapo14k.jsonl",
            format="raw",
            prompt_format="{prompt}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
            max_prompt_length=1024,
        ),
        sampling=SamplingConfig(num_generations=1, max_completion_length=2048, temperature=1.0),
        estimator=EstimatorConfig(
            recipe="topk_kl",
            support="student",
            support_top_k=100,
            renormalize="both",
            aggregation="token_mean",
        ),
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="cosine", max_grad_norm=1.0),
        train=TrainConfig(
            num_steps=219, prompts_per_step=64, gradient_accumulation_steps=16, remat="layer"
        ),
        evaluation=EvaluationConfig(
            source="math500.jsonl",
            grader="boxed",
            num_prompts=500,
            num_samples=8,
            temperature=0.6,
            max_completion_length=4096,
            batch_size=64,
        ),
        checkpoint=CheckpointConfig(every=20),
        log=LogConfig(samples_every=20),
        seed=42,
    )
