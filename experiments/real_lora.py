"""vOPD on the pretrained pair with low-rank adapters of rank 64 on all kernels.

Paper: "KL for a KL", arXiv 2605.07865, which trains adapters of this rank. Everything but the
adapters and the rate is as in real_vopd.py.

    opdjax train experiments/real_lora.py --workdir runs/real_lora

Hardware: two CPU cores and 6 GiB of memory.
"""

from dataclasses import replace

from opdjax.config import Config, LoraConfig
from opdjax.config.experiments import config_beside


def get_config() -> Config:
    base = config_beside(__file__, "real_vopd.py")
    optimizer = replace(base.optimizer, learning_rate=3e-4)
    return replace(base, lora=LoraConfig(rank=64), optimizer=optimizer)
