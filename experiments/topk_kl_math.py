"""KL(student || teacher), renormalised on the student's top 100 ids, at the scale of vOPD's paper.

Paper: the row "OPD top-k" of "KL for a KL", arXiv 2605.07865. The estimate is biased: it ignores
the student's mass outside these ids. `--estimator.renormalize none --estimator.outside tail`
removes the bias. Everything but the estimator is as in vopd_math.py, whose docstring has the
settings, the data and the deviations.

    opdjax train experiments/topk_kl_math.py --workdir runs/topk_kl_math

Hardware: the paper reports one H200 or A100 per run, 2 to 6 hours. Expected from the paper: about
0.4 points over OPD on the average of four benchmarks (vOPD: 3.2 over it). Not run here yet.
"""

from dataclasses import replace

from opdjax.config import Config, EstimatorConfig
from opdjax.config.experiments import config_beside


def get_config() -> Config:
    base = config_beside(__file__, "vopd_math.py")
    options = {"support": "student", "support_top_k": 100, "renormalize": "both"}
    return replace(base, estimator=EstimatorConfig("topk_kl", **options))
