"""Credit across tokens: what discount, batch mean, task reward and prefix weight do to the expected
gradient on a tree of sequences.
"""

import itertools

import jax
import numpy as np
import pytest
from enumeration import (
    CONTEXT_OF,
    CONTEXTS,
    LENGTH,
    MASK,
    PAIRS,
    SEQUENCES,
    TOKENS,
    action_variance,
    batch_probabilities,
    exact_gradient,
    expectation,
    gradient_of_expected,
    reach,
    relative_bias,
    reverse_kl_gradient,
    sequence_logprobs,
    softmax,
    token_logprobs,
)

from opdjax.estimators import advantage
from opdjax.ops import masked

running_sum = jax.jit(masked.running_sum)
mean_of_other_sequences = jax.jit(advantage.mean_of_other_sequences)
future_reward, prefix_weight = (
    jax.jit(function, static_argnums=3)
    for function in (advantage.future_reward, advantage.prefix_weight)
)
group_advantage = jax.jit(advantage.group_advantage, static_argnums=(2, 3))

BASELINES = {
    "none": ("opd", {}),
    "full": ("vopd", {}),
    "optimal": ("vopd", {"baseline": "optimal"}),
}


@pytest.fixture
def tables(rng):
    return tuple(rng.normal(size=(len(CONTEXTS), 3)) for _ in range(2))


@pytest.mark.usefixtures("x64")
class TestDiscount:
    def test_the_reference_is_the_frozen_gradient_at_0_and_that_of_the_sequence_kl_at_1(
        self, tables
    ):
        theta, teacher = tables
        frozen = reach(theta)[:, None] * [reverse_kl_gradient(*pair) for pair in zip(*tables)]
        np.testing.assert_allclose(exact_gradient(tables, 0.0), frozen / LENGTH, atol=1e-12)
        cost = sequence_logprobs(theta) - sequence_logprobs(teacher)
        whole = gradient_of_expected(theta, cost)
        np.testing.assert_allclose(exact_gradient(tables, 1.0), whole / LENGTH, atol=1e-12)

    @pytest.mark.parametrize("baseline", BASELINES)
    @pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
    def test_sampled_and_expected_returns_have_the_expectation_of_the_discounted_cost(
        self, discount, baseline, tables
    ):
        name, options = BASELINES[baseline]
        exact = exact_gradient(tables, discount)
        returns = [{"return_to_go": how} for how in ("sampled", "expected")] if discount else [{}]
        for how in returns:
            found = expectation(tables, name, options | {"discount": discount} | how)
            np.testing.assert_allclose(found, exact, atol=1e-10, err_msg=str(how))

    @pytest.mark.parametrize("baseline", BASELINES)
    def test_expected_returns_have_less_variance(self, baseline, tables):
        name, options = BASELINES[baseline]
        for discount in (0.5, 1.0):
            both = [
                action_variance(tables, name, options | {"discount": discount, "return_to_go": how})
                for how in ("sampled", "expected")
            ]
            print(
                f"{baseline}, discount {discount}: variance {both[0]:.4f} sampled, {both[1]:.4f} "
                f"expected"
            )
            assert both[1] < 0.98 * both[0]

    def test_a_transformed_reward_is_discounted_in_the_same_way(self, tables):
        for how in ({"reward_floor": -0.5}, {"power_alpha": 0.5}):
            both = [
                expectation(tables, "opd", how | {"discount": 0.7, "return_to_go": kind})
                for kind in ("sampled", "expected")
            ]
            np.testing.assert_allclose(*both, atol=1e-10)
            assert relative_bias(both[0], exact_gradient(tables, 0.7)) > 0.01


@pytest.mark.usefixtures("x64")
class TestBatchMean:
    @pytest.mark.parametrize("discount", [0.0, 1.0])
    def test_the_mean_of_the_other_sequences_costs_no_bias(self, discount, tables):
        options = {"baseline": "batch_mean", "discount": discount}
        found = expectation(tables, "vopd", options, PAIRS)
        np.testing.assert_allclose(found, exact_gradient(tables, discount), atol=1e-10)
        np.testing.assert_allclose(
            expectation(tables, "opd", {"discount": discount}, PAIRS), found, atol=1e-10
        )

    def test_leaving_out_the_token_alone_would(self, tables):
        """What follows a token was written because of it: in numpy, all pairs, the mean of all
        tokens but the one.
        """
        theta, teacher = tables
        rewards = token_logprobs(teacher) - token_logprobs(theta)
        scores = np.eye(3)[TOKENS] - softmax(theta)[CONTEXT_OF]
        probs = batch_probabilities(theta, PAIRS)
        for leaves_out_the_sequence in (True, False):
            found = np.zeros_like(theta)
            for (i, j), p in zip(PAIRS, probs):
                for me, other in ((i, j), (j, i)):
                    for t in range(len(SEQUENCES[me])):
                        theirs = rewards[other][MASK[other]]
                        mine = (
                            [] if leaves_out_the_sequence else np.delete(rewards[me][MASK[me]], t)
                        )
                        value = np.mean(np.concatenate([theirs, mine]))
                        found[CONTEXT_OF[me, t]] -= (
                            p * (rewards[me, t] - value) * scores[me, t] / (2 * LENGTH)
                        )
            bias = relative_bias(found, exact_gradient(tables, 0.0))
            print(
                f"batch mean without {'the sequence' if leaves_out_the_sequence else 'the token'}: "
                f"relative bias {bias:.1e}"
            )
            assert bias < 1e-12 if leaves_out_the_sequence else bias > 0.01

    def test_a_single_sequence_has_no_baseline(self, tables):
        found = expectation(tables, "vopd", {"baseline": "batch_mean"})
        np.testing.assert_allclose(found, exact_gradient(tables, 0.0), atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("group", [2, 3])
def test_a_task_reward_adds_its_gradient_less_the_share_of_its_own_group_mean(group, tables, rng):
    """G completions of one prompt: R - mean holds (G - 1) / G of R's own gradient. All groups are
    visited.
    """
    reward, coef, theta = rng.normal(size=len(SEQUENCES)), 0.8, tables[0]
    groups = np.array(list(itertools.product(range(len(SEQUENCES)), repeat=group)))
    credit = reward[groups] - reward[groups].mean(axis=1, keepdims=True)
    columns = {"advantages": np.repeat(credit[..., None], LENGTH, axis=2)}
    of_reward = gradient_of_expected(theta, reward)
    for discount in (0.0, 1.0) if group == 2 else (0.0,):
        found = expectation(
            tables, "opd", {"task_reward_coef": coef, "discount": discount}, groups, **columns
        )
        exact = exact_gradient(tables, discount) - coef * (group - 1) / group * of_reward / LENGTH
        np.testing.assert_allclose(found, exact, atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_the_prefix_weight_changes_the_expected_gradient(tables):
    for gain in (0.5, 2.0):
        found = expectation(tables, "opd", {"prefix_weight": gain})
        exact = exact_gradient(tables, 0.0)
        scaled = relative_bias(found * np.vdot(found, exact) / np.vdot(found, found), exact)
        print(
            f"prefix_weight {gain}: relative bias {relative_bias(found, exact):.3f}, {scaled:.3f} "
            f"after the best rescaling"
        )
        assert scaled > 0.01
    np.testing.assert_allclose(
        expectation(tables, "opd", {"prefix_weight": 0.0}), exact_gradient(tables, 0.0), atol=1e-10
    )


# By hand. One row of two packed sequences with padding between, and one of a single sequence;
# masked slots hold garbage.

G = np.nan
SEGMENTS = np.array([[1, 1, 1, 1, 0, 2, 2, 2], [0, 1, 1, 1, 1, 1, 0, 0]])
BRICK_MASK = np.array(
    [[0, 1, 1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 1, 0, 0]], bool
)  # a token inside a sequence may be masked
VALUES = np.float32([[G, 1.0, 2.0, 4.0, G, G, 8.0, -16.0], [G, G, 3.0, -1.0, G, 5.0, G, G]])


def by_hand(found, expected):
    np.testing.assert_allclose(np.where(BRICK_MASK, found, 0), expected, rtol=1e-6)
    assert np.isfinite(found).all()


def test_future_reward_by_hand():
    by_hand(
        future_reward(VALUES, BRICK_MASK, SEGMENTS, 1.0),
        [[0, 6, 4, 0, 0, 0, -16, 0], [0, 0, 4, 5, 0, 0, 0, 0]],
    )
    by_hand(
        future_reward(VALUES, BRICK_MASK, SEGMENTS, 0.5),
        [[0, 2, 2, 0, 0, 0, -8, 0], [0, 0, 0.75, 2.5, 0, 0, 0, 0]],
    )
    by_hand(future_reward(VALUES, BRICK_MASK, SEGMENTS, 0.0), np.zeros((2, 8)))


def test_running_sum_by_hand():
    by_hand(
        running_sum(VALUES, BRICK_MASK, SEGMENTS),
        [[0, 1, 3, 7, 0, 0, 8, -8], [0, 0, 3, 2, 0, 7, 0, 0]],
    )


def test_mean_of_other_sequences_by_hand():
    """Sums 7, -8 and 7 over 3, 2 and 3 tokens."""
    found = mean_of_other_sequences(VALUES, BRICK_MASK, SEGMENTS)
    first, second, third = -1 / 5, 14 / 6, -1 / 5
    by_hand(
        found,
        [[0, first, first, first, 0, 0, second, second], [0, 0, third, third, 0, third, 0, 0]],
    )
    # These rows are a part of a batch of 10 tokens whose rewards sum to 9.
    found = mean_of_other_sequences(VALUES, BRICK_MASK, SEGMENTS, (np.float32(9), np.float32(10)))
    first, second, third = 2 / 7, 17 / 8, 2 / 7
    by_hand(
        found,
        [[0, first, first, first, 0, 0, second, second], [0, 0, third, third, 0, third, 0, 0]],
    )
    alone = mean_of_other_sequences(VALUES[1:], BRICK_MASK[1:], SEGMENTS[1:])
    np.testing.assert_array_equal(
        np.where(BRICK_MASK[1:], alone, 0), 0
    )  # there is no other sequence


def test_prefix_weight_by_hand():
    """Shares of the disagreement at a token and after it: 7/7, 6/7, 4/7; 1, 2/3; 9/9, 6/9, 5/9."""
    found = prefix_weight(VALUES, BRICK_MASK, SEGMENTS, 0.5)
    ones = [
        [0, 1.5, 1 + 3 / 7, 1 + 2 / 7, 0, 0, 1.5, 1 + 1 / 3],
        [0, 0, 1.5, 1 + 1 / 3, 0, 1 + 5 / 18, 0, 0],
    ]
    by_hand(found, ones)
    # Without any disagreement nothing lies before a token.
    by_hand(
        prefix_weight(np.float32(np.where(BRICK_MASK, 0.0, G)), BRICK_MASK, SEGMENTS, 0.5),
        1.5 * BRICK_MASK,
    )


def test_group_advantage_by_hand():
    centred = lambda x, size: group_advantage(np.float32(x), np.ones(len(x), bool), size, "mean")
    np.testing.assert_allclose(
        centred([1.0, 0.0, 0.0, 1.0, 1.0, 1.0], 3), [2 / 3, -1 / 3, -1 / 3, 0, 0, 0], atol=1e-6
    )
    np.testing.assert_array_equal(centred([1.0, 0.5], 1), 0)
