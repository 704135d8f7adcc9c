"""What is logged in addition to metrics.jsonl."""

import dataclasses
from typing import Annotated

from opdjax.config.validation import Section


@dataclasses.dataclass(frozen=True)
class LogConfig(Section):
    """What is logged in addition to metrics.jsonl."""

    # Steps between rollouts written to samples.jsonl; 0: never.
    samples_every: Annotated[int, "0 (off) or more"] = 50
    # Also write TensorBoard event files; needs the tensorboard extra.
    tensorboard: bool = False
    # Steps between diagnostics: entropies, overlap of student and teacher, quantiles of the reward;
    # 0: never.
    diagnostics_every: Annotated[int, "0 (off) or more"] = 10
