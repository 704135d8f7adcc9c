"""The mini teacher as its own student: its scores before the only update are the teacher's scores.

It is the row "teacher" of the papers' tables on the mini pair (sweeps/mini_vopd.py, mini_npd.py and
mini_ropd.py).

    opdjax train experiments/mini_teacher.py --workdir runs/mini_teacher

Hardware: two CPU cores, about half a minute.
"""

from opdjax.config import (
    MINI_TEACHER,
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    LogConfig,
    ModelConfig,
    SamplingConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        student=ModelConfig(MINI_TEACHER),
        data=DataConfig("arithmetic:train", max_prompt_length=32),
        sampling=SamplingConfig(num_generations=1, max_completion_length=24),
        estimator=EstimatorConfig("opd"),
        train=TrainConfig(num_steps=1, prompts_per_step=1),
        evaluation=EvaluationConfig(num_prompts=512, num_samples=8, max_completion_length=24),
        log=LogConfig(samples_every=0),
    )
