"""What an estimator does at one context, exactly, in logit space: its expected gradient and the
variance of a draw.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from opdjax.diagnose.audit.subjects import Subject
from opdjax.estimators.divergence import reverse_kl
from opdjax.estimators.opd import score_norms
from opdjax.ops.tile import VocabTile
from opdjax.ops.vocab import TokenInputs

Stats = dict[str, Float[Array, " n"]]


def _probs(tile: VocabTile) -> Float[Array, "n V"]:
    return jnp.where(tile.logits > -jnp.inf, jnp.exp(tile.logprobs), 0)


def reverse_gradient(student: VocabTile, teacher: VocabTile) -> Float[Array, "n V"]:
    """`d KL(student || teacher) / d logits = p_v (log p_v - log q_v - KL)`."""
    gap = jnp.where(student.logits > -jnp.inf, student.logprobs - teacher.logprobs, 0)
    return _probs(student) * (gap - student.expect(gap)[:, None])


def forward_gradient(student: VocabTile, teacher: VocabTile) -> Float[Array, "n V"]:
    """`d KL(teacher || student) / d logits = p_v - q_v`."""
    return _probs(student) - _probs(teacher)


def measure(
    subject: Subject,
    student: VocabTile,
    teacher: VocabTile,
    mean_reward: Float[Array, ""] | float = 0.0,
) -> Stats:
    """Per-context statistics of an uncoupled subject, from closed forms that cost O(V) a context
    (gradients: of the logits).

    A draw's gradient is `-A_v (e_v - p)`, its squared norm `A_v^2 w_v`: nothing of size V x V is
    formed. What does not depend on the draw is differentiated. See `summarise` for what the
    statistics are for.
    """
    undrawn = _undrawn_gradient(subject, student, teacher)
    if not subject.is_sampled:
        return _compare(undrawn, jnp.zeros(undrawn.shape[0], undrawn.dtype), student, teacher)
    drawn, p = _probs(subject.drawn_from(student, teacher)), _probs(student)
    advantage = jnp.where(drawn > 0, subject.advantages(student, teacher, mean_reward), 0)
    pushed = drawn * advantage
    own = -(pushed - p * jnp.sum(pushed, axis=-1, keepdims=True))
    second = jnp.sum(drawn * jnp.square(advantage) * score_norms(student), axis=-1)
    variance = (second - jnp.sum(jnp.square(own), axis=-1)) / subject.num_draws
    return _compare(own + undrawn, variance, student, teacher)


def _undrawn_gradient(
    subject: Subject, student: VocabTile, teacher: VocabTile
) -> Float[Array, "n V"]:
    loss = subject.undrawn_loss()
    if loss is None:
        return jnp.zeros_like(student.logits)
    row = TokenInputs(jnp.zeros(student.logits.shape[0], jnp.int32))
    return jax.grad(lambda logits: jnp.sum(loss(VocabTile(logits), teacher, row)[0]))(
        student.logits
    )


def enumerate_draws(
    subject: Subject,
    student: VocabTile,
    teacher: VocabTile,
    mean_reward: Float[Array, ""] | float = 0.0,
) -> Stats:
    """The same through the loss itself: every token of a small vocabulary is drawn, and the loss
    differentiated each time.

    With extra draws the loss is that of one draw, and the variance of their mean follows from their
    independence.
    """
    n, vocab = student.logits.shape
    one = Subject(
        subject.name,
        subject.recipe,
        {name: v for name, v in subject.options.items() if name != "extra_draws"},
    )
    repeated = lambda tile: VocabTile(jnp.repeat(tile.logits, vocab, axis=0))
    row = TokenInputs(
        jnp.tile(jnp.arange(vocab), n),
        mean_reward=jnp.full(n * vocab, mean_reward, student.logits.dtype),
    )
    loss, others = one.token_loss(), repeated(teacher)
    gradient = jax.grad(lambda logits: jnp.sum(loss(VocabTile(logits), others, row)[0]))(
        repeated(student).logits
    )
    drawn = _probs(subject.drawn_from(student, teacher))
    gradient = jnp.where(
        drawn[:, :, None] > 0, gradient.reshape(n, vocab, vocab), 0
    )  # what is never drawn may be anything
    own = jnp.einsum("nv,nvu->nu", drawn, gradient)
    # The spread around the mean, not the difference of two squares.
    variance = jnp.einsum("nv,nvu->n", drawn, jnp.square(gradient - own[:, None]))
    return _compare(own, variance / subject.num_draws, student, teacher)


def _compare(
    own: Float[Array, "n V"], variance: Float[Array, " n"], student: VocabTile, teacher: VocabTile
) -> Stats:
    square = lambda x: jnp.sum(jnp.square(x), axis=-1)
    stats = {
        "kl": reverse_kl(student, teacher),
        "variance": jnp.maximum(variance, 0),
        "own": square(own),
    }
    for name, exact in (
        ("reverse", reverse_gradient(student, teacher)),
        ("forward", forward_gradient(student, teacher)),
    ):
        stats |= {
            name: square(exact),
            f"to_{name}": square(own - exact),
            f"dot_{name}": jnp.sum(own * exact, axis=-1),
        }
    return stats


def summarise(stats: dict[str, np.ndarray], plain_variance: np.ndarray) -> dict[str, Any]:
    """Numbers of a subject from its contexts, stacked as one long gradient; `plain_variance`: that
    of `opd` at each context.

    `bias`: norm of (expected gradient - exact gradient) over the norm of the exact one, against
    both directions of the KL. `cosine`: between the two. `noise_to_signal`: root of summed variance
    over summed squared expectation, one draw a context. `variance_ratio`: to `opd`. `worse`: share
    of contexts with more variance than `opd`.
    """
    total = {name: float(np.sum(values, dtype=np.float64)) for name, values in stats.items()}
    found: dict[str, Any] = {"bias": {}, "cosine": {}}
    # The mean of draws that cancel is left with their rounding: no direction at all.
    epsilon = np.finfo(stats["own"].dtype).eps
    is_zero = total["own"] <= (64 * epsilon) ** 2 * (total["variance"] + total["own"])
    for name in ("reverse", "forward"):
        found["bias"][name] = (
            float(np.sqrt(total[f"to_{name}"] / total[name])) if total[name] else None
        )
        norms = np.sqrt(total["own"] * total[name])
        found["cosine"][name] = (
            None if is_zero or not norms else float(total[f"dot_{name}"] / norms)
        )
    found["variance"] = total["variance"] / len(plain_variance)
    found["noise_to_signal"] = None if is_zero else float(np.sqrt(total["variance"] / total["own"]))
    found["variance_ratio"] = total["variance"] / float(np.sum(plain_variance, dtype=np.float64))
    found["worse"] = float(np.mean(stats["variance"] > plain_variance * (1 + 1e-5)))
    return found
