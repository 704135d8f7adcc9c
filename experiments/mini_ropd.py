"""ROPD on the mini pair: a judge writes rubrics and grades answers; the teacher provides text only.

Paper: "Rubric-based On-policy Distillation", arXiv 2605.07396, as released: four references,
mean-centred advantages, token mean, clip 0.2 / 0.28. A step has 32 prompts x 8 rollouts and makes
64 judge calls.

    opdjax train experiments/mini_ropd.py --workdir runs/mini_ropd

First the teacher answers 1,600 prompts four times (opdjax references does that alone).

The judge is rule-based and runs in this process on the texts it is sent. Any server with the OpenAI
protocol can replace it: --api.base-url, --rubricator.model and --verifier.model
(scripts/serve_rule_judge.py is such a server).

Hardware: two CPU cores, three minutes. Expected on 512 test problems, three seeds: avg@8 0.409 ->
0.541 ± 0.036, greedy 0.543 -> 0.893.
"""

from opdjax.config import (
    ROPD_CODE,
    RULE_JUDGE,
    Config,
    DataConfig,
    EvaluationConfig,
    JudgeConfig,
    OptimizerConfig,
    SamplingConfig,
    TeachConfig,
    TrainConfig,
)


def get_config() -> Config:
    judge = JudgeConfig(RULE_JUDGE)
    references = "runs/references/arithmetic.jsonl"
    return Config(
        data=DataConfig("arithmetic:train[:1600]", max_prompt_length=32, references=references),
        sampling=SamplingConfig(num_generations=8, max_completion_length=24),
        estimator=ROPD_CODE,
        rubricator=judge,
        verifier=judge,
        teach=TeachConfig(num_answers=4, max_completion_length=24),
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule="constant", b2=0.98),
        train=TrainConfig(num_steps=150, prompts_per_step=32),
        evaluation=EvaluationConfig(max_completion_length=24),
    )
