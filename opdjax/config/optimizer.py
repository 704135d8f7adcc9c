"""The optimizer."""

import dataclasses
from typing import Annotated, Literal

from opdjax.config.validation import Section


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section):
    """AdamW."""

    # Learning rate after the warm-up.
    learning_rate: Annotated[float, "more than 0"] = 1e-5
    # Learning rate after the warm-up: constant, or falling to 0 at the last step.
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    # Steps in which the learning rate rises linearly from 0.
    warmup_steps: Annotated[int, "0 or more"] = 0
    # Decay rate of Adam's mean of squared gradients.
    b2: Annotated[float, "at least 0 and less than 1"] = 0.999
    # Decoupled weight decay; norms and biases are not decayed. 0: off.
    weight_decay: Annotated[float, "0 (off) or more"] = 0.0
    # Clip gradients to this global norm; 0: off.
    max_grad_norm: Annotated[float, "0 (off) or more"] = 1.0
