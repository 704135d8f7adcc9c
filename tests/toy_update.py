"""A toy student and teacher, batches of random rows, and their gradients by the real update."""

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
    shape, column = (rows, columns), np.arange(columns)
    lengths, starts = rng.integers(2, columns - 3, rows), rng.integers(0, 3, rows)[:, None]
    segments = ((column >= starts) & (column < starts + lengths[:, None])).astype(np.int32)
    mask = (segments == 1) & (column > starts + 1)
    return TrainBatch(
        tokens=jnp.asarray(rng.integers(0, MODEL.vocab_size, shape), jnp.int32),
        mask=jnp.asarray(mask),
        segment_ids=jnp.asarray(segments),
        behavior_logprobs=jnp.zeros(shape),
    )


@functools.cache
def make_models(dtype):
    """(student, teacher): random parameters."""
    init = jax.jit(lambda seed: init_params(MODEL, jax.random.key(seed), dtype))
    return init(0), init(1)


def scored(batch, teacher, recipe):
    """(batch with the teacher's scores that the recipe reads, teacher head or None)."""
    needs = estimator_of(recipe).teacher
    head = head_of(teacher)
    scores = score(teacher, head, batch, config=MODEL, needs=needs, tile=8)
    return dataclasses.replace(batch, teacher=scores), head if needs == "vocabulary" else None


def gradient(student, batch, head, estimator, dtype, **spec):
    """(loss, gradient, outputs) of a batch."""
    spec = UpdateSpec(MODEL, estimator_of(estimator), dtype, max_completion_length=7, **spec)
    return jax.jit(lambda p, b, h: loss_and_grad(p, b, h, spec)[:3])(student, batch, head)


def relative_difference(left, right):
    """|left - right| / |left| of two trees."""
    one, other = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (left, right)
    )
    return np.linalg.norm(one - other) / np.linalg.norm(one)
