"""The vOPD paper's tables at its own scale: main comparison, how large k must be, seconds of a
step, gradient norms.

    python scripts/join_benchmarks.py math4.jsonl ...            # its docstring has the command for the four benchmarks
    opdjax sweep experiments/sweeps/vopd_tables.py --workdir runs/vopd_tables --dry-run
    opdjax sweep experiments/sweeps/vopd_tables.py --workdir runs/vopd_tables --shard 1/8      # 2/8 ... on other machines
    opdjax table runs/vopd_tables --paper vopd_table1            # vopd_k, vopd_step_time, vopd_gradient_norm

Paper: "KL for a KL: On-Policy Distillation with Control Variate Baseline", arXiv 2605.07865.
Models: Qwen3-1.7B-Base from Qwen3-1.7B, Qwen3-4B-Base from Qwen3-4B, Qwen3-0.6B-Base from
Qwen3-1.7B; the same 1.7B pair on chemistry. Its Olmo-3-7B is of no family here. Data:
DAPO-Math-17k, the 14 thousand English ones (hub: open-r1/DAPO-Math-17k-Processed, en), one epoch of
219 steps of 64 prompts, one answer each. Evaluation: MATH500, Minerva, AMC23, AIME24/25
(math4.jsonl), 8 samples at T = 0.6, 4,096 tokens. Science: 1,890 questions of SciKnowEval's
chemistry (chemistry_train.jsonl), tested on its own test part and GPQA-Diamond (science2.jsonl),
top-p 0.95, top-k 20. Rows have `prompt`, `answer` (of science the letter of the right option) and,
for the evaluation, `benchmark`. Settings of its released configuration: LoRA of rank 64, alpha 128,
AdamW at 1e-5 with a cosine down to 0, clip 1, at most 1,024 + 2,048 tokens, temperature 1 and no
filter, k = 100, token mean, raw text without a chat template.

Hardware: the paper reports one H200 or A100 a run, 2 to 6 hours [N]. Here 72 runs, so 150 to 430
hours of such a device, evaluations aside; three seeds where the paper has one. Never run here. The
paper's numbers: 4-benchmark average OPD 29.8, vOPD 33.0 (1.7B), 42.9 and 45.3 (4B); MATH500 58.7
and 64.9; chemistry 29.3 and 34.7; GPQA-Diamond 24.7 and 28.4 [N]; a step 32.88 s [N] beside 77.66 s
[I]; k flat from 5 on [P]; gradients 10 to 100 times smaller [P]. Deviations: no importance mask
between sampler and trainer, which are one set of kernels; every divergence with the token mean of
all 64 rollouts, where the paper's exact ones sum 64 means; letters in \\boxed{} in place of JSON;
the last checkpoint is the one that is scored.
"""

from opdjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.config.grid import SweepPoint, arms, chain, points, product, seeds


def pair(student: str, teacher: str, **more) -> dict:
    """The two models, and what else is of them alone."""
    return {
        "student": ModelConfig(f"Qwen/{student}"),
        "teacher": ModelConfig(f"Qwen/{teacher}"),
        **more,
    }


SCIENCE = {
    "data.source": "chemistry_train.jsonl",
    "data.prompt_format": "{prompt}\n\nPlease reason step by step, and put the letter of the right option within \\boxed{}.",
    "evaluation.source": "science2.jsonl",
    "evaluation.top_p": 0.95,
    "evaluation.top_k": 20,
    "train.num_steps": 30,
}
PAIRS = {
    "qwen3_1_7b": pair("Qwen3-1.7B-Base", "Qwen3-1.7B"),
    "qwen3_4b": pair("Qwen3-4B-Base", "Qwen3-4B"),
    "qwen3_0_6b": pair("Qwen3-0.6B-Base", "Qwen3-1.7B"),
    "qwen3_1_7b_science": pair("Qwen3-1.7B-Base", "Qwen3-1.7B", **SCIENCE),
}


def top_k(k: int) -> EstimatorConfig:
    """The paper's baseline on the student's first k ids."""
    return EstimatorConfig("vopd", baseline="student_topk", baseline_top_k=k)


METHODS = {
    "opd": {"estimator": EstimatorConfig("opd")},
    "vopd": {"estimator": EstimatorConfig("vopd", baseline="full")},
    "vopd_k100": {"estimator": top_k(100)},
    "full_kl": {"estimator": EstimatorConfig("full_kl", divergence="reverse")},
    "opd_topk": {
        "estimator": EstimatorConfig(
            "topk_kl", support="student", support_top_k=100, renormalize="both"
        )
    },
}
K_ABLATION = {f"vopd_k{k}": {"estimator": top_k(k)} for k in (5, 20, 50)}
# A teacher's own scores: it is measured as a student is, before a single update. Of the 0.6B pair
# it is that of the 1.7B pair.
TEACHERS = {
    name: {**fields, "student": fields["teacher"], "train.num_steps": 1}
    for name, fields in PAIRS.items()
}
TEACHER = {"teacher": {"estimator": EstimatorConfig("full_kl", divergence="reverse")}}


def get_sweep() -> list[SweepPoint]:
    base = Config(
        data=DataConfig(
            source="hf:open-r1/DAPO-Math-17k-Processed@en#train",
            format="raw",
            prompt_format="{prompt}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
            max_prompt_length=1024,
        ),
        sampling=SamplingConfig(num_generations=1, max_completion_length=2048, temperature=1.0),
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="cosine", max_grad_norm=1.0),
        train=TrainConfig(
            num_steps=219, prompts_per_step=64, gradient_accumulation_steps=16, remat="layer"
        ),
        lora=LoraConfig(rank=64, alpha=128.0),
        evaluation=EvaluationConfig(
            source="math4.jsonl",
            benchmark_column="benchmark",
            grader="boxed",
            num_prompts=1000,
            num_samples=8,
            temperature=0.6,
            max_completion_length=4096,
            batch_size=64,
        ),
        checkpoint=CheckpointConfig(every=20),
        log=LogConfig(samples_every=20),
    )
    main = product(arms(PAIRS, "pair"), arms(METHODS), seeds(3))
    of_k = product(arms({"qwen3_1_7b": PAIRS["qwen3_1_7b"]}, "pair"), arms(K_ABLATION), seeds(3))
    teachers = product(arms(TEACHERS, "pair"), arms(TEACHER), seeds(1))
    return points(base, chain(main, of_k, teachers))
