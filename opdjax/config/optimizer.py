"""The optimizer."""

from __future__ import annotations

import dataclasses
from typing import Literal

from opdjax.config.validation import require_ranges, require_types


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    # Learning rate after the warm-up.
    learning_rate: float = 1e-5
    # Learning rate after the warm-up: constant, or falling to 0 at the last step.
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    # Steps in which the learning rate rises linearly from 0.
    warmup_steps: int = 0
    # Decay rate of Adam's mean of squared gradients.
    b2: float = 0.999
    # Decoupled weight decay; norms and biases are not decayed. 0: off.
    weight_decay: float = 0.0
    # Clip gradients to this global norm; 0: off.
    max_grad_norm: float = 1.0

    def __post_init__(self):
        require_types(self, "optimizer.")
        ranges = {"learning_rate": "more than 0", "warmup_steps": "0 or more"}
        ranges |= {"b2": "at least 0 and less than 1"}
        ranges |= dict.fromkeys(("weight_decay", "max_grad_norm"), "0 (off) or more")
        require_ranges(self, "optimizer.", ranges)
