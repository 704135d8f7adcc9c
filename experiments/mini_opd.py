"""Plain sampled-token on-policy distillation on the built-in mini pair, the baseline of vOPD.

Paper: "KL for a KL", arXiv 2605.07865. Everything but the estimator is as in mini_vopd.py.

    opdjax train experiments/mini_opd.py --workdir runs/mini_opd

Hardware: two CPU cores, about two minutes. Expected on 512 test problems: avg@8 0.409 -> 0.564,
greedy 0.543 -> 0.934.
"""

from dataclasses import replace

from opdjax.config import Config, EstimatorConfig
from opdjax.config.experiments import config_beside


def get_config() -> Config:
    base = config_beside(__file__, "mini_vopd.py")
    return replace(base, estimator=EstimatorConfig("opd"))
