"""Self-distillation on the built-in mini pair: the teacher is the student itself, whose prompt also
shows the worked answer.

Papers: OPSD, "Self-Distilled Reasoner", arXiv 2601.18734, and SDFT: no larger teacher, only
privileged context.

    opdjax train experiments/mini_self_distillation.py --workdir runs/mini_self_distillation
    opdjax train experiments/mini_self_distillation.py --workdir runs/mini_self_frozen
    --teacher.path @mini_student

The second takes the frozen start for a teacher. Two CPU cores, about half a minute each. It shows
the setting, and ruins the student: the mini student was never trained to read an answer in its
prompt and answers nothing right when it sees one (KL
6.1 at the first step). `opdjax doctor` says so before (teacher_is_better). Measured on 512 test
problems: avg@8 0.409 -> 0.000 with its own current weights, 0.409 -> 0.013 with the frozen ones;
greedy 0.543 -> 0.000 and 0.012.

From a student that reads it, it works: after 250 steps of `sft` at 2e-3 on prompts of the form that
the teacher sees (the ledger has the commands) the view with the answer is right on 58 of 64
prompts, the bare one on 31, and the frozen teacher at 1e-4 takes the bare one from 0.249 to 0.533
avg@8 (greedy 0.439 -> 0.924). After 100 such steps at 3e-4 it is not ahead yet (23 against 25), and
avg@8 stays at 0.19; a moving teacher then drifts with its student, as nothing holds it.
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
        data=DataConfig(
            source="arithmetic:train",
            max_prompt_length=64,
            teacher_prompt_format="{reference}\n{prompt}",
        ),
        sampling=SamplingConfig(num_generations=1, max_completion_length=24),
        estimator=EstimatorConfig(recipe="full_kl", divergence="reverse", aggregation="token_mean"),
        optimizer=OptimizerConfig(
            learning_rate=3e-4, schedule="cosine", warmup_steps=5, b2=0.98, max_grad_norm=1.0
        ),
        train=TrainConfig(num_steps=100, prompts_per_step=64),
        evaluation=EvaluationConfig(num_prompts=512, num_samples=8, max_completion_length=24),
        log=LogConfig(samples_every=50),
    )
