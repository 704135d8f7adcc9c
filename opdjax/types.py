"""The rail: the frozen containers that carry data through a run.

Letters, in the whole project: `P` prompts, `G` samples per prompt, `B = P * G` rows, `T` tokens,
`V` vocabulary, `K` kept tokens, `D` width. Alignment, in the whole project: `logprobs[b, t]` is the
log-probability of `tokens[b, t]` given `tokens[b, :t]`, and `mask[b, t]` is 1 iff the student
sampled that token. Log-probabilities are in nats. A field keeps its name from here to the recipe.
"""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Int

Metrics = dict[str, float]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts of one step, padded on the left. The teacher may use a prompt template of its own."""

    tokens: Int[Array, "P T"]
    mask: Bool[Array, "P T"]  # False on padding
    prompt_id: Int[Array, " P"]  # index into the data source; selects the random stream
    teacher_tokens: Int[Array, "P U"] | None = None  # None: the student's prompts
    teacher_mask: Bool[Array, "P U"] | None = None
    # How often the same prompt occurs earlier in this batch; None: never.
    occurrence: Int[Array, " P"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollouts:
    """One completion per row: prompt columns (left-padded), then completion columns.

    Given answers (a teacher's text, the references of the data) have the same form: their tokens
    count as sampled, and their log-probs are None, because no policy was sampled.
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]  # True where the student sampled the token, the stop token included
    segment_ids: Int[Array, "B T"]  # 1 on prompt and completion, 0 on padding
    # Under the distribution that was sampled from, with temperature and filters.
    behavior_logprobs: Float[Array, "B T"] | None
    # With temperature only; the same array if no filter is on.
    unfiltered_logprobs: Float[Array, "B T"] | None
    prompt_id: Int[Array, " B"]
    sample_id: Int[Array, " B"]
    policy_version: Int[Array, " B"]
    is_truncated: Bool[Array, " B"]  # reached the maximum length without a stop token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TeacherScores:
    """The teacher's scores of a batch; only the fields that the recipe reads are set.

    The teacher's head is not data: it is an argument of its own.
    """

    teacher_logprobs: Float[Array, "B T"] | None = None
    # The teacher's K most likely ids at each context, most likely first, and their log-probs under
    # its full softmax.
    teacher_top_ids: Int[Array, "B T K"] | None = None
    teacher_top_logprobs: Float[Array, "B T K"] | None = None
    # Column t is the teacher's state after the token of the student's column t, so that the one
    # shift by one (in ops/vocab.py) is the same for student and teacher.
    hidden: Float[Array, "B T D"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TeacherView:
    """The teacher's rows, if its prompt template differs from the student's.

    `columns[b, t]` is the teacher's column that has read the same completion tokens as the
    student's column t.
    """

    tokens: Int[Array, "B U"]
    segment_ids: Int[Array, "B U"]
    columns: Int[Array, "B T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """Rows to train on. A row may hold several sequences, each with its own segment id."""

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    segment_ids: Int[Array, "B T"]  # 0 on padding
    behavior_logprobs: Float[Array, "B T"] | None
    # Advantage of the token's completion (or stage), from a scalar reward.
    advantages: Float[Array, "B T"] | None = None
    # Under the student's start, for a KL penalty.
    reference_logprobs: Float[Array, "B T"] | None = None
    # For M more draws from the student at each context.
    uniforms: Float[Array, "B T M"] | None = None
    teacher_view: TeacherView | None = None
    teacher: TeacherScores | None = None
