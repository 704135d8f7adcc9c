"""Estimators that look right and are wrong; each is shipped by some library, none is a recipe.

The audit measures what they do. A pitfall of one token has a `token_loss` like a recipe's and
its `advantages`, the factor A_v in its gradient -A_v grad log student(v) for every id v;
`drawn_from` is the distribution its tokens are sampled from where it differs from the scored
one. A pitfall of a batch has `weights` instead of `losses.aggregation_weights`, or `add` instead
of a sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from opdjax.estimators.importance import k1, k3
from opdjax.estimators.losses import policy_gradient_loss
from opdjax.estimators.opd import opd, sampled_reward, student_topk_baseline
from opdjax.ops.tile import VocabTile
from opdjax.ops.vocab import TokenInputs

_VALUE_TOP_K = 8  # ids whose KL is taken for an advantage


@dataclasses.dataclass(frozen=True)
class Pitfall:
    """What it looks like, what happens, and which library ships it."""

    about: str
    token_loss: Callable | None = None
    advantages: Callable[[VocabTile, VocabTile], Float[Array, "n V"]] | None = None
    drawn_from: Callable[[VocabTile], VocabTile] | None = None
    weights: Callable | None = None
    add: Callable | None = None


def k1_direct(student: VocabTile, teacher: VocabTile, row: TokenInputs):
    """k1 as the loss: `log student(y) - log teacher(y)`, differentiated."""
    student_logprobs = student.logprob(row.tokens)
    return k1(student_logprobs, jax.lax.stop_gradient(teacher.logprob(row.tokens))), {
        "student_logprobs": student_logprobs
    }


def k3_direct(student: VocabTile, teacher: VocabTile, row: TokenInputs):
    """k3 as the loss: `teacher / student - 1 + log student - log teacher` of y, differentiated."""
    student_logprobs = student.logprob(row.tokens)
    return k3(student_logprobs, jax.lax.stop_gradient(teacher.logprob(row.tokens))), {
        "student_logprobs": student_logprobs
    }


def topk_value(student: VocabTile, teacher: VocabTile, row: TokenInputs):
    """Minus the KL on the student's top k ids as the advantage of the sampled token."""
    student_logprobs = student.logprob(row.tokens)
    return policy_gradient_loss(
        student_topk_baseline(student, teacher, _VALUE_TOP_K), student_logprobs
    ), {"student_logprobs": student_logprobs}


def filtered(
    student: VocabTile, *, temperature: float = 0.7, k: int = 50, top_p: float = 0.95
) -> VocabTile:
    """The distribution after temperature, then top k, then top p."""
    logits = student.logits / temperature
    ordered = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0]
    probs = jax.nn.softmax(ordered, axis=-1)
    is_kept = jnp.cumsum(probs, axis=-1) - probs < top_p
    threshold = jnp.min(jnp.where(is_kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return VocabTile(jnp.where(logits >= threshold, logits, -jnp.inf))


def mean_of_means(mask: Bool[Array, "B T"], parts: int) -> Float[Array, "B T"]:
    """Weights that average over the tokens of each micro-batch, then over micro-batches."""
    live = mask.astype(jnp.result_type(float)).reshape(parts, -1, mask.shape[1])
    return (live / jnp.maximum(jnp.sum(live, axis=(1, 2), keepdims=True), 1) / parts).reshape(
        mask.shape
    )


def shifted_mask(mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Token-mean weights of a mask shifted by one column.

    The first token is not trained; the column after the last one is.
    """
    moved = jnp.concatenate([jnp.zeros_like(mask[:, :1]), mask[:, :-1]], axis=1).astype(
        jnp.result_type(float)
    )
    return moved / jnp.maximum(jnp.sum(moved), 1)


def add_in_bfloat16(losses: Float[Array, " n"], chunk: int = 64) -> Float[Array, ""]:
    """The sum of per-token losses, chunk by chunk, in a bfloat16 accumulator."""
    parts = jnp.pad(losses, (0, -losses.size % chunk)).reshape(-1, chunk).astype(jnp.bfloat16)
    add = lambda total, part: (total + jnp.sum(part), None)
    return jax.lax.scan(add, jnp.zeros((), jnp.bfloat16), parts)[0].astype(losses.dtype)


PITFALLS = {
    "k1_direct": Pitfall(
        "k1 estimates KL(student || teacher) without bias, so it is used as a loss. Its "
        "gradient is that of log student(y) alone, whose expectation is 0: the student follows "
        "a random walk at full noise. A library whose switch from loss to policy gradient is a "
        "separate option (verl's use_policy_gradient) is one setting away from it.",
        k1_direct,
        lambda student, teacher: -jnp.ones_like(student.logits),
    ),
    "k3_direct": Pitfall(
        "k3 is the low-variance estimate of KL(student || teacher) and is never negative, so it "
        "is used as a loss. Its expected gradient is exactly that of the other direction, "
        "KL(teacher || student): a run that reports reverse KL covers modes. Its variance grows "
        "with teacher(y) / student(y). verl's YAML default (loss_mode k3, use_policy_gradient "
        "false), documented as reverse KL; TorchRL's DistillationLoss, which documents it.",
        k3_direct,
        lambda student, teacher: jnp.where(
            student.logits > -jnp.inf, jnp.expm1(teacher.logprobs - student.logprobs), 0
        ),
    ),
    "topk_value_advantage": Pitfall(
        "A KL on the top k ids has less variance than the reward of one token, so its value is "
        "used as the advantage of a policy gradient. It is a property of the context: every "
        "sampled token gets the same advantage, and the expected gradient is 0. It is the "
        "baseline of vOPD without the reward. Reported against radixark/miles (issue 2362).",
        topk_value,
        lambda student, teacher: jnp.broadcast_to(
            student_topk_baseline(student, teacher, _VALUE_TOP_K)[:, None], student.logits.shape
        ),
    ),
    "filtered_sampling": Pitfall(
        "Completions are sampled at a temperature or through top-k and top-p, and scored under "
        "the full softmax at temperature 1. The reward of a sampled token is right, its "
        "frequency is not: likely tokens count too much, unlikely ones never. EasyDeL's "
        "defaults (temperature 0.7, top-k 50, top-p 0.95: measured here), ROLL's examples, TRL "
        "before 1.16.",
        opd,
        lambda student, teacher: sampled_reward(teacher.logprobs, student.logprobs),
        drawn_from=filtered,
    ),
    "mean_of_means": Pitfall(
        "Gradient accumulation that averages over the tokens of each micro-batch and then over "
        "micro-batches gives tokens of short micro-batches more weight: with one row a "
        "micro-batch, a token of a 10-token answer counts 100 times one of a 1000-token answer. "
        "The loss then depends on how the batch is split. TRL (issue 4719, fixed in pull "
        "request 6006), ms-swift (issues 10076, 10165).",
        weights=mean_of_means,
    ),
    "shifted_mask": Pitfall(
        "Logits at a column predict the next token. If they are compared with the token of "
        "their own column, or the mask is not shifted with them, the first token of a "
        "completion is never trained and the column after its end is. No error occurs and the "
        "loss falls. EasyDeL's on-policy distillation step.",
        weights=shifted_mask,
    ),
    "bfloat16_sums": Pitfall(
        "Token losses are summed in the model's dtype. bfloat16 keeps 8 bits: once the sum is "
        "256 times a summand, adding it changes nothing, so the loss of a long batch is wrong, "
        "mostly too small. EasyDeL's chunked loss; here chunks of 64 tokens are added.",
        add=add_in_bfloat16,
    ),
}
