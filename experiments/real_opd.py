"""Plain sampled-token on-policy distillation on the pretrained pair, the baseline of vOPD.

Paper: "KL for a KL", arXiv 2605.07865. Everything but the estimator is as in real_vopd.py.

    opdjax train experiments/real_opd.py --workdir runs/real_opd

Hardware: two CPU cores and 8 GiB of memory.
"""

from dataclasses import replace

from opdjax.config import Config, EstimatorConfig
from opdjax.config.experiments import config_beside


def get_config() -> Config:
    base = config_beside(__file__, "real_vopd.py")
    return replace(base, estimator=EstimatorConfig("opd"))
