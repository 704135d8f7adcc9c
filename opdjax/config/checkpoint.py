"""How often checkpoints are saved, and which are kept."""

from __future__ import annotations

import dataclasses

from opdjax.config.validation import require, require_ranges, require_types


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often checkpoints are saved, and which are kept."""

    # Steps between checkpoints; the last step is always saved.
    every: int = 50
    # Number of the newest checkpoints to keep.
    keep: int = 2
    # Also keep the checkpoint with the best evaluation score: avg@k, pass@k or greedy.
    best_metric: str = "avg@k"

    def __post_init__(self):
        require_types(self, "checkpoint.")
        require_ranges(self, "checkpoint.", {"every": "at least 1", "keep": "at least 1"})
        is_score = self.best_metric in ("avg@k", "pass@k", "greedy")
        expected = "avg@k, pass@k or greedy"
        require(is_score, "checkpoint.best_metric", self.best_metric, expected)
