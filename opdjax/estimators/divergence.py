"""Divergences over the full vocabulary at one context, each direction by its own name; nats; the gradient flows to the student."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from opdjax.estimators.opd import sampled_reward
from opdjax.ops.vocab import Columns, VocabTile


def reverse_kl(student: VocabTile, teacher: VocabTile) -> Float[Array, " n"]:
    """`KL(student || teacher)`, mode-seeking; infinite where the student can draw what the teacher cannot."""
    return student.expect(student.logprobs - teacher.logprobs)


def forward_kl(student: VocabTile, teacher: VocabTile) -> Float[Array, " n"]:
    """`KL(teacher || student)`, mass-covering."""
    return teacher.expect(teacher.logprobs - student.logprobs)


def jsd(student: VocabTile, teacher: VocabTile, beta: float) -> Float[Array, " n"]:
    """Generalised Jensen-Shannon divergence `beta KL(T || M) + (1 - beta) KL(S || M)`, M = beta T + (1 - beta) S.

    GKD (arXiv 2306.13649), equation 1. Its limits, where the formula itself is 0, are named by convention: beta 0 is
    `forward_kl` and beta 1 is `reverse_kl`.
    """
    if beta == 0:
        return forward_kl(student, teacher)
    if beta == 1:
        return reverse_kl(student, teacher)
    # Both are -inf on padded ids; a finite stand-in keeps the gradient of logaddexp from being NaN there.
    is_live = (student.logits > -jnp.inf) | (teacher.logits > -jnp.inf)
    s, t = (jnp.where(is_live, tile.logprobs, 0) for tile in (student, teacher))
    mixture = jnp.logaddexp(t + jnp.log(beta), s + jnp.log1p(-beta))
    return beta * teacher.expect(t - mixture) + (1 - beta) * student.expect(s - mixture)


def full_kl(student: VocabTile, teacher: VocabTile, row: Columns, *, divergence: str = "reverse", beta: float = 0.5):
    """The exact divergence at each sampled context, the student's whole distribution differentiated.

    No action variance, at the cost of the teacher's unembedding. `divergence`: `reverse` KL(student || teacher),
    `forward` KL(teacher || student), `jsd` with `beta` (GKD, arXiv 2306.13649). The distribution of contexts is held fixed.
    """
    if divergence == "reverse":
        loss = reverse_kl(student, teacher)
    elif divergence == "forward":
        loss = forward_kl(student, teacher)
    elif divergence == "jsd":
        loss = jsd(student, teacher, beta)
    else:
        raise ValueError(f"full_kl has no divergence {divergence!r}; expected 'reverse', 'forward' or 'jsd'")
    student_logprob = student.logprob(row.token)
    reward = sampled_reward(teacher.logprob(row.token), student_logprob)
    kl = loss if divergence == "reverse" else reverse_kl(student, teacher)
    return loss, {"reward": reward, "student_logprob": student_logprob, "kl": jax.lax.stop_gradient(kl)}
