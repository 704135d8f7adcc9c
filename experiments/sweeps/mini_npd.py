"""The NPD paper's tables on the built-in mini pair: its components one by one, lambda, k, tau,
refreshes, the gap to the teacher.

    opdjax sweep experiments/sweeps/mini_npd.py --workdir runs/mini_npd --jobs 2
    opdjax table runs/mini_npd --paper npd_components
        # also npd_lambda, npd_k, npd_tau, npd_refresh, npd_math, npd_speed

Paper: arXiv 2605.05940. Ten epochs over the same 640 prompts, 100 updates of 64. Arm `npd` is the
paper's setting (lambda 0.9, k 10, tau 0.8, one refresh before the sixth epoch, packed rows of 256
tokens); every other arm changes one setting. The grid has five learning rates for every arm, on
validation prompts with a seed of its own. The comparison uses 3e-4 in every arm, the best for `npd`
and `npd_sft` in results/near_policy.md; a table judges no arm whose rate is not the best of its
grid here. Then four paired seeds. Ours, because the paper's choice was not recovered: IFD as a
ratio of mean negative log-likelihoods, a KL that is not renormalised on the top k, the batch and
the grids of lambda, k and tau. Hardware: two CPU cores, about 30 seconds per run and core.
"""

from dataclasses import replace

from opdjax.config import (
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    NearPolicyConfig,
    TrainConfig,
)
from opdjax.config.experiments import config_beside
from opdjax.config.grid import SweepPoint, arms, points, product, rate_grid, seeds

NPD = config_beside(__file__, "../mini_npd.py")
GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
VALIDATION = {"source": "arithmetic:validation", "every": 0}
FROM_TEACHER = {"sampling.completions_from": "teacher"}


def near(loss: dict | None = None, **changed) -> dict:
    """The paper's setting with some fields of `estimator` and `near_policy` changed."""
    return {
        "estimator": replace(NPD.estimator, **loss or {}),
        "near_policy": replace(NPD.near_policy, **changed),
        "train.pack_length": NPD.train.pack_length,
    }


ARMS = {
    # The paper's components, added one after the other.
    "npd_sft": {"estimator": EstimatorConfig("sft"), **FROM_TEACHER},
    "npd_offline_kd": {"estimator": NPD.estimator, **FROM_TEACHER},
    "npd_rollouts": near(refresh_epochs=(), filter="none"),
    "npd_filter": near(refresh_epochs=()),
    "npd": near(),
    # The same loss on on-policy answers.
    "npd_on_policy": {"estimator": NPD.estimator},
    "npd_lambda_0": near({"kd_weight": 0.0, "support_top_k": None}),
    **{f"npd_lambda_{weight:g}": near({"kd_weight": weight}) for weight in (0.5, 1.0)},
    **{f"npd_k{k}": near({"support_top_k": k}) for k in (1, 5, 50)},
    **{f"npd_tau_{tau:g}": near(ifd_max=tau) for tau in (0.1, 0.2, 0.4)},
    "npd_refresh_2": near(refresh_epochs=(3, 6)),
    "npd_refresh_9": near(refresh_epochs=tuple(range(1, 10))),
}


def get_sweep() -> list[SweepPoint]:
    base = replace(
        NPD,
        data=DataConfig("arithmetic:train[:640]", max_prompt_length=32),
        near_policy=NearPolicyConfig(),
        optimizer=replace(NPD.optimizer, learning_rate=3e-4),
        train=TrainConfig(num_steps=100, prompts_per_step=64),
        evaluation=EvaluationConfig(max_completion_length=24, every=50),
    )
    teacher = config_beside(__file__, "../mini_teacher.py")
    mini = arms({"mini": {}}, "pair")
    return [
        *points(base, rate_grid(product(mini, arms(ARMS)), GRID, VALIDATION, seed=100)),
        *points(base, product(mini, arms(ARMS), seeds(4))),
        *points(teacher, product(mini, arms({"teacher": {}}), seeds(1))),
    ]
