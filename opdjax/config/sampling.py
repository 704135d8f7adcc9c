"""How completions are sampled."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from opdjax.config.validation import require, require_types


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Who writes the completions that are trained on, and how they are drawn."""

    num_generations: int = 1  # completions per prompt
    max_completion_length: int = 512  # tokens, stop token included
    temperature: float = (
        1.0  # the student is scored at this temperature too where it is the student that is sampled
    )
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # 0: off
    stop_token_ids: tuple[int, ...] = ()  # beside the end-of-sequence ids of the checkpoint
    completions_from: Literal["student", "teacher", "references"] = (
        "student"  # student: on-policy; references: the data's own answers
    )
    # Mesh axes that the weights rollouts are drawn with lie split over; with fsdp they would be
    # sent anew for every token.
    split_over: tuple[Literal["fsdp", "tensor"], ...] = ("tensor",)
    # Rows decoded at a time; a finished one makes place for the next. None: all of a step, the
    # fastest where memory allows and lengths are alike. A multiple of mesh.data x mesh.fsdp.
    slots: int | None = None
    # Of stored keys and values; auto: as the forward pass. int8 takes half of bfloat16's memory and
    # draws from a distribution a little off the one that is trained. On the mini pair log-probs are
    # off by 0.004 nats on average and 0.11 at most (bfloat16: 0.0024 and 0.04): slightly off-policy
    # data, whose behaviour log-probs are of what was truly drawn from.
    kv_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"

    def __post_init__(self):
        require_types(self, "sampling.")
        require(
            self.num_generations > 0, "sampling.num_generations", self.num_generations, "at least 1"
        )
        require_sampling("sampling", self)
        require(
            self.slots is None or self.slots > 0,
            "sampling.slots",
            self.slots,
            "at least 1, or none for all rows",
        )
        require(
            0 <= self.min_p < 1, "sampling.min_p", self.min_p, "at least 0 (off) and less than 1"
        )

    @property
    def has_filter(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


def require_sampling(section: str, sampling: Any) -> None:
    """The fields that drawing rollouts and drawing answers share."""
    require(
        sampling.max_completion_length > 0,
        f"{section}.max_completion_length",
        sampling.max_completion_length,
        "at least 1",
    )
    require(sampling.temperature > 0, f"{section}.temperature", sampling.temperature, "more than 0")
    require(
        0 < sampling.top_p <= 1, f"{section}.top_p", sampling.top_p, "more than 0 and at most 1"
    )
    require(sampling.top_k >= 0, f"{section}.top_k", sampling.top_k, "0 (off) or more")
