"""How the student is evaluated."""

from __future__ import annotations

import dataclasses
from typing import Literal

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
    # Temperature of the sampled answers.
    temperature: float = 1.0
    # Nucleus sampling: keep the most likely tokens up to this total probability; 1: off.
    top_p: float = 1.0
    # Keep this many of the most likely tokens; 0: off.
    top_k: int = 0
    # Longest answer in tokens, including the stop token.
    max_completion_length: int = 512
    # Rows decoded at a time; a finished row makes room for the next.
    batch_size: int = 512
    # Also evaluate the untrained student at these temperatures.
    extra_temperatures: tuple[float, ...] = ()
    # Steps between evaluations; 0: only before and after training.
    every: int = 0
    # Seed of the samples. Runs with the same seed answer the same prompts with the same random
    # numbers, so that they can be compared.
    seed: int = 0
    # Column of the prompts; None: data.prompt_column.
    prompt_column: str | None = None
    # Column of the answers; None: data.answer_column.
    answer_column: str | None = None
    # Column with the name of a prompt's benchmark (MATH500, AMC23 ...): scores are then also given
    # for each benchmark, and as their mean. None: no benchmarks.
    benchmark_column: str | None = None

    def __post_init__(self):
        require_types(self, "evaluation.")
        ranges = dict.fromkeys(("num_prompts", "num_samples", "batch_size"), "at least 1")
        require_ranges(self, "evaluation.", ranges | {"every": "0 (off) or more"})
        require_sampling("evaluation", self)
        are_positive = all(t > 0 for t in self.extra_temperatures)
        expected, field = "more than 0 each", "evaluation.extra_temperatures"
        require(are_positive, field, self.extra_temperatures, expected)
        require_seed("evaluation.seed", self.seed)
        for name in ("prompt_column", "answer_column", "benchmark_column"):
            require(getattr(self, name) != "", f"evaluation.{name}", "", "the name of a column")


def require_seed(field: str, seed: int) -> None:
    """Random generators take no negative seed, and jitted functions at most 31 bits."""
    require(0 <= seed < 2**31, field, seed, "from 0 to 2147483647")
