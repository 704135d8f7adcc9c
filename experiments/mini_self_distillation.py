"""Self-distillation on the built-in mini pair: the teacher is the student with the worked answer in
its prompt.

Papers: OPSD, "Self-Distilled Reasoner", arXiv 2601.18734, and SDFT. No larger teacher is needed,
only privileged context.

    opdjax train experiments/mini_self_distillation.py --workdir runs/mini_self_distillation
    opdjax train experiments/mini_self_distillation.py --workdir runs/mini_self_frozen \
        --teacher.path @mini_student

In the second command the teacher is the frozen initial student. Hardware: two CPU cores, about half
a minute each. The file shows the setting; here it ruins the student. The mini student was never
trained to read an answer in its prompt, and with one it answers nothing right (KL 6.1 at the first
step). `opdjax doctor` reports this before training (teacher_is_better). Measured on 512 test
problems: avg@8 0.409 -> 0.000 with the current weights as the teacher, 0.409 -> 0.013 with the
frozen ones; greedy 0.543 -> 0.000 and 0.012.

It works from a student that can read the answer. After 250 steps of `sft` at 2e-3 on prompts in the
teacher's form (commands in the ledger), the student with the answer is right on 58 of 64 prompts
and without it on 31. Frozen as the teacher, at 1e-4, it raises avg@8 without the answer from 0.249
to 0.533 (greedy 0.439 -> 0.924). After only 100 such steps at 3e-4 the answer does not help yet (23
against 25 right), and avg@8 stays at 0.19; a teacher with current weights then drifts with its
student, because nothing anchors it.
"""

from opdjax.config import (
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)


def get_config() -> Config:
    with_answer = "{reference}\n{prompt}"
    return Config(
        teacher=ModelConfig("@student"),
        data=DataConfig(
            "arithmetic:train", max_prompt_length=64, teacher_prompt_format=with_answer
        ),
        sampling=SamplingConfig(num_generations=1, max_completion_length=24),
        estimator=EstimatorConfig("full_kl", divergence="reverse"),
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="cosine", warmup_steps=5, b2=0.98),
        train=TrainConfig(num_steps=100, prompts_per_step=64),
        evaluation=EvaluationConfig(num_prompts=512, num_samples=8, max_completion_length=24),
    )
