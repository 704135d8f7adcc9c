"""Low-rank adapters."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from opdjax.config.validation import require, require_types

LoraTarget = Literal["q", "k", "v", "o", "gate", "up", "down"]  # the kernels of a layer


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside the student's kernels: they alone are trained, and they alone are in
    the checkpoints.
    """

    rank: int = 0  # of every adapter; 0: none, all parameters are trained
    alpha: float = 16.0  # an adapter's product is scaled by alpha / rank
    targets: tuple[LoraTarget, ...] = get_args(
        LoraTarget
    )  # kernels that get one: of the attention q, k, v, o, of the MLP gate, up, down

    def __post_init__(self):
        require_types(self, "lora.")
        require(self.rank >= 0, "lora.rank", self.rank, "0 (off) or more")
        require(self.alpha > 0, "lora.alpha", self.alpha, "more than 0")
        is_set = 0 < len(self.targets) == len(set(self.targets))
        require(
            is_set,
            "lora.targets",
            self.targets,
            f"one or more of {', '.join(get_args(LoraTarget))}, each once",
        )
        for name in ("alpha", "targets") if self.rank == 0 else ():
            default = LoraConfig.__dataclass_fields__[name].default
            require(
                getattr(self, name) == default,
                f"lora.{name}",
                getattr(self, name),
                f"{default} where lora.rank is 0: no adapters",
            )

    @property
    def scale(self) -> float:
        """What an adapter's product is scaled by; 1 where there are none."""
        return self.alpha / self.rank if self.rank else 1.0
