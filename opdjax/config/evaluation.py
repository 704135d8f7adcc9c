"""How the student is evaluated."""

from __future__ import annotations

import dataclasses
from typing import Literal

from opdjax.config.data import columns_of
from opdjax.config.sampling import require_sampling
from opdjax.config.validation import require, require_ranges, require_types


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Sampled and greedy answers to held-out prompts, before, during and after training."""

    # Prompts with answers, in the form of data.source; None: no evaluation.
    source: str | None = "arithmetic:test"
    # Part of a completion that is compared with the answer: its last number after a #, its
    # last boxed expression (LaTeX), or all of it.
    grader: Literal["final_number", "boxed", "exact"] = "final_number"
    # Use the first N prompts, of each benchmark if there are several.
    num_prompts: int = 512
    # Sampled answers per prompt: the k of avg@k and pass@k.
    num_samples: int = 8
    # Temperatures of the sampled answers. All scores are those of the first; the untrained student
    # is also evaluated at the others.
    temperatures: tuple[float, ...] = (1.0,)
    # Nucleus sampling: keep the most likely tokens up to this total probability; 1: off.
    top_p: float = 1.0
    # Keep this many of the most likely tokens; 0: off.
    top_k: int = 0
    # Longest answer in tokens, including the stop token.
    max_completion_length: int = 512
    # Steps between evaluations; 0: only before and after training.
    every: int = 0
    # Columns, NAME=COLUMN: prompt and answer, where they differ from data.columns; benchmark, the
    # column with the name of a prompt's benchmark (MATH500, AMC23 ...): scores are then also given
    # for each benchmark, and as their mean.
    columns: tuple[str, ...] = ()

    def __post_init__(self):
        require_types(self, "evaluation.")
        ranges = dict.fromkeys(("num_prompts", "num_samples"), "at least 1")
        require_ranges(self, "evaluation.", ranges | {"every": "0 (off) or more"})
        require_sampling("evaluation", self)
        are_positive = self.temperatures and all(t > 0 for t in self.temperatures)
        expected = "one or more numbers, more than 0 each"
        require(are_positive, "evaluation.temperatures", self.temperatures, expected)
        _ = self.column_names

    @property
    def column_names(self) -> dict[str, str]:
        """The columns that are named, by what they hold."""
        return columns_of("evaluation.columns", self.columns, ("prompt", "answer", "benchmark"))

    @property
    def temperature(self) -> float:
        """Temperature of the answers of all scores."""
        return self.temperatures[0]


def require_seed(field: str, seed: int) -> None:
    """Random generators take no negative seed, and jitted functions at most 31 bits."""
    require(0 <= seed < 2**31, field, seed, "from 0 to 2147483647")
