"""The training loop."""

import dataclasses
from typing import Annotated, Literal

from opdjax.config.validation import Section


@dataclasses.dataclass(frozen=True)
class TrainConfig(Section):
    """The training loop."""

    # Optimizer updates.
    num_steps: Annotated[int, "at least 1"] = 100
    # Prompts per update.
    prompts_per_step: Annotated[int, "at least 1"] = 64
    # Micro-batches per update, each with the same number of rows. Saves memory and does not change
    # the gradient.
    gradient_accumulation_steps: Annotated[int, "at least 1"] = 1
    # What the backward pass recomputes. none: nothing. layer: each layer from its input, the least
    # memory for one more forward pass. dots: everything but the products with the layers' kernels,
    # which are most of the work.
    remat: Literal["none", "dots", "layer"] = "none"
    # Pack rollouts into rows of this many tokens; None: one rollout per row. Saves time only with
    # gradient accumulation, because empty micro-batches are skipped. Attention cost grows with the
    # square.
    pack_length: Annotated[int | None, "at least 2, or none"] = None
    # Dtype of the forward passes of student and teacher; auto: bfloat16 on TPU and GPU, float32 on
    # CPU.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Attention in training and scoring; the sampler always uses xla. xla runs everywhere and holds
    # T x T scores per head. splash (TPU, heads of 64, 128 or 256) and cudnn (NVIDIA GPU, bfloat16,
    # heads of up to 128) are fused kernels that do not. auto: splash on a TPU if it can run, else
    # xla; cudnn has not been timed yet.
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
