"""The ROPD paper's tables with a black box as the teacher: table 1 in both modes, table 3 with
another student, table 6 leaves one out.

    python scripts/join_benchmarks.py contests.jsonl \\
        AIME24=hf:HuggingFaceH4/aime_2024#train,problem,answer
        AIME25=hf:MathArena/aime_2025#train,problem,answer \\ "HMMT25
        Feb=hf:MathArena/hmmt_feb_2025#train,problem,answer" "HMMT25
        Nov=hf:MathArena/hmmt_nov_2025#train,problem,answer"
    python scripts/join_benchmarks.py gpqa.jsonl
    GPQA-Diamond=hf:fingertap/GPQA-Diamond#test,question,answer export OPENAI_API_KEY=... opdjax
    sweep experiments/sweeps/ropd_black_box.py --workdir runs/ropd_black_box --shard 1/8
    opdjax table runs/ropd_black_box --paper ropd_table1   # ropd_table1_thinking, ropd_table3, ropd_table6

Paper: "Rubric-based On-policy Distillation", arXiv 2605.07396. Models: Qwen3-4B, without and with
thinking, from GPT-5.2-chat-latest as teacher, rubricator and verifier. Of table 3, whose
Gemma3-4B-it is of no family here, Qwen3-1.7B takes the place. Data: DAPO-Math-17K (dapo17k.jsonl),
531 steps; of GPQA-Diamond RaR-Science-20k (rar_science.jsonl), 625 steps; rows have `prompt`. The
teacher answers each prompt four times before the first point that reads it. HealthBench and IFEval
have no grader here. Settings of the paper's table A2: 32 prompts x 8 rollouts, AdamW at 1e-6 with a
cosine after 100 steps of warm-up, b2 0.95, weight decay
0.1, clip 1, answers of up to 8,192 tokens at temperature 1, four references, 4 to 12 criteria; the
loss as released (rewards less their mean, token mean, clip 0.2 / 0.28, dual clip 3, no KL).
Evaluation: 16 samples at T = 1 and top-p 0.95, up to 32,768 tokens.

Hardware: eight A100 of 80 GB; by the paper's figures about 6.6 minutes a step, 58 hours a run of
531 steps [D]. Here 48 runs, 36 of which learn from judges, so some 2,200 hours of such a machine;
some 34 thousand judge calls a run [D], each of up to 98 thousand tokens. Never run here; give the
roles their prices and the run a cap (ApiConfig.max_dollars, in a copy of this file) before it is.
The paper's numbers, AIME24 and AIME25 [P]: non-thinking from 24.17 and 20.83, T-Judge 62.50 and
56.64, ROPD 65.02 and 58.75; thinking from
70.42 and 59.58, T-Judge 72.50 and 65.48, ROPD 75.41 and 68.75; GPQA-Diamond 36.50 and 55.05; one
reference 47.08, a rubric for each rollout
61.25, not blind 61.75 on AIME24; Gemma3-4B-it 10.00 from 6.67.
Deviations: one update of 256 rollouts a step, where the release makes four of 64; no importance
weight between sampler and trainer, which are one set of kernels; references at temperature 1, since
four at 0 would be one; the last checkpoint is scored, the paper's is the best by a validation;
judges think with high effort, as released, so that the paper's temperatures are not sent;
`ropd_sft` at 1e-5, ours.
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
    ModelConfig,
    OptimizerConfig,
    RubricsConfig,
    SamplingConfig,
    TeachConfig,
    TrainConfig,
)
from opdjax.config.grid import SweepPoint, arms, chain, points, product, seeds


def role(**fields) -> EndpointConfig:
    """The one model in one of its roles."""
    limits = {
        "requests_per_minute": 1920,
        "tokens_per_minute": 6_000_000,
        "max_tokens_field": "max_completion_tokens",
    }
    return EndpointConfig(
        "https://api.openai.com/v1",
        "gpt-5.2-chat-latest",
        api_key_env="OPENAI_API_KEY",
        **limits,
        **fields,
    )


def judged(
    estimator: EstimatorConfig = ROPD_CODE, rubrics: RubricsConfig = RubricsConfig()
) -> dict:
    """What learns from the judge."""
    return {
        "estimator": estimator,
        "rubrics": rubrics,
        "rubricator": role(max_tokens=8192, timeout=120.0, reasoning_effort="high"),
        "verifier": role(max_tokens=4096, timeout=60.0, reasoning_effort="high"),
    }


ROPD = {"ropd": judged()}
COMPARED = {
    **ROPD,
    "ropd_tjudge": judged(
        EstimatorConfig("tjudge", advantage="mean", clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    ),
    "ropd_sft": {
        "estimator": EstimatorConfig("sft"),
        "sampling.completions_from": "references",
        "optimizer.learning_rate": 1e-5,
    },
}
LEFT_OUT = {
    "ropd_one_reference": judged(rubrics=RubricsConfig(num_references=1)),
    "ropd_per_student": judged(rubrics=RubricsConfig(rubric_of="student")),
    "ropd_not_blind": judged(rubrics=RubricsConfig(blind=False)),
}
SCIENCE = {
    "data.source": "rar_science.jsonl",
    "data.references": "references/gpt_rar_science.jsonl",
    "data.prompt_format": "{prompt}",
    "evaluation.source": "gpqa.jsonl",
    "train.num_steps": 625,
}
THINKING = {"data.enable_thinking": True}
PLAIN = {"data.enable_thinking": False}
PAIRS = {
    "qwen3_4b_gpt": PLAIN,
    "qwen3_4b_gpt_science": PLAIN | SCIENCE,
    "qwen3_4b_gpt_thinking": THINKING,
    "qwen3_4b_gpt_thinking_science": THINKING | SCIENCE,
}
SMALLER = {"qwen3_1_7b_gpt": PLAIN | {"student": ModelConfig("Qwen/Qwen3-1.7B")}}


def get_sweep() -> list[SweepPoint]:
    base = Config(
        student=ModelConfig("Qwen/Qwen3-4B"),
        data=DataConfig(
            source="dapo17k.jsonl",
            prompt_format="{prompt}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
            max_prompt_length=2048,
            references="references/gpt_dapo17k.jsonl",
        ),
        sampling=SamplingConfig(num_generations=8, max_completion_length=8192),
        teacher_api=role(max_tokens=8192, timeout=480.0, temperature=1.0),
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
        ),
        checkpoint=CheckpointConfig(every=50),
        log=LogConfig(samples_every=50),
    )
    compared = product(arms(PAIRS, "pair"), arms(COMPARED), seeds(3))
    left_out = product(arms({"qwen3_4b_gpt": PLAIN}, "pair"), arms(LEFT_OUT), seeds(3))
    smaller = product(arms(SMALLER, "pair"), arms(ROPD), seeds(3))
    return points(base, chain(compared, left_out, smaller))
