"""ROPD at the scale of its paper: Qwen3-4B on competition mathematics, taught by a model that is
known by its text alone.

Paper: "Rubric-based On-policy Distillation", arXiv 2605.07396, table 1, non-thinking, with the
settings of its release where paper and release differ: 32 prompts x 8 rollouts a step, four
references, 4 to 12 criteria, rewards less the mean of their group, token mean, clip
0.2 / 0.28 and dual clip 3, no KL, AdamW at 1e-6 with weight decay 0.01, clip 1, answers of up to
8,192 tokens at temperature 1.

    export OPENAI_API_KEY=...
    opdjax teach experiments/ropd_math.py --data.source dapo17k.jsonl --data.references
    references/dapo17k.jsonl opdjax train experiments/ropd_math.py --data.source dapo17k.jsonl
    --data.references references/dapo17k.jsonl \
        --evaluation.source aime24.jsonl --workdir runs/ropd_math --api.max-dollars 500

One model is teacher, rubricator and verifier, as in the paper; a local judge is a matter of
--rubricator.base-url and --rubricator.model, and the same of --verifier (the paper's white-box
runs: Qwen3-30B-A3B-Instruct-2507 behind vLLM). Set --verifier.input-price and its kin for the
spending cap to mean anything. `--estimator.advantage mean_std --estimator.aggregation
sequence_mean_token_mean
--estimator.dual-clip 0` is the paper's own wording (ROPD_PAPER in opdjax.config).

Data: JSON lines with `prompt` and, for the evaluation, `answer`; the paper trains on DAPO-Math-17K,
one epoch of 531 steps. The grader needs `pip install 'opdjax[eval,judge]'`.

Hardware: the paper reports eight A100 of 80 GB; some 34 thousand judge calls a run, each of up to
98 thousand tokens. Expected score by the paper, 16 samples at T = 1 and top-p 0.95 on AIME24: 65.02
from 24.17 (teacher 80.83, scalar judge 62.50: recipe tjudge). Never run here. Deviations: one
update of 256 rollouts a step, where the release makes four of 64; no importance weight between
sampler and trainer, which here are one set of kernels; evaluation answers of 8,192 tokens, the
paper's of 32,768; references are drawn at temperature 1, since four at temperature 0 would be one.
"""

from opdjax.config import (
    ROPD_CODE,
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

JUDGE = EndpointConfig(
    "https://api.openai.com/v1",
    "gpt-5.2-chat-latest",
    api_key_env="OPENAI_API_KEY",
    reasoning_effort="high",
    max_tokens_field="max_completion_tokens",
    requests_per_minute=1920,
    tokens_per_minute=6_000_000,
)


def role(**fields) -> EndpointConfig:
    """The same model with limits of its own."""
    return EndpointConfig(**{**vars(JUDGE), **fields})


def get_config() -> Config:
    return Config(
        student=ModelConfig("Qwen/Qwen3-4B"),
        data=DataConfig(
            source="dapo17k.jsonl",
            prompt_format="{prompt}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
            enable_thinking=False,
            max_prompt_length=2048,
            references="references/dapo17k.jsonl",
        ),
        sampling=SamplingConfig(num_generations=8, max_completion_length=8192),
        estimator=ROPD_CODE,
        rubricator=role(max_tokens=8192, timeout=120.0),
        verifier=role(max_tokens=4096, timeout=60.0),
        teacher_api=role(max_tokens=8192, timeout=480.0, reasoning_effort=None, temperature=1.0),
        teach=TeachConfig(num_answers=4),
        optimizer=OptimizerConfig(
            learning_rate=1e-6, schedule="constant", weight_decay=0.01, max_grad_norm=1.0
        ),
        train=TrainConfig(
            num_steps=531, prompts_per_step=32, gradient_accumulation_steps=32, remat="layer"
        ),
        evaluation=EvaluationConfig(
            source="aime24.jsonl",
            grader="boxed",
            num_prompts=30,
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
