"""The vOPD paper's tables on the built-in mini pair: main comparison, how large k must be, seconds
of a step, gradient norms.

    opdjax sweep experiments/sweeps/mini_vopd.py --workdir runs/mini_vopd --jobs 2
    opdjax table runs/mini_vopd --paper vopd_table1        # vopd_k, vopd_step_time, vopd_gradient_norm

100 updates of 64 prompts, one answer each; every arm at the best of five learning rates on
validation prompts (sweeps/white_box.py); five paired seeds. Of the 214 ids the student's first five
hold nearly all of its mass, so that the divergence on its top k is taken on five and the baseline
on one (which is none) and two as well. Paper: arXiv 2605.07865. Two CPU cores: about 20 seconds a
run and core.
"""

from opdjax.config import (
    MINI_TEACHER,
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    LogConfig,
    OptimizerConfig,
    SamplingConfig,
    TeachConfig,
    TrainConfig,
)
from opdjax.config.grid import SweepPoint, arms, chain, points, product, seeds

RATE = {"opd": 1e-4, "full_kl": 1e-3, "opd_topk": 1e-3}  # of the others 3e-4
ARMS = {
    "opd": EstimatorConfig("opd"),
    "vopd": EstimatorConfig("vopd", baseline="full"),
    **{
        f"vopd_k{k}": EstimatorConfig("vopd", baseline="student_topk", baseline_top_k=k)
        for k in (1, 2, 5, 20, 50, 100)
    },
    "full_kl": EstimatorConfig("full_kl", divergence="reverse"),
    "opd_topk": EstimatorConfig("topk_kl", support="student", support_top_k=5, renormalize="both"),
}

# Its scores before any update are the teacher's; the same run in all twins.
TEACHER = {
    "student.path": MINI_TEACHER,
    "estimator": EstimatorConfig("opd"),
    "data": DataConfig(source="arithmetic:train", max_prompt_length=32),
    "sampling": SamplingConfig(num_generations=1, max_completion_length=24),
    "optimizer": OptimizerConfig(),
    "train": TrainConfig(num_steps=1, prompts_per_step=1),
    "teach": TeachConfig(),
    "evaluation": EvaluationConfig(num_prompts=512, num_samples=8, max_completion_length=24),
    "log": LogConfig(samples_every=0),
}


def get_sweep() -> list[SweepPoint]:
    base = Config(
        data=DataConfig(source="arithmetic:train", max_prompt_length=32),
        sampling=SamplingConfig(num_generations=1, max_completion_length=24),
        optimizer=OptimizerConfig(schedule="cosine", warmup_steps=5, b2=0.98, max_grad_norm=1.0),
        train=TrainConfig(num_steps=100, prompts_per_step=64),
        evaluation=EvaluationConfig(
            num_prompts=512, num_samples=8, max_completion_length=24, every=50
        ),
        log=LogConfig(samples_every=50),
    )
    methods = arms(
        {
            name: {"estimator": e, "optimizer.learning_rate": RATE.get(name, 3e-4)}
            for name, e in ARMS.items()
        }
    )
    runs = chain(product(methods, seeds(5)), product(arms({"teacher": TEACHER}), seeds(1)))
    return points(base, product(arms({"mini": {}}, "pair"), runs))
