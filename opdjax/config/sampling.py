"""How completions are sampled."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from opdjax.config.validation import require_ranges, require_types


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """The completions that are trained on, and how they are sampled."""

    # Completions per prompt.
    num_generations: int = 1
    # Longest completion in tokens, including the stop token.
    max_completion_length: int = 512
    # Temperature of sampling. The student's own samples are also scored at it.
    temperature: float = 1.0
    # Nucleus sampling: keep the most likely tokens up to this total probability; 1: off.
    top_p: float = 1.0
    # Keep this many of the most likely tokens; 0: off.
    top_k: int = 0
    # Further stop tokens, besides the checkpoint's end-of-sequence ids.
    stop_token_ids: tuple[int, ...] = ()
    # Who writes the completions. student: on-policy samples; teacher: samples of the teacher;
    # references: the data's own answers.
    completions_from: Literal["student", "teacher", "references"] = "student"
    # Rows decoded at a time, also in evaluations; a finished row makes room for the next. Must be a
    # multiple of mesh.data x mesh.fsdp. None: all rows of a step, the fastest if memory allows and
    # lengths are similar; 512 rows of an evaluation.
    slots: int | None = None
    # Dtype of cached keys and values; auto: that of the forward pass. int8 halves bfloat16's memory
    # and samples from a slightly different distribution than the trained one: on the mini pair
    # log-probs differ by 0.004 nats on average and 0.11 at most (bfloat16: 0.0024 and 0.04). The
    # stored behaviour log-probs are those of the distribution sampled from.
    kv_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"

    def __post_init__(self):
        require_types(self, "sampling.")
        ranges = {"num_generations": "at least 1", "temperature": "more than 0"}
        require_ranges(self, "sampling.", ranges)
        require_sampling("sampling", self)
        require_ranges(self, "sampling.", {"slots": "at least 1, or none for all rows"})

    @property
    def has_filter(self) -> bool:
        """Whether some tokens cannot be sampled."""
        return self.top_p < 1 or self.top_k > 0


def require_sampling(section: str, sampling: Any) -> None:
    """Check the fields that the sampling of rollouts and of evaluations share."""
    ranges = {"max_completion_length": "at least 1"}
    ranges |= {"top_p": "more than 0 and at most 1", "top_k": "0 (off) or more"}
    require_ranges(sampling, f"{section}.", ranges)
