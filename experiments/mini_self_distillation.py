"""Self-distillation on the built-in mini pair: the teacher is the student itself, whose prompt also shows the worked answer.

Papers: OPSD, "Self-Distilled Reasoner", arXiv 2601.18734, and SDFT: no larger teacher, only privileged context.

    opdjax train experiments/mini_self_distillation.py --workdir runs/mini_self_distillation
    opdjax train experiments/mini_self_distillation.py --workdir runs/mini_self_frozen --teacher.path @mini_student

The second takes the frozen start for a teacher. Two CPU cores, about half a minute each. It shows the setting, and ruins
the student: the mini student was never trained to read an answer in its prompt and answers nothing right when it sees one (KL
6.1 at the first step). `opdjax doctor` says so before (teacher_is_better). Measured on 512 test problems: avg@8 0.409 -> 0.000
with its own current weights, 0.409 -> 0.013 with the frozen ones; greedy 0.543 -> 0.000 and 0.012.

After 100 steps of `sft` on prompts of the form that the teacher sees (see the ledger) the two views agree better (KL 0.42), and
still the one with the answer is right no more often. Its frozen teacher then takes greedy answers from 0.303 to 0.617 at a
learning rate of 1e-4 and leaves avg@8 where it was (0.195 -> 0.192). The moving one drifts with its student, as nothing
holds it: greedy 0.303 -> 0.223 at 3e-5, and answers of two tokens at 3e-4.
"""

from opdjax.config import (
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        teacher=ModelConfig("@student"),
        data=DataConfig(source="arithmetic:train", max_prompt_length=64, teacher_prompt_format="{reference}\n{prompt}"),
        sampling=SamplingConfig(num_generations=1, max_completion_length=24),
        estimator=EstimatorConfig(recipe="full_kl", divergence="reverse", aggregation="token_mean"),
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="cosine", warmup_steps=5, b2=0.98, max_grad_norm=1.0),
        train=TrainConfig(num_steps=100, prompts_per_step=64),
        evaluation=EvaluationConfig(num_prompts=512, num_samples=8, max_completion_length=24),
        log=LogConfig(samples_every=50),
    )
