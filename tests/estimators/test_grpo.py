"""Policy gradients on rewards of whole answers: every branch of the loss by hand, what they
advertise by enumeration in float64.
"""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import (
    LENGTH,
    PAIRS,
    SEQUENCES,
    expectation,
    expected_gradient,
    forward_kl_gradient,
    gradient_of_expected,
    gradient_of_mean,
    log_softmax,
    reverse_kl,
    reverse_kl_gradient,
    sample_gradients,
    softmax,
    token_logprobs,
)

from opdjax.estimators import TOKEN_LOSSES, advantage, bind
from opdjax.estimators.advantage import spread_stages
from opdjax.estimators.grpo import dual_clipped_loss, reference_penalty
from opdjax.estimators.losses import aggregation_weights, count_denominators
from opdjax.ops.tile import Head, VocabTile
from opdjax.ops.vocab import TokenInputs, tiled_loss

V = 7
ALL = ("grpo", "ropd", "tjudge", "ropd_stages")
UNCLIPPED = {"clip_low": 0.999, "clip_high": 1e6, "dual_clip": 0.0}


group_advantage = jax.jit(advantage.group_advantage, static_argnums=(2, 3))
stage_advantage = jax.jit(advantage.stage_advantage, static_argnums=(4, 5))


def centred(rewards):
    """Advantages of rewards [N, size] of groups."""
    return rewards - rewards.mean(axis=1, keepdims=True)


@pytest.fixture
def logits(rng):
    """Student and another policy at one context."""
    return tuple(1.5 * rng.normal(size=V) for _ in range(2))


# By hand

# (A, rho): the loss and its derivative by log student(y), clipped to 0.8 .. 1.28 and, for A < 0,
# bounded at 3.
BRANCHES = {
    "gain, below the band": (2.0, 0.5, -1.0, -1.0),
    "gain, inside": (2.0, 1.1, -2.2, -2.2),
    "gain, above: capped": (2.0, 1.5, -2.56, 0.0),
    "loss, below: capped": (-2.0, 0.5, 1.6, 0.0),
    "loss, inside": (-2.0, 0.9, 1.8, 1.8),
    "loss, above": (-2.0, 2.5, 5.0, 5.0),
    "loss, beyond the dual bound": (-2.0, 4.0, 6.0, 0.0),
    "nothing at stake": (0.0, 4.0, 0.0, 0.0),
}


@partial(jax.jit, static_argnums=3)
def clipped(advantages, student, behavior, dual_clip=3.0):
    """(losses, their gradients by student and by advantages)."""

    def total(advantages, student):
        losses = dual_clipped_loss(advantages, student, behavior, 0.2, 0.28, dual_clip)
        return jnp.sum(losses), losses

    (of_advantages, of_student), losses = jax.grad(total, (0, 1), has_aux=True)(advantages, student)
    return losses, of_student, of_advantages


@pytest.mark.usefixtures("x64")
def test_the_clipped_loss_by_hand():
    advantages, ratios, values, slopes = map(np.array, zip(*BRANCHES.values()))
    behavior = np.full(len(BRANCHES), np.log(0.1))
    found = clipped(advantages, np.log(0.1 * ratios), behavior)
    np.testing.assert_allclose(found[:2], (values, slopes), rtol=1e-12, atol=1e-12)
    # Without the dual bound a token with a negative advantage costs ever more.
    found = clipped(np.array([-2.0]), np.log([0.4]), np.log([0.1]), 0.0)
    np.testing.assert_allclose(found[:2], [[8.0], [8.0]], rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_clipped_loss_agrees_with_finite_differences(rng):
    advantages, gap = rng.normal(size=40), rng.normal(size=40)
    behavior, step = -rng.exponential(size=40), 1e-6
    _, slopes, of_advantages = clipped(advantages, behavior + gap, behavior)
    ahead, behind = (clipped(advantages, behavior + gap + s, behavior)[0] for s in (step, -step))
    np.testing.assert_allclose((ahead - behind) / (2 * step), slopes, rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(of_advantages, 0)


@pytest.mark.usefixtures("x64")
def test_penalties_by_hand():
    """student(y) twice reference(y): d = ln 2; k2 = d^2 / 2, slope d; k3 = 1/2 - 1 + d, slope 1 -
    1/2.
    """
    d = np.log(2.0)

    @partial(jax.jit, static_argnums=2)
    @partial(jax.value_and_grad, argnums=(0, 1))
    def penalty(student, reference, kind):
        return reference_penalty(student, reference, kind)

    for kind, value, slope in (("k2", d * d / 2, d), ("k3_direct", d - 0.5, 0.5)):
        found, (of_student, of_reference) = penalty(np.log(0.4), np.log(0.2), kind)
        np.testing.assert_allclose((found, of_student), (value, slope), rtol=1e-12)
        assert of_reference == 0
    with pytest.raises(ValueError, match="no reference penalty 'k1'"):
        reference_penalty(jnp.zeros(1), jnp.zeros(1), "k1")


# By enumeration


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ALL)
def test_the_expected_gradient_is_that_of_the_reward_less_the_share_of_its_own_mean(
    name, logits, rng
):
    """Groups of two: all V^2 pairs, each completion one token."""
    student, reward = logits[0], rng.normal(size=V)
    pairs = np.array(list(itertools.product(range(V), repeat=2)))
    credit = centred(reward[pairs]).ravel()
    behavior = log_softmax(student)[pairs.ravel()]
    each, _ = sample_gradients(
        name, {}, student, student, pairs.ravel(), advantages=credit, behavior_logprobs=behavior
    )
    probs = np.prod(softmax(student)[pairs], axis=1)
    found = probs @ np.mean(np.reshape(each, (len(pairs), 2, V)), axis=1)
    of_reward = gradient_of_mean(student, reward)
    assert np.linalg.norm(of_reward) > 0.05
    np.testing.assert_allclose(found, -(1 - 1 / 2) * of_reward, atol=1e-12)


@pytest.mark.usefixtures("x64")
class TestTree:
    @pytest.fixture
    def tables(self, rng):
        return tuple(rng.normal(size=(7, 3)) for _ in range(2))

    @pytest.mark.parametrize("size", [2, 3])
    def test_on_policy(self, size, tables, rng):
        """All groups of completions of up to three tokens, under the aggregation whose divisor is
        fixed.
        """
        theta, reward = tables[0], rng.normal(size=len(SEQUENCES))
        groups = (
            PAIRS
            if size == 2
            else np.array(list(itertools.product(range(len(SEQUENCES)), repeat=3)))
        )
        credit = centred(reward[groups])
        columns = {
            "advantages": np.repeat(credit[..., None], LENGTH, axis=2),
            "behavior_logprobs": token_logprobs(theta),
        }
        of_reward = gradient_of_expected(theta, reward)
        np.testing.assert_allclose(
            expectation(tables, "grpo", {}, groups, **columns),
            -(1 - 1 / size) * of_reward / LENGTH,
            atol=1e-10,
        )

    def test_dividing_by_the_deviation_is_another_gradient(self, tables, rng):
        """It weighs prompts and pairs anew: no multiple of the reward's own gradient."""
        theta, reward = tables[0], rng.normal(size=len(SEQUENCES))
        credit = np.reshape(
            group_advantage(
                jnp.asarray(reward[PAIRS].ravel()), jnp.ones(PAIRS.size, bool), 2, "mean_std"
            ),
            PAIRS.shape,
        )
        columns = {
            "advantages": np.repeat(credit[..., None], LENGTH, axis=2),
            "behavior_logprobs": token_logprobs(theta),
        }
        found = expectation(tables, "grpo", {}, PAIRS, **columns)
        of_reward = gradient_of_expected(theta, reward)
        cosine = -np.vdot(found, of_reward) / np.linalg.norm(found) / np.linalg.norm(of_reward)
        print(f"pairs, mean_std: cosine {cosine:.4f} with the gradient of the reward")
        assert 0.5 < cosine < 0.999


@pytest.mark.usefixtures("x64")
def test_an_unclipped_ratio_corrects_for_another_policys_draws(logits, rng):
    student, behavior = logits
    reward = rng.normal(size=V)
    pairs = np.array(list(itertools.product(range(V), repeat=2)))
    credit = centred(reward[pairs]).ravel()
    drawn = log_softmax(behavior)[pairs.ravel()]
    of_reward = gradient_of_mean(student, reward)
    probs = np.prod(softmax(behavior)[pairs], axis=1)

    def expected(options):
        each, _ = sample_gradients(
            "grpo",
            options,
            student,
            student,
            pairs.ravel(),
            advantages=credit,
            behavior_logprobs=drawn,
        )
        return probs @ np.mean(np.reshape(each, (len(pairs), 2, V)), axis=1)

    np.testing.assert_allclose(expected(UNCLIPPED), -0.5 * of_reward, atol=1e-10)
    assert np.linalg.norm(expected({}) + 0.5 * of_reward) > 0.05 * np.linalg.norm(
        of_reward
    )  # clipping costs bias


@pytest.mark.usefixtures("x64")
def test_which_way_the_penalties_go(logits):
    """Differentiated as they stand, over y ~ student: k2 descends KL(student || reference), k3
    KL(reference || student).
    """
    student, reference = logits
    held = {
        "advantages": 0.0,
        "behavior_logprobs": log_softmax(student),
        "reference_logprobs": log_softmax(reference),
    }
    for kind, gradient in (("k2", reverse_kl_gradient), ("k3_direct", forward_kl_gradient)):
        options = {"reference_kl_coef": 0.3, "reference_kl": kind}
        exact = 0.3 * gradient(student, reference)
        assert np.linalg.norm(exact) > 0.05
        np.testing.assert_allclose(
            expected_gradient("grpo", options, student, student, **held), exact, atol=1e-12
        )
    values = reference_penalty(held["behavior_logprobs"], held["reference_logprobs"], "k3_direct")
    np.testing.assert_allclose(
        softmax(student) @ values, reverse_kl(student, reference), rtol=1e-12
    )


@pytest.mark.usefixtures("x64")
def test_the_credit_last_is_the_plain_advantage_of_the_last_stage(rng):
    """All pairs of completions of the tree, their tokens in two stages."""
    theta, scores = rng.normal(size=(7, 3)), rng.random((len(SEQUENCES), 2))
    stages = np.minimum(np.arange(LENGTH), 1)[None].repeat(PAIRS.size, axis=0)
    is_there, is_scored = np.ones((PAIRS.size, 2), bool), np.ones(PAIRS.size, bool)
    by_stage = stage_advantage(
        jnp.asarray(scores[PAIRS.ravel()]),
        is_there,
        is_scored,
        np.array([[0, 1.0], [0, 1]]),
        2,
        "mean",
    )
    credit = np.reshape(spread_stages(by_stage, jnp.asarray(stages)), (*PAIRS.shape, LENGTH))
    found = expectation(
        (theta, theta),
        "ropd_stages",
        {},
        PAIRS,
        advantages=credit,
        behavior_logprobs=token_logprobs(theta),
    )
    of_last = gradient_of_expected(theta, scores[:, 1])
    np.testing.assert_allclose(found, -0.5 * of_last / LENGTH, atol=1e-10)


# Through the tiled pass


SEGMENTS = np.ones((4, 5), int)
MASK = np.array([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [0, 1, 1, 0, 0]], bool)
PENALISED = {"reference_kl_coef": 0.1, "reference_kl": "k2"}


def batch_of(rng, dtype=np.float32):
    """hidden, kernel, tokens and every column that the recipes read, of four rows of five."""
    hidden, kernel = rng.normal(size=(4, 5, 3)).astype(dtype), rng.normal(size=(V, 3)).astype(dtype)
    columns = {
        "advantages": rng.normal(size=(4, 5)),
        "behavior_logprobs": -rng.exponential(2, size=(4, 5)),
        "reference_logprobs": -rng.exponential(2, size=(4, 5)),
    }
    return (
        hidden,
        kernel,
        rng.integers(0, V, (4, 5)),
        {name: x.astype(dtype) for name, x in columns.items()},
    )


@partial(jax.jit, static_argnames=("name", "options"))
def value_and_grad(hidden, kernel, tokens, columns, mask, name="ropd", options=()):
    estimator = bind(name, dict(options))
    segments = SEGMENTS[: len(mask)]
    weights = aggregation_weights(
        mask, segments, "token_mean", count_denominators(mask, segments, 4)
    )

    def loss(hidden, kernel):
        row = TokenInputs(tokens, **columns)
        return tiled_loss(estimator.token_loss, hidden, Head(kernel), weights, row, tile=3)[0]

    return jax.value_and_grad(loss, argnums=(0, 1))(hidden, kernel)


@pytest.mark.parametrize("name", ALL)
def test_garbage_in_masked_slots_changes_nothing(name, rng):
    hidden, kernel, tokens, columns = batch_of(rng)
    options = tuple(PENALISED.items())
    clean = value_and_grad(hidden, kernel, tokens, columns, MASK, name, options)
    assert np.all(np.isfinite(clean[0]))
    assert np.any(clean[1][1])
    spoilt = {key: np.where(MASK, x, np.nan) for key, x in columns.items()}
    chex.assert_trees_all_equal(
        value_and_grad(hidden, kernel, tokens, spoilt, MASK, name, options), clean
    )


def test_a_group_that_nobody_scored_has_no_gradient_and_no_share_in_the_mean(rng):
    """Its advantages are 0 whatever its scores hold; masked, as judged runs do it, the others' mean
    does not see it either.
    """
    hidden, kernel, tokens, columns = batch_of(rng)
    scores = np.float32([0.3, 0.9, np.nan, np.inf])
    is_scored = np.array([True, True, False, False])
    columns["advantages"] = np.broadcast_to(
        group_advantage(scores, is_scored, 2, "mean")[:, None], MASK.shape
    )
    _, (of_hidden, _) = value_and_grad(hidden, kernel, tokens, columns, MASK)
    assert np.any(of_hidden[:2])
    np.testing.assert_array_equal(of_hidden[2:], 0)
    nobody = group_advantage(scores, np.zeros(4, bool), 2, "mean_std")
    np.testing.assert_array_equal(nobody, 0)
    alone = columns | {"advantages": np.broadcast_to(nobody[:, None], MASK.shape)}
    chex.assert_trees_all_equal(
        value_and_grad(hidden, kernel, tokens, alone, MASK), (0.0, (0 * hidden, 0 * kernel))
    )
    masked = value_and_grad(hidden, kernel, tokens, columns, MASK & is_scored[:, None])
    without = value_and_grad(
        hidden[:2], kernel, tokens[:2], {name: x[:2] for name, x in columns.items()}, MASK[:2]
    )
    np.testing.assert_allclose(masked[0], without[0], rtol=1e-6)
    np.testing.assert_allclose(masked[1][1], without[1][1], rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("x64")
def test_a_penalised_update_agrees_with_finite_differences(rng):
    hidden, kernel, tokens, columns = batch_of(rng, float)
    for kind in ("k2", "k3_direct"):
        options = (("reference_kl_coef", 0.1), ("reference_kl", kind))
        loss = lambda h, k, options=options: value_and_grad(
            h, k, tokens, columns, MASK, "grpo", options
        )[0]
        of_hidden, of_kernel = value_and_grad(
            hidden, kernel, tokens, columns, MASK, "grpo", options
        )[1]
        towards = rng.normal(size=hidden.shape), rng.normal(size=kernel.shape)
        step = 1e-6
        ahead, behind = (
            loss(hidden + sign * step * towards[0], kernel + sign * step * towards[1])
            for sign in (1, -1)
        )
        slope = np.vdot(of_hidden, towards[0]) + np.vdot(of_kernel, towards[1])
        np.testing.assert_allclose((ahead - behind) / (2 * step), slope, rtol=1e-6)


class TestTransforms(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_recipes_agree_with_and_without_transforms(self):
        rng = np.random.default_rng(1)
        student = jnp.asarray(rng.normal(size=(8, 4, V)), jnp.float32)
        columns = {
            "advantages": rng.normal(size=(8, 4)),
            "behavior_logprobs": -rng.exponential(2, size=(8, 4)),
            "reference_logprobs": -rng.exponential(2, size=(8, 4)),
        }
        rows = TokenInputs(
            jnp.asarray(rng.integers(0, V, (8, 4))),
            **{key: np.float32(x) for key, x in columns.items()},
        )
        how = [
            ("grpo", {}),
            ("ropd", PENALISED),
            ("tjudge", UNCLIPPED),
            ("ropd_stages", {"reference_kl_coef": 1.0}),
        ]
        losses = lambda s, row: [
            TOKEN_LOSSES[name](VocabTile(s), None, row, **options)[0] for name, options in how
        ]
        flat = lambda tree: jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[2:])), tree)
        plain = [x.reshape(8, 4) for x in jax.jit(losses)(flat(student), flat(rows))]
        chex.assert_trees_all_close(
            self.variant(jax.vmap(losses))(student, rows), plain, rtol=1e-5, atol=1e-6
        )


# Refusals


@pytest.mark.parametrize("name", ALL)
def test_what_recipes_of_rewards_are_made_of(name):
    recipe = bind(name, {"advantage": "mean_std", "dual_clip": 0.0}).recipe
    kinds = {"grpo": "task", "ropd": "rubric", "tjudge": "scalar", "ropd_stages": "stages"}
    assert (recipe.teacher, recipe.is_policy_gradient, recipe.reward) == ("none", True, kinds[name])
    has_stages = "stage_credit" in recipe.options
    assert has_stages == (name == "ropd_stages")
    for option in ("importance", "discount", "baseline"):
        with pytest.raises(ValueError, match=f"has no option '{option}'"):
            bind(name, {option: "none"})


def test_what_the_batch_lacks_is_named():
    tile, token = VocabTile(jnp.zeros((1, V))), jnp.zeros(1, int)
    zero = jnp.zeros(1)
    with pytest.raises(ValueError, match="'advantages', which this batch does not carry"):
        TOKEN_LOSSES["ropd"](tile, None, TokenInputs(token, behavior_logprobs=zero))
    with pytest.raises(ValueError, match="'behavior_logprobs', which"):
        TOKEN_LOSSES["ropd"](tile, None, TokenInputs(token, advantages=zero))
    with pytest.raises(ValueError, match="'reference_logprobs', which"):
        TOKEN_LOSSES["ropd"](
            tile,
            None,
            TokenInputs(token, advantages=zero, behavior_logprobs=zero),
            reference_kl_coef=0.1,
        )
