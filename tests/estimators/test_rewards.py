"""Transforms of the reward, baselines and extra draws at one context: by hand, and by enumerating
every action in float64.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import (
    expected_gradient,
    gradient_of_mean,
    log_softmax,
    reverse_kl,
    reverse_kl_gradient,
    sample_gradients,
    softmax,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from on_logits import on_logits

from opdjax.estimators.opd import (
    advantages,
    full_baseline,
    optimal_baseline,
    sampled_reward,
    score_norms,
    student_topk_baseline,
)
from opdjax.ops.tile import VocabTile

V, FLOOR, ALPHA = 7, -0.4, 0.6
BASELINES = {
    "opd": ("opd", {}),
    "full": ("vopd", {}),
    "optimal": ("vopd", {"baseline": "optimal"}),
    "topk": ("vopd", {"baseline": "student_topk", "support_top_k": 3}),
    "batch_mean": ("vopd", {"baseline": "batch_mean"}),
}
TRANSFORMS = {"plain": {}, "floor": {"reward_floor": FLOOR}, "power": {"power_alpha": ALPHA}}
MEAN = {"mean_rewards": -0.37}


def floored_kl_gradient(student, teacher):
    """Of sum_v phi(p_v): p log(p / q) up to p = q e^-floor, from there on its tangent."""
    p, q = softmax(student), softmax(teacher)
    slope = np.where(p <= q * np.exp(-FLOOR), np.log(p / q) + 1, 1 - FLOOR)
    return gradient_of_mean(student, slope)


def power_divergence_gradient(student, teacher):
    """Of sum_v p^(1 + alpha) / (1 + alpha) - p q^alpha."""
    p, q = softmax(student), softmax(teacher)
    return gradient_of_mean(student, p**ALPHA - q**ALPHA)


POTENTIAL_GRADIENTS = {
    "plain": reverse_kl_gradient,
    "floor": floored_kl_gradient,
    "power": power_divergence_gradient,
}


def tiles(student, teacher):
    return tuple(VocabTile(jnp.asarray(x)[None]) for x in (student, teacher))


@pytest.fixture
def logits(rng):
    return tuple(1.5 * rng.normal(size=V) for _ in range(2))


@pytest.mark.usefixtures("x64")
class TestExpectedGradients:
    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_each_reward_descends_its_potential_under_every_baseline(self, transform, logits):
        rewards = log_softmax(logits[1]) - log_softmax(logits[0])
        assert 0 < np.sum(rewards < FLOOR) < V  # the floor cuts some tokens and spares others
        exact = POTENTIAL_GRADIENTS[transform](*logits)
        assert np.linalg.norm(exact) > 0.05
        for name, options in BASELINES.values():
            found = expected_gradient(name, options | TRANSFORMS[transform], *logits, **MEAN)
            np.testing.assert_allclose(found, exact, atol=1e-10, err_msg=f"{name} {options}")

    def test_the_transforms_are_biased_for_the_kl(self, logits):
        exact = reverse_kl_gradient(*logits)
        for transform in ("floor", "power"):
            found = POTENTIAL_GRADIENTS[transform](*logits)
            assert np.linalg.norm(found - exact) > 0.05 * np.linalg.norm(exact)

    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_advantages_average_to_zero_under_the_full_baseline_of_their_own_reward(
        self, transform, logits
    ):
        found = sample_gradients("vopd", TRANSFORMS[transform], *logits)[1]["advantages"]
        assert np.abs(found).max() > 0.1
        assert abs(softmax(logits[0]) @ found) < 1e-12
        options = TRANSFORMS[transform]
        table, without = (
            on_logits(lambda s, t, o=options | more: advantages(s, t, **o))(*logits)
            for more in ({"baseline": "full"}, {})
        )
        np.testing.assert_allclose(table, found, atol=1e-12)
        np.testing.assert_allclose(
            without,
            sample_gradients("opd", TRANSFORMS[transform], *logits)[1]["advantages"],
            atol=1e-12,
        )

    def test_only_the_plain_full_baseline_is_reported_as_the_kl(self, logits):
        outputs = sample_gradients("vopd", {}, *logits)[1]
        np.testing.assert_allclose(outputs["kl"], reverse_kl(*logits), rtol=1e-12)
        for options in (
            {"reward_floor": FLOOR},
            {"reward_floor": 0.0},
            {"power_alpha": ALPHA},
            {"baseline": "optimal"},
        ):
            outputs = sample_gradients("vopd", options, *logits)[1]
            assert "kl" not in outputs
            # What is logged as the reward stays the log-ratio, whose mean is -KL, under every
            # transform.
            np.testing.assert_allclose(
                softmax(logits[0]) @ outputs["rewards"], -reverse_kl(*logits), rtol=1e-12
            )

    def test_a_student_that_is_the_teacher_gets_no_gradient(self, logits):
        for (name, options), how in itertools.product(BASELINES.values(), TRANSFORMS.values()):
            gradients, _ = sample_gradients(
                name, options | how, logits[0], logits[0], mean_rewards=0.0
            )
            np.testing.assert_allclose(gradients, 0, atol=1e-14)

    def test_padded_ids_change_nothing(self, logits):
        padded = [np.append(x, [-np.inf, -np.inf]) for x in logits]
        for (name, options), how in zip(BASELINES.values(), itertools.cycle(TRANSFORMS.values())):
            found = np.asarray(
                sample_gradients(name, options | how, *padded, tokens=np.arange(V), **MEAN)[0]
            )
            np.testing.assert_allclose(
                found[:, :V], sample_gradients(name, options | how, *logits, **MEAN)[0], atol=1e-12
            )
            np.testing.assert_array_equal(found[:, V:], 0)

    def test_cross_entropy_on_its_own_draws_teaches_nothing(self, logits):
        np.testing.assert_allclose(expected_gradient("sft", {}, *logits), 0, atol=1e-12)


@pytest.mark.usefixtures("x64")
class TestExtraDraws:
    """Four tokens, so that all 4^(m+1) outcomes of the first draw and the m extra ones can be
    visited.
    """

    @pytest.mark.parametrize(
        ("name", "baseline", "options"),
        [
            ("opd", {}, {"reward_floor": FLOOR}),
            ("vopd", {"baseline": "full"}, {}),
            ("vopd", {"baseline": "batch_mean"}, {"reward_floor": FLOOR}),
            *(
                pytest.param(*each, marks=pytest.mark.long)
                for each in (
                    ("opd", {}, {}),
                    ("vopd", {"baseline": "full"}, {"reward_floor": FLOOR}),
                    ("vopd", {"baseline": "batch_mean"}, {}),
                )
            ),
        ],
    )
    def test_expectation_stays_and_the_action_variance_falls_to_its_share(
        self, name, baseline, options, logits
    ):
        student, teacher = (x[:4] for x in logits)
        options = options | baseline
        p = softmax(student)
        middle = np.cumsum(p) - p / 2  # this uniform number draws that token
        one, _ = sample_gradients(name, options, student, teacher, **MEAN)
        exact = p @ one
        variance = p @ np.sum(np.square(one - exact), axis=1)
        assert variance > 1e-3
        for m in (1, 2):
            draws = np.array(list(itertools.product(range(4), repeat=m + 1)))
            weight = np.prod(p[draws], axis=1)
            more = options | {"extra_draws": m}
            several, outputs = sample_gradients(
                name, more, student, teacher, draws[:, 0], uniforms=middle[draws[:, 1:]], **MEAN
            )
            np.testing.assert_allclose(several, np.mean(np.asarray(one)[draws], axis=1), atol=1e-12)
            np.testing.assert_allclose(weight @ several, exact, atol=1e-10)
            np.testing.assert_allclose(
                weight @ np.sum(np.square(several - exact), axis=1), variance / (m + 1), rtol=1e-10
            )
            assert outputs["advantages"].shape == (len(draws),)

    def test_what_does_not_belong_to_the_context_is_credited_to_the_first_draw_alone(self, logits):
        options = {"extra_draws": 2, "discount": 0.5, "task_reward_coef": 2.0}
        columns = {"future_rewards": 0.3, "advantages": -0.25, "uniforms": np.full((V, 2), 0.5)}
        found, _ = sample_gradients("opd", options, *logits, **columns)
        plain, _ = sample_gradients(
            "opd", {"extra_draws": 2}, *logits, uniforms=columns["uniforms"]
        )
        score = np.eye(V) - softmax(logits[0])
        np.testing.assert_allclose(found - plain, -(0.3 - 0.5) * score, atol=1e-12)


# By hand: student (1/2, 1/4, 1/4), teacher (1/4, 1/2, 1/4), so that the rewards are (-ln 2, ln 2,
# 0).

BY_HAND = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.5, 0.25])
LN2 = np.log(2.0)


BASELINE_FUNCTIONS = full_baseline, optimal_baseline, student_topk_baseline


def jitted(function):
    """function(student logits, teacher logits, ...), compiled for these options."""

    def call(student, teacher, *rest, **options):
        return on_logits(lambda s, t: function(s, t, *rest, **options))(student, teacher)

    return call


def test_rewards_by_hand():
    student, teacher = BY_HAND
    np.testing.assert_allclose(sampled_reward(teacher, student), [-LN2, LN2, 0], atol=1e-6)
    np.testing.assert_allclose(
        sampled_reward(teacher, student, reward_floor=-0.5), [-0.5, LN2, 0], atol=1e-6
    )
    np.testing.assert_allclose(
        sampled_reward(teacher, student, reward_floor=-5.0), [-LN2, LN2, 0], atol=1e-6
    )
    np.testing.assert_allclose(
        sampled_reward(teacher, student, power_alpha=1.0), [-0.25, 0.25, 0], atol=1e-6
    )
    root = np.sqrt(0.5) - 0.5
    np.testing.assert_allclose(
        sampled_reward(teacher, student, power_alpha=0.5), [-root, root, 0], atol=1e-6
    )
    # No token is worth more than 1 or less than -1, impossible ones included.
    found = sampled_reward(jnp.array([-jnp.inf, 0.0]), jnp.array([0.0, -jnp.inf]), power_alpha=0.3)
    np.testing.assert_allclose(found, [-1, 1])


def test_score_norms_by_hand():
    """w = ((1/2)^2 + 2 / 16, (3/4)^2 + 1/4 + 1/16, the same): 3/8, 7/8, 7/8."""
    np.testing.assert_allclose(
        score_norms(VocabTile(jnp.asarray(BY_HAND[0])[None]))[0], [3 / 8, 7 / 8, 7 / 8], rtol=1e-6
    )


def test_baselines_by_hand():
    pair = BY_HAND
    full_baseline, optimal_baseline, student_topk_baseline = map(jitted, BASELINE_FUNCTIONS)
    np.testing.assert_allclose(full_baseline(*pair), -LN2 / 4, rtol=1e-6)
    np.testing.assert_allclose(full_baseline(*pair, reward_floor=-0.5), LN2 / 4 - 0.25, rtol=1e-6)
    np.testing.assert_allclose(full_baseline(*pair, power_alpha=1.0), -1 / 16, rtol=1e-6)
    # E[w] = 3/16 + 7/32 + 7/32 = 5/8; E[w r] = ln 2 (-3/16 + 7/32) = ln 2 / 32.
    np.testing.assert_allclose(optimal_baseline(*pair), LN2 / 20, rtol=1e-5)
    np.testing.assert_allclose(optimal_baseline(*pair, power_alpha=1.0), 0.25 / 20, rtol=1e-5)
    # On two ids: student (2/3, 1/3), teacher (1/3, 2/3).
    np.testing.assert_allclose(student_topk_baseline(*pair, 2), -LN2 / 3, rtol=1e-6)
    np.testing.assert_allclose(
        student_topk_baseline(*pair, 2, reward_floor=-0.5), LN2 / 3 - 1 / 3, rtol=1e-5
    )
    np.testing.assert_allclose(student_topk_baseline(*pair, 2, power_alpha=1.0), -1 / 9, rtol=1e-5)


# The squared norms of the score, and the baseline made of them


@pytest.mark.usefixtures("x64")
def test_score_norms_equal_the_naive_formula(rng):
    logits = np.asarray(
        np.concatenate(
            [
                rng.normal(size=(40, V)),
                np.zeros((1, V)),
                np.log([[0.4, 0.4, 0.1, 0.025, 0.025, 0.025, 0.025]]),
            ]
        )
    )
    p = softmax(logits)
    naive = 1 - 2 * p + np.sum(np.square(p), axis=1, keepdims=True)
    found = jax.jit(lambda x: score_norms(VocabTile(x)))(logits)
    np.testing.assert_allclose(found, naive, rtol=1e-12)
    jacobian = jax.jit(jax.vmap(jax.jacrev(jax.nn.log_softmax)))(logits)
    np.testing.assert_allclose(found, np.sum(np.square(jacobian), axis=2), rtol=1e-12)


def test_score_norms_keep_their_digits_where_the_student_is_nearly_sure(rng):
    """p_top = 1 - 1e-9 is 1 in float32: 1 - 2 p + sum p^2 gives 0 instead of 1.5e-18."""
    others = rng.dirichlet(np.ones(V - 1)) * 1e-9
    logits = np.log(np.insert(others, 2, 1 - 1e-9)).astype(np.float32)
    logits[2] = 0
    exact = np.exp(logits.astype(np.float64))
    exact /= exact.sum()
    w = np.array(
        [
            np.square(np.delete(exact, v).sum()) + np.sum(np.square(np.delete(exact, v)))
            for v in range(V)
        ]
    )
    found = np.asarray(score_norms(VocabTile(jnp.asarray(logits)[None]))[0])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, w, rtol=1e-5)
    naive = 1 - 2 * np.float32(exact) + np.sum(np.square(np.float32(exact)))
    assert abs(naive[2] - w[2]) > 0.5 * w[2]
    # The baseline is then as exact, and only below E[w] = 1e-12 given up.
    teacher = rng.normal(size=V).astype(np.float32)
    reward = (teacher - np.logaddexp.reduce(teacher.astype(np.float64))) - np.log(exact)
    np.testing.assert_allclose(
        optimal_baseline(*tiles(logits, teacher))[0], (exact * w) @ reward / (exact @ w), rtol=1e-5
    )
    assert optimal_baseline(*tiles(np.where(np.arange(V) == 2, 0, logits - 10), teacher))[0] == 0


@jax.jit
def spread_of(student, teacher):
    """(E[w (r - b)^2] with the optimal b, without a baseline, E[w]) of one context."""
    pair = tiles(student, teacher)
    live = student > -jnp.inf
    p, w = jax.nn.softmax(student), score_norms(pair[0])[0]
    value = optimal_baseline(*pair)[0]
    reward = jnp.where(live, advantages(*pair)[0], 0)
    return (
        jnp.sum(p * w * jnp.square(reward - value)),
        jnp.sum(p * w * jnp.square(reward)),
        jnp.sum(p * w),
        value,
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**31 - 1),
    st.sampled_from([1e-6, 0.3, 1.0, 3.0, 10.0, 30.0, 300.0]),
    st.sampled_from([0.1, 3.0, 100.0]),
    st.integers(1, V),
)
def test_the_optimal_baseline_never_adds_action_variance(
    seed, student_scale, teacher_scale, num_live
):
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        pair = [
            np.where(np.arange(V) < num_live, scale * rng.normal(size=V), -np.inf)
            for scale in (student_scale, teacher_scale)
        ]
        best, without, total, value = (float(x) for x in spread_of(*pair))
    assert np.isfinite([best, without, total, value]).all()
    assert best <= without * (1 + 1e-9)
    assert (value == 0) if total < 1e-12 else True
