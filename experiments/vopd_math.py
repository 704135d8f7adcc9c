"""vOPD at the scale of its paper: Qwen3-1.7B-Base from Qwen3-1.7B on competition mathematics.

Paper: "KL for a KL: On-Policy Distillation with Control Variate Baseline", arXiv 2605.07865, with
the settings of its released configuration: 64 prompts x 1 rollout a step, sampled anew at every
step, at most 1024 + 2048 tokens, temperature 1 without a filter; AdamW at 1e-5, cosine to 0, clip
1; one epoch of 14 thousand prompts (about 219 steps); the baseline on the student's top 100 ids;
global token mean; raw text without a chat template.

    opdjax train experiments/vopd_math.py --workdir runs/vopd_math

Data: the English part of DAPO-Math-17k and MATH-500, from the hub (`pip install
'opdjax[data,eval]'`); `--data.source preset:dapo_math_14k_en=FILE --evaluation.source
suite:math500=FILE` name copies. `opdjax suites runs/vopd_math --output DIR --protocol vopd_math`
evaluates on all benchmarks of the paper.

Hardware: the paper reports one H200 or A100 per run, 2 to 6 hours. Expected score from the paper,
8 samples at T = 0.6 on MATH-500: 64.9 (plain OPD: 58.7). Not run here yet. Deviations: all
parameters are trained, the paper trains LoRA adapters of rank 64; there is no importance mask
between sampler and trainer, which use the same kernels here; generation stops at the stop ids of
the student's checkpoint.
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

BOXED = "{prompt}\n\nPlease reason step by step, and put your final answer within \\boxed{}."


def get_config() -> Config:
    return Config(
        student=ModelConfig("Qwen/Qwen3-1.7B-Base"),
        teacher=ModelConfig("Qwen/Qwen3-1.7B"),
        data=DataConfig(
            source="preset:dapo_math_14k_en",
            format="raw",
            prompt_format=BOXED,
            max_prompt_length=1024,
        ),
        sampling=SamplingConfig(num_generations=1, max_completion_length=2048, slots=64),
        estimator=EstimatorConfig("vopd", baseline="student_topk", support_top_k=100),
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="cosine", max_grad_norm=1.0),
        train=TrainConfig(
            num_steps=219, prompts_per_step=64, gradient_accumulation_steps=16, remat="layer"
        ),
        evaluation=EvaluationConfig(
            source="suite:math500",
            grader="boxed",
            num_prompts=500,
            num_samples=8,
            temperatures=(0.6,),
            max_completion_length=4096,
        ),
        checkpoint=CheckpointConfig(every=20),
        log=LogConfig(samples_every=20),
        seed=42,
    )
