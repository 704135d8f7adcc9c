"""The optimizer."""

from __future__ import annotations

import dataclasses
from typing import Literal

from opdjax.config.validation import require, require_types


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    learning_rate: float = 1e-5  # the peak
    schedule: Literal["constant", "linear", "cosine"] = (
        "cosine"  # after the warm-up, down to 0 at the last step
    )
    warmup_steps: int = 0  # rising linearly from 0
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # global norm that gradients are clipped to; 0: no clipping

    def __post_init__(self):
        require_types(self, "optimizer.")
        require(
            self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "more than 0"
        )
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "0 or more")
        require(
            0 <= self.b1 < 1 and 0 <= self.b2 < 1,
            "optimizer.b1, b2",
            (self.b1, self.b2),
            "each at least 0 and less than 1",
        )
        require(self.epsilon > 0, "optimizer.epsilon", self.epsilon, "more than 0")
        require(
            self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 (off) or more"
        )
        require(
            self.max_grad_norm >= 0,
            "optimizer.max_grad_norm",
            self.max_grad_norm,
            "0 (off) or more",
        )
