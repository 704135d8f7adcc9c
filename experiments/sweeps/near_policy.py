"""Near-policy distillation beside its baselines on the built-in mini pair: a learning rate each
from one grid, then paired seeds.

    opdjax sweep experiments/sweeps/near_policy.py --workdir runs/near_policy --jobs 2
    python scripts/near_policy_study.py runs/near_policy    # checks the rates below, writes experiments/results/near_policy.*

Every method takes 100 updates of 64 of the same 640 prompts, ten epochs. Those of `ON_POLICY` are
answered anew for every update, by the student or (`sft`) by the teacher; those of `NEAR_POLICY`
twice in all, before the first and before the sixth epoch. First the grid: validation prompts, a
seed of its own; its best rates stand in `BEST_RATE`. Then the comparison on test prompts, and one
setting at a time of NPD changed, at the rate of NPD as the paper has it. Paper: arXiv 2605.05940;
results/near_policy.md says what of its claims was seen.
"""

from opdjax.config import (
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    LogConfig,
    NearPolicyConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.config.grid import SweepPoint, chain, points, product, seeds, vary

PACK_LENGTH = 256
NPD = EstimatorConfig(recipe="npd", kd_weight=0.9, support_top_k=10)
NO_FILTER = NearPolicyConfig(schedule="refresh", num_epochs=10, refresh_epochs=(5,))
PAPER = NearPolicyConfig(
    schedule="refresh", num_epochs=10, refresh_epochs=(5,), filter="ifd", ifd_min=0.0, ifd_max=0.8
)


def refreshed(*epochs: int, filter: str = "ifd") -> NearPolicyConfig:
    """All prompts answered anew before these epochs."""
    return NearPolicyConfig(schedule="refresh", num_epochs=10, refresh_epochs=epochs, filter=filter)


def near(
    estimator: EstimatorConfig = NPD,
    near_policy: NearPolicyConfig = PAPER,
    pack_length: int | None = PACK_LENGTH,
) -> dict:
    """What a variant of NPD sets."""
    return {"estimator": estimator, "near_policy": near_policy, "train.pack_length": pack_length}


ON_POLICY = {
    "sft": {"estimator": EstimatorConfig(recipe="sft"), "sampling.completions_from": "teacher"},
    "opd": {"estimator": EstimatorConfig(recipe="opd")},
    "vopd": {"estimator": EstimatorConfig(recipe="vopd", baseline="full")},
    # The same divergence on answers of the moment: what drawing them ahead costs, and nothing else.
    "npd_fresh": {"estimator": NPD},
}
NEAR_POLICY = {
    "npd": near(),
    "npd_no_filter": near(near_policy=NO_FILTER),
    "npd_random": near(near_policy=refreshed(5, filter="random")),
    "npd_no_kd": near(EstimatorConfig(recipe="npd", kd_weight=0.0)),
}
# One setting changed at a time, at the rate of `npd`.
ABLATIONS = {
    "npd_no_packing": near(pack_length=None),
    "npd_no_refresh": near(near_policy=refreshed()),
    "npd_9_refreshes": near(near_policy=refreshed(*range(1, 10))),
    # The paper's upper bound drops nothing here: one that drops a tenth, without the lower one.
    "npd_upper_only": near(
        near_policy=NearPolicyConfig(
            "refresh",
            num_epochs=10,
            refresh_epochs=(5,),
            filter="ifd",
            ifd_min=None,
            ifd_quantile=0.9,
        )
    ),
}
# The same of NPD without its filter, at that one's rate.
NO_FILTER_ABLATIONS = {
    "no_filter_no_packing": near(near_policy=NO_FILTER, pack_length=None),
    "no_filter_no_refresh": near(near_policy=refreshed(filter="none")),
    "no_filter_9_refreshes": near(near_policy=refreshed(*range(1, 10), filter="none")),
}
METHODS = ON_POLICY | NEAR_POLICY | ABLATIONS | NO_FILTER_ABLATIONS

# The best rate of a sampled-token reward lies lower than that of an exact divergence
# (sweeps/white_box.py).
GRID = (3e-4, 1e-3, 3e-3)
SAMPLED_GRID = (1e-4, 3e-4, 1e-3)
BEST_RATE = {
    "sft": 3e-4,
    "opd": 3e-4,
    "vopd": 3e-4,
    "npd_fresh": 1e-3,
    "npd": 3e-4,
    "npd_no_filter": 1e-3,
    "npd_random": 3e-4,
    "npd_no_kd": 3e-4,
}
NUM_SEEDS = 3

BASE = Config(
    data=DataConfig(source="arithmetic:train[:640]", max_prompt_length=32),
    sampling=SamplingConfig(num_generations=1, max_completion_length=24),
    optimizer=OptimizerConfig(
        learning_rate=3e-4, schedule="cosine", warmup_steps=5, b2=0.98, max_grad_norm=1.0
    ),
    train=TrainConfig(num_steps=100, prompts_per_step=64),
    evaluation=EvaluationConfig(num_prompts=256, num_samples=8, max_completion_length=24, every=25),
    log=LogConfig(samples_every=0),
)
VALIDATION = product(
    vary("evaluation.source", {"validation": "arithmetic:validation"}),
    vary("evaluation.every", (0,)),
    vary("evaluation.num_prompts", (512,)),
)


def method(name: str):
    """Everything that a method sets, under its name."""
    return product(
        *(
            vary(field, {name: value} if "." not in field else (value,))
            for field, value in METHODS[name].items()
        )
    )


def rate_of(name: str) -> float:
    """Of a method that has none of its own, that of the one it is a variant of."""
    return (
        BEST_RATE.get(name) or BEST_RATE["npd_no_filter" if name in NO_FILTER_ABLATIONS else "npd"]
    )


def at_its_rate(name: str):
    """Paired seeds of one method."""
    return product(
        method(name), vary("optimizer.learning_rate", (rate_of(name),)), seeds(NUM_SEEDS)
    )


def grid_of(name: str):
    """The rates from which one method's best is chosen."""
    rates = SAMPLED_GRID if name in ("sft", "opd", "vopd") else GRID
    return product(
        method(name), vary("optimizer.learning_rate", rates), VALIDATION, seeds(1, first=100)
    )


def get_sweep() -> list[SweepPoint]:
    grid = [grid_of(name) for name in ON_POLICY | NEAR_POLICY]
    return points(BASE, chain(*grid, *map(at_its_rate, METHODS)))
