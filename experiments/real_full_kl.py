"""The exact KL(student || teacher) over the whole vocabulary on the pretrained pair.

Paper: "KL for a KL", arXiv 2605.07865 (its full-vocabulary row). Everything but the estimator is as
in real_vopd.py.

    opdjax train experiments/real_full_kl.py --workdir runs/real_full_kl

Hardware: two CPU cores and 8 GiB of memory.
"""

from dataclasses import replace

from opdjax.config import Config, EstimatorConfig
from opdjax.config.experiments import config_beside


def get_config() -> Config:
    base = config_beside(__file__, "real_vopd.py")
    return replace(base, estimator=EstimatorConfig("full_kl"))
