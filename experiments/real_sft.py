"""Cross-entropy on text that the teacher samples, on the pretrained pair.

Paper: "Sequence-Level Knowledge Distillation", arXiv 1606.07947. Everything but the estimator and
the completions is as in real_vopd.py.

    opdjax train experiments/real_sft.py --workdir runs/real_sft

Hardware: two CPU cores and 8 GiB of memory.
"""

from dataclasses import replace

from opdjax.config import Config, EstimatorConfig
from opdjax.config.experiments import config_beside


def get_config() -> Config:
    base = config_beside(__file__, "real_vopd.py")
    sampling = replace(base.sampling, completions_from="teacher")
    return replace(base, estimator=EstimatorConfig("sft"), sampling=sampling)
