"""The training loop."""

from __future__ import annotations

import dataclasses
from typing import Literal

from opdjax.config.validation import require, require_types


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    num_steps: int = 100  # optimizer updates
    prompts_per_step: int = 64
    gradient_accumulation_steps: int = (
        1  # micro-batches a step, of equally many rows; changes memory, never the gradient
    )
    # What the backward pass computes again instead of keeping it. layer: each layer from its input,
    # the least memory for one more forward pass; dots: all but the products with the layers'
    # kernels, which are most of the work
    remat: Literal["none", "dots", "layer"] = "none"
    max_nonfinite_steps: int = 5  # so many skipped steps in a row stop the run
    # Tokens of a row that several rollouts share; None: a row for each. There are as many rows
    # either way; the rollouts fill as few micro-batches of them as they can, and the others cost no
    # time: nothing is saved with a single one. Attention is paid by the square of a row, so that
    # rows much longer than the longest rollout lose what they save.
    pack_length: int | None = None

    def __post_init__(self):
        require_types(self, "train.")
        for name in (
            "num_steps",
            "prompts_per_step",
            "gradient_accumulation_steps",
            "max_nonfinite_steps",
        ):
            require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "at least 1")
        require(
            self.pack_length is None or self.pack_length > 1,
            "train.pack_length",
            self.pack_length,
            "at least 2, or none",
        )
