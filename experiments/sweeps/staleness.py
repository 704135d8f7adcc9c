"""What old rollouts do to each estimator on the built-in mini pair: how old, which correction,
sampled or exact, which direction.

    opdjax sweep experiments/sweeps/staleness.py --workdir runs/staleness --jobs 2
    python scripts/staleness_study.py runs/staleness        # writes experiments/results/staleness.*

Every update takes 64 answers drawn by the weights of exactly 0, 8 or 32 updates before it (of the
first updates: by the start), at one learning rate for all and without decay, so that the student
keeps moving. A sampled-token reward goes stale in the action and in its context, an exact
divergence in the context alone; `npd` with kd_weight 1 is an exact divergence on the ten ids that
the teacher's stored answer holds, in both directions, so that direction and sampling are told
apart. The ratio at lag 0 is 1: corrections are run from lag 8 on. Papers: AsyncOPD, arXiv
2606.24143 (forward KL stands stale rollouts, reverse KL does not); NPD, arXiv 2605.05940.
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

PLAIN = {
    "opd": EstimatorConfig(recipe="opd"),
    "vopd": EstimatorConfig(recipe="vopd", baseline="full"),
    "reverse": EstimatorConfig(recipe="full_kl", divergence="reverse"),
    "forward": EstimatorConfig(recipe="full_kl", divergence="forward"),
    "cached_reverse": EstimatorConfig(
        recipe="npd", kd_weight=1.0, divergence="reverse", renormalize="both"
    ),
    "cached_forward": EstimatorConfig(recipe="npd", kd_weight=1.0, divergence="forward"),
}
CORRECTED = {
    "opd_token_truncate": EstimatorConfig(recipe="opd", importance="token_truncate"),
    "opd_sequence_mask": EstimatorConfig(recipe="opd", importance="sequence_mask"),
    "vopd_token_truncate": EstimatorConfig(
        recipe="vopd", baseline="full", importance="token_truncate"
    ),
    "reverse_prefix": EstimatorConfig(
        recipe="full_kl", divergence="reverse", importance="prefix_truncate"
    ),
}
LAGS = (0, 8, 32)
RATE = 3e-4
NUM_SEEDS = 3

BASE = Config(
    data=DataConfig(source="arithmetic:train", max_prompt_length=32),
    sampling=SamplingConfig(num_generations=1, max_completion_length=24),
    near_policy=NearPolicyConfig(schedule="continuous"),
    optimizer=OptimizerConfig(
        learning_rate=RATE, schedule="constant", warmup_steps=5, b2=0.98, max_grad_norm=1.0
    ),
    train=TrainConfig(num_steps=100, prompts_per_step=64),
    evaluation=EvaluationConfig(num_prompts=256, num_samples=8, max_completion_length=24),
    log=LogConfig(samples_every=0),
)


def lagging(estimators: dict[str, EstimatorConfig], lags: tuple[int, ...]):
    """Each estimator on rollouts of each age, in paired seeds."""
    return product(
        vary("estimator", estimators), vary("near_policy.max_staleness", lags), seeds(NUM_SEEDS)
    )


def get_sweep() -> list[SweepPoint]:
    made = points(BASE, chain(lagging(PLAIN, LAGS), lagging(CORRECTED, LAGS[1:])))
    return sorted(made, key=lambda point: point.config.seed)
