"""The audit of estimators that couple tokens, on a tree whose sequences are all enumerated.

V = 3, T = 3, and token 0 ends a sequence. The student's parameters are a table with a row of logits
for each prefix; the prepared columns, the recipe's loss and the aggregation are those of training.
Float64.
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opdjax.config.recipes import EXACT, PLAIN, WITH_BASELINE
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
    """Return (tokens, mask, number of the prefix before each token), each `[T + 1]`.

    Column 0 is the prompt.
    """
    shape = LENGTH + 1
    row, mask, before = np.zeros(shape, int), np.zeros(shape, bool), np.zeros(shape, int)
    for t, token in enumerate(tokens):
        row[t + 1], mask[t + 1], before[t + 1] = token, True, PREFIXES.index(tokens[:t])
    return row, mask, before


_ENCODED = [np.stack(parts) for parts in zip(*map(_encode, SEQUENCES))]


def sequence_logprobs(table) -> jax.Array:
    """Return the log-probability of every sequence under a table `[C, V]`, in nats."""
    logprobs = jax.nn.log_softmax(table, axis=-1)
    return jnp.stack(
        [sum(logprobs[PREFIXES.index(s[:t]), y] for t, y in enumerate(s)) for s in SEQUENCES]
    )


def gradient_of(subject: Subject, student, teacher, behavior, rows, aggregation: str):
    """Return the gradient `[C, V]` of the subject's loss on a batch of sequences.

    `rows`: the numbers of the sequences, sampled from the table `behavior`.
    """
    tokens, mask, before = (jnp.asarray(x)[rows] for x in _ENCODED)
    segments = jnp.ones_like(tokens)
    denominators = count_denominators(mask, segments, LENGTH)
    weights = aggregation_weights(mask, segments, aggregation, denominators)
    estimator = bind(subject.recipe, subject.options)
    at = lambda table: VocabTile(table[before.reshape(-1)])
    flat = lambda tree: jax.tree.map(lambda x: x.reshape(-1), tree)
    logprobs = at(behavior).logprob(tokens.reshape(-1)).reshape(tokens.shape)
    columns = TokenInputs(tokens, behavior_logprobs=logprobs)
    if estimator.is_coupled:
        stats = estimator.token_stats(at(student), at(teacher), flat(columns))
        stats = jax.tree.map(lambda x: x.reshape(tokens.shape), stats)
        columns = estimator.prepare(columns, stats, mask, segments)

    def loss(table):
        losses, _ = estimator.token_loss(at(table), at(teacher), flat(columns))
        return jnp.sum(weights.reshape(-1) * losses)

    return jax.grad(loss)(student)


def exact_gradients(student, teacher) -> dict[str, jax.Array]:
    """Return two exact gradients `[C, V]`.

    `frozen`: of sum_t KL_t with the distribution of contexts held fixed. `sequence`: of the KL of
    whole sequences.
    """
    probs = np.exp(sequence_logprobs(student))
    passes_through = lambda sequence, prefix: sequence[: len(prefix)] == prefix != sequence
    visits = np.array(
        [sum(p for p, s in zip(probs, SEQUENCES) if passes_through(s, c)) for c in PREFIXES]
    )

    def frozen(table):
        p, q = jax.nn.log_softmax(table, axis=-1), jax.nn.log_softmax(teacher, axis=-1)
        return jnp.sum(visits * jnp.sum(jnp.exp(p) * (p - q), axis=-1))

    def whole(table):
        p = sequence_logprobs(table)
        return jnp.sum(jnp.exp(p) * (p - sequence_logprobs(teacher)))

    gradients = {"frozen": jax.grad(frozen)(student), "sequence": jax.grad(whole)(student)}
    return {name: gradient / LENGTH for name, gradient in gradients.items()}


def expected(
    subject: Subject,
    student,
    teacher,
    behavior,
    *,
    num_rows: int = 1,
    aggregation: str = "fixed_denominator",
):
    """Return (expected gradient [C, V], its variance summed over parameters).

    The expectation is over all batches of `num_rows` sequences.
    """
    batches = jnp.array(list(itertools.product(range(len(SEQUENCES)), repeat=num_rows)))
    logprobs = sequence_logprobs(behavior)
    probs = jnp.exp(jnp.sum(logprobs[batches], axis=1))
    gradients = jax.vmap(
        lambda rows: gradient_of(subject, student, teacher, behavior, rows, aggregation)
    )(batches)
    mean = jnp.einsum("n,ncv->cv", probs, gradients)
    return mean, jnp.einsum("n,ncv->", probs, jnp.square(gradients - mean))


@dataclasses.dataclass(frozen=True)
class TreeCase:
    """An estimator and the batches that it is measured on."""

    title: str
    subject: Subject
    num_rows: int = 1
    aggregation: str = "fixed_denominator"
    is_stale: bool = False  # the data was sampled by another table


_CAP = 1.2
_NO_CAP = {"importance": "prefix_truncate", "importance_cap": 1e6}
_CORRECTIONS = {
    "no correction": {},
    f"token_truncate {_CAP}": {"importance": "token_truncate", "importance_cap": _CAP},
    f"token_mask 0.5 to {_CAP}": {"importance": "token_mask", "importance_cap": _CAP},
    "ppo_clip": {"importance": "ppo_clip"},
    "prefix_truncate 2": {"importance": "prefix_truncate"},
    "prefix ratio, no cap": _NO_CAP,
    "sequence_mask 3": {"importance": "sequence_mask"},
    "sequence ratio, no cap": {"importance": "sequence_mask", "importance_cap": 1e6},
}
_ALSO_WITH_BASELINE = tuple(_CORRECTIONS)[:3]
_PLAIN, _BASELINE, _EXACT = subject(PLAIN), subject(WITH_BASELINE, baseline="full"), subject(EXACT)
_EXPECTED = {"discount": 1.0, "return_to_go": "expected"}
CASES = (
    TreeCase("token-level credit", _PLAIN),
    TreeCase("baseline full", _BASELINE),
    TreeCase("sampled reward to go", subject(PLAIN, discount=1.0)),
    TreeCase("reward to go, -KL for later rewards", subject(PLAIN, **_EXPECTED)),
    TreeCase("the same with baseline full", subject(WITH_BASELINE, baseline="full", **_EXPECTED)),
    TreeCase("prefix weight 0.5", subject(PLAIN, prefix_weight=0.5)),
    TreeCase("exact KL", _EXACT),
    TreeCase("two rows, baseline batch_mean", subject(WITH_BASELINE, baseline="batch_mean"), 2),
    *(TreeCase(f"two rows, {kind}", _PLAIN, 2, kind) for kind in AGGREGATIONS),
    *(TreeCase(f"two rows, {kind}, baseline full", _BASELINE, 2, kind) for kind in AGGREGATIONS),
    *(
        TreeCase(f"stale, {name}", subject(PLAIN, **options), is_stale=True)
        for name, options in _CORRECTIONS.items()
    ),
    *(
        TreeCase(
            f"stale, {name}, baseline full",
            subject(WITH_BASELINE, **_CORRECTIONS[name]),
            is_stale=True,
        )
        for name in _ALSO_WITH_BASELINE
    ),
    TreeCase("stale, exact KL, no correction", _EXACT, is_stale=True),
    TreeCase("stale, exact KL, prefix ratio, no cap", subject(EXACT, **_NO_CAP), is_stale=True),
)


def audit_tree(*, seed: int = 0) -> dict[str, Any]:
    """Return each case's relative bias, and its variance over the squared norm of its expectation.

    `frozen`: bias against the gradient with the distribution of contexts held fixed; `sequence`:
    against that of the sequence KL. A mean over a batch divides by the sampled lengths, so its
    gradient has another scale: there the scale is fitted, and the bias measures the direction.
    `baseline`: the relative change of the expectation through the baseline; None without one.
    """
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        tables = rng.normal(size=(3, len(PREFIXES), 3))
        student, teacher, step = map(jnp.asarray, tables)
        stale = student + 0.5 * step  # the table that sampled the stale data
        exact, rows, means = exact_gradients(student, teacher), [], {}
        for case in CASES:
            run = jax.jit(
                partial(
                    expected, case.subject, num_rows=case.num_rows, aggregation=case.aggregation
                )
            )
            mean, variance = run(student, teacher, stale if case.is_stale else student)
            is_fitted = case.num_rows > 1 and case.aggregation != "fixed_denominator"
            means[case.title] = mean
            plain = means.get(case.title.removesuffix(", baseline full"))
            has_plain = plain is not None and plain is not mean
            row = {
                "title": case.title,
                "name": case.subject.name,
                "variance": float(variance / jnp.vdot(mean, mean)),
            }
            row |= {name: _misfit(mean, gradient, is_fitted) for name, gradient in exact.items()}
            row["baseline"] = _misfit(mean, plain, False) if has_plain else None
            rows.append(row)
    return {"seed": seed, "vocab": 3, "length": LENGTH, "rows": rows}


def _misfit(mean, exact, is_fitted: bool) -> float:
    scale = jnp.maximum(jnp.vdot(mean, exact) / jnp.vdot(mean, mean), 0) if is_fitted else 1.0
    return float(jnp.linalg.norm(scale * mean - exact) / jnp.linalg.norm(exact))
