"""The exact expected gradient of an estimator at one context, and its variance, in logit space."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from opdjax.config.recipes import PLAIN
from opdjax.diagnose.audit.subjects import Part, Subject
from opdjax.estimators.divergence import reverse_kl
from opdjax.estimators.opd import score_norms
from opdjax.ops.tile import VocabTile
from opdjax.ops.vocab import TokenInputs

Stats = dict[str, Float[Array, " n"]]
Scalar = Float[Array, ""] | float


def random_contexts(num_contexts: int, vocab: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return logits `[n, V]` of flat to peaked students and of near to distant teachers."""
    rng = np.random.default_rng(seed)
    sharpness = rng.uniform(0.5, 3.0, (num_contexts, 1))
    distance = rng.uniform(0.1, 2.0, (num_contexts, 1))
    student = sharpness * rng.normal(size=(num_contexts, vocab))
    return student, student + distance * rng.normal(size=(num_contexts, vocab))


def audit_vocabulary(
    subjects: list[Subject], size: tuple[int, int] = (1000, 50), seed: int = 0, progress=iter
) -> Part:
    """Return bias, cosine and action variance of uncoupled subjects, with `opd`, from the loss at
    every token. `size`: the number of random contexts and of ids. Float64.
    """
    stats = {}
    with jax.enable_x64(True):
        student, teacher = (VocabTile(jnp.asarray(x)) for x in random_contexts(*size, seed))
        mean_reward = -jnp.mean(reverse_kl(student, teacher))
        for each in progress(subjects):
            found = jax.jit(partial(enumerate_draws, each))(student, teacher, mean_reward)
            stats[each.name] = jax.tree.map(np.asarray, found)
    rows = {name: summarise(found, stats[PLAIN]["variance"]) for name, found in stats.items()}
    return {"num_contexts": size[0], "vocab": size[1], "seed": seed, "rows": rows}


def _probs(tile: VocabTile) -> Float[Array, "n V"]:
    return jnp.where(tile.logits > -jnp.inf, jnp.exp(tile.logprobs), 0)


def reverse_gradient(student: VocabTile, teacher: VocabTile) -> Float[Array, "n V"]:
    """`d KL(student || teacher) / d logits = p_v (log p_v - log q_v - KL)`."""
    gap = jnp.where(student.logits > -jnp.inf, student.logprobs - teacher.logprobs, 0)
    return _probs(student) * (gap - student.expect(gap)[:, None])


def forward_gradient(student: VocabTile, teacher: VocabTile) -> Float[Array, "n V"]:
    """`d KL(teacher || student) / d logits = p_v - q_v`."""
    return _probs(student) - _probs(teacher)


def measure(subject: Subject, student: VocabTile, teacher: VocabTile, mean_reward: Scalar) -> Stats:
    """Return statistics of an uncoupled subject at each context, for `summarise`.

    Closed forms cost O(V) a context: a sampled token's gradient of the logits is `-A_v (e_v - p)`,
    its squared norm `A_v^2 w_v`. The loss that does not depend on the token is differentiated.
    """
    loss, row = subject.unsampled_loss(), TokenInputs(jnp.zeros(len(student.logits), jnp.int32))
    total = lambda logits: jnp.sum(loss(VocabTile(logits), teacher, row)[0])
    probs, p = _probs(subject.drawn_from(student, teacher)), _probs(student)
    advantage = jnp.where(probs > 0, subject.advantages(student, teacher, mean_reward), 0)
    weighted = probs * advantage
    own = -(weighted - p * jnp.sum(weighted, axis=-1, keepdims=True))
    second = jnp.sum(probs * jnp.square(advantage) * score_norms(student), axis=-1)
    variance = (second - jnp.sum(jnp.square(own), axis=-1)) / subject.num_draws
    return _against_exact(own + jax.grad(total)(student.logits), variance, student, teacher)


def enumerate_draws(
    subject: Subject, student: VocabTile, teacher: VocabTile, mean_reward: Scalar
) -> Stats:
    """Return the same statistics as `measure`, from the loss itself, differentiated once for every
    token of a small vocabulary. Extra draws are independent: they divide the variance of one draw.
    """
    n, vocab = student.logits.shape
    repeated = lambda tile: VocabTile(jnp.repeat(tile.logits, vocab, axis=0))
    mean_rewards = jnp.full(n * vocab, mean_reward, student.logits.dtype)
    row = TokenInputs(jnp.tile(jnp.arange(vocab), n), mean_rewards=mean_rewards)
    loss, teachers = subject.with_one_draw().token_loss(), repeated(teacher)
    total = lambda logits: jnp.sum(loss(VocabTile(logits), teachers, row)[0])
    gradient = jax.grad(total)(repeated(student).logits).reshape(n, vocab, vocab)
    probs = _probs(subject.drawn_from(student, teacher))
    # The gradient of a token with probability 0 may be infinite or NaN.
    gradient = jnp.where(probs[:, :, None] > 0, gradient, 0)
    own = jnp.einsum("nv,nvu->nu", probs, gradient)
    # The spread around the mean: the difference of two squares would lose digits.
    variance = jnp.einsum("nv,nvu->n", probs, jnp.square(gradient - own[:, None]))
    return _against_exact(own, variance / subject.num_draws, student, teacher)


def _against_exact(
    own: Float[Array, "n V"], variance: Float[Array, " n"], student: VocabTile, teacher: VocabTile
) -> Stats:
    square = lambda x: jnp.sum(jnp.square(x), axis=-1)
    stats = {"own": square(own), "variance": jnp.maximum(variance, 0)}
    for name, gradient in (("reverse", reverse_gradient), ("forward", forward_gradient)):
        exact = gradient(student, teacher)
        stats |= {name: square(exact), f"to_{name}": square(own - exact)}
        stats[f"dot_{name}"] = jnp.sum(own * exact, axis=-1)
    return stats


def summarise(stats: dict[str, np.ndarray], plain_variance: np.ndarray) -> Part:
    """Summarise a subject over its contexts, whose gradients are stacked as one vector.

    Returned are, against both directions of the KL, `bias` = |expected - exact gradient| / |exact
    gradient| and the `cosine` of the two; `variance`, the mean over contexts; `noise_to_signal`,
    the root of summed variance over summed squared expectation; `variance_ratio`, to that of `opd`,
    `plain_variance [n]`; `worse`, the share of contexts above it. None: undefined.
    """
    total = {name: float(np.sum(values, dtype=np.float64)) for name, values in stats.items()}
    found: Part = {"bias": {}, "cosine": {}}
    # Draws that cancel leave a mean of rounding errors, which has no direction.
    epsilon = np.finfo(stats["own"].dtype).eps
    is_zero = total["own"] <= (64 * epsilon) ** 2 * (total["variance"] + total["own"])
    for name in ("reverse", "forward"):
        exact, norms = total[name], np.sqrt(total["own"] * total[name])
        found["bias"][name] = float(np.sqrt(total[f"to_{name}"] / exact)) if exact else None
        cosine = float(total[f"dot_{name}"] / norms) if norms and not is_zero else None
        found["cosine"][name] = cosine
    found["variance"] = total["variance"] / len(plain_variance)
    found["noise_to_signal"] = None if is_zero else float(np.sqrt(total["variance"] / total["own"]))
    found["variance_ratio"] = total["variance"] / float(np.sum(plain_variance, dtype=np.float64))
    found["worse"] = float(np.mean(stats["variance"] > plain_variance * (1 + 1e-5)))
    return found
