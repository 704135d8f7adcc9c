"""KL(student || teacher) on the student's top five ids and one bucket for all others, mini pair.

Paper: the top-k row of arXiv 2605.07865, which renormalises instead. The bucket makes it a true KL
between coarser distributions. Everything but the estimator is as in mini_vopd.py.

    opdjax train experiments/mini_topk_kl.py --workdir runs/mini_topk_kl

Hardware: two CPU cores, about two minutes. Expected on 512 test problems: avg@8 0.409 -> 0.603,
greedy 0.543 -> 0.973.
"""

from dataclasses import replace

from opdjax.config import Config, EstimatorConfig
from opdjax.config.experiments import config_beside


def get_config() -> Config:
    base = config_beside(__file__, "mini_vopd.py")
    options = {"support": "student", "support_top_k": 5, "renormalize": "none", "outside": "tail"}
    return replace(base, estimator=EstimatorConfig("topk_kl", **options))
