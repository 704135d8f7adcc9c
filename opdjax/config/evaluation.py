"""How the student is evaluated."""

from __future__ import annotations

import dataclasses
import re

from opdjax.config.data import columns_of
from opdjax.config.sampling import require_sampling
from opdjax.config.validation import require, require_ranges, require_types

# Names of `evaluation.grader`, besides auto, regex:PATTERN and FILE.py:FUNCTION.
GRADERS = ("gsm8k", "last_number", "boxed", "choice", "exact")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Sampled and greedy answers to held-out prompts, before, during and after training."""

    # Prompts with answers, in the form of data.source; None: no evaluation.
    source: str | None = "arithmetic:test"
    # What is read of a completion and compared with the answer: gsm8k (the number after ####),
    # last_number, boxed (the last \boxed{...}, as mathematics), choice (a letter from A to J),
    # exact (the whole text), regex:PATTERN (its last match, or the first group of it),
    # FILE.py:FUNCTION (your own, called with the completion and the answer), or auto: gsm8k for
    # the built-in task, else last_number.
    grader: str = "auto"
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
        self._check_grader()
        _ = self.column_names

    def _check_grader(self):
        name = self.grader
        is_known = name in (*GRADERS, "auto") or re.fullmatch(r".+\.py:\w+", name)
        expected = f"{', '.join(GRADERS)}, auto, regex:PATTERN or FILE.py:FUNCTION"
        require(is_known or name.startswith("regex:"), "evaluation.grader", name, expected)
        try:
            re.compile(name.removeprefix("regex:") if name.startswith("regex:") else "")
        except re.error as error:
            expected = f"a regular expression after regex: ({error})"
            require(False, "evaluation.grader", name, expected)

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
