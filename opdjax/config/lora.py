"""Low-rank adapters."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from opdjax.config.validation import require, require_default, require_ranges, require_types

LoraTarget = Literal["q", "k", "v", "o", "gate", "up", "down"]  # the kernels of a layer


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of the student: only they are trained and saved in checkpoints."""

    # Rank of every adapter; 0: no adapters, all parameters are trained.
    rank: int = 0
    # An adapter's product is multiplied by alpha / rank.
    alpha: float = 16.0
    # Kernels with an adapter: q, k, v, o of the attention; gate, up, down of the MLP.
    targets: tuple[LoraTarget, ...] = get_args(LoraTarget)

    def __post_init__(self):
        require_types(self, "lora.")
        require_ranges(self, "lora.", {"rank": "0 (off) or more", "alpha": "more than 0"})
        is_set = 0 < len(self.targets) == len(set(self.targets))
        expected = f"one or more of {', '.join(get_args(LoraTarget))}, each once"
        require(is_set, "lora.targets", self.targets, expected)
        for name in ("alpha", "targets") if self.rank == 0 else ():
            require_default(self, "lora.", name, "where lora.rank is 0: no adapters")

    @property
    def scale(self) -> float:
        """Factor of an adapter's product; 1 without adapters."""
        return self.alpha / self.rank if self.rank else 1.0
