"""Near-policy distillation and its baselines on the built-in mini pair: a learning-rate grid per
method, then paired seeds.

    opdjax sweep experiments/sweeps/near_policy.py --workdir runs/near_policy --jobs 2
    opdjax table runs/near_policy        # the grid too: its best rates are BEST_RATE below

Paper: arXiv 2605.05940; results/near_policy.md has the verdicts on its claims. Every method takes
100 updates of 64 of the same 640 prompts, ten epochs. Methods in `ON_POLICY` train on new answers
at every update, by the student or (`sft`) by the teacher. Methods in `NEAR_POLICY` train on answers
sampled twice in all, before the first and before the sixth epoch. The grid runs first, on
validation prompts with its own seed; its best rates are `BEST_RATE`. Then come the comparison on
test prompts and the ablations of NPD, one setting each, at the rate of NPD as in the paper.
Hardware: two CPU cores, 63 minutes of runs.
"""

from dataclasses import replace

from opdjax.config import (
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    LogConfig,
    NearPolicyConfig,
    TrainConfig,
)
from opdjax.config.experiments import config_beside
from opdjax.config.grid import SweepPoint, chain, points, product, seeds, vary

MINI = config_beside(__file__, "../mini_npd.py")
PACK_LENGTH = 256
NPD, PAPER = MINI.estimator, MINI.near_policy
NO_FILTER = replace(PAPER, filter="none")


def near(
    near_policy: NearPolicyConfig = PAPER,
    estimator: EstimatorConfig = NPD,
    pack_length: int | None = PACK_LENGTH,
) -> dict:
    """The fields that a variant of NPD sets."""
    return {"estimator": estimator, "near_policy": near_policy, "train.pack_length": pack_length}


ON_POLICY = {
    "sft": {"estimator": EstimatorConfig("sft"), "sampling.completions_from": "teacher"},
    "opd": {"estimator": EstimatorConfig("opd")},
    "vopd": {"estimator": EstimatorConfig("vopd", baseline="full")},
    # The divergence of NPD on on-policy answers isolates the cost of stale answers.
    "npd_fresh": {"estimator": NPD},
}
NEAR_POLICY = {
    "npd": near(),
    "npd_no_filter": near(NO_FILTER),
    "npd_random": near(replace(PAPER, filter="random")),
    "npd_no_kd": near(estimator=EstimatorConfig("npd", kd_weight=0.0)),
}
EVERY_EPOCH = tuple(range(1, 10))
# One setting changed at a time, at the rate of `npd`.
ABLATIONS = {
    "npd_no_packing": near(pack_length=None),
    "npd_no_refresh": near(replace(PAPER, refresh_epochs=())),
    "npd_9_refreshes": near(replace(PAPER, refresh_epochs=EVERY_EPOCH)),
    # The paper's upper bound drops nothing here. This one drops a tenth, without the lower bound.
    "npd_upper_only": near(replace(PAPER, ifd_min=None, ifd_quantile=0.9)),
}
# The same changes to NPD without its filter, at the rate of `npd_no_filter`.
NO_FILTER_ABLATIONS = {
    "no_filter_no_packing": near(NO_FILTER, pack_length=None),
    "no_filter_no_refresh": near(replace(NO_FILTER, refresh_epochs=())),
    "no_filter_9_refreshes": near(replace(NO_FILTER, refresh_epochs=EVERY_EPOCH)),
}
METHODS = ON_POLICY | NEAR_POLICY | ABLATIONS | NO_FILTER_ABLATIONS

# A sampled-token reward has a lower best rate than an exact divergence (sweeps/white_box.py).
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

BASE = replace(
    MINI,
    data=DataConfig("arithmetic:train[:640]", max_prompt_length=32),
    near_policy=NearPolicyConfig(),
    optimizer=replace(MINI.optimizer, learning_rate=3e-4),
    train=TrainConfig(num_steps=100, prompts_per_step=64),
    evaluation=EvaluationConfig(num_prompts=256, max_completion_length=24, every=25),
    log=LogConfig(samples_every=0),
)
VALIDATION = product(
    vary("evaluation.source", {"validation": "arithmetic:validation"}),
    vary("evaluation.every", (0,)),
    vary("evaluation.num_prompts", (512,)),
)


def method(name: str):
    """All fields that a method sets; the values of whole sections carry the method's name."""
    return product(
        *(
            vary(field, {name: value} if "." not in field else (value,))
            for field, value in METHODS[name].items()
        )
    )


def rate_of(name: str) -> float:
    """The method's best rate; an ablation has the rate of the method that it varies."""
    varied = "npd_no_filter" if name in NO_FILTER_ABLATIONS else "npd"
    return BEST_RATE.get(name) or BEST_RATE[varied]


def at_its_rate(name: str):
    """Paired seeds of one method."""
    rates = vary("optimizer.learning_rate", (rate_of(name),))
    return product(method(name), rates, seeds(NUM_SEEDS))


def grid_of(name: str):
    """The grid of rates of one method."""
    rates = vary(
        "optimizer.learning_rate", SAMPLED_GRID if name in ("sft", "opd", "vopd") else GRID
    )
    return product(method(name), rates, VALIDATION, seeds(1, first=100))


def get_sweep() -> list[SweepPoint]:
    grid = [grid_of(name) for name in ON_POLICY | NEAR_POLICY]
    return points(BASE, chain(*grid, *map(at_its_rate, METHODS)))
