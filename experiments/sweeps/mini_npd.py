"""The NPD paper's tables on the built-in mini pair: its components one by one, lambda, k, tau,
refreshes, the gap to the teacher.

    opdjax sweep experiments/sweeps/mini_npd.py --workdir runs/mini_npd --jobs 2
    opdjax table runs/mini_npd --paper npd_components      # npd_lambda, npd_k, npd_tau, npd_refresh, npd_math

Ten epochs over the same 640 prompts, 100 updates of 64; arm `npd` is the paper's setting (lambda
0.9, k 10, tau 0.8, one refresh before the sixth epoch, packed rows of 256 tokens), every other arm
changes one thing. All learn at 3e-4, the best of a grid for `npd` and for its unfiltered variant
alike (results/near_policy.md). Four paired seeds. Paper: arXiv 2605.05940. Two CPU cores: about 30
seconds a run and core.
"""

from opdjax.config import (
    MINI_TEACHER,
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    LogConfig,
    NearPolicyConfig,
    OptimizerConfig,
    SamplingConfig,
    TeachConfig,
    TrainConfig,
)
from opdjax.config.grid import SweepPoint, arms, chain, points, product, seeds

LOSS = {"recipe": "npd", "kd_weight": 0.9, "support_top_k": 10}
PAPER = {
    "schedule": "refresh",
    "num_epochs": 10,
    "refresh_epochs": (5,),
    "filter": "ifd",
    "ifd_min": 0.0,
    "ifd_max": 0.8,
}


def ahead(loss: dict = LOSS, **changed) -> dict:
    """The paper's setting with these fields of `near_policy` changed."""
    return {
        "estimator": EstimatorConfig(**loss),
        "near_policy": NearPolicyConfig(**PAPER | changed),
        "train.pack_length": 256,
    }


ARMS = {
    # What the paper adds, one after the other.
    "npd_sft": {"estimator": EstimatorConfig("sft"), "sampling.completions_from": "teacher"},
    "npd_offline_kd": {
        "estimator": EstimatorConfig(**LOSS),
        "sampling.completions_from": "teacher",
    },
    "npd_rollouts": ahead(refresh_epochs=(), filter="none"),
    "npd_filter": ahead(refresh_epochs=()),
    "npd": ahead(),
    # The same loss on answers of the moment.
    "npd_on_policy": {"estimator": EstimatorConfig(**LOSS)},
    "npd_lambda_0": ahead({"recipe": "npd", "kd_weight": 0.0}),
    **{f"npd_lambda_{weight:g}": ahead(LOSS | {"kd_weight": weight}) for weight in (0.5, 1.0)},
    **{f"npd_k{k}": ahead(LOSS | {"support_top_k": k}) for k in (1, 5, 50)},
    **{f"npd_tau_{tau:g}": ahead(ifd_max=tau) for tau in (0.1, 0.2, 0.4)},
    "npd_refresh_2": ahead(refresh_epochs=(3, 6)),
    "npd_refresh_9": ahead(refresh_epochs=tuple(range(1, 10))),
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
        data=DataConfig(source="arithmetic:train[:640]", max_prompt_length=32),
        sampling=SamplingConfig(num_generations=1, max_completion_length=24),
        optimizer=OptimizerConfig(
            learning_rate=3e-4, schedule="cosine", warmup_steps=5, b2=0.98, max_grad_norm=1.0
        ),
        train=TrainConfig(num_steps=100, prompts_per_step=64),
        evaluation=EvaluationConfig(
            num_prompts=512, num_samples=8, max_completion_length=24, every=50
        ),
        log=LogConfig(samples_every=50),
    )
    runs = chain(product(arms(ARMS), seeds(4)), product(arms({"teacher": TEACHER}), seeds(1)))
    return points(base, product(arms({"mini": {}}, "pair"), runs))
