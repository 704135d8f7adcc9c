"""Surrogate losses, and the weights that aggregate token losses into one number."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opdjax.ops.masked import sequence_total, starts_sequence
from opdjax.ops.tile import VocabTile
from opdjax.ops.vocab import TokenInputs

AGGREGATIONS = (
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "fixed_denominator",
)


def policy_gradient_loss(
    advantage: Float[Array, "*n"], student_logprobs: Float[Array, "*n"]
) -> Float[Array, "*n"]:
    """`-sg[A] * log student(y)`: over y ~ student, descending it raises the expected A, nats."""
    return -jax.lax.stop_gradient(advantage) * student_logprobs


def clipped_policy_gradient_loss(
    advantage: Float[Array, "*n"],
    student_logprobs: Float[Array, "*n"],
    behavior_logprobs: Float[Array, "*n"],
    low: float,
    high: float,
) -> Float[Array, "*n"]:
    """`-min(rho A, clip(rho, 1 - low, 1 + high) A)`, rho = student(y) / behavior(y), A detached.

    PPO, arXiv 1707.06347, equation 7. The gradient flows through rho and is 0 where a step would
    move rho further out of the band in A's favour.
    """
    ratio = jnp.exp(student_logprobs - behavior_logprobs)
    advantage = jax.lax.stop_gradient(advantage)
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)


def sft(student: VocabTile, teacher: VocabTile | None, row: TokenInputs):
    """Cross-entropy of the student S on given answers, of the teacher T or of the data.

    Equation: loss = -log S(y), nats, y the answer's token. If T sampled y, its expectation is KL(T
    || S) plus the entropy of T, at the contexts of T: sequence-level distillation (arXiv
    1606.07947).

    Detached: nothing; log S(y) carries gradient, and y is data.

    Cost: no teacher in training: three products with a [V, D] matrix a token (logits, gradients of
    states and head) where recipes with a teacher have four, one [tile, V] of logits, no second
    forward pass. A teacher's answers have to be sampled first.

    Use it when only the teacher's text is available, the vocabularies differ, or good answers
    exist; and as the baseline that on-policy training is compared with. The student never sees its
    own mistakes. On its own samples the expected gradient is 0, and the config refuses that.

    Options:
      none of its own
    """
    student_logprobs = student.logprob(row.tokens)
    return -student_logprobs, {"student_logprobs": jax.lax.stop_gradient(student_logprobs)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Denominators:
    """What the whole batch divides by, counted over all hosts and micro-batches."""

    num_tokens: Float[Array, ""]  # trained tokens
    num_sequences: Float[Array, ""]  # sequences sampled, trained tokens or not
    max_length: Float[Array, ""]  # completion tokens a sequence may have


def count_denominators(
    mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"], max_length: int
) -> Denominators:
    """The denominators of a batch of completions of at most `max_length` tokens each.

    A row may hold several sequences.
    """
    count = jnp.asarray(mask.sum(), jnp.result_type(float))
    num_sequences = jnp.sum(starts_sequence(segment_ids) & (segment_ids > 0)).astype(count.dtype)
    return Denominators(count, num_sequences, jnp.full((), max_length, count.dtype))


def aggregation_weights(
    mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"], kind: str, denominators: Denominators
) -> Float[Array, "B T"]:
    """Weights `w` such that the batch loss is `sum(w * token loss)`.

    They are computed once, before any split into micro-batches. `token_mean`: 1 / tokens of the
    batch. `sequence_mean_token_mean`: 1 / (sequences * tokens of this sequence).
    `sequence_mean_token_sum`: 1 / sequences. `fixed_denominator`: 1 / (sequences * longest allowed
    completion), the only one that depends on no sampled length, under which baselines are exactly
    unbiased. ValueError on another kind.
    """
    live = mask.astype(denominators.num_tokens.dtype)
    num_sequences = jnp.maximum(denominators.num_sequences, 1)
    if kind == "token_mean":
        return live / jnp.maximum(denominators.num_tokens, 1)
    if kind == "sequence_mean_token_mean":
        return live / (num_sequences * jnp.maximum(sequence_total(live, segment_ids), 1))
    if kind == "sequence_mean_token_sum":
        return live / num_sequences
    if kind == "fixed_denominator":
        return live / (num_sequences * denominators.max_length)
    raise ValueError(f"there is no aggregation {kind!r}; expected one of {AGGREGATIONS}")
