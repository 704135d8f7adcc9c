"""The exact divergence at every sampled context, on the built-in mini pair.

It has no variance from sampled actions, so it marks what a sampled-token estimator can reach.
Paper: GKD, "On-Policy Distillation of Language Models", arXiv 2306.13649. Everything but the
estimator is as in mini_vopd.py.

    opdjax train experiments/mini_full_kl.py --workdir runs/mini_full_kl

Hardware: two CPU cores, about two minutes. Expected on 512 test problems: avg@8 0.409 -> 0.601,
greedy 0.543 -> 0.967.
"""

from dataclasses import replace

from opdjax.config import Config, EstimatorConfig
from opdjax.config.experiments import config_beside


def get_config() -> Config:
    base = config_beside(__file__, "mini_vopd.py")
    return replace(base, estimator=EstimatorConfig("full_kl", divergence="reverse"))
