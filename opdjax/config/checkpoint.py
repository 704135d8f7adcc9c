"""How often checkpoints are saved, and which are kept."""

import dataclasses
from typing import Annotated

from opdjax.config.validation import Section


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Section):
    """How often checkpoints are saved, and which are kept."""

    # Steps between checkpoints; the last step is always saved.
    every: Annotated[int, "at least 1"] = 50
    # Number of the newest checkpoints to keep, besides the one with the best avg@k.
    keep: Annotated[int, "at least 1"] = 2
