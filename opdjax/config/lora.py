"""Low-rank adapters."""

import dataclasses
from typing import Annotated, Literal, get_args

from opdjax.config.validation import Section

LoraTarget = Literal["q", "k", "v", "o", "gate", "up", "down"]  # the kernels of a layer


@dataclasses.dataclass(frozen=True)
class LoraConfig(Section):
    """Low-rank adapters of the student: only they are trained and saved in checkpoints."""

    # Rank of every adapter; 0: no adapters, all parameters are trained.
    rank: Annotated[int, "0 (off) or more"] = 0
    # An adapter's product is multiplied by alpha / rank.
    alpha: Annotated[float, "more than 0"] = 16.0
    # Kernels with an adapter: q, k, v, o of the attention; gate, up, down of the MLP.
    targets: tuple[LoraTarget, ...] = get_args(LoraTarget)

    def __post_init__(self):
        super().__post_init__()
        is_set = 0 < len(self.targets) == len(set(self.targets))
        expected = f"one or more of {', '.join(get_args(LoraTarget))}, each once"
        self.require(is_set, "targets", expected)
        for name in ("alpha", "targets") if self.rank == 0 else ():
            self.require_default(name, "where lora.rank is 0: no adapters")

    @property
    def scale(self) -> float:
        """Factor of an adapter's product; 1 without adapters."""
        return self.alpha / self.rank if self.rank else 1.0
