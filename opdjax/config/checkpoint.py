"""How often checkpoints are saved, and which are kept."""

from __future__ import annotations

import dataclasses

from opdjax.config.validation import require, require_types


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept to continue from, and which step is the best."""

    every: int = 50  # steps; the last step is always saved
    keep: int = 2  # newest checkpoints kept
    best_metric: str = "avg@k"  # of the evaluation; the best checkpoint by it is kept as well

    def __post_init__(self):
        require_types(self, "checkpoint.")
        require(self.every > 0, "checkpoint.every", self.every, "at least 1")
        require(self.keep > 0, "checkpoint.keep", self.keep, "at least 1")
        require(
            self.best_metric in ("avg@k", "pass@k", "greedy"),
            "checkpoint.best_metric",
            self.best_metric,
            "avg@k, pass@k or greedy",
        )
