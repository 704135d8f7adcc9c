"""All white-box recipes on the built-in mini pair: a learning-rate grid per recipe, then paired
seeds.

    opdjax sweep experiments/sweeps/white_box.py --workdir runs/white_box --jobs 2
    opdjax table runs/white_box        # the grid too: its best rates are BEST_RATE below

Paper: the claims of "KL for a KL: On-Policy Distillation with Control Variate Baseline", arXiv
2605.07865; results/white_box.md has the verdicts. The grid runs first: five rates per recipe,
validation prompts, its own seed; its best rates are `BEST_RATE`. Then comes the comparison on test
prompts: seeds 0 to 4 (0 to 7 for `MORE_SEEDS`), at each recipe's best rate and at a common one. All
recipes see the same prompts in the same order and sample with the same keys. Three recipes also run
with smaller and larger batches. The variants of the sampled-token estimator run last, with eight
micro-batches a step so that each run separates signal from noise. Hardware: two CPU cores, 13
seconds per run and core at best; 250 minutes of runs in all, on a shared machine.
"""

from dataclasses import replace

from opdjax.config import EstimatorConfig, EvaluationConfig, TrainConfig
from opdjax.config.experiments import config_beside
from opdjax.config.grid import SweepPoint, chain, points, product, seeds, vary

# k = 5 of 214 ids: at k = 20 both variants hold all but a thousandth of the student's mass.
TOP_5 = EstimatorConfig("topk_kl", support="student", support_top_k=5)
ON_POLICY = {
    "opd": EstimatorConfig("opd"),
    **{
        f"vopd_k{k}": EstimatorConfig("vopd", baseline="student_topk", support_top_k=k)
        for k in (5, 20, 100)
    },
    "vopd_full": EstimatorConfig("vopd", baseline="full"),
    "full_kl_reverse": EstimatorConfig("full_kl", divergence="reverse"),
    "full_kl_forward": EstimatorConfig("full_kl", divergence="forward"),
    "full_kl_jsd": EstimatorConfig("full_kl", divergence="jsd", beta=0.5),
    "topk_kl_renormalize": replace(TOP_5, renormalize="both"),
    "topk_kl_tail": replace(TOP_5, renormalize="none", outside="tail"),
}
# Variants of the sampled-token estimator. They and the recipes in ANCHORS run in micro-batches,
# which leave the gradient unchanged and measure its noise.
VARIANTS = {
    "vopd_optimal": EstimatorConfig("vopd", baseline="optimal"),
    "vopd_batch_mean": EstimatorConfig("vopd", baseline="batch_mean"),
    "opd_power": EstimatorConfig("opd", power_alpha=0.5),
    "opd_floor": EstimatorConfig("opd", reward_floor=-2.0),
    "opd_3_draws": EstimatorConfig("opd", extra_draws=3),
    "opd_15_draws": EstimatorConfig("opd", extra_draws=15),
    "opd_to_go": EstimatorConfig("opd", discount=1.0),
    "opd_to_go_expected": EstimatorConfig("opd", discount=1.0, return_to_go="expected"),
}
ANCHORS = ("opd", "vopd_full", "full_kl_reverse")
MICRO_BATCHES = vary("train.gradient_accumulation_steps", (8,))
OFF_POLICY = {"sft": EstimatorConfig("sft")}  # trains on text that the teacher samples
GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
COMMON_RATE = 3e-4
BEST_RATE = {
    "opd": 1e-4,
    "vopd_k5": 3e-4,
    "vopd_k20": 3e-4,
    "vopd_k100": 3e-4,
    "vopd_full": 3e-4,
    "full_kl_reverse": 1e-3,
    "full_kl_forward": 1e-3,
    "full_kl_jsd": 1e-3,
    "topk_kl_renormalize": 1e-3,
    "topk_kl_tail": 1e-3,
    "sft": 3e-4,
    "vopd_optimal": 3e-4,
    "vopd_batch_mean": 3e-4,
    "opd_power": 3e-4,
    "opd_floor": 1e-4,
    "opd_3_draws": 3e-4,
    "opd_15_draws": 1e-3,
    "opd_to_go": 1e-4,
    "opd_to_go_expected": 3e-4,
}
MORE_SEEDS = ("opd", "vopd_full", "vopd_optimal")
OTHER_BATCHES = ("opd", "vopd_full", "full_kl_reverse")

MINI = config_beside(__file__, "../mini_vopd.py")
BASE = replace(
    MINI,
    optimizer=replace(MINI.optimizer, learning_rate=COMMON_RATE),
    train=TrainConfig(num_steps=100, prompts_per_step=64),
    evaluation=EvaluationConfig(max_completion_length=24, every=50),
)
VALIDATION = vary("evaluation.source", {"validation": "arithmetic:validation"})


def one_recipe(name: str):
    """The recipe, and the source of its completions."""
    estimator = vary("estimator", {name: (ON_POLICY | VARIANTS | OFF_POLICY)[name]})
    if name in OFF_POLICY:
        return product(estimator, vary("sampling.completions_from", ("teacher",)))
    return estimator


def at_rate(name: str, rate: float):
    """Paired seeds of one recipe."""
    rates = vary("optimizer.learning_rate", (rate,))
    return product(one_recipe(name), rates, seeds(8 if name in MORE_SEEDS else 5))


def grid_of(name: str):
    """The grid of rates of one recipe."""
    rates = vary("optimizer.learning_rate", GRID)
    return product(one_recipe(name), rates, VALIDATION, seeds(1, first=100))


def other_batches(name: str):
    """One recipe with smaller and larger batches, at its best rate."""
    rates = vary("optimizer.learning_rate", (BEST_RATE[name],))
    return product(one_recipe(name), rates, seeds(5), vary("train.prompts_per_step", (16, 128)))


def get_sweep() -> list[SweepPoint]:
    names, compared = (*ON_POLICY, *OFF_POLICY), (*ANCHORS, *VARIANTS)
    whole = [
        *map(grid_of, names),
        *(at_rate(name, BEST_RATE[name]) for name in names),
        *(at_rate(name, COMMON_RATE) for name in names),
        *map(other_batches, OTHER_BATCHES),
    ]
    variants = [
        *map(grid_of, VARIANTS),
        *(at_rate(name, COMMON_RATE) for name in compared),
        *(at_rate(name, BEST_RATE[name]) for name in compared),
    ]
    return points(BASE, chain(*whole, *(product(each, MICRO_BATCHES) for each in variants)))
