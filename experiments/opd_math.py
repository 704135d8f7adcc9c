"""Plain sampled-token OPD at the scale of vOPD's paper: Qwen3-1.7B-Base from Qwen3-1.7B.

Paper: the row "OPD" of "KL for a KL", arXiv 2605.07865. Everything but the estimator is as in
vopd_math.py, whose docstring has the settings, the data and the deviations.

    opdjax train experiments/opd_math.py --workdir runs/opd_math

Hardware: the paper reports one H200 or A100 per run, 2 to 6 hours. Expected score from the paper,
8 samples at T = 0.6 on MATH-500: 58.7. Not run here yet.
"""

from dataclasses import replace

from opdjax.config import Config, EstimatorConfig
from opdjax.config.experiments import config_beside


def get_config() -> Config:
    base = config_beside(__file__, "vopd_math.py")
    return replace(base, estimator=EstimatorConfig("opd"))
