"""vOPD on the pretrained pair with the baseline on the student's top 20 ids of 49,152.

Paper: "KL for a KL", arXiv 2605.07865. Everything but the estimator is as in real_vopd.py.

    opdjax train experiments/real_vopd_topk.py --workdir runs/real_vopd_topk

Hardware: two CPU cores and 8 GiB of memory.
"""

from dataclasses import replace

from opdjax.config import Config, EstimatorConfig
from opdjax.config.experiments import config_beside


def get_config() -> Config:
    base = config_beside(__file__, "real_vopd.py")
    estimator = EstimatorConfig("vopd", baseline="student_topk", support_top_k=20)
    return replace(base, estimator=estimator)
