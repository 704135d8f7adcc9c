"""ROPD on science questions without a grader: Qwen3-4B on RaR-Science-20k from a text-only teacher.

Paper: "Rubric-based On-policy Distillation", arXiv 2605.07396, table 1 (GPQA-Diamond), with its
settings for science: 625 steps of 32 prompts x 8 rollouts, learning rate 1e-6 with a cosine after
100 steps of warm-up, AdamW with b2 0.95 and weight decay 0.1, judge temperatures 0.7 (rubricator)
and 0 (verifier).

    opdjax references experiments/ropd_science.py
    opdjax train experiments/ropd_science.py --workdir runs/ropd_science

The judge is local, as in the paper's white-box runs: Qwen3-30B-A3B-Instruct-2507 behind vLLM or
SGLang at port 8000, `vllm serve Qwen/Qwen3-30B-A3B-Instruct-2507 --max-model-len 98304`. Another
judge can replace it, as in ropd_math.py.

Data: RaR-Science and GPQA-Diamond, from the hub (`pip install 'opdjax[data,judge]'`); the latter
asks its readers to accept terms. Hardware: the paper reports eight A100 of 80 GB. Expected score
from the paper with its own judge: GPQA-Diamond 36.50 from 35.66, thinking 55.05 from 53.59. These
gains are within the noise of 16 samples of 198 questions. Never run here. Deviations as in
ropd_math.py.
"""

from dataclasses import replace

from opdjax.config import (
    ROPD_PAPER,
    ApiConfig,
    Config,
    DataConfig,
    JudgeConfig,
    OptimizerConfig,
    TeachConfig,
)
from opdjax.config.experiments import config_beside

MODEL = "Qwen/Qwen3-30B-A3B-Instruct-2507"


def get_config() -> Config:
    base = config_beside(__file__, "ropd_math.py")
    return replace(
        base,
        data=DataConfig(
            source="preset:rar_science",
            format="no_thinking",
            max_prompt_length=2048,
            references="references/rar_science.jsonl",
        ),
        estimator=ROPD_PAPER,
        rubricator=JudgeConfig(MODEL, temperature=0.7),
        verifier=JudgeConfig(MODEL, temperature=0.0),
        teach=TeachConfig(temperature=0.7, max_completion_length=8192, model=MODEL),
        api=ApiConfig("http://127.0.0.1:8000/v1", timeout=480.0, concurrency=16),
        optimizer=OptimizerConfig(
            learning_rate=1e-6, schedule="cosine", warmup_steps=100, b2=0.95, weight_decay=0.1
        ),
        train=replace(base.train, num_steps=625),
        evaluation=replace(
            base.evaluation, source="suite:gpqa_diamond", grader="choice", num_prompts=198
        ),
    )
