"""The rail: the few frozen containers that flow through a run, and nothing else.

Letters, everywhere in the project: `P` prompts, `G` samples per prompt, `B = P * G` rows, `T`
tokens, `V` vocabulary, `K` kept tokens, `D` width. Alignment, everywhere: `logprobs[b, t]` is the
log-probability of `tokens[b, t]` given `tokens[b, :t]`, and `mask[b, t]` is 1 iff the student
sampled that token. Log-probabilities are in nats.
"""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Int

Metrics = dict[str, float]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts of one step, padded on the left; the teacher may see each prompt through a template
    of its own.
    """

    tokens: Int[Array, "P T"]
    mask: Bool[Array, "P T"]  # False on padding
    prompt_id: Int[Array, " P"]  # index into the data source: names the random stream of the row
    teacher_tokens: Int[Array, "P U"] | None = None  # None: the teacher reads the student's view
    teacher_mask: Bool[Array, "P U"] | None = None
    occurrence: Int[Array, " P"] | None = (
        None  # how often the same prompt stands earlier in this batch; None: never
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Completions by row: prompt columns first (left-padded), then the completion's columns.

    Given answers (a teacher's text, the data's references) come in the same form; no policy was
    sampled, so their log-probs are None, and "sampled" reads "given".
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]  # True where the student sampled the token, the stop token included
    segment_ids: Int[Array, "B T"]  # 1 on prompt and completion, 0 on padding
    behavior_logprobs: (
        Float[Array, "B T"] | None
    )  # of the distribution sampled from: temperature and filters included
    unfiltered_logprobs: (
        Float[Array, "B T"] | None
    )  # temperature only; the same array when no filter is on
    prompt_id: Int[Array, " B"]
    sample_id: Int[Array, " B"]
    policy_version: Int[Array, " B"]
    is_truncated: Bool[Array, " B"]  # the length ran out before a stop token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TeacherScores:
    """What the teacher said of a batch: the fields that the recipe reads. Its head is no data and
    travels beside the batch.
    """

    token_logprobs: Float[Array, "B T"] | None = None
    # Its K most likely ids at each context, most likely first, and their log-probs under its full
    # softmax.
    top_ids: Int[Array, "B T K"] | None = None
    top_logprobs: Float[Array, "B T K"] | None = None
    # Column t holds the teacher's hidden state once it has read the student's column t, so that the
    # one shift by one (in ops/vocab.py) serves student and teacher alike.
    hidden: Float[Array, "B T D"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TeacherView:
    """The teacher's own rows when its template differs from the student's.

    `columns[b, t]` is the teacher column that has read just what the student's column t has read.
    """

    tokens: Int[Array, "B U"]
    segment_ids: Int[Array, "B U"]
    columns: Int[Array, "B T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """Rows ready to be trained on; every row may hold several sequences, told apart by their
    segment ids.
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    segment_ids: Int[Array, "B T"]  # 0 on padding
    behavior_logprobs: Float[Array, "B T"] | None
    advantages: Float[Array, "B T"] | None = (
        None  # of whole completions or their stages, from a scalar reward; each token has its own's
    )
    reference_logprobs: Float[Array, "B T"] | None = (
        None  # of the student as it was at the start, for a penalty on leaving it
    )
    uniforms: Float[Array, "B T M"] | None = (
        None  # for M more draws from the student at each context
    )
    teacher_view: TeacherView | None = None
    teacher: TeacherScores | None = None
