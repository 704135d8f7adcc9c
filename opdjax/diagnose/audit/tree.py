"""The audit of estimators that couple tokens, on a tree whose sequences are all enumerated: V = 3,
T = 3, token 0 ends a sequence, float64. The student's parameters are a table with a row of logits
for each prefix; the prepared columns, the recipe's loss and the aggregation are those of training.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opdjax.config.recipes import EXACT, PLAIN, WITH_BASELINE
from opdjax.diagnose.audit.subjects import Part, Progress, Subject, subject
from opdjax.estimators import bind
from opdjax.estimators.losses import AGGREGATIONS, aggregation_weights, count_denominators
from opdjax.ops.tile import VocabTile
from opdjax.ops.vocab import TokenInputs

LENGTH, END = 3, 0
PREFIXES = [prefix for n in range(LENGTH) for prefix in itertools.product((1, 2), repeat=n)]
SEQUENCES = [(*prefix, END) for prefix in PREFIXES]
SEQUENCES += itertools.product((1, 2), repeat=LENGTH)


def _rows(of_sequence) -> np.ndarray:
    """Return one number for each token of each sequence, `[S, T + 1]`; column 0 is the prompt."""
    padded = lambda values: [0, *values, *[0] * (LENGTH - len(values))]
    return np.array([padded(of_sequence(sequence)) for sequence in SEQUENCES])


_TOKENS, _MASK = _rows(list), _rows(lambda sequence: [1] * len(sequence)).astype(bool)
_BEFORE = _rows(lambda s: [PREFIXES.index(s[:t]) for t in range(len(s))])  # prefix of each token
_NO_CAP = {"importance": "prefix_truncate", "importance_cap": 1e6}
_CORRECTIONS = {
    "no correction": {},
    "token_truncate 1.2": {"importance": "token_truncate", "importance_cap": 1.2},
    "token_mask 0.5 to 1.2": {"importance": "token_mask", "importance_cap": 1.2},
    "ppo_clip": {"importance": "ppo_clip"},
    "prefix_truncate 2": {"importance": "prefix_truncate"},
    "prefix ratio, no cap": _NO_CAP,
    "sequence_mask 3": {"importance": "sequence_mask"},
    "sequence ratio, no cap": {"importance": "sequence_mask", "importance_cap": 1e6},
}
_PLAIN, _BASELINE, _EXACT = subject(PLAIN), subject(WITH_BASELINE, baseline="full"), subject(EXACT)
_EXPECTED = {"discount": 1.0, "return_to_go": "expected"}


class TreeCase(NamedTuple):
    """An estimator and the batches that it is measured on."""

    title: str
    subject: Subject
    num_rows: int = 1
    aggregation: str = "fixed_denominator"
    sampled_from: str = "student"  # the table: student, teacher or stale


_stale = partial(TreeCase, sampled_from="stale")
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
    *(_stale(f"stale, {name}", subject(PLAIN, **how)) for name, how in _CORRECTIONS.items()),
    *(
        _stale(f"stale, {name}, baseline full", subject(WITH_BASELINE, **_CORRECTIONS[name]))
        for name in list(_CORRECTIONS)[:3]
    ),
    _stale("stale, exact KL, no correction", _EXACT),
    _stale("stale, exact KL, prefix ratio, no cap", subject(EXACT, **_NO_CAP)),
)


def own_case(own: Subject, aggregation: str) -> TreeCase:
    """Return the case of the config's own recipe: two rows, its aggregation, one draw a context."""
    title = f"two rows, {aggregation}, {own.name}" + ", one draw" * (own.num_draws > 1)
    sampled_from = "student" if own.is_on_policy else "teacher"
    return TreeCase(title, own.with_one_draw(), 2, aggregation, sampled_from)


def audit_tree(more: Sequence[TreeCase] = (), *, seed: int = 0, progress: Progress = iter) -> Part:
    """Return each case's relative bias, and its variance over the squared norm of its expectation.

    `frozen`: bias against the gradient of sum_t KL_t with the distribution of contexts held fixed;
    `sequence`: against that of the KL of whole sequences. A mean that divides by sampled lengths
    has another scale: there the scale is fitted, and the bias is that of the direction. `baseline`:
    the relative change of the expectation through the baseline; None without one.
    """
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        student, teacher, step = map(jnp.asarray, rng.normal(size=(3, len(PREFIXES), 3)))
        tables = {"student": student, "teacher": teacher, "stale": student + 0.5 * step}
        exact, rows, means = _exact_gradients(student, teacher), [], {}
        for case in progress([*CASES, *more]):
            mean, variance = jax.jit(partial(_expected, case))(tables)
            is_fitted = case.num_rows > 1 and case.aggregation != "fixed_denominator"
            row = {"title": case.title, "name": case.subject.name}
            row["variance"] = float(variance / jnp.vdot(mean, mean))
            row |= {name: _misfit(mean, gradient, is_fitted) for name, gradient in exact.items()}
            plain = means.get(case.title.removesuffix(", baseline full"))
            rows.append(row | {"baseline": None if plain is None else _misfit(mean, plain)})
            means[case.title] = mean
    return {"seed": seed, "vocab": 3, "length": LENGTH, "rows": rows}


def _misfit(mean, exact, is_fitted: bool = False) -> float:
    scale = jnp.maximum(jnp.vdot(mean, exact) / jnp.vdot(mean, mean), 0) if is_fitted else 1.0
    return float(jnp.linalg.norm(scale * mean - exact) / jnp.linalg.norm(exact))


def _sequence_logprobs(table) -> jax.Array:
    """Return the log-probability of every sequence under a table `[C, V]`, in nats."""
    logprobs = jax.nn.log_softmax(table, axis=-1)[_BEFORE, _TOKENS]
    return jnp.sum(jnp.where(_MASK, logprobs, 0), axis=1)


def _exact_gradients(student, teacher) -> dict[str, jax.Array]:
    """Return two exact gradients `[C, V]`: `frozen` and `sequence` of `audit_tree`."""
    probs = np.exp(_sequence_logprobs(student))
    visits = np.bincount(_BEFORE[_MASK], (probs[:, None] * _MASK)[_MASK])

    kl = lambda p, q: jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    def frozen(table):
        return jnp.sum(visits * kl(jax.nn.log_softmax(table), jax.nn.log_softmax(teacher)))

    def sequence(table):
        return kl(_sequence_logprobs(table), _sequence_logprobs(teacher))

    return {of.__name__: jax.grad(of)(student) / LENGTH for of in (frozen, sequence)}


def _expected(case: TreeCase, tables: dict[str, jax.Array]):
    """Return (expected gradient `[C, V]` over all batches, its variance summed over parameters)."""
    batches = jnp.array(list(itertools.product(range(len(SEQUENCES)), repeat=case.num_rows)))
    logprobs = _sequence_logprobs(tables[case.sampled_from])
    probs = jnp.exp(jnp.sum(logprobs[batches], axis=1))
    gradients = jax.vmap(partial(_gradient, case, tables))(batches)
    mean = jnp.einsum("n,ncv->cv", probs, gradients)
    return mean, jnp.einsum("n,ncv->", probs, jnp.square(gradients - mean))


def _gradient(case: TreeCase, tables: dict[str, jax.Array], rows):
    """Return the gradient `[C, V]` of the case's loss on the sequences with these numbers."""
    tokens, mask, before = (jnp.asarray(x)[rows] for x in (_TOKENS, _MASK, _BEFORE))
    segments = jnp.ones_like(tokens)
    denominators = count_denominators(mask, segments, LENGTH)
    weights = aggregation_weights(mask, segments, case.aggregation, denominators)
    estimator = bind(case.subject.recipe, case.subject.options)
    at = lambda table: VocabTile(table[before.reshape(-1)])
    flat = lambda tree: jax.tree.map(lambda x: x.reshape(-1), tree)
    student, teacher = tables["student"], at(tables["teacher"])
    logprobs = at(tables[case.sampled_from]).logprob(tokens.reshape(-1)).reshape(tokens.shape)
    columns = TokenInputs(tokens, behavior_logprobs=logprobs)
    if estimator.is_coupled:
        stats = estimator.token_stats(at(student), teacher, flat(columns))
        stats = jax.tree.map(lambda x: x.reshape(tokens.shape), stats)
        columns = estimator.prepare(columns, stats, mask, segments)
    losses = lambda table: estimator.token_loss(at(table), teacher, flat(columns))[0]
    return jax.grad(lambda table: jnp.sum(weights.reshape(-1) * losses(table)))(student)
