"""Every white-box recipe on the built-in mini pair: a learning rate each from one grid, then paired
seeds.

    opdjax sweep experiments/sweeps/white_box.py --workdir runs/white_box --jobs 2
    python scripts/white_box_study.py runs/white_box        # checks the rates below, writes experiments/results/white_box.*

First the grid: five rates a recipe, validation prompts, a seed of its own. Its best rates stand in
`BEST_RATE`. Then the comparison on test prompts: seeds 0 to 4 (0 to 7 for those in `MORE_SEEDS`) at
the recipe's best rate and at a common one; all recipes see the same prompts in the same order and
draw with the same keys. Smaller and larger batches for three of them. Then, in eight micro-batches
a step so that each run tells signal from noise, the variants of the sampled-token estimator.
Hardware: two CPU cores, 13 seconds a run and core at best, 250 minutes of runs in all beside other
work. Paper: the claims of "KL for a KL: On-Policy Distillation with Control Variate Baseline",
arXiv 2605.07865; results/white_box.md says what was seen.
"""

from opdjax.config import (
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    LogConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.config.grid import SweepPoint, chain, points, product, seeds, vary

ON_POLICY = {
    "opd": EstimatorConfig(recipe="opd"),
    "vopd_k5": EstimatorConfig(recipe="vopd", baseline="student_topk", baseline_top_k=5),
    "vopd_k20": EstimatorConfig(recipe="vopd", baseline="student_topk", baseline_top_k=20),
    "vopd_k100": EstimatorConfig(recipe="vopd", baseline="student_topk", baseline_top_k=100),
    "vopd_full": EstimatorConfig(recipe="vopd", baseline="full"),
    "full_kl_reverse": EstimatorConfig(recipe="full_kl", divergence="reverse"),
    "full_kl_forward": EstimatorConfig(recipe="full_kl", divergence="forward"),
    "full_kl_jsd": EstimatorConfig(recipe="full_kl", divergence="jsd", beta=0.5),
    # k = 5 of 214 ids: at 20 both already hold all but a thousandth of the student's mass.
    "topk_kl_renormalize": EstimatorConfig(
        recipe="topk_kl", support="student", support_top_k=5, renormalize="both"
    ),
    "topk_kl_tail": EstimatorConfig(
        recipe="topk_kl", support="student", support_top_k=5, renormalize="none", outside="tail"
    ),
}
# Variants of the sampled-token estimator, and what they are compared with, in micro-batches: the
# same gradient, and its noise.
VARIANTS = {
    "vopd_optimal": EstimatorConfig(recipe="vopd", baseline="optimal"),
    "vopd_batch_mean": EstimatorConfig(recipe="vopd", baseline="batch_mean"),
    "opd_power": EstimatorConfig(recipe="opd", power_alpha=0.5),
    "opd_floor": EstimatorConfig(recipe="opd", reward_floor=-2.0),
    "opd_3_draws": EstimatorConfig(recipe="opd", extra_draws=3),
    "opd_15_draws": EstimatorConfig(recipe="opd", extra_draws=15),
    "opd_to_go": EstimatorConfig(recipe="opd", discount=1.0),
    "opd_to_go_expected": EstimatorConfig(recipe="opd", discount=1.0, return_to_go="expected"),
}
ANCHORS = ("opd", "vopd_full", "full_kl_reverse")
MICRO_BATCHES = vary("train.gradient_accumulation_steps", (8,))
OFF_POLICY = {"sft": EstimatorConfig(recipe="sft")}  # on text that the teacher samples
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

BASE = Config(
    data=DataConfig(source="arithmetic:train", max_prompt_length=32),
    sampling=SamplingConfig(num_generations=1, max_completion_length=24),
    optimizer=OptimizerConfig(
        learning_rate=COMMON_RATE, schedule="cosine", warmup_steps=5, b2=0.98, max_grad_norm=1.0
    ),
    train=TrainConfig(num_steps=100, prompts_per_step=64),
    evaluation=EvaluationConfig(num_prompts=512, num_samples=8, max_completion_length=24, every=50),
    log=LogConfig(samples_every=50),
)
VALIDATION = vary("evaluation.source", {"validation": "arithmetic:validation"})


def one_recipe(name: str):
    """The recipe, and whose text it reads."""
    if name in OFF_POLICY:
        return product(
            vary("estimator", {name: OFF_POLICY[name]}),
            vary("sampling.completions_from", ("teacher",)),
        )
    return vary("estimator", {name: (ON_POLICY | VARIANTS)[name]})


def at_rate(name: str, rate: float):
    """Paired seeds of one recipe."""
    return product(
        one_recipe(name),
        vary("optimizer.learning_rate", (rate,)),
        seeds(8 if name in MORE_SEEDS else 5),
    )


def grid_of(name: str):
    """The rates from which one recipe's best is chosen."""
    return product(
        one_recipe(name), vary("optimizer.learning_rate", GRID), VALIDATION, seeds(1, first=100)
    )


def get_sweep() -> list[SweepPoint]:
    names = (*ON_POLICY, *OFF_POLICY)
    best = [at_rate(name, BEST_RATE[name]) for name in names]
    common = [at_rate(name, COMMON_RATE) for name in names]
    batches = [
        product(
            one_recipe(name),
            vary("optimizer.learning_rate", (BEST_RATE[name],)),
            seeds(5),
            vary("train.prompts_per_step", (16, 128)),
        )
        for name in OTHER_BATCHES
    ]
    compared = (*ANCHORS, *VARIANTS)
    variants = [grid_of(name) for name in VARIANTS] + [
        at_rate(name, COMMON_RATE) for name in compared
    ]
    variants += [at_rate(name, BEST_RATE[name]) for name in compared]
    whole = chain(*map(grid_of, names), *best, *common, *batches)
    return points(BASE, chain(whole, *(product(each, MICRO_BATCHES) for each in variants)))
