"""NPD on the pretrained pair: epochs over stored, filtered, packed student answers.

Paper: "Near-Policy: Accelerating On-Policy Distillation via Asynchronous Generation and Selective
Packing", arXiv 2605.05940, with its schedule of ten epochs and one refresh, its filter and its
loss. The number of prompts is that of 60 steps of real_vopd.py; everything else is as there.

    opdjax train experiments/real_npd.py --workdir runs/real_npd

Hardware: two CPU cores and 8 GiB of memory.
"""

from dataclasses import replace

from opdjax.config import Config, EstimatorConfig, NearPolicyConfig
from opdjax.config.experiments import config_beside


def get_config() -> Config:
    base = config_beside(__file__, "real_vopd.py")
    near_policy = NearPolicyConfig(
        "refresh", num_epochs=10, refresh_epochs=(5,), filter="ifd", ifd_min=0.0, ifd_max=0.8
    )
    return replace(
        base,
        data=replace(base.data, source="instructions:train[:96]"),
        near_policy=near_policy,
        estimator=EstimatorConfig("npd", kd_weight=0.9, support_top_k=10),
        train=replace(base.train, pack_length=320),
    )
