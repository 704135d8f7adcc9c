"""Masked and per-sequence reductions: hand-worked numbers, and garbage in masked slots has no
effect.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from opdjax.ops.masked import (
    masked_mean,
    masked_quantiles,
    masked_std,
    masked_sum,
    reverse_discounted_sum,
    sequence_index,
    sequence_total,
    zero_where_masked,
)

X = jnp.array([[1.0, 2.0, 6.0], [3.0, 100.0, -7.0]])
MASK = jnp.array([[True, True, False], [True, False, True]])  # keeps 1, 2, 3, -7

# First row: two sequences and padding. Second row: a sequence, padding, and another sequence.
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 0, 2, 2, 2, 2, 3]])
VALUES = jnp.array([[1.0, 2, 4, 8, 16, 32, 64, 128], [1, 2, 4, 8, 16, 32, 64, 128]])
LIVE = jnp.array([[0, 1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 1, 0, 1, 0, 1]], bool)

JITS = pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["without_jit", "with_jit"])


@JITS
def test_reductions_by_hand(jit):
    np.testing.assert_array_equal(jit(zero_where_masked)(X, MASK), [[1, 2, 0], [3, 0, -7]])
    assert jit(masked_sum)(X, MASK) == -1
    np.testing.assert_array_equal(jit(partial(masked_sum, axis=1))(X, MASK), [3, -4])
    np.testing.assert_array_equal(jit(partial(masked_sum, axis=0))(X, MASK), [4, 2, -7])
    assert jit(masked_mean)(X, MASK) == -0.25
    np.testing.assert_array_equal(jit(partial(masked_mean, axis=1))(X, MASK), [1.5, -2])
    # Squared deviations from -1/4: 25/16, 81/16, 169/16, 729/16.
    np.testing.assert_allclose(jit(masked_std)(X, MASK), np.sqrt(1004 / 16 / 4), rtol=1e-6)


@JITS
def test_nothing_unmasked_gives_zero(jit):
    nothing, nan = jnp.zeros_like(MASK), jnp.full_like(X, jnp.nan)
    for reduce in (masked_sum, masked_mean, masked_std):
        value, gradient = jit(jax.value_and_grad(reduce))(nan, nothing)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)
    np.testing.assert_array_equal(
        jit(partial(masked_mean, axis=1))(X, MASK.at[0].set(False)), [0, -2]
    )


def test_equal_entries_have_no_spread():
    value, gradient = jax.value_and_grad(masked_std)(
        jnp.array([2.0, 2.0, jnp.nan]), jnp.array([True, True, False])
    )
    assert value == 0
    assert np.all(np.isfinite(gradient))


def test_sums_are_taken_in_float32():
    ones = jnp.ones(4096, jnp.bfloat16)  # a bfloat16 sum stops at 256
    mask = jnp.arange(4096) % 4 != 0
    assert masked_sum(ones, mask) == 3072
    assert masked_sum(ones, mask).dtype == jnp.float32
    assert masked_mean(ones, mask) == 1


def test_sequence_index_by_hand():
    expected = [[0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 1, 2, 2, 2, 2, 3]]
    np.testing.assert_array_equal(sequence_index(SEGMENTS), expected)
    # An id that occurs again after another one is a new sequence.
    np.testing.assert_array_equal(
        sequence_index(jnp.array([[5, 5, 1, 5], [0, 0, 0, 0], [4, 3, 2, 1]])),
        [[0, 0, 1, 2], [0] * 4, [0, 1, 2, 3]],
    )


@JITS
def test_sequence_total_by_hand(jit):
    expected = [[7, 7, 7, 56, 56, 56, 192, 192], [3, 3, 4, 120, 120, 120, 120, 128]]
    np.testing.assert_array_equal(jit(sequence_total)(VALUES, SEGMENTS), expected)
    np.testing.assert_array_equal(
        jit(sequence_total)(jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[1, 2, 1]])), [[1, 2, 4]]
    )


def test_sequence_total_gradient_stays_in_the_sequence():
    gradient = jax.grad(
        lambda x: sequence_total(x, SEGMENTS)[0, 4] + 10 * sequence_total(x, SEGMENTS)[1, 0]
    )(VALUES)
    np.testing.assert_array_equal(gradient, [[0, 0, 0, 1, 1, 1, 0, 0], [10, 10, 0, 0, 0, 0, 0, 0]])


@JITS
@pytest.mark.parametrize(
    ("discount", "expected"),
    [
        (0.0, [[0, 2, 4, 0, 16, 32, 0, 0], [1, 2, 0, 8, 0, 32, 0, 128]]),
        # Row 1: the masked column 4 neither resets nor decays, so column 3 sees 8 + 32 / 2.
        (0.5, [[0, 4, 4, 0, 32, 32, 0, 0], [2, 2, 0, 24, 0, 32, 0, 128]]),
        (1.0, [[0, 6, 4, 0, 48, 32, 0, 0], [3, 2, 0, 40, 0, 32, 0, 128]]),
    ],
)
def test_reverse_discounted_sum_by_hand(jit, discount, expected):
    np.testing.assert_array_equal(
        jit(partial(reverse_discounted_sum, discount=discount))(VALUES, LIVE, SEGMENTS), expected
    )


def test_reverse_discounted_sum_across_segment_zero():
    """The function treats columns of segment 0 as a sequence: nothing flows in or out."""
    everything = jnp.ones((1, 5), bool)
    sums = reverse_discounted_sum(
        jnp.array([[1.0, 2, 4, 8, 16]]), everything, jnp.array([[1, 1, 0, 0, 1]]), 1.0
    )
    np.testing.assert_array_equal(sums, [[3, 2, 12, 8, 16]])


def test_reverse_discounted_sum_gradient_by_hand():
    gradient = jax.grad(lambda x: reverse_discounted_sum(x, LIVE, SEGMENTS, 0.5)[1, 3])(VALUES)
    np.testing.assert_array_equal(gradient, [[0] * 8, [0, 0, 0, 1, 0, 0.5, 0, 0]])


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -1e30])
@pytest.mark.parametrize(
    "reduce",
    [
        lambda x: masked_sum(x, LIVE),
        lambda x: masked_mean(x, LIVE),
        lambda x: jnp.sum(masked_mean(x, LIVE, axis=1) ** 2),
        lambda x: masked_std(x, LIVE),
        lambda x: jnp.sum(reverse_discounted_sum(x, LIVE, SEGMENTS, 0.5) ** 2),
        lambda x: jnp.sum(sequence_total(zero_where_masked(x, LIVE), SEGMENTS) ** 2),
    ],
    ids=["sum", "mean", "row_mean", "std", "discounted", "total"],
)
def test_garbage_in_masked_slots_changes_neither_value_nor_gradient(reduce, garbage):
    clean = jax.value_and_grad(reduce)(VALUES)
    dirty = jax.value_and_grad(reduce)(jnp.where(LIVE, VALUES, garbage))
    np.testing.assert_array_equal(dirty[0], clean[0])
    np.testing.assert_array_equal(dirty[1], clean[1])
    np.testing.assert_array_equal(clean[1][~LIVE], 0)


def test_numerical_gradients(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=VALUES.shape))
    for reduce in (
        masked_mean,
        masked_std,
        lambda x, mask: reverse_discounted_sum(x, mask, SEGMENTS, 0.7),
    ):
        check_grads(jax.jit(lambda x, reduce=reduce: reduce(x, LIVE)), (x,), order=1, modes=["rev"])


@JITS
def test_quantiles_by_hand(jit):
    """Of 1, 2, 3 and -7; masked entries have no effect."""
    quantiles = jit(partial(masked_quantiles, shares=(0.0, 0.05, 0.5, 1.0)))
    for garbage in (6.0, jnp.nan, jnp.inf, -jnp.inf):
        found = quantiles(jnp.where(MASK, X, garbage), MASK)
        np.testing.assert_allclose(found, np.quantile([1, 2, 3, -7], (0, 0.05, 0.5, 1)), rtol=1e-6)
    assert np.isnan(quantiles(X, jnp.zeros_like(MASK))).all()
    assert quantiles(jnp.where(MASK, -jnp.inf, 0.0), MASK)[1] == -jnp.inf
