"""ROPD on science, where no grader can tell: Qwen3-4B on RaR-Science-20k, taught and judged by text
alone.

Paper: "Rubric-based On-policy Distillation", arXiv 2605.07396, table 1 (GPQA-Diamond) and its
settings for science: 625 steps of 32 prompts x 8 rollouts, learning rate 1e-6 with a cosine after
100 steps of warm-up, AdamW with b2 0.95 and weight decay 0.1, judge temperatures 0.7 (rubricator)
and 0 (verifier).

    opdjax teach experiments/ropd_science.py --data.source rar_science.jsonl --data.references
    references/rar_science.jsonl opdjax train experiments/ropd_science.py --data.source
    rar_science.jsonl --data.references references/rar_science.jsonl \
        --evaluation.source gpqa_diamond.jsonl --workdir runs/ropd_science

The judge is a local one, Qwen3-30B-A3B-Instruct-2507 behind vLLM or SGLang at port 8000, as in the
paper's white-box runs: vllm serve Qwen/Qwen3-30B-A3B-Instruct-2507 --max-model-len 98304. Any other
takes its place as in ropd_math.py.

Data: JSON lines with `prompt` and, for the evaluation, multiple-choice questions with `answer` (the
letter), answered in \\boxed{}. Hardware: the paper reports eight A100 of 80 GB. Expected score by
the paper with its own judge: GPQA-Diamond 36.50 from 35.66, thinking
55.05 from 53.59: gains within what 16 samples of 198 questions can tell. Never run here. Deviations
as in ropd_math.py.
"""

from opdjax.config import (
    ROPD_PAPER,
    CheckpointConfig,
    Config,
    DataConfig,
    EndpointConfig,
    EvaluationConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TeachConfig,
    TrainConfig,
)


def judge(**fields) -> EndpointConfig:
    """A role of the local model."""
    return EndpointConfig(
        "http://127.0.0.1:8000/v1", "Qwen/Qwen3-30B-A3B-Instruct-2507", concurrency=16, **fields
    )


def get_config() -> Config:
    return Config(
        student=ModelConfig("Qwen/Qwen3-4B"),
        data=DataConfig(
            source="rar_science.jsonl",
            enable_thinking=False,
            max_prompt_length=2048,
            references="references/rar_science.jsonl",
        ),
        sampling=SamplingConfig(num_generations=8, max_completion_length=8192),
        estimator=ROPD_PAPER,
        rubricator=judge(temperature=0.7, seed=0, max_tokens=8192, timeout=120.0),
        verifier=judge(temperature=0.0, max_tokens=4096, timeout=60.0),
        teacher_api=judge(temperature=0.7, max_tokens=8192, timeout=480.0),
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
            num_steps=625, prompts_per_step=32, gradient_accumulation_steps=32, remat="layer"
        ),
        evaluation=EvaluationConfig(
            source="gpqa_diamond.jsonl",
            grader="boxed",
            num_prompts=198,
            num_samples=16,
            temperature=1.0,
            top_p=0.95,
            max_completion_length=8192,
            batch_size=64,
        ),
        checkpoint=CheckpointConfig(every=50),
        log=LogConfig(samples_every=50),
        seed=42,
    )
