"""The exact KL(student || teacher) at every sampled context, at the scale of vOPD's paper.

Paper: the row "OPD full-V" of "KL for a KL", arXiv 2605.07865. Everything but the estimator is as
in vopd_math.py, whose docstring has the settings, the data and the deviations. One more deviation:
the paper's code averages this loss by sequence and sums over 64 micro-batches; here it is the token
mean.

    opdjax train experiments/full_kl_math.py --workdir runs/full_kl_math

Hardware: the paper reports one H200 or A100 per run, 2 to 6 hours. Expected from the paper: the
accuracy of vOPD (64.9 on MATH-500, 8 samples at T = 0.6) at 2.4 times its step time. Not run here
yet.
"""

from dataclasses import replace

from opdjax.config import Config, EstimatorConfig
from opdjax.config.experiments import config_beside


def get_config() -> Config:
    base = config_beside(__file__, "vopd_math.py")
    return replace(base, estimator=EstimatorConfig("full_kl", divergence="reverse"))
