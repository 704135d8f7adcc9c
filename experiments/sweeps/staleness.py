"""The effect of stale rollouts on each estimator, on the built-in mini pair: age, correction,
sampled or exact, direction.

    opdjax sweep experiments/sweeps/staleness.py --workdir runs/staleness --jobs 2
    opdjax table runs/staleness

Papers: AsyncOPD, arXiv 2606.24143 (forward KL tolerates stale rollouts, reverse KL does not); NPD,
arXiv 2605.05940. Every update trains on 64 answers that the weights of exactly 0, 8 or 32 updates
earlier sampled (the first updates: the initial weights). All runs have one learning rate without
decay, so the student keeps moving. A sampled-token reward is stale in the action and in its
context, an exact divergence only in the context. `npd` with kd_weight 1 is an exact divergence on
the ten ids that the teacher's stored answer holds; with both directions it separates the effect of
the direction from that of sampling. At lag 0 the ratio is 1, so corrections run from lag 8.
Hardware: two CPU cores, 57 minutes of runs.
"""

from dataclasses import replace

from opdjax.config import (
    EstimatorConfig,
    EvaluationConfig,
    LogConfig,
    NearPolicyConfig,
    OptimizerConfig,
    TrainConfig,
)
from opdjax.config.experiments import config_beside
from opdjax.config.grid import SweepPoint, chain, points, product, seeds, vary

CACHED = EstimatorConfig("npd", kd_weight=1.0, divergence="forward")
PLAIN = {
    "opd": EstimatorConfig("opd"),
    "vopd": EstimatorConfig("vopd", baseline="full"),
    "reverse": EstimatorConfig("full_kl", divergence="reverse"),
    "forward": EstimatorConfig("full_kl", divergence="forward"),
    "cached_reverse": replace(CACHED, divergence="reverse", renormalize="both"),
    "cached_forward": CACHED,
}
CORRECTED = {
    "opd_token_truncate": replace(PLAIN["opd"], importance="token_truncate"),
    "opd_sequence_mask": replace(PLAIN["opd"], importance="sequence_mask"),
    "vopd_token_truncate": replace(PLAIN["vopd"], importance="token_truncate"),
    "reverse_prefix": replace(PLAIN["reverse"], importance="prefix_truncate"),
}
LAGS = (0, 8, 32)
RATE = 3e-4
NUM_SEEDS = 3


def lagging(estimators: dict[str, EstimatorConfig], lags: tuple[int, ...]):
    """Each estimator on rollouts of each age, in paired seeds."""
    return product(
        vary("estimator", estimators), vary("near_policy.max_staleness", lags), seeds(NUM_SEEDS)
    )


def get_sweep() -> list[SweepPoint]:
    base = replace(
        config_beside(__file__, "../mini_vopd.py"),
        near_policy=NearPolicyConfig("continuous"),
        optimizer=OptimizerConfig(learning_rate=RATE, schedule="constant", warmup_steps=5, b2=0.98),
        train=TrainConfig(num_steps=100, prompts_per_step=64),
        evaluation=EvaluationConfig(num_prompts=256, max_completion_length=24),
        log=LogConfig(samples_every=0),
    )
    made = points(base, chain(lagging(PLAIN, LAGS), lagging(CORRECTED, LAGS[1:])))
    return sorted(made, key=lambda point: point.config.seed)
