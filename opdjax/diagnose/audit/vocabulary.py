"""The audit at random contexts of a small vocabulary: float64, every token enumerated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opdjax.config.recipes import PLAIN
from opdjax.diagnose.audit.contexts import enumerate_draws, summarise
from opdjax.diagnose.audit.subjects import Subject, subject
from opdjax.estimators.divergence import reverse_kl
from opdjax.ops.tile import VocabTile


def random_contexts(num_contexts: int, vocab: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return logits `[n, V]` of flat to peaked students and of near to distant teachers."""
    rng = np.random.default_rng(seed)
    sharpness = rng.uniform(0.5, 3.0, (num_contexts, 1))
    distance = rng.uniform(0.1, 2.0, (num_contexts, 1))
    student = sharpness * rng.normal(size=(num_contexts, vocab))
    return student, student + distance * rng.normal(size=(num_contexts, vocab))


def audit_vocabulary(
    subjects: Sequence[Subject], *, num_contexts: int = 1000, vocab: int = 50, seed: int = 0
) -> dict[str, Any]:
    """Return bias, cosine and action variance of each subject, from its loss at every token."""
    with jax.enable_x64(True):
        student, teacher = (
            VocabTile(jnp.asarray(x)) for x in random_contexts(num_contexts, vocab, seed)
        )
        mean_reward = -jnp.mean(reverse_kl(student, teacher))
        plain = np.asarray(
            jax.jit(partial(enumerate_draws, subject(PLAIN)))(student, teacher)["variance"]
        )
        rows = {}
        for each in subjects:
            stats = jax.jit(partial(enumerate_draws, each))(student, teacher, mean_reward)
            rows[each.name] = summarise(jax.tree.map(np.asarray, stats), plain)
    return {"num_contexts": num_contexts, "vocab": vocab, "seed": seed, "rows": rows}
