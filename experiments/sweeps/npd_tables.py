"""The NPD paper's tables on the models of its controlled experiment: components, lambda, k, tau,
refreshes, the gap to the teacher.

    python scripts/join_benchmarks.py math2.jsonl \\
        MATH500=hf:HuggingFaceH4/MATH-500#test,problem,answer GSM8K=gsm8k_test.jsonl,prompt,answer
    opdjax sweep experiments/sweeps/npd_tables.py --workdir runs/npd_tables --shard 1/8
    opdjax table runs/npd_tables --paper npd_math          # npd_components, npd_lambda, npd_k, npd_tau, npd_refresh, npd_speed

Paper: "Near-Policy: Accelerating On-Policy Distillation via Asynchronous Generation and Selective
Packing", arXiv 2605.05940. Its main tables are of openPangu models and data of their makers, so
that here all of them are asked of the pair of its controlled experiment: Qwen2.5-Math-1.5B from
Qwen2.5-Math-7B-Instruct on 50 thousand prompts of MetaMathQA (hub: meta-math/MetaMathQA, column
query). Evaluation: MATH500 and GSM8K, whose answers in gsm8k_test.jsonl are the bare numbers (what
follows ####). Settings as far as they were recovered: lambda 0.9, k 10, tau 0.8, one refresh before
the sixth of ten epochs, lr 1e-5 with a cosine, clip 1; batch size, temperature, longest answer, the
grids of lambda, k and tau around their best and the numbers of refreshes are ours.

Hardware: not told for this pair; the paper's main run takes 366 hours of one Ascend NPU, 300 of
them to draw answers [N]. Here 52 runs of 3,900 updates of 128 answers. By our arithmetic (700
tokens an answer, 6 FLOP a parameter and token at 40 % of an H100, 10 thousand tokens drawn a
second) some 5 hours a run of two refreshes and 15 where every update draws anew. Never run here.
The paper's numbers: GSM8K 82.87 from 77.33 (teacher 89.31), MATH-500 76.6 from 62.0 (teacher 80.0)
[N]; openPangu, 11 benchmarks: SFT
56.28, packed rollouts +2.84, filter +1.15, one refresh +1.59, NPD 64.37 [N]; 8.1 times the
throughput of the on-policy baseline [B]. Deviations: the cosine ends at 0, the paper's at 1e-6;
rows of 4,096 tokens, the paper's of 32,768; the on-policy baseline has NPD's own loss, where the
paper's is DistiLLM-2; the student is taken as it is, where the paper's is fine-tuned on answers
first.
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
    NearPolicyConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.config.grid import SweepPoint, arms, chain, points, product, seeds

TEACHER = ModelConfig("Qwen/Qwen2.5-Math-7B-Instruct")
MODELS = {"student": ModelConfig("Qwen/Qwen2.5-Math-1.5B"), "teacher": TEACHER}
LOSS = {"recipe": "npd", "kd_weight": 0.9, "support_top_k": 10}
PAPER = {
    "schedule": "refresh",
    "num_epochs": 10,
    "refresh_epochs": (5,),
    "filter": "ifd",
    "ifd_min": 0.0,
    "ifd_max": 0.8,
}


def ahead(loss: dict = LOSS, **changed) -> dict:
    """The paper's setting with these fields of `near_policy` changed."""
    return {
        "estimator": EstimatorConfig(**loss),
        "near_policy": NearPolicyConfig(**PAPER | changed),
        "train.pack_length": 4096,
    }


ARMS = {
    "npd_sft": {"estimator": EstimatorConfig("sft"), "sampling.completions_from": "teacher"},
    "npd_offline_kd": {
        "estimator": EstimatorConfig(**LOSS),
        "sampling.completions_from": "teacher",
    },
    "npd_rollouts": ahead(refresh_epochs=(), filter="none"),
    "npd_filter": ahead(refresh_epochs=()),
    "npd": ahead(),
    "npd_on_policy": {"estimator": EstimatorConfig(**LOSS)},
    "npd_lambda_0": ahead({"recipe": "npd", "kd_weight": 0.0}),
    **{f"npd_lambda_{weight:g}": ahead(LOSS | {"kd_weight": weight}) for weight in (0.5, 1.0)},
    **{f"npd_k{k}": ahead(LOSS | {"support_top_k": k}) for k in (1, 5, 50)},
    **{f"npd_tau_{tau:g}": ahead(ifd_max=tau) for tau in (0.1, 0.2, 0.4)},
    "npd_refresh_2": ahead(refresh_epochs=(3, 6)),
    "npd_refresh_9": ahead(refresh_epochs=tuple(range(1, 10))),
}
# The teacher's own scores: measured as a student is, before a single update, of small adapters so
# that it fits.
ITSELF = {
    "teacher": {
        "student": TEACHER,
        "teacher": TEACHER,
        "estimator": EstimatorConfig("full_kl", divergence="reverse"),
        "lora": LoraConfig(rank=1),
        "train.num_steps": 1,
    }
}


def get_sweep() -> list[SweepPoint]:
    base = Config(
        data=DataConfig(
            source="hf:meta-math/MetaMathQA#train[:50000]",
            prompt_column="query",
            format="chat",
            max_prompt_length=1024,
        ),
        sampling=SamplingConfig(num_generations=1, max_completion_length=2048, temperature=1.0),
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="cosine", max_grad_norm=1.0),
        train=TrainConfig(
            num_steps=3900, prompts_per_step=128, gradient_accumulation_steps=16, remat="layer"
        ),
        evaluation=EvaluationConfig(
            source="math2.jsonl",
            benchmark_column="benchmark",
            prompt_column="prompt",
            grader="boxed",
            num_prompts=1319,
            num_samples=8,
            temperature=0.6,
            max_completion_length=2048,
            batch_size=64,
        ),
        checkpoint=CheckpointConfig(every=100),
        log=LogConfig(samples_every=100),
    )
    methods = product(arms({"qwen2_5_math_1_5b": MODELS}, "pair"), arms(ARMS), seeds(3))
    teacher = product(arms({"qwen2_5_math_1_5b": {}}, "pair"), arms(ITSELF), seeds(1))
    return points(base, chain(methods, teacher))
