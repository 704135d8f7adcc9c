"""The NPD paper's tables on the models of its controlled experiment: components, lambda, k, tau,
refreshes, the gap to the teacher.

    python scripts/join_benchmarks.py math2.jsonl \
        MATH500=hf:HuggingFaceH4/MATH-500#test,problem,answer \
        GSM8K=gsm8k_test.jsonl,prompt,answer
    opdjax sweep experiments/sweeps/npd_tables.py --workdir runs/npd_tables --shard 1/8
    opdjax table runs/npd_tables --paper npd_math
        # also npd_components, npd_lambda, npd_k, npd_tau, npd_refresh, npd_speed

Paper: "Near-Policy: Accelerating On-Policy Distillation via Asynchronous Generation and Selective
Packing", arXiv 2605.05940. Its main tables use openPangu models and data of their makers. Here all
tables use the pair of its controlled experiment: Qwen2.5-Math-1.5B from Qwen2.5-Math-7B-Instruct on
50 thousand prompts of MetaMathQA (hub: meta-math/MetaMathQA, column query). Evaluation: MATH500 and
GSM8K; the answers in gsm8k_test.jsonl are the bare numbers after ####. Recovered settings: lambda
0.9, k 10, tau 0.8, one refresh before the sixth of ten epochs, lr 1e-5 with a cosine, clip 1. Ours:
batch size, temperature, answer length, IFD as a ratio of mean negative log-likelihoods (not of
perplexities), a KL that is not renormalised on the top k, the grids of lambda, k and tau around
their best values, and the numbers of refreshes.

Hardware: not stated for this pair; the paper's main run takes 366 hours on one Ascend NPU, 300 of
them for generation [N]. Here 52 runs of 3,900 updates of 128 answers. We estimate (700 tokens an
answer, 6 FLOP per parameter and token at 40 % of an H100, 10 thousand sampled tokens per second)
some 5 hours for a run with two refreshes and 15 for a run that samples at every update. Never run
here. The paper's numbers: GSM8K 82.87 from 77.33 (teacher 89.31), MATH-500 76.6 from 62.0 (teacher
80.0) [N]; openPangu, 11 benchmarks: SFT 56.28, packed rollouts +2.84, filter +1.15, one refresh
+1.59, NPD 64.37 [N]; 8.1 times the throughput of the on-policy baseline [B]. Deviations: the cosine
ends at 0, the paper's at 1e-6; rows of 4,096 tokens, the paper's of 32,768; the on-policy baseline
has NPD's own loss, the paper's is DistiLLM-2; the student is not fine-tuned on answers first, the
paper's is.
"""

from dataclasses import replace

from opdjax.config import EstimatorConfig, LoraConfig, NearPolicyConfig
from opdjax.config.experiments import config_beside
from opdjax.config.grid import SweepPoint, arms, chain, points, product, seeds

NPD = config_beside(__file__, "../npd_math.py")
FROM_TEACHER = {"sampling.completions_from": "teacher"}


def near(loss: dict | None = None, **changed) -> dict:
    """The paper's setting with some fields of `estimator` and `near_policy` changed."""
    return {
        "estimator": replace(NPD.estimator, **loss or {}),
        "near_policy": replace(NPD.near_policy, **changed),
        "train.pack_length": NPD.train.pack_length,
    }


ARMS = {
    "npd_sft": {"estimator": EstimatorConfig("sft"), **FROM_TEACHER},
    "npd_offline_kd": {"estimator": NPD.estimator, **FROM_TEACHER},
    "npd_rollouts": near(refresh_epochs=(), filter="none"),
    "npd_filter": near(refresh_epochs=()),
    "npd": near(),
    "npd_on_policy": {"estimator": NPD.estimator},
    "npd_lambda_0": near({"kd_weight": 0.0, "support_top_k": None}),
    **{f"npd_lambda_{weight:g}": near({"kd_weight": weight}) for weight in (0.5, 1.0)},
    **{f"npd_k{k}": near({"support_top_k": k}) for k in (1, 5, 50)},
    **{f"npd_tau_{tau:g}": near(ifd_max=tau) for tau in (0.1, 0.2, 0.4)},
    "npd_refresh_2": near(refresh_epochs=(3, 6)),
    "npd_refresh_9": near(refresh_epochs=tuple(range(1, 10))),
}
# The teacher is scored as a student before any update, with small adapters so that it fits.
TEACHER = {
    "student": NPD.teacher,
    "estimator": EstimatorConfig("full_kl", divergence="reverse"),
    "lora": LoraConfig(rank=1),
    "train.num_steps": 1,
    "train.gradient_accumulation_steps": 64,
}


def get_sweep() -> list[SweepPoint]:
    base = replace(
        NPD,
        data=replace(
            NPD.data, source="hf:meta-math/MetaMathQA#train[:50000]", columns=("prompt=query",)
        ),
        near_policy=NearPolicyConfig(),
        train=replace(NPD.train, pack_length=None),
        evaluation=replace(
            NPD.evaluation,
            source="math2.jsonl",
            columns=("prompt=prompt", "benchmark=benchmark"),
            num_prompts=1319,
        ),
    )
    pair = arms({"qwen2_5_math_1_5b": {}}, "pair")
    methods = product(pair, arms(ARMS), seeds(3))
    return points(base, chain(methods, product(pair, arms({"teacher": TEACHER}), seeds(1))))
