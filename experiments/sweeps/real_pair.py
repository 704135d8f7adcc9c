"""White-box recipes on the pretrained pair: a learning-rate grid per recipe, then paired seeds.

    ./scripts/make_real_pair.sh
    opdjax sweep experiments/sweeps/real_pair.py --workdir runs/real_study --jobs 2
    opdjax table runs/real_study

Paper: the claims of "KL for a KL: On-Policy Distillation with Control Variate Baseline", arXiv
2605.07865, that a vocabulary of 214 ids cannot judge: here it has 49,152. The grid has the same
three rates for every recipe, validation instructions and a seed of its own; its best rates, by the
held-out KL(student || teacher), are `BEST_RATE`. The comparison has test instructions, whose topics
and templates no training prompt has, and seeds 0 to 2. All recipes see the same prompts in the same
order and sample with the same keys, but `npd`, which answers a quarter of the prompts and trains on
each answer several times. Hardware: two CPU cores and 8 GiB of memory for each job.
"""

from dataclasses import replace

from opdjax.config import EstimatorConfig, NearPolicyConfig
from opdjax.config.experiments import config_beside
from opdjax.config.grid import SweepPoint, arms, chain, points, product, rate_grid, seeds, vary

STEPS, PROMPTS, LENGTH = 12, 8, 32


def recipe(name: str, **options) -> dict:
    """An arm that differs from the others in its estimator only."""
    return {"estimator": EstimatorConfig(name, **options)}


def vopd_k(k: int) -> dict:
    """The paper's baseline on the student's top k ids."""
    return recipe("vopd", baseline="student_topk", support_top_k=k)


def kl_k(k: int) -> dict:
    """The paper's exact KL on the student's top k ids, renormalised."""
    return recipe("topk_kl", support="student", support_top_k=k, renormalize="both")


NPD = NearPolicyConfig(
    "refresh", num_epochs=4, refresh_epochs=(2,), filter="ifd", ifd_min=0.0, ifd_max=0.8
)
METHODS = {
    "opd": recipe("opd"),
    **{f"vopd_k{k}": vopd_k(k) for k in (5, 20, 100)},
    "vopd_full": recipe("vopd", baseline="full"),
    "vopd_optimal": recipe("vopd", baseline="optimal"),
    "full_kl": recipe("full_kl", divergence="reverse"),
    **{f"topk_kl_k{k}": kl_k(k) for k in (5, 100)},
    "npd": recipe("npd", kd_weight=0.9, support_top_k=10)
    | {
        "near_policy": NPD,
        "data.source": f"instructions:train[:{STEPS * PROMPTS // 4}]",
        "train.pack_length": 256,
    },
    "sft": recipe("sft") | {"sampling.completions_from": "teacher"},
}
GRID = (3e-5, 1e-4, 3e-4)
BEST_RATE: dict[str, float] = {}  # filled from the grid


def at(name: str, rates: tuple[float, ...]):
    """The arm at each of these rates."""
    return product(arms({name: METHODS[name]}), vary("optimizer.learning_rate", rates))


def get_sweep() -> list[SweepPoint]:
    paper = config_beside(__file__, "../real_vopd.py")
    base = replace(
        paper,
        sampling=replace(paper.sampling, max_completion_length=LENGTH),
        optimizer=replace(paper.optimizer, warmup_steps=2),
        train=replace(paper.train, num_steps=STEPS, prompts_per_step=PROMPTS),
        evaluation=replace(
            paper.evaluation, num_prompts=32, max_completion_length=LENGTH, every=STEPS // 2
        ),
        checkpoint=replace(paper.checkpoint, every=STEPS // 2),
    )
    # The grid is scored before and after, the comparison in the middle as well.
    validation = {"source": "instructions:validation", "every": STEPS}
    grids = [rate_grid(arms({name: METHODS[name]}), GRID, validation, seed=100) for name in METHODS]
    compared = [product(at(name, (rate,)), seeds(3)) for name, rate in BEST_RATE.items()]
    return points(base, chain(*grids, *compared))
