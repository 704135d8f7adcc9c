"""ROPD on the mini pair: rubrics written and verified by a judge, the teacher known by its text
alone.

Paper: Rubric-based On-policy Distillation (arXiv 2605.07396), as released: m = 4 references,
mean-centred advantages, token mean, clip 0.2 / 0.28. 32 prompts x 8 rollouts a step, 64 calls of
the judge.

    opdjax teach experiments/mini_ropd.py                                   # the teacher answers 1,600 prompts four times
    opdjax train experiments/mini_ropd.py --workdir runs/mini_ropd

The judge goes by rules and works on the texts it is sent, in this process; any server with the
OpenAI protocol takes its place by
--rubricator.base-url, --rubricator.model, and the same of --verifier (scripts/serve_rule_judge.py
is one).

Two CPU cores, three minutes. Expected on 512 test problems, three seeds: avg@8 0.409 -> 0.541 ±
0.036, greedy 0.543 -> 0.893.
"""

from opdjax.config import (
    ROPD_CODE,
    RULE_JUDGE,
    Config,
    DataConfig,
    EndpointConfig,
    EvaluationConfig,
    OptimizerConfig,
    SamplingConfig,
    TeachConfig,
    TrainConfig,
)

JUDGE = EndpointConfig(RULE_JUDGE, "rules")


def get_config() -> Config:
    return Config(
        data=DataConfig(
            source="arithmetic:train[:1600]",
            max_prompt_length=32,
            references="runs/references/arithmetic.jsonl",
        ),
        sampling=SamplingConfig(num_generations=8, max_completion_length=24),
        estimator=ROPD_CODE,
        rubricator=JUDGE,
        verifier=JUDGE,
        teach=TeachConfig(num_answers=4, batch_size=400, max_completion_length=24),
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule="constant", b2=0.98),
        train=TrainConfig(num_steps=150, prompts_per_step=32),
        evaluation=EvaluationConfig(max_completion_length=24),
    )
