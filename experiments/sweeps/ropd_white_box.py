"""The ROPD paper's table 2 and figure 3: a white-box teacher used through its text or through its
log-probs, and the cost of each.

    vllm serve Qwen/Qwen3-30B-A3B-Instruct-2507 --port 8000 --max-model-len 98304
    vllm serve Qwen/Qwen3-14B --port 8001 --max-model-len 98304
        # with YaRN, as its model card says
    opdjax sweep experiments/sweeps/ropd_white_box.py --workdir runs/ropd_white_box --shard 1/4
    opdjax table runs/ropd_white_box --paper ropd_table2       # also ropd_efficiency

Paper: "Rubric-based On-policy Distillation", arXiv 2605.07396. Models: Qwen3-4B without thinking
from Qwen3-30B-A3B as teacher, rubricator and verifier (pair qwen3_4b_30b). That teacher is a
mixture of experts, which the decoder does not support: behind a server it teaches and judges, but
LOPD needs its log-probs. So all rows also run with Qwen3-14B in all roles (pair qwen3_4b_14b): as a
checkpoint for `lopd` and its own scores, behind the second server otherwise. Data and evaluation
are those of ropd_black_box.py, whose docstring has the command for contests.jsonl. Settings are
those too; the students are evaluated every 50 steps, for the figure.

Hardware: eight A100 of 80 GB; the paper's figures give 6.6 minutes per step of ROPD and 4.3 of LOPD
[D], 58 and 38 hours for 531 steps. Here 16 runs, six of ROPD and three of LOPD, so some 470 hours
of such a machine without the judges' servers, SFT and the eleven evaluations of each run. Never run
here. The paper's numbers, average of four contests [P]: student 15.63, SFT 17.29, LOPD 32.82, ROPD
45.87, teacher 56.46; LOPD reaches its best average after 15.4 thousand prompts, ROPD reaches the
same after 1.6 thousand; 34.4 and 5.5 hours until 48.3 on AIME24. Deviations: as in
ropd_black_box.py; judges at the paper's temperatures, 0.7 and 0; references at 0.7, which is ours;
LOPD at ROPD's learning rate and batch, `ropd_sft` at 1e-5, because the paper does not state theirs.
"""

from dataclasses import replace

from opdjax.config import (
    ROPD_CODE,
    ApiConfig,
    EstimatorConfig,
    JudgeConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TeachConfig,
)
from opdjax.config.experiments import config_beside
from opdjax.config.grid import SweepPoint, arms, chain, points, product, seeds

TEACHER = ModelConfig("Qwen/Qwen3-14B")
SERVED = {
    "30b": ("http://127.0.0.1:8000/v1", "Qwen/Qwen3-30B-A3B-Instruct-2507"),
    "14b": ("http://127.0.0.1:8001/v1", "Qwen/Qwen3-14B"),
}


def pair(name: str, **more) -> dict:
    """The teacher behind a server, and the file of its answers."""
    url, model = SERVED[name]
    return {
        "api": ApiConfig(url, timeout=480.0, concurrency=16),
        "teach": TeachConfig(temperature=0.7, max_completion_length=8192, model=model),
        "data.references": f"references/{name}_dapo17k.jsonl",
        **more,
    }


PAIRS = {"30b": pair("30b"), "14b": pair("14b", teacher=TEACHER)}


def by_text(name: str) -> dict:
    """The arms that read only the teacher's text."""
    return {
        "ropd": {
            "estimator": ROPD_CODE,
            "rubricator": JudgeConfig(SERVED[name][1], temperature=0.7),
            "verifier": JudgeConfig(SERVED[name][1], temperature=0.0),
        },
        "ropd_sft": {
            "estimator": EstimatorConfig("sft"),
            "sampling.completions_from": "references",
            "optimizer.learning_rate": 1e-5,
        },
    }


BY_LOGPROBS = {"lopd": {"estimator": EstimatorConfig("opd")}}
# The teacher is scored as a student before any update, with small adapters so that it fits.
ITSELF = {
    "student": TEACHER,
    "estimator": EstimatorConfig("full_kl", divergence="reverse"),
    "lora": LoraConfig(rank=1),
    "train.num_steps": 1,
}


def get_sweep() -> list[SweepPoint]:
    ropd = config_beside(__file__, "../ropd_math.py")
    base = replace(
        ropd,
        data=replace(ropd.data, references=None),
        sampling=replace(ropd.sampling, slots=16),  # evaluations have 32,768 tokens
        estimator=EstimatorConfig(),
        rubricator=JudgeConfig(),
        verifier=JudgeConfig(),
        optimizer=OptimizerConfig(
            learning_rate=1e-6, schedule="cosine", warmup_steps=100, b2=0.95, weight_decay=0.1
        ),
        train=replace(ropd.train, gradient_accumulation_steps=64),
        mesh=MeshConfig(fsdp=4, tensor=2),  # for the teacher of 14 B
        evaluation=replace(
            ropd.evaluation,
            source="contests.jsonl",
            columns=("benchmark=benchmark",),
            num_prompts=512,
            max_completion_length=32768,
            every=50,
        ),
    )
    texts = [
        product(arms({f"qwen3_4b_{name}": PAIRS[name]}, "pair"), arms(by_text(name)), seeds(3))
        for name in PAIRS
    ]
    white = arms({"qwen3_4b_14b": PAIRS["14b"]}, "pair")
    logprobs = product(white, arms(BY_LOGPROBS), seeds(3))
    teacher = product(white, arms({"teacher": ITSELF}), seeds(1))
    return points(base, chain(*texts, logprobs, teacher))
