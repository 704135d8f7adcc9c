"""Fused attention against materialised scores: padded and packed rows, grouped heads, a mesh, and
refusals.
"""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import MODEL

from opdjax.config import TrainConfig
from opdjax.config.validation import ConfigError
from opdjax.models import attention, decoder
from opdjax.models.attention import (
    NO_WINDOW,
    attend_within_segments,
    fused_attention,
    is_attended,
    masked_attention,
    segment_distance,
    splash_attention,
)
from opdjax.ops.sharding import make_mesh
from opdjax.rollouts.setup import attention_of

interpreted = partial(splash_attention, interpret=True)


def packed_rows(rows, columns):
    """Rows of three segments, padded on the left or on both sides; segment ids need not ascend."""
    segments = np.zeros((rows, columns), np.int32)
    for row in range(rows):
        start = row * columns // 8
        bounds = [start, start + columns // 5, start + columns // 2, columns - 3 * (row % 2)]
        for number, (low, high) in enumerate(itertools.pairwise(bounds)):
            segments[row, low:high] = (2, 1, 5)[number]
    return segments


def inputs(rng, rows, columns, heads, kv_heads, size):
    """(q, k, v, weights of the outputs, segment ids)."""
    shapes = [(rows, columns, count, size) for count in (heads, kv_heads, kv_heads)] + [
        (rows, columns, heads * size)
    ]
    return *(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes), jnp.asarray(
        packed_rows(rows, columns)
    )


def value_and_grads(attend, q, k, v, weights, segments):
    """Outputs, and gradients of a weighted sum of the live outputs by q, k and v."""

    def total(q, k, v):
        out = attend(q, k, v)
        return jnp.sum(jnp.where(segments[..., None] > 0, out * weights, 0)), out

    grads, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return jnp.where(segments[..., None] > 0, out, 0), *grads


def assert_equal_to_xla(attend, arguments, *windows):
    segments = arguments[-1]
    plain = attend_within_segments(segments, "xla", None, *windows)
    expected = jax.jit(partial(value_and_grads, plain))(*arguments)
    found = jax.jit(partial(value_and_grads, partial(attend, segment_ids=segments)))(*arguments)
    for name, one, other in zip(("output", "dq", "dk", "dv"), found, expected):
        np.testing.assert_allclose(one, other, atol=2e-5, err_msg=name)
        assert np.abs(other).max() > 0.1


def test_splash_equals_materialised_scores(rng):
    """300 columns are padded to three blocks of 128; four query heads share two key heads."""
    assert_equal_to_xla(partial(interpreted, mesh=None), inputs(rng, 2, 300, 4, 2, 64))


def test_splash_with_a_window_equals_materialised_scores(rng):
    attend = partial(interpreted, mesh=None, window=30)
    assert_equal_to_xla(attend, inputs(rng, 2, 150, 4, 2, 64), (30,))


@pytest.mark.parametrize(
    ("rows", "kv_heads"),
    [(4, 2), pytest.param(3, 1, marks=pytest.mark.long)],
    ids=["split", "what-does-not-divide"],
)
def test_splash_over_a_mesh_equals_one_device(rows, kv_heads, rng):
    assert_equal_to_xla(
        partial(interpreted, mesh=make_mesh(2, 2, 2)), inputs(rng, rows, 20, 4, kv_heads, 64)
    )


@pytest.mark.long
@pytest.mark.parametrize("windows", [(), (7, 100)], ids=["plain", "windows"])
def test_the_decoder_with_splash_is_the_decoder(rng, monkeypatch, windows):
    """`dots` keeps the kernel's output, so that the backward pass does not run the kernel again."""
    monkeypatch.setattr(attention, "splash_attention", interpreted)
    plain = dataclasses.replace(
        MODEL,
        vocab_size=31,
        hidden_size=16,
        head_size=64,
        intermediate_size=8,
        layer_windows=windows,
    )
    params = jax.jit(decoder.init_params, static_argnums=0)(plain, jax.random.key(0))
    tokens, segments = rng.integers(0, 31, (2, 40)), packed_rows(2, 40)

    def states(params, config, remat="dots"):
        return jnp.where(
            segments[..., None] > 0,
            decoder.forward(params, config, tokens, segments, remat=remat, mesh=make_mesh(1)),
            0,
        )

    fused = dataclasses.replace(plain, attention="splash")
    outputs = [
        jax.jit(
            jax.value_and_grad(lambda p, c: jnp.sum(states(p, c) ** 3), argnums=0), static_argnums=1
        )(params, c)
        for c in (plain, fused)
    ]
    # Relative to the norm of each array: its small entries are differences of large ones.
    for one, other in zip(*map(jax.tree.leaves, outputs)):
        assert np.linalg.norm(one - other) <= 1e-4 * np.linalg.norm(one)
    residuals = jax.tree.leaves(
        jax.eval_shape(lambda p: jax.vjp(partial(states, config=fused), p)[1], params)
    )
    assert (2, 2, 2, 128, 64) in {leaf.shape for leaf in residuals}  # [L, B, N, T padded, H]


@pytest.mark.parametrize("columns", [pytest.param(12, marks=pytest.mark.long), 13])
def test_what_cudnn_is_given_is_the_same_attention(columns, rng):
    """The arguments of the cuDNN call, computed by XLA; lengths that cuDNN refuses are padded."""
    q, k, v, _, segments = inputs(rng, 3, columns, 4, 2, 16)
    columns = jnp.arange(columns)
    mask = is_attended(segment_distance(columns, segments, columns, segments), NO_WINDOW)
    live = np.asarray(segments) > 0
    found = fused_attention(q, k, v, mask, implementation="xla")
    np.testing.assert_allclose(found[live], masked_attention(q, k, v, mask)[live], atol=1e-5)


def test_cudnn_is_called_forward_and_backward(rng, monkeypatch):
    """Lowered for a GPU, without one: rows of odd length, bfloat16."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    *arguments, segments = inputs(rng, 2, 13, 4, 2, 64)
    arguments = [x.astype(jnp.bfloat16) for x in arguments]
    run = jax.jit(
        partial(value_and_grads, attend_within_segments(segments, "cudnn"), segments=segments)
    )
    lowered = run.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax" in lowered
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in lowered


@pytest.mark.parametrize(
    ("asked", "backend", "dtype", "head_size", "found"),
    [
        ("auto", "cpu", "auto", 64, "xla"),
        ("auto", "gpu", "auto", 64, "xla"),
        ("auto", "tpu", "auto", 128, "splash"),
        ("auto", "tpu", "auto", 80, "xla"),
        ("xla", "tpu", "auto", 128, "xla"),
        ("cudnn", "gpu", "auto", 128, "cudnn"),
        (
            "splash",
            "cpu",
            "auto",
            64,
            "train.attention is 'splash'; expected auto or xla: splash attention needs a TPU, "
            "this is a cpu",
        ),
        (
            "splash",
            "tpu",
            "auto",
            80,
            r"auto or xla: splash needs heads of \(64, 128, 256\), student's are of 80",
        ),
        (
            "cudnn",
            "cpu",
            "auto",
            64,
            "train.attention is 'cudnn'; expected auto or xla: cuDNN needs an NVIDIA GPU, this "
            "is a cpu",
        ),
        ("cudnn", "gpu", "float32", 64, "cuDNN computes in bfloat16, train.dtype is float32"),
        (
            "cudnn",
            "gpu",
            "auto",
            256,
            "cuDNN needs heads of 8 to 128 in steps of 8, student's are of 256",
        ),
    ],
)
def test_what_runs_where(asked, backend, dtype, head_size, found, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    settings = TrainConfig(dtype=dtype, attention=asked)
    if found in ("xla", "cudnn", "splash"):
        assert attention_of(settings, head_size, "student") == found
        return
    with pytest.raises(ConfigError, match=found):
        attention_of(settings, head_size, "student")
