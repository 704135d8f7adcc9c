"""The vOPD paper's tables on the built-in mini pair: main comparison, size of k, seconds per step,
gradient norms.

    opdjax sweep experiments/sweeps/mini_vopd.py --workdir runs/mini_vopd --jobs 2
    opdjax table runs/mini_vopd --paper vopd_table1
        # also vopd_k, vopd_step_time, vopd_gradient_norm

Paper: arXiv 2605.07865. 100 updates of 64 prompts with one answer each. The grid has five learning
rates for every arm, on validation prompts with a seed of its own; `RATE` is the best of that of
sweeps/white_box.py, and of `vopd` for k = 1, 2 and 50, which are not there. A table judges no arm
whose rate is not the best of its grid here. Then five paired seeds. Ours: top k = 5 and 100 and the
renormalised KL as in the paper's release, 8 samples a prompt at temperature 1 and the greedy
answer. The student's top five of 214 ids hold nearly all of its mass, so the top-k divergence uses
k = 5, and the baseline also k = 1 (no baseline) and k = 2. Hardware: two CPU cores, about 20
seconds per run and core.
"""

from dataclasses import replace

from opdjax.config import EstimatorConfig, EvaluationConfig, OptimizerConfig, TrainConfig
from opdjax.config.experiments import config_beside
from opdjax.config.grid import SweepPoint, arms, points, product, rate_grid, seeds

RATE = {"opd": 1e-4, "full_kl": 1e-3, "opd_topk": 1e-3}  # all others: 3e-4
GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
ARMS = {
    "opd": EstimatorConfig("opd"),
    "vopd": EstimatorConfig("vopd", baseline="full"),
    **{
        f"vopd_k{k}": EstimatorConfig("vopd", baseline="student_topk", support_top_k=k)
        for k in (1, 2, 5, 20, 50, 100)
    },
    "full_kl": EstimatorConfig("full_kl", divergence="reverse"),
    "opd_topk": EstimatorConfig("topk_kl", support="student", support_top_k=5, renormalize="both"),
}

VALIDATION = {"source": "arithmetic:validation", "every": 0}


def get_sweep() -> list[SweepPoint]:
    base = replace(
        config_beside(__file__, "../mini_vopd.py"),
        optimizer=OptimizerConfig(schedule="cosine", warmup_steps=5, b2=0.98),
        train=TrainConfig(num_steps=100, prompts_per_step=64),
        evaluation=EvaluationConfig(max_completion_length=24, every=50),
    )
    methods = {name: {"estimator": estimator} for name, estimator in ARMS.items()}
    compared = {
        name: fields | {"optimizer.learning_rate": RATE.get(name, 3e-4)}
        for name, fields in methods.items()
    }
    teacher = config_beside(__file__, "../mini_teacher.py")
    mini = arms({"mini": {}}, "pair")
    return [
        *points(base, rate_grid(product(mini, arms(methods)), GRID, VALIDATION, seed=100)),
        *points(base, product(mini, arms(compared), seeds(5))),
        *points(teacher, product(mini, arms({"teacher": {}}), seeds(1))),
    ]
