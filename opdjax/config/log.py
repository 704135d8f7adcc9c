"""What is logged beside metrics.jsonl."""

from __future__ import annotations

import dataclasses

from opdjax.config.validation import require, require_types


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is written beside metrics.jsonl."""

    samples_every: int = 50  # steps between rollouts written to samples.jsonl; 0: never
    num_samples: int = 4  # rollouts written each time
    tensorboard: bool = False  # event files too; needs the tensorboard extra
    # Steps between those that also measure entropies, overlap of student and teacher, quantiles of
    # the reward; 0: never
    diagnostics_every: int = 10

    def __post_init__(self):
        require_types(self, "log.")
        require(self.samples_every >= 0, "log.samples_every", self.samples_every, "0 (off) or more")
        require(
            self.diagnostics_every >= 0,
            "log.diagnostics_every",
            self.diagnostics_every,
            "0 (off) or more",
        )
        require(self.num_samples > 0, "log.num_samples", self.num_samples, "at least 1")
