"""How often checkpoints are saved, and which are kept."""

from __future__ import annotations

import dataclasses

from opdjax.config.validation import require_ranges, require_types


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often checkpoints are saved, and which are kept."""

    # Steps between checkpoints; the last step is always saved.
    every: int = 50
    # Number of the newest checkpoints to keep, besides the one with the best avg@k.
    keep: int = 2

    def __post_init__(self):
        require_types(self, "checkpoint.")
        require_ranges(self, "checkpoint.", {"every": "at least 1", "keep": "at least 1"})
