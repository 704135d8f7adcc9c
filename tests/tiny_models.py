"""A two-layer decoder with eleven tokens, batches for it, and the gradient of one update."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from opdjax.engine.scorer import score
from opdjax.engine.update import UpdateSpec, loss_and_grad
from opdjax.estimators import estimator_of
from opdjax.models.decoder import DecoderConfig, head_of, init_params
from opdjax.models.rope import Rope
from opdjax.types import TrainBatch

MODEL = DecoderConfig(
    vocab_size=11,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_size=4,
    intermediate_size=12,
    rope=Rope(1e4),
    norm_epsilon=1e-6,
    ties_embeddings=True,
    has_qk_norm=True,
    has_qkv_bias=False,
    has_output_bias=False,
)


def make_batch(rng, rows=8, columns=9):
    """Rows of several lengths, padded on both sides."""
    shape = (rows, columns)
    lengths = rng.integers(2, columns - 3, rows)
    starts = rng.integers(0, 3, rows)
    column = np.arange(columns)
    segments = ((column >= starts[:, None]) & (column < (starts + lengths)[:, None])).astype(
        np.int32
    )
    mask = (segments == 1) & (column > starts[:, None] + 1)
    return TrainBatch(
        tokens=jnp.asarray(rng.integers(0, MODEL.vocab_size, shape), jnp.int32),
        mask=jnp.asarray(mask),
        segment_ids=jnp.asarray(segments),
        behavior_logprobs=jnp.zeros(shape),
    )


@functools.cache
def make_models(dtype):
    init = jax.jit(lambda seed: init_params(MODEL, jax.random.key(seed), dtype))
    return init(0), init(1)


def in_tiles(estimator):
    """The estimator in tiles of five tokens, several in the smallest batch."""
    return dataclasses.replace(estimator_of(estimator), tile=5)


def scored(batch, teacher, recipe):
    """(the batch with the teacher's scores, the teacher's head or None)."""
    needs = estimator_of(recipe).teacher
    scores = score(teacher, head_of(teacher), batch, config=MODEL, needs=needs, tile=8)
    return dataclasses.replace(batch, teacher=scores), head_of(
        teacher
    ) if needs == "vocabulary" else None


@functools.partial(jax.jit, static_argnums=3)
def _gradient(student, batch, head, spec):
    return loss_and_grad(student, batch, head, spec)[:3]


def gradient(student, batch, head, estimator, dtype, **spec):
    """(loss, gradient, outputs); one program per estimator, dtype and `UpdateSpec` fields."""
    spec = UpdateSpec(MODEL, in_tiles(estimator), dtype, max_completion_length=7, **spec)
    return _gradient(student, batch, head, spec)


def relative_difference(left, right):
    """||left - right|| / ||left|| over all leaves."""
    one, other = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (left, right)
    )
    return np.linalg.norm(one - other) / np.linalg.norm(one)
