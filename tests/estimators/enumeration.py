"""Expectations by enumeration: every token of one context, every sequence of a small tree."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from opdjax.estimators import TOKEN_LOSSES, bind
from opdjax.ops.tile import VocabTile
from opdjax.ops.vocab import TokenInputs


def sample_gradients(name, options, student, teacher, tokens=None, **columns):
    """(gradient with respect to the logits [n, V], outputs) of each token on its own; without
    `tokens` every one of the V.

    A column is one number for all tokens, or one a token.
    """
    tokens = jnp.arange(len(student)) if tokens is None else jnp.asarray(tokens)
    rows = [np.broadcast_to(x, (len(tokens), len(student))) for x in (student, teacher)]
    columns = {
        key: np.broadcast_to(x, (len(tokens), *np.shape(x)[1:])) for key, x in columns.items()
    }
    return _gradients(*rows, TokenInputs(tokens, **columns), name, tuple(options.items()))


@partial(jax.jit, static_argnames=("name", "options"))
def _gradients(student, teacher, columns, name, options):
    def total(logits):
        loss, outputs = TOKEN_LOSSES[name](
            VocabTile(logits), VocabTile(teacher), columns, **dict(options)
        )
        return jnp.sum(loss), outputs

    return jax.grad(total, has_aux=True)(student)


def expected_gradient(name, options, student, teacher, measure=None, **columns):
    """E[grad loss(y)], every y enumerated; y is drawn from the student, or counts `measure` [V]."""
    measure = softmax(student) if measure is None else measure
    return np.asarray(measure) @ sample_gradients(name, options, student, teacher, **columns)[0]


# Exact values in numpy


def log_softmax(logits):
    logits = np.asarray(logits)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def softmax(logits):
    return np.exp(log_softmax(logits))


def reverse_kl(student, teacher):
    """KL(student || teacher)."""
    p, q = log_softmax(student), log_softmax(teacher)
    return np.sum(np.exp(p) * (p - q))


def reverse_kl_gradient(student, teacher):
    """The gradient of KL(student || teacher) with respect to the student's logits."""
    return gradient_of_mean(student, log_softmax(student) - log_softmax(teacher))


def forward_kl_gradient(student, teacher):
    """The gradient of KL(teacher || student) with respect to the student's logits."""
    return softmax(student) - softmax(teacher)


def gradient_of_mean(logits, values):
    """The gradient of E[values], y ~ softmax(logits), with respect to the logits."""
    p = softmax(logits)
    return p * (values - np.sum(p * values, axis=-1, keepdims=True))


def relative_bias(found, exact):
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


# A tree: V = 3, T = 3, token 0 ends the sequence. Parameters are one row of logits per context.

LENGTH, EOS = 3, 0
CONTEXTS = [prefix for n in range(LENGTH) for prefix in itertools.product((1, 2), repeat=n)]
SEQUENCES = [(*prefix, EOS) for prefix in CONTEXTS] + [
    (*prefix, y) for prefix in CONTEXTS if len(prefix) == 2 for y in (1, 2)
]
PAIRS = np.array(list(itertools.product(range(len(SEQUENCES)), repeat=2)))
TOKENS, CONTEXT_OF, MASK = (np.zeros((len(SEQUENCES), LENGTH), kind) for kind in (int, int, bool))
for _row, _sequence in enumerate(SEQUENCES):
    for _t, _token in enumerate(_sequence):
        TOKENS[_row, _t], CONTEXT_OF[_row, _t], MASK[_row, _t] = (
            _token,
            CONTEXTS.index(_sequence[:_t]),
            True,
        )


def token_logprobs(theta):
    """Log-probability [S, T] of every token of every sequence under the table theta [C, V]; 0 where
    masked.
    """
    return np.where(MASK, log_softmax(theta)[CONTEXT_OF, TOKENS], 0)


def sequence_logprobs(theta):
    """Log-probability [S] of every sequence under the table theta [C, V]."""
    return np.sum(token_logprobs(theta), axis=1)


def reach(theta):
    """The probability [C] that a sequence passes through each context."""
    passes = (CONTEXT_OF[:, :, None] == np.arange(len(CONTEXTS))) & MASK[:, :, None]
    return np.exp(sequence_logprobs(theta)) @ passes.any(axis=1)


def gradient_of_expected(theta, reward):
    """The gradient [C, V] of E[reward], of one number per sequence [S], by the score function."""
    scores = np.eye(3)[TOKENS] - softmax(theta)[CONTEXT_OF]
    weights = np.where(MASK, (np.exp(sequence_logprobs(theta)) * reward)[:, None], 0)
    return np.einsum("st,stv,stc->cv", weights, scores, np.eye(len(CONTEXTS))[CONTEXT_OF])


def sequence_gradients(tables, name, options=None, batches=None, **columns):
    """Gradient [N, C, V] of the recipe's loss on each batch of sequences `[N, R]` (by number),
    under fixed_denominator.

    Without `batches` every sequence is a batch of its own. A column is `[S, T]`, one for every
    sequence, or `[N, R, T]`. The recipe is bound and prepared as an update does it, on dense tiles.
    """
    batches = np.arange(len(SEQUENCES))[:, None] if batches is None else batches
    shape = (*batches.shape, LENGTH)
    columns = {
        key: np.asarray(x if np.shape(x)[:2] == shape[:2] else np.asarray(x)[batches])
        for key, x in columns.items()
    }
    student, teacher = (np.asarray(table)[CONTEXT_OF[batches]] for table in tables)
    tokens, mask = TokenInputs(TOKENS[batches], **columns), MASK[batches]
    options = tuple((options or {}).items())
    found = np.asarray(_sequence_gradients(student, teacher, tokens, mask, name, options))
    place = (CONTEXT_OF[batches][..., None] == np.arange(len(CONTEXTS))) & mask[..., None]
    return np.einsum("nrtv,nrtc->ncv", found, place)


@partial(jax.jit, static_argnames=("name", "options"))
def _sequence_gradients(student, teacher, columns, mask, name, options):
    """The gradient [N, R, T, V] of the student's logits of every token."""
    estimator, shape = bind(name, dict(options)), mask.shape
    flat = lambda tree: jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), tree)
    teacher = VocabTile(flat(teacher))
    if estimator.is_coupled:
        stats = estimator.token_stats(VocabTile(flat(student)), teacher, flat(columns))
        stats = jax.tree.map(lambda x: x.reshape(shape), stats)
        segments = jnp.ones(shape[1:], int)
        prepare = lambda *args: estimator.prepare(*args, segments)
        columns = jax.vmap(prepare)(columns, stats, mask)

    def total(logits):
        loss, _ = estimator.token_loss(VocabTile(flat(logits)), teacher, flat(columns))
        return jnp.sum(jnp.where(mask, loss.reshape(shape), 0)) / (shape[1] * LENGTH)

    return jax.grad(total)(student)


def expectation(tables, name, options=None, batches=None, behavior=None, **columns):
    """E[gradient] [C, V] over sequences drawn from the student, or from the table `behavior`."""
    if behavior is not None:
        columns["behavior_logprobs"] = token_logprobs(behavior)
    gradients = sequence_gradients(tables, name, options, batches, **columns)
    return np.tensordot(
        batch_probabilities(tables[0] if behavior is None else behavior, batches), gradients, 1
    )


def batch_probabilities(theta, batches=None):
    probs = np.exp(sequence_logprobs(theta))
    return probs if batches is None else np.prod(probs[batches], axis=1)


def action_variance(tables, name, options=None, **columns):
    """Trace of the covariance of one sequence's gradient."""
    gradients = sequence_gradients(tables, name, options, **columns)
    probs = batch_probabilities(tables[0])
    mean = np.tensordot(probs, gradients, 1)
    return np.tensordot(probs, np.sum(np.square(gradients - mean), axis=(1, 2)), 1)


def exact_gradient(tables, discount):
    """sum_c P(reach c) sum_y grad p(y | c) Q(c, y), Q = -r + discount * cost to go, divided by the
    fixed denominator; by recursion.
    """
    theta, _ = tables
    student_logprobs, teacher_logprobs = map(log_softmax, tables)
    cost = student_logprobs - teacher_logprobs
    for index in reversed(range(len(CONTEXTS))):
        for y in (1, 2):
            if len(CONTEXTS[index]) + 1 < LENGTH:
                child = CONTEXTS.index((*CONTEXTS[index], y))
                cost[index, y] += discount * np.sum(np.exp(student_logprobs[child]) * cost[child])
    return reach(theta)[:, None] * gradient_of_mean(theta, cost) / LENGTH
