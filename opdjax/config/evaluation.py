"""How the student is evaluated."""

from typing import Annotated, Literal

from opdjax.config.data import columns_of
from opdjax.config.validation import Section


class EvaluationConfig(Section):
    """Sampled and greedy answers to held-out prompts, before, during and after training."""

    # Prompts with answers, in the form of data.source; None: no evaluation.
    source: str | None = "arithmetic:test"
    # Part of a completion that is compared with the answer: its last number after a #, its
    # last boxed expression (LaTeX), or all of it.
    grader: Literal["final_number", "boxed", "exact"] = "final_number"
    # Use the first N prompts, of each benchmark if there are several.
    num_prompts: Annotated[int, "at least 1"] = 512
    # Sampled answers per prompt: the k of avg@k and pass@k.
    num_samples: Annotated[int, "at least 1"] = 8
    # Temperatures of the sampled answers. All scores are those of the first; the untrained student
    # is also evaluated at the others.
    temperatures: Annotated[tuple[float, ...], "one or more numbers, more than 0 each"] = (1.0,)
    # Nucleus sampling: keep the most likely tokens up to this total probability; 1: off.
    top_p: Annotated[float, "more than 0 and at most 1"] = 1.0
    # Keep this many of the most likely tokens; 0: off.
    top_k: Annotated[int, "0 (off) or more"] = 0
    # Longest answer in tokens, including the stop token.
    max_completion_length: Annotated[int, "at least 1"] = 512
    # Steps between evaluations; 0: only before and after training.
    every: Annotated[int, "0 (off) or more"] = 0
    # Columns, NAME=COLUMN: prompt and answer, where they differ from data.columns; benchmark, the
    # column with the name of a prompt's benchmark (MATH500, AMC23 ...): scores are then also given
    # for each benchmark, and as their mean.
    columns: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        _ = self.column_names

    @property
    def column_names(self) -> dict[str, str]:
        """The columns that are named, by what they hold."""
        return columns_of("evaluation.columns", self.columns, ("prompt", "answer", "benchmark"))

    @property
    def temperature(self) -> float:
        """Temperature of the answers of all scores."""
        return self.temperatures[0]
