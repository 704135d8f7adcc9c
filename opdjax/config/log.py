"""What is logged in addition to metrics.jsonl."""

from __future__ import annotations

import dataclasses

from opdjax.config.validation import require_ranges, require_types


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is logged in addition to metrics.jsonl."""

    # Steps between rollouts written to samples.jsonl; 0: never.
    samples_every: int = 50
    # Also write TensorBoard event files; needs the tensorboard extra.
    tensorboard: bool = False
    # Steps between diagnostics: entropies, overlap of student and teacher, quantiles of the reward;
    # 0: never.
    diagnostics_every: int = 10

    def __post_init__(self):
        require_types(self, "log.")
        ranges = dict.fromkeys(("samples_every", "diagnostics_every"), "0 (off) or more")
        require_ranges(self, "log.", ranges)
