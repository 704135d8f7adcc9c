"""The ROPD paper's table 2 and figure 3: a teacher whose log-probs could be read, known by its
text, and what each way takes.

    vllm serve Qwen/Qwen3-30B-A3B-Instruct-2507 --port 8000 --max-model-len 98304
    vllm serve Qwen/Qwen3-14B --port 8001 --max-model-len 98304      # with YaRN, as its model card says
    opdjax sweep experiments/sweeps/ropd_white_box.py --workdir runs/ropd_white_box --shard 1/4
    opdjax table runs/ropd_white_box --paper ropd_table2       # ropd_efficiency

Paper: "Rubric-based On-policy Distillation", arXiv 2605.07396. Models: Qwen3-4B without thinking
from Qwen3-30B-A3B as teacher, rubricator and verifier (pair qwen3_4b_30b). That teacher is a
mixture of experts, which the decoder here does not compute: behind a server it teaches and judges,
but LOPD needs its log-probs. So all rows are asked once more of Qwen3-14B in all roles (pair
qwen3_4b_14b), for `lopd` and its own scores as a checkpoint, for the rest behind the other server.
Data and evaluation: as in ropd_black_box.py, whose docstring has the command for contests.jsonl.
Settings: as there; every 50 steps the students are scored, for the figure.

Hardware: eight A100 of 80 GB; the paper's figures give 6.6 minutes a step of ROPD and 4.3 of LOPD
[D], 58 and 38 hours for 531 steps. Here 16 runs, six of ROPD and three of LOPD, so some 470 hours
of such a machine, the servers of the judges, SFT and the eleven evaluations of each run not
counted. Never run here. The paper's numbers, average of four contests [P]: student 15.63, SFT
17.29, LOPD 32.82, ROPD 45.87, teacher 56.46; LOPD's best average after 15.4 thousand prompts and by
ROPD after 1.6 thousand; 34.4 and 5.5 hours until 48.3 on AIME24. Deviations: as in
ropd_black_box.py; judges at the paper's temperatures, 0.7 and 0; LOPD at ROPD's learning rate and
batch, `ropd_sft` at 1e-5: the paper does not tell theirs.
"""

from opdjax.config import (
    ROPD_CODE,
    CheckpointConfig,
    Config,
    DataConfig,
    EndpointConfig,
    EstimatorConfig,
    EvaluationConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TeachConfig,
    TrainConfig,
)
from opdjax.config.grid import SweepPoint, arms, chain, points, product, seeds

TEACHER = ModelConfig("Qwen/Qwen3-14B")
SERVED = {
    "30b": ("http://127.0.0.1:8000/v1", "Qwen/Qwen3-30B-A3B-Instruct-2507"),
    "14b": ("http://127.0.0.1:8001/v1", "Qwen/Qwen3-14B"),
}


def role(name: str, **fields) -> EndpointConfig:
    """A served teacher in one of its roles."""
    return EndpointConfig(*SERVED[name], concurrency=16, **fields)


def pair(name: str, **more) -> dict:
    """Who teaches, and where what it answered is kept."""
    answers = role(name, max_tokens=8192, timeout=480.0, temperature=0.7)
    return {"teacher_api": answers, "data.references": f"references/{name}_dapo17k.jsonl", **more}


PAIRS = {"30b": pair("30b"), "14b": pair("14b", teacher=TEACHER)}


def by_text(name: str) -> dict:
    """The arms that read the teacher's text alone."""
    rubricator, verifier = (
        role(name, temperature=0.7, seed=0, timeout=120.0),
        role(name, temperature=0.0, max_tokens=4096, timeout=60.0),
    )
    return {
        "ropd": {"estimator": ROPD_CODE, "rubricator": rubricator, "verifier": verifier},
        "ropd_sft": {
            "estimator": EstimatorConfig("sft"),
            "sampling.completions_from": "references",
            "optimizer.learning_rate": 1e-5,
        },
    }


BY_LOGPROBS = {"lopd": {"estimator": EstimatorConfig("opd")}}
# The teacher's own scores: measured as a student is, before a single update, of small adapters so
# that it fits.
ITSELF = {
    "teacher": {
        "student": TEACHER,
        "estimator": EstimatorConfig("full_kl", divergence="reverse"),
        "lora": LoraConfig(rank=1),
        "train.num_steps": 1,
    }
}


def get_sweep() -> list[SweepPoint]:
    base = Config(
        student=ModelConfig("Qwen/Qwen3-4B"),
        data=DataConfig(
            source="dapo17k.jsonl",
            prompt_format="{prompt}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
            enable_thinking=False,
            max_prompt_length=2048,
        ),
        sampling=SamplingConfig(num_generations=8, max_completion_length=8192),
        teach=TeachConfig(num_answers=4),
        optimizer=OptimizerConfig(
            learning_rate=1e-6,
            schedule="cosine",
            warmup_steps=100,
            b2=0.95,
            weight_decay=0.1,
            max_grad_norm=1.0,
        ),
        train=TrainConfig(
            num_steps=531, prompts_per_step=32, gradient_accumulation_steps=32, remat="layer"
        ),
        evaluation=EvaluationConfig(
            source="contests.jsonl",
            benchmark_column="benchmark",
            grader="boxed",
            num_samples=16,
            temperature=1.0,
            top_p=0.95,
            max_completion_length=32768,
            batch_size=64,
            every=50,
        ),
        checkpoint=CheckpointConfig(every=50),
        log=LogConfig(samples_every=50),
    )
    texts = [
        product(arms({f"qwen3_4b_{name}": PAIRS[name]}, "pair"), arms(by_text(name)), seeds(3))
        for name in PAIRS
    ]
    white = arms({"qwen3_4b_14b": PAIRS["14b"]}, "pair")
    return points(
        base,
        chain(
            *texts,
            product(white, arms(BY_LOGPROBS), seeds(3)),
            product(white, arms(ITSELF), seeds(1)),
        ),
    )
