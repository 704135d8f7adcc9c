"""What a step tells of itself: hand-worked numbers, padded ids, ties, and both ways to find the
k-th largest.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opdjax.estimators import diagnostics
from opdjax.estimators.diagnostics import (
    applied_importance,
    entropy,
    kth_largest,
    squared_score,
    top_k_overlap,
    vocabulary_stats,
)
from opdjax.estimators.grpo import clipping
from opdjax.ops.tile import VocabTile

effective_sample_size, sequence_sample_size = map(
    jax.jit, (diagnostics.effective_sample_size, diagnostics.sequence_sample_size)
)
largest_share = jax.jit(diagnostics.largest_share, static_argnums=2)
# Ids 0 to 3 live, id 4 pads the embedding.
STUDENT = VocabTile(jnp.log(jnp.array([[1 / 2, 1 / 4, 1 / 8, 1 / 8, 0]])))
TEACHER = VocabTile(jnp.log(jnp.array([[1 / 8, 1 / 2, 1 / 4, 1 / 8, 0]])))
UNIFORM = VocabTile(jnp.array([[2.0, 2, 2, 2, -jnp.inf]]))


def test_entropy_by_hand():
    np.testing.assert_allclose(entropy(STUDENT), [1.75 * np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(entropy(UNIFORM), [np.log(4)], rtol=1e-6)


def test_squared_score_by_hand():
    # 1 - 2 p + sum p^2, sum p^2 = 1/4 + 1/16 + 2/64 = 11/32
    for token, p in enumerate((1 / 2, 1 / 4, 1 / 8)):
        np.testing.assert_allclose(
            squared_score(STUDENT, jnp.array([token])), [1 - 2 * p + 11 / 32], rtol=1e-6
        )


def test_squared_score_is_the_norm_of_the_gradient(rng):
    logits = jnp.asarray(rng.normal(size=(3, 7)), jnp.float32)
    token = jnp.array([0, 3, 6])
    gradient = jax.grad(lambda x: jnp.sum(VocabTile(x).logprob(token)))(logits)
    np.testing.assert_allclose(
        squared_score(VocabTile(logits), token), jnp.sum(gradient**2, axis=-1), rtol=1e-5
    )


def test_squared_score_keeps_its_digits_where_the_student_is_nearly_sure():
    sure = VocabTile(jnp.array([[0.0, -12.0, -12.0]]))
    rest = np.exp(-12.0) / (1 + 2 * np.exp(-12.0))
    np.testing.assert_allclose(
        squared_score(sure, jnp.array([0])), [(2 * rest) ** 2 + 2 * rest**2], rtol=3e-2
    )


def test_overlap_by_hand():
    # The student's two: 0 and 1. The teacher's two: 1 and 2.
    found = top_k_overlap(STUDENT, TEACHER, 2)
    np.testing.assert_allclose(found["overlap/ratio"], [1 / 2])
    np.testing.assert_allclose(found["overlap/student_mass"], [3 / 4], rtol=1e-6)
    np.testing.assert_allclose(found["overlap/teacher_mass"], [5 / 8], rtol=1e-6)


def test_overlap_counts_all_that_tie_and_no_padding():
    # The student's third place is shared by 2 and 3; the teacher's three distinct values take in
    # all four.
    np.testing.assert_allclose(
        top_k_overlap(STUDENT, TEACHER, 3)["overlap/student_mass"], [1], rtol=1e-6
    )
    for k in (3, 16):
        found = top_k_overlap(UNIFORM, STUDENT, k)
        np.testing.assert_allclose([*found.values()], 1, rtol=1e-6)


@pytest.mark.parametrize("vocab", [37, 4096, 9001])
def test_kth_largest_of_short_and_long_rows(vocab, rng):
    x = rng.permutation(3 * vocab).reshape(3, vocab).astype(np.float32)
    x[:, -5:] = -np.inf
    np.testing.assert_array_equal(
        kth_largest(VocabTile(jnp.asarray(x)), 16), np.sort(x, axis=-1)[:, -16]
    )


def test_no_statistic_is_nan_where_ids_are_padded():
    """Padded ids are -inf on both sides; a token the teacher cannot draw is no reason for NaN
    either.
    """
    for teacher in (TEACHER, VocabTile(jnp.array([[0.0, -jnp.inf, 0, 0, -jnp.inf]])), None):
        stats = vocabulary_stats(STUDENT, teacher, jnp.array([1]))
        assert all(np.isfinite(value).all() for value in stats.values())
        assert ("entropy/teacher" in stats) == (teacher is not None)


MASK = jnp.array([[False, True, True, True], [True, True, False, False]])
SEGMENTS = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]])
RATIOS = jnp.log(
    jnp.array([[jnp.nan, 1 / 4, 4, 3], [1, 3 / 2, jnp.nan, 9]])
)  # what is masked is garbage
CORRECTIONS = {
    "token_truncate": ({}, [[0, 1 / 4, 2, 2], [1, 3 / 2, 0, 0]], [[0, 0, 1, 1], [0, 0, 0, 0]]),
    "token_mask": ({}, [[0, 0, 0, 0], [1, 3 / 2, 0, 0]], [[0, 1, 1, 1], [0, 0, 0, 0]]),
    # Products 1/4, 1, 3 and 1, 3/2.
    "prefix_truncate": (
        {"importance_cap": 1.25},
        [[0, 1 / 4, 1, 5 / 4], [1, 5 / 4, 0, 0]],
        [[0, 0, 0, 1], [0, 1, 0, 0]],
    ),
    "sequence_mask": (
        {"importance_cap": 2.0},
        [[0, 0, 0, 0], [3 / 2, 3 / 2, 0, 0]],
        [[0, 1, 1, 1], [0, 0, 0, 0]],
    ),
    # Above the band 0.8 to 1.28 counts with a positive advantage alone, below it with a negative
    # one.
    "ppo_clip": ({}, [[0, 0, 0, 3], [1, 0, 0, 0]], [[0, 1, 1, 0], [0, 1, 0, 0]]),
}


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_applied_importance_by_hand(kind):
    options, weights, cut = CORRECTIONS[kind]
    advantage = jnp.array([[jnp.nan, -1.0, 1, -1], [1, 1, jnp.nan, 1]])
    found = applied_importance(
        RATIOS, advantage, MASK, SEGMENTS, {"importance": kind, **options}, is_policy_gradient=True
    )
    np.testing.assert_allclose(found[0], weights, rtol=1e-6)
    np.testing.assert_array_equal(found[1], np.array(cut, bool))


def test_a_punished_token_beyond_the_dual_bound_is_cut():
    """Of the ratios 1/4, 4, 3 and 1, 3/2 the third is punished."""
    advantage = jnp.array([[jnp.nan, -1.0, 1, -1], [1, 1, jnp.nan, jnp.nan]])
    for dual, is_third_cut in ((2.5, True), (3.5, False), (0.0, False)):
        asked = clipping({"dual_clip": dual})
        _, is_cut = applied_importance(
            RATIOS, advantage, MASK, SEGMENTS, asked, is_policy_gradient=True
        )
        np.testing.assert_array_equal(
            is_cut, [[False, True, True, is_third_cut], [False, True, False, False]]
        )
    assert clipping({})["dual_clip"] == 3


def test_an_exact_divergence_weighs_the_contexts_alone():
    """Exclusive prefixes: 1, 1/4, 1 and 1, 1."""
    options = {"importance": "prefix_truncate", "importance_cap": 0.5}
    weight, is_cut = applied_importance(
        RATIOS, None, MASK, SEGMENTS, options, is_policy_gradient=False
    )
    np.testing.assert_allclose(weight, [[0, 1 / 2, 1 / 4, 1 / 2], [1 / 2, 1 / 2, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(is_cut, [[False, True, False, True], [True, True, False, False]])


def test_effective_sample_size_by_hand():
    weight = jnp.array([1.0, 3, jnp.nan, 0])
    # (1 + 3)^2 / (3 (1 + 9))
    np.testing.assert_allclose(
        effective_sample_size(weight, jnp.array([True, True, False, True])), 16 / 30, rtol=1e-6
    )
    assert effective_sample_size(weight, jnp.zeros(4, bool)) == 0
    assert effective_sample_size(jnp.full(5, 0.1), jnp.ones(5, bool)) == pytest.approx(1)


def test_sample_size_of_sequences_by_hand():
    """Products 3 and 3/2; the same two packed in one row beside a prompt alone; and products that
    no float32 holds.
    """
    expected = 4.5**2 / (2 * (9 + 9 / 4))
    np.testing.assert_allclose(sequence_sample_size(RATIOS, MASK, SEGMENTS), expected, rtol=1e-6)
    row = lambda *parts: jnp.concatenate(parts)[None]
    packed = (
        row(RATIOS[0], RATIOS[1], RATIOS[0, :2]),
        row(MASK[0], MASK[1], jnp.zeros(2, bool)),
        row(SEGMENTS[0], jnp.array([2, 2, 3, 3]), jnp.array([4, 4])),
    )
    np.testing.assert_allclose(sequence_sample_size(*packed), expected, rtol=1e-6)
    for shift in (-200.0, 200.0):
        np.testing.assert_allclose(
            sequence_sample_size(RATIOS.at[:, 1].add(shift), MASK, SEGMENTS), expected, rtol=1e-4
        )
    assert sequence_sample_size(jnp.zeros((2, 4)), MASK, SEGMENTS) == 1
    assert sequence_sample_size(RATIOS, 0 * MASK > 0, SEGMENTS) == 0
    np.testing.assert_allclose(
        sequence_sample_size(RATIOS.at[0, 1].add(90.0), MASK, SEGMENTS), 1 / 2, rtol=1e-6
    )


def test_largest_share_by_hand():
    x = jnp.array([[1.0, jnp.nan, 6], [2, 3, jnp.nan]])
    mask = jnp.array([[True, False, True], [True, True, False]])
    np.testing.assert_allclose(largest_share(x, mask, 0.05), 1 / 2)  # one of four tokens at least
    np.testing.assert_allclose(largest_share(x, mask, 0.5), 3 / 4)
    assert np.isnan(largest_share(jnp.zeros(3), jnp.ones(3, bool), 0.05))


def test_no_gradient_comes_of_them():
    def total(logits):
        return sum(
            jnp.sum(value)
            for value in vocabulary_stats(VocabTile(logits), TEACHER, jnp.array([1])).values()
        )

    np.testing.assert_array_equal(jax.grad(total)(STUDENT.logits), 0)
