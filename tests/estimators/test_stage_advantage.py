"""Advantages of groups and of the stages of answers: the papers' worked numbers, their properties,
and what is refused.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opdjax.estimators import advantage
from opdjax.estimators.advantage import STAGE_CREDITS, credit_matrix

group_advantage = jax.jit(advantage.group_advantage, static_argnums=(2, 3))
stage_advantage = jax.jit(
    advantage.stage_advantage, static_argnums=(4, 5), static_argnames="epsilon"
)
spread_stages = jax.jit(advantage.spread_stages)
stage_balance = jax.jit(advantage.stage_balance, static_argnums=2)

# ROPD: points of eight rollouts under the rubric of table 4, out of 22.
REWARD = np.array([17, 5, 17, 9, 22, 5, 13, 17]) / 22
CENTRED = [0.1761, -0.3693, 0.1761, -0.1875, 0.4034, -0.3693, -0.0057, 0.1761]
STANDARDISED = [0.6635, -1.3912, 0.6635, -0.7063, 1.5196, -1.3912, -0.0214, 0.6635]
# RubricEM: three rollouts, four stages.
SCORES = np.array([[0.5, 0.25, 0.75, 1.0], [0.75, 0.5, 0.25, 0.5], [0.25, 1.0, 0.5, 0.75]])
RETURNS = np.array([[1.85, 1.35, 1.55, 1.0], [1.5, 1.0, 0.65, 0.5], [1.55, 1.8, 1.1, 0.75]])
STAGED = [
    [1.40183, -0.10180, 1.22474, 1.22474],
    [-0.86266, -1.17067, -1.22474, -1.22474],
    [-0.53916, 1.27247, 0, 0],
]


def everyone(scores):
    return np.ones(np.shape(scores), bool), np.ones(len(scores), bool)


def staged(scores, credit="paper", scale="mean_std", size=None, **options):
    credit = credit_matrix(credit, np.shape(scores)[1]) if isinstance(credit, str) else credit
    return stage_advantage(
        jnp.asarray(scores), *everyone(scores), credit, size or len(scores), scale, **options
    )


# Groups


@pytest.mark.usefixtures("x64")
def test_the_eight_rollouts_of_ropd():
    is_scored = np.ones(8, bool)
    np.testing.assert_allclose(REWARD.mean(), 0.59659, atol=5e-6)
    np.testing.assert_allclose(group_advantage(REWARD, is_scored, 8, "mean"), CENTRED, atol=5e-5)
    np.testing.assert_allclose(
        group_advantage(REWARD, is_scored, 8, "mean_std"), STANDARDISED, atol=5e-5
    )
    # To more digits than are printed, in plain numpy.
    centred = REWARD - REWARD.mean()
    np.testing.assert_allclose(group_advantage(REWARD, is_scored, 8, "mean"), centred, atol=1e-12)
    np.testing.assert_allclose(
        group_advantage(REWARD, is_scored, 8, "mean_std"),
        centred / (REWARD.std() + 1e-6),
        rtol=1e-12,
        atol=1e-12,
    )


def test_groups_do_not_see_each_other_and_nobody_sees_what_has_no_score():
    reward = np.array([1.0, 0, np.nan, 0.5, np.nan, 0.25, 7, 7, 7], np.float32)
    is_scored = np.array([1, 1, 0, 1, 0, 0, 1, 1, 1], bool)
    expected = [0.5, -0.5, 0, 0, 0, 0, 0, 0, 0]  # two scored; one alone; a tie
    np.testing.assert_array_equal(group_advantage(reward, is_scored, 3, "mean"), expected)
    found = group_advantage(reward, is_scored, 3, "mean_std")
    np.testing.assert_allclose(found, np.array(expected) / (0.5 + 1e-6), rtol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 5, 6, 7, 8])
def test_a_tie_is_worth_nothing_however_its_sums_are_rounded(count):
    """The float32 mean of equal numbers may differ from them; that difference over itself is 1."""
    scores = np.float32(np.linspace(0, 1, 23)[:, None, None] * np.ones((count, 4)))
    np.testing.assert_array_equal(jax.jit(jax.vmap(staged))(scores), 0)
    for scale in ("mean", "mean_std"):
        of = lambda x, scale=scale: group_advantage(x, np.ones(count, bool), count, scale)
        np.testing.assert_array_equal(jax.jit(jax.vmap(of))(scores[..., 0]), 0)
    # The same return by other sums: 0.3 = 0.1 + 0.4 * 0.5.
    found = staged(jnp.array([[0.3, 0, 0, 0], [0.1, 0.5, 0, 0]], jnp.float32))
    np.testing.assert_array_equal(found[:, 0], 0)
    np.testing.assert_allclose(found[:, 1], [-1, 1], rtol=1e-5)


def test_small_differences_are_no_tie():
    found = group_advantage(
        jnp.array([0.5, 0.5, 0.5, 0.5 + 1 / 1024], jnp.float32), np.ones(4, bool), 4, "mean_std"
    )
    np.testing.assert_allclose(found, np.array([-1, -1, -1, 3]) / np.sqrt(3), rtol=5e-3)


# Stages


@pytest.mark.usefixtures("x64")
def test_the_worked_example_of_rubricem():
    credit = credit_matrix("paper", 4)
    np.testing.assert_allclose(SCORES @ credit.T, RETURNS, atol=1e-12)
    np.testing.assert_allclose(staged(SCORES), STAGED, atol=1e-5)
    np.testing.assert_allclose(staged(SCORES, epsilon=1e-6), STAGED, atol=2e-5)  # ROPD's constant
    np.testing.assert_allclose(
        staged(SCORES, scale="mean"), RETURNS - RETURNS.mean(axis=0), atol=1e-12
    )


def test_the_worked_example_in_float32():
    np.testing.assert_allclose(staged(SCORES.astype(np.float32)), STAGED, atol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", ["mean", "mean_std"])
def test_properties(scale, rng):
    scores = rng.random((12, 4))
    last = staged(scores, "last", scale, size=4, epsilon=1e-6)
    plain = group_advantage(scores[:, -1], np.ones(12, bool), 4, scale)
    np.testing.assert_allclose(last, np.broadcast_to(plain[:, None], (12, 4)), atol=1e-12)
    for credit in STAGE_CREDITS:
        found = staged(scores, credit, scale, size=4)
        moved = staged(scores + np.array([0.3, -0.2, 0.7, 0.1]), credit, scale, size=4)
        np.testing.assert_allclose(moved, found, atol=1e-9)
        np.testing.assert_allclose(np.reshape(found, (3, 4, 4)).mean(axis=1), 0, atol=1e-12)
    own = staged(scores, "identity", scale, size=4, epsilon=1e-6)
    alone = [group_advantage(scores[:, k], np.ones(12, bool), 4, scale) for k in range(4)]
    np.testing.assert_allclose(own, np.stack(alone, axis=1), atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_a_missing_stage_scores_nothing_and_counts_for_nobody():
    """Rollout 2 lacks stage 1 (its score is garbage), rollout 3 has no scores at all."""
    scores = np.array([[0.5, 1.0], [0.5, 0.0], [1.0, np.nan], [np.nan, np.nan]])
    has_stage = np.array([[1, 1], [1, 1], [1, 0], [1, 1]], bool)
    is_scored = np.array([1, 1, 1, 0], bool)
    found = stage_advantage(scores, has_stage, is_scored, credit_matrix("decay", 2), 4, "mean")
    # Returns of stage 0: 0.5 + 0.8, 0.5, 1 + 0; their mean 2.8 / 3. Of stage 1: 1 and 0.
    np.testing.assert_allclose(
        found, [[1.3 - 2.8 / 3, 0.5], [0.5 - 2.8 / 3, -0.5], [1 - 2.8 / 3, 0], [0, 0]], atol=1e-12
    )
    alone = stage_advantage(
        scores,
        has_stage & (np.arange(4) == 0)[:, None],
        is_scored,
        np.eye(2),
        4,
        "mean_std",
    )
    np.testing.assert_array_equal(
        alone, 0
    )  # one rollout with a stage has nobody to be compared with
    nobody = stage_advantage(scores, has_stage, np.zeros(4, bool), np.eye(2), 4, "mean_std")
    np.testing.assert_array_equal(nobody, 0)


def test_tokens_take_the_advantage_of_their_stage():
    advantages = jnp.array([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]])
    stages = jnp.array([[-1, 0, 0, 2, -1], [2, 2, 1, 0, -1]])
    np.testing.assert_array_equal(
        spread_stages(advantages, stages), [[0, 1, 1, 3, 0], [-3, -3, -2, -1, 0]]
    )
    np.testing.assert_array_equal(spread_stages(jnp.full((2, 3), jnp.nan), jnp.full((2, 5), -1)), 0)


@pytest.mark.usefixtures("x64")
def test_a_token_mean_becomes_the_mean_of_the_stages_own_means(rng):
    stages = np.array(
        [[-1, 0, 0, 0, 2, -1], [0, 0, 0, 0, 0, 2], [-1, -1, 2, 2, 0, 0]]
    )  # nobody is in stage 1
    mask = np.array([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]], bool)
    losses = np.where(
        stages >= 0, rng.normal(size=stages.shape), 0
    )  # outside all stages the advantage is 0
    factor = stage_balance(stages, mask, 3)
    by_stage = [losses[mask & (stages == k)].mean() for k in (0, 2)]
    np.testing.assert_allclose(
        np.sum(losses * factor * mask) / mask.sum(), np.mean(by_stage), rtol=1e-12
    )
    np.testing.assert_array_equal(np.asarray(factor)[~mask | (stages < 0)], 0)
    np.testing.assert_array_equal(stage_balance(stages, np.zeros(mask.shape, bool), 3), 0)


class TestVariants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_advantages_agree_under_jit_and_vmap(self):
        rng = np.random.default_rng(2)
        scores = jnp.asarray(rng.random((5, 6, 4)), jnp.float32)
        has_stage, is_scored = rng.random((5, 6, 4)) < 0.8, rng.random((5, 6)) < 0.8
        stages = jnp.asarray(rng.integers(-1, 4, (5, 6, 7)))

        def both(scores, has_stage, is_scored, stages):
            by_stage = advantage.stage_advantage(
                scores, has_stage, is_scored, credit_matrix(None, 4), 3, "mean_std"
            )
            return (
                advantage.group_advantage(scores[:, 0], is_scored, 3, "mean"),
                advantage.spread_stages(by_stage, stages),
                advantage.stage_balance(stages, stages != 1, 4),
            )

        operands = (scores, jnp.asarray(has_stage), jnp.asarray(is_scored), stages)
        alone = jax.jit(both)
        plain = [alone(*(x[i] for x in operands)) for i in range(5)]
        plain = jax.tree.map(lambda *x: jnp.stack(x), *plain)
        chex.assert_trees_all_close(
            self.variant(jax.vmap(both))(*operands), plain, rtol=1e-5, atol=1e-6
        )


# Credit


def test_credits():
    np.testing.assert_array_equal(credit_matrix(None, 4), credit_matrix("paper", 4))
    np.testing.assert_array_equal(credit_matrix("identity", 3), np.eye(3))
    np.testing.assert_array_equal(credit_matrix("last", 3), [[0, 0, 1]] * 3)
    np.testing.assert_array_equal(credit_matrix(None, 3), [[1, 0.5, 0.8], [0, 1, 0.8], [0, 0, 1]])
    np.testing.assert_array_equal(credit_matrix(None, 2), [[1, 0.8], [0, 1]])
    np.testing.assert_array_equal(credit_matrix((1, 0.25, 0, 1), 2), [[1, 0.25], [0, 1]])


@pytest.mark.parametrize(
    ("credit", "stages", "told"),
    [
        ("paper", 3, "defined for 4 stages, there are 3"),
        ("nope", 3, "no stage_credit 'nope'"),
        ((1, 0.5, 0, 1), 3, "has 4 numbers; expected 9"),
        ((1, 0.5, 0.1, 1), 2, "0 below it"),
        ((1, 0.5, 0, 0.9), 2, "1 on the diagonal"),
        ((1, np.nan, 0, 1), 2, "finite"),
    ],
)
def test_credits_that_cannot_be(credit, stages, told):
    with pytest.raises(ValueError, match=told):
        credit_matrix(credit, stages)


def test_scales_that_cannot_be():
    with pytest.raises(ValueError, match="no scale 'std'"):
        group_advantage(jnp.zeros(2), jnp.ones(2, bool), 2, "std")
    with pytest.raises(ValueError, match="no scale 'std'"):
        staged(SCORES, scale="std")
