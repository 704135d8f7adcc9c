"""Cross-entropy on text that the teacher samples, on the built-in mini pair.

This is off-policy sequence-level distillation. Paper: "Sequence-Level Knowledge Distillation",
arXiv 1606.07947. `--sampling.completions_from references` trains on the data's own answers.
Everything but the estimator and the completions is as in mini_vopd.py.

    opdjax train experiments/mini_sft.py --workdir runs/mini_sft

Hardware: two CPU cores, about two minutes. Expected on 512 test problems: avg@8 0.409 -> 0.588,
greedy 0.543 -> 0.967.
"""

from dataclasses import replace

from opdjax.config import Config, EstimatorConfig
from opdjax.config.experiments import config_beside


def get_config() -> Config:
    base = config_beside(__file__, "mini_vopd.py")
    sampling = replace(base.sampling, completions_from="teacher")
    return replace(base, estimator=EstimatorConfig("sft"), sampling=sampling)
