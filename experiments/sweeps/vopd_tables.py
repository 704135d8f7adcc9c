"""The vOPD paper's tables at its own scale: main comparison, size of k, seconds per step, gradient
norms.

    python scripts/join_benchmarks.py math4.jsonl ...
        # its docstring has the command for the four benchmarks
    opdjax sweep experiments/sweeps/vopd_tables.py --workdir runs/vopd_tables --dry-run
    opdjax sweep experiments/sweeps/vopd_tables.py --workdir runs/vopd_tables --shard 1/8
        # 2/8 ... on other machines
    opdjax table runs/vopd_tables --paper vopd_table1
        # also vopd_k, vopd_step_time, vopd_gradient_norm

Paper: "KL for a KL: On-Policy Distillation with Control Variate Baseline", arXiv 2605.07865.
Models: Qwen3-1.7B-Base from Qwen3-1.7B, Qwen3-4B-Base from Qwen3-4B, Qwen3-0.6B-Base from
Qwen3-1.7B; the 1.7B pair on chemistry too. The paper's Olmo-3-7B is not a supported family. Data:
the 14 thousand English prompts of DAPO-Math-17k (hub: open-r1/DAPO-Math-17k-Processed, en), one
epoch of 219 steps of 64 prompts with one answer each. Evaluation: MATH500, Minerva, AMC23,
AIME24/25 (math4.jsonl), 8 samples at T = 0.6, 4,096 tokens. Science: 1,890 chemistry questions of
SciKnowEval (chemistry_train.jsonl), evaluated on its own test part and GPQA-Diamond
(science2.jsonl), top-p 0.95, top-k 20. Rows have `prompt`, `answer` (in science the letter of the
right option) and, for the evaluation, `benchmark`. Settings are those of the released configuration
(vopd_math.py), with LoRA of rank 64 and alpha 128.

Hardware: the paper reports one H200 or A100 per run, 2 to 6 hours [N]. Here 72 runs, so 150 to 430
hours of such a device without evaluations; three seeds, the paper has one. Never run here. The
paper's numbers: 4-benchmark average OPD 29.8, vOPD 33.0 (1.7B), 42.9 and 45.3 (4B); MATH500 58.7
and 64.9; chemistry 29.3 and 34.7; GPQA-Diamond 24.7 and 28.4 [N]; a step takes 32.88 s [N] with
vOPD, 77.66 s [I] with the exact KL; accuracy is flat from k = 5 [P]; gradients are 10 to 100 times
smaller [P]. Deviations: no importance mask between sampler and trainer, which use the same kernels
here; every divergence is the token mean over all 64 rollouts, the paper's exact ones sum 64 means;
answers are letters in \\boxed{}, the paper's are JSON; the last checkpoint is scored. Ours: 8
samples a problem on AIME24/25 too, where the paper may use 32 [W].
"""

from dataclasses import replace

from opdjax.config import EstimatorConfig, LoraConfig, ModelConfig
from opdjax.config.experiments import config_beside
from opdjax.config.grid import SweepPoint, arms, chain, points, product, seeds


def pair(student: str, teacher: str, **more) -> dict:
    """The two models and other fields of the pair."""
    models = {"student": ModelConfig(f"Qwen/{student}"), "teacher": ModelConfig(f"Qwen/{teacher}")}
    return {**models, **more}


def top_k(k: int) -> EstimatorConfig:
    """The paper's baseline on the student's top k ids."""
    return EstimatorConfig("vopd", baseline="student_topk", support_top_k=k)


LETTER = (
    "{prompt}\n\nPlease reason step by step, and put the letter of the right option within "
    "\\boxed{}."
)
SCIENCE = {
    "data.source": "chemistry_train.jsonl",
    "data.prompt_format": LETTER,
    "evaluation.source": "science2.jsonl",
    "evaluation.top_p": 0.95,
    "evaluation.top_k": 20,
    "train.num_steps": 30,
}
SMALL = pair("Qwen3-1.7B-Base", "Qwen3-1.7B")
PAIRS = {
    "qwen3_1_7b": SMALL,
    "qwen3_4b": pair("Qwen3-4B-Base", "Qwen3-4B"),
    "qwen3_0_6b": pair("Qwen3-0.6B-Base", "Qwen3-1.7B"),
    "qwen3_1_7b_science": SMALL | SCIENCE,
}
FULL_KL = {"estimator": EstimatorConfig("full_kl", divergence="reverse")}
TOP_100 = EstimatorConfig("topk_kl", support="student", support_top_k=100, renormalize="both")
METHODS = {
    "opd": {"estimator": EstimatorConfig("opd")},
    "vopd": {"estimator": EstimatorConfig("vopd", baseline="full")},
    "vopd_k100": {"estimator": top_k(100)},
    "full_kl": FULL_KL,
    "opd_topk": {"estimator": TOP_100},
}
K_ABLATION = {f"vopd_k{k}": {"estimator": top_k(k)} for k in (5, 20, 50)}
# A teacher is scored as a student before any update. The 0.6B pair has the teacher of the 1.7B one.
TEACHERS = {
    name: {**fields, "student": fields["teacher"], "train.num_steps": 1}
    for name, fields in PAIRS.items()
}


def get_sweep() -> list[SweepPoint]:
    paper = config_beside(__file__, "../vopd_math.py")
    base = replace(
        paper,
        data=replace(paper.data, source="hf:open-r1/DAPO-Math-17k-Processed@en#train"),
        lora=LoraConfig(rank=64, alpha=128.0),
        evaluation=replace(
            paper.evaluation,
            source="math4.jsonl",
            columns=("benchmark=benchmark",),
            num_prompts=1000,
        ),
    )
    main = product(arms(PAIRS, "pair"), arms(METHODS), seeds(3))
    of_k = product(arms({"qwen3_1_7b": SMALL}, "pair"), arms(K_ABLATION), seeds(3))
    teachers = product(arms(TEACHERS, "pair"), arms({"teacher": FULL_KL}), seeds(1))
    return points(base, chain(main, of_k, teachers))
