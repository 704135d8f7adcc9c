"""ROPD at the scale of its paper: Qwen3-4B on competition mathematics from a text-only teacher.

Paper: "Rubric-based On-policy Distillation", arXiv 2605.07396, table 1, non-thinking. Where paper
and release differ, the settings are the release's: 32 prompts x 8 rollouts a step, four references,
4 to 12 criteria, rewards minus their group mean, token mean, clip 0.2 / 0.28 and dual clip 3, no
KL, AdamW at 1e-6 with weight decay 0.01, clip 1, answers of up to 8,192 tokens at temperature 1.

    export OPENAI_API_KEY=...
    opdjax references experiments/ropd_math.py
    opdjax train experiments/ropd_math.py --workdir runs/ropd_math --api.max-dollars 500

As in the paper, one model is teacher, rubricator and verifier. --api.base-url, --rubricator.model
and --verifier.model select a local judge; the paper's white-box runs use
Qwen3-30B-A3B-Instruct-2507 behind vLLM. The spending cap needs prices: --api.prices
gpt-5.2-chat-latest=INPUT/OUTPUT, in dollars per million tokens. The paper's own wording of the loss
is ROPD_PAPER in opdjax.config: `--estimator.advantage mean_std --estimator.aggregation
sequence_mean_token_mean --estimator.dual-clip 0`.

Data: DAPO-Math-17k, one epoch of 531 steps, and AIME24, from the hub (`pip install
'opdjax[data,eval,judge]'`); `--data.source preset:dapo_math_17k=FILE --evaluation.source
suite:aime24=FILE` name copies. `opdjax suites runs/ropd_math --output DIR --protocol ropd`
evaluates on all benchmarks of the paper.

Hardware: the paper reports eight A100 of 80 GB; a run makes some 34 thousand judge calls of up to
98 thousand tokens each. Expected score from the paper, 16 samples at T = 1 and top-p 0.95 on
AIME24: 65.02 from 24.17 (teacher 80.83; scalar judge, recipe tjudge, 62.50). Never run here.
Deviations: one update of 256 rollouts a step, the release makes four of 64; no importance weight
between sampler and trainer, which use the same kernels here; evaluation answers of 8,192 tokens,
the paper's of 32,768; references are sampled at temperature 1, because four at temperature 0 would
be identical.
"""

from opdjax.config import (
    ROPD_CODE,
    ApiConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    JudgeConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TeachConfig,
    TrainConfig,
)

BOXED = "{prompt}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
JUDGE = JudgeConfig("gpt-5.2-chat-latest", reasoning_effort="high")


def get_config() -> Config:
    return Config(
        student=ModelConfig("Qwen/Qwen3-4B"),
        data=DataConfig(
            source="preset:dapo_math_17k",
            prompt_format=BOXED,
            format="no_thinking",
            max_prompt_length=2048,
            references="references/dapo17k.jsonl",
        ),
        sampling=SamplingConfig(num_generations=8, max_completion_length=8192, slots=64),
        estimator=ROPD_CODE,
        rubricator=JUDGE,
        verifier=JUDGE,
        teach=TeachConfig(
            num_answers=4, temperature=1.0, max_completion_length=8192, model=JUDGE.model
        ),
        api=ApiConfig(
            "https://api.openai.com/v1",
            "OPENAI_API_KEY",
            timeout=480.0,
            per_minute=(1920, 6_000_000),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-6, schedule="constant", weight_decay=0.01),
        train=TrainConfig(
            num_steps=531, prompts_per_step=32, gradient_accumulation_steps=32, remat="layer"
        ),
        evaluation=EvaluationConfig(
            source="suite:aime24",
            grader="boxed",
            num_prompts=30,
            num_samples=16,
            top_p=0.95,
            max_completion_length=8192,
        ),
        checkpoint=CheckpointConfig(every=50),
        log=LogConfig(samples_every=50),
        seed=42,
    )
