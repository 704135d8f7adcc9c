"""The audit of what couples tokens, on a tree small enough to enumerate every sequence: V = 3, T =
3, token 0 ends it.

The student is a table: a row of logits for each prefix, its parameters. Everything else is real:
the columns that are prepared, the recipe's loss, the aggregation. Float64.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opdjax.diagnose.audit.subjects import Subject, subject
from opdjax.estimators import bind
from opdjax.estimators.losses import AGGREGATIONS, aggregation_weights, count_denominators
from opdjax.ops.tile import VocabTile
from opdjax.ops.vocab import TokenInputs

LENGTH, END = 3, 0
PREFIXES = [prefix for n in range(LENGTH) for prefix in itertools.product((1, 2), repeat=n)]
SEQUENCES = [(*prefix, END) for prefix in PREFIXES] + [
    (*prefix, y) for prefix in PREFIXES if len(prefix) == LENGTH - 1 for y in (1, 2)
]


def _encode(tokens):
    """(tokens [T + 1], mask, number of the prefix before each token [T + 1]); column 0 is the
    prompt.
    """
    row, mask, before = (
        np.zeros(LENGTH + 1, int),
        np.zeros(LENGTH + 1, bool),
        np.zeros(LENGTH + 1, int),
    )
    for t, token in enumerate(tokens):
        row[t + 1], mask[t + 1], before[t + 1] = token, True, PREFIXES.index(tokens[:t])
    return row, mask, before


_ENCODED = [np.stack(parts) for parts in zip(*map(_encode, SEQUENCES))]


def sequence_logprobs(table) -> jax.Array:
    """Log-probability of every sequence under a table `[C, V]`."""
    logprobs = jax.nn.log_softmax(table, axis=-1)
    return jnp.stack(
        [sum(logprobs[PREFIXES.index(s[:t]), y] for t, y in enumerate(s)) for s in SEQUENCES]
    )


def gradient_of(subject: Subject, student, teacher, behavior, rows, aggregation: str):
    """Gradient `[C, V]` of the subject's loss on the sequences with these numbers, drawn from the
    table `behavior`.
    """
    tokens, mask, before = (jnp.asarray(x)[rows] for x in _ENCODED)
    segments = jnp.ones_like(tokens)
    weights = aggregation_weights(
        mask, segments, aggregation, count_denominators(mask, segments, LENGTH)
    )
    estimator = bind(subject.recipe, subject.options)
    at = lambda table: VocabTile(table[before.reshape(-1)])
    flat = lambda tree: jax.tree.map(lambda x: x.reshape(-1), tree)
    columns = TokenInputs(
        tokens, behavior_logprob=at(behavior).logprob(tokens.reshape(-1)).reshape(tokens.shape)
    )
    if estimator.is_coupled:
        stats = estimator.token_stats(at(student), at(teacher), flat(columns))
        stats = jax.tree.map(lambda x: x.reshape(tokens.shape), stats)
        columns = estimator.prepare(columns, stats, mask, segments)

    def loss(table):
        losses, _ = estimator.token_loss(at(table), at(teacher), flat(columns))
        return jnp.sum(weights.reshape(-1) * losses)

    return jax.grad(loss)(student)


def exact_gradients(student, teacher) -> dict[str, jax.Array]:
    """`frozen`: of sum_t KL_t with the distribution of contexts held fixed; `sequence`: of the KL
    of whole sequences.
    """
    probs = np.exp(sequence_logprobs(student))
    reach = np.array(
        [
            sum(p for p, s in zip(probs, SEQUENCES) if s[: len(c)] == c and len(s) > len(c))
            for c in PREFIXES
        ]
    )

    def frozen(table):
        p, q = jax.nn.log_softmax(table, axis=-1), jax.nn.log_softmax(teacher, axis=-1)
        return jnp.sum(reach * jnp.sum(jnp.exp(p) * (p - q), axis=-1))

    def whole(table):
        p = sequence_logprobs(table)
        return jnp.sum(jnp.exp(p) * (p - sequence_logprobs(teacher)))

    return {
        "frozen": jax.grad(frozen)(student) / LENGTH,
        "sequence": jax.grad(whole)(student) / LENGTH,
    }


def expected(
    subject: Subject,
    student,
    teacher,
    behavior,
    *,
    num_rows: int = 1,
    aggregation: str = "fixed_denominator",
):
    """(expected gradient [C, V], its variance summed over parameters) of batches of `num_rows`
    sequences, all enumerated.
    """
    batches = jnp.array(list(itertools.product(range(len(SEQUENCES)), repeat=num_rows)))
    logprobs = sequence_logprobs(behavior)
    probs = jnp.exp(jnp.sum(logprobs[batches], axis=1))
    gradients = jax.vmap(
        lambda rows: gradient_of(subject, student, teacher, behavior, rows, aggregation)
    )(batches)
    mean = jnp.einsum("n,ncv->cv", probs, gradients)
    return mean, jnp.einsum("n,ncv->", probs, jnp.square(gradients - mean))


_CAP = 1.2
_STALE = (
    ("no correction", {}),
    (f"token_truncate {_CAP}", {"importance": "token_truncate", "importance_cap": _CAP}),
    (f"token_mask 0.5 to {_CAP}", {"importance": "token_mask", "importance_cap": _CAP}),
    ("ppo_clip", {"importance": "ppo_clip"}),
    ("prefix_truncate 2", {"importance": "prefix_truncate"}),
    ("prefix ratio, no cap", {"importance": "prefix_truncate", "importance_cap": 1e6}),
    ("sequence_mask 3", {"importance": "sequence_mask"}),
    ("sequence ratio, no cap", {"importance": "sequence_mask", "importance_cap": 1e6}),
)
_FREE = {"importance": "prefix_truncate", "importance_cap": 1e6}
# What is worth knowing of coupled options: (title, subject, rows a batch, aggregation, are the data
# stale).
CASES = (
    ("token-level credit", subject("opd"), 1, "fixed_denominator", False),
    ("baseline full", subject("vopd", baseline="full"), 1, "fixed_denominator", False),
    ("reward to go, as drawn", subject("opd", discount=1.0), 1, "fixed_denominator", False),
    (
        "reward to go, -KL for later rewards",
        subject("opd", discount=1.0, return_to_go="expected"),
        1,
        "fixed_denominator",
        False,
    ),
    (
        "the same and baseline full",
        subject("vopd", baseline="full", discount=1.0, return_to_go="expected"),
        1,
        "fixed_denominator",
        False,
    ),
    ("prefix weight 0.5", subject("opd", prefix_weight=0.5), 1, "fixed_denominator", False),
    ("exact KL", subject("full_kl"), 1, "fixed_denominator", False),
    (
        "two rows, baseline batch_mean",
        subject("vopd", baseline="batch_mean"),
        2,
        "fixed_denominator",
        False,
    ),
    *((f"two rows, {kind}", subject("opd"), 2, kind, False) for kind in AGGREGATIONS),
    *(
        (f"two rows, {kind}, baseline full", subject("vopd", baseline="full"), 2, kind, False)
        for kind in AGGREGATIONS
    ),
    *(
        (f"stale, {name}", subject("opd", **options), 1, "fixed_denominator", True)
        for name, options in _STALE
    ),
    *(
        (f"stale, {name}, baseline full", subject("vopd", **options), 1, "fixed_denominator", True)
        for name, options in _STALE[:3]
    ),
    ("stale, exact KL, no correction", subject("full_kl"), 1, "fixed_denominator", True),
    (
        "stale, exact KL, prefix ratio, no cap",
        subject("full_kl", **_FREE),
        1,
        "fixed_denominator",
        True,
    ),
)


def audit_tree(*, seed: int = 0) -> dict[str, Any]:
    """Bias of each case, relative, and its variance over the squared norm of its expectation.

    `frozen`: against the gradient with the distribution of contexts held fixed; `sequence`: against
    that of the sequence KL. A batch mean divides by what was sampled and has another size by
    intent: there the size is fitted and the direction judged. `baseline`: what the baseline adds to
    the expectation, relative to the same without one.
    """
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        student, teacher, step = (
            jnp.asarray(rng.normal(size=(len(PREFIXES), 3))) for _ in range(3)
        )
        stale = student + 0.5 * step  # the table that stale data were drawn from
        exact, rows, without = exact_gradients(student, teacher), [], {}
        for title, case, num_rows, aggregation, is_stale in CASES:
            run = jax.jit(partial(expected, case, num_rows=num_rows, aggregation=aggregation))
            mean, variance = run(student, teacher, stale if is_stale else student)
            is_fitted = num_rows > 1 and aggregation != "fixed_denominator"
            row = {
                "title": title,
                "name": case.name,
                "variance": float(variance / jnp.vdot(mean, mean)),
            }
            row |= {name: _misfit(mean, gradient, is_fitted) for name, gradient in exact.items()}
            without[title] = mean
            plain = without.get(title.removesuffix(", baseline full"))
            row["baseline"] = (
                None if plain is mean or plain is None else _misfit(mean, plain, False)
            )
            rows.append(row)
    return {"seed": seed, "vocab": 3, "length": LENGTH, "rows": rows}


def _misfit(mean, exact, is_fitted: bool) -> float:
    scale = jnp.maximum(jnp.vdot(mean, exact) / jnp.vdot(mean, mean), 0) if is_fitted else 1.0
    return float(jnp.linalg.norm(scale * mean - exact) / jnp.linalg.norm(exact))
