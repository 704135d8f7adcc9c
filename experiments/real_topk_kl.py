"""KL(student || teacher) on the student's top 100 ids and one bucket for all others, real pair.

Paper: the top-k row of arXiv 2605.07865, which renormalises instead. Everything but the estimator
is as in real_vopd.py.

    opdjax train experiments/real_topk_kl.py --workdir runs/real_topk_kl

Hardware: two CPU cores and 8 GiB of memory.
"""

from dataclasses import replace

from opdjax.config import Config, EstimatorConfig
from opdjax.config.experiments import config_beside


def get_config() -> Config:
    base = config_beside(__file__, "real_vopd.py")
    options = {"support": "student", "support_top_k": 100}
    estimator = EstimatorConfig("topk_kl", **options, renormalize="none", outside="tail")
    return replace(base, estimator=estimator)
