"""How the student is evaluated."""

from __future__ import annotations

import dataclasses
from typing import Literal

from opdjax.config.sampling import require_sampling
from opdjax.config.validation import require, require_types


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Sampled and greedy answers to held-out prompts, before, during and after training."""

    source: str | None = (
        "arithmetic:test"  # as data.source; rows need an answer. None: no evaluation
    )
    grader: Literal["final_number", "boxed", "exact"] = (
        "final_number"  # what of a completion is compared with the answer
    )
    num_prompts: int = 512  # the first so many, of every benchmark where there are several
    num_samples: int = 8  # answers a prompt: the k of avg@k and pass@k
    temperature: float = 1.0
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off
    max_completion_length: int = 512
    batch_size: int = 512  # rows sampled at a time; a finished one makes place for the next
    extra_temperatures: tuple[float, ...] = ()  # the untrained student is also measured at these
    every: int = 0  # steps between evaluations; 0: only before and after
    # common to all runs that are compared: they then answer the same prompts with the same draws
    seed: int = 0
    prompt_column: str | None = None  # None: data.prompt_column
    answer_column: str | None = None  # None: data.answer_column
    # The name of a row's benchmark (MATH500, AMC23 ...): scores are then also told of each of them,
    # and their mean. None: no benchmarks
    benchmark_column: str | None = None

    def __post_init__(self):
        require_types(self, "evaluation.")
        for name in ("num_prompts", "num_samples", "batch_size"):
            require(
                getattr(self, name) > 0, f"evaluation.{name}", getattr(self, name), "at least 1"
            )
        require_sampling("evaluation", self)
        require(
            all(t > 0 for t in self.extra_temperatures),
            "evaluation.extra_temperatures",
            self.extra_temperatures,
            "more than 0 each",
        )
        require(self.every >= 0, "evaluation.every", self.every, "0 (off) or more")
        require_seed("evaluation.seed", self.seed)
        for name in ("prompt_column", "answer_column", "benchmark_column"):
            require(getattr(self, name) != "", f"evaluation.{name}", "", "the name of a column")


def require_seed(field: str, seed: int) -> None:
    """Random bit generators take no negative seed, jitted functions no more than 31 bits."""
    require(0 <= seed < 2**31, field, seed, "from 0 to 2147483647")
