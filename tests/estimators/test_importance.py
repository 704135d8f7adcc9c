"""Tokens that another policy drew: what each ratio makes of the expected gradient, by enumeration
under that policy.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import (
    CONTEXTS,
    LENGTH,
    SEQUENCES,
    batch_probabilities,
    exact_gradient,
    expectation,
    expected_gradient,
    forward_kl_gradient,
    log_softmax,
    reach,
    relative_bias,
    reverse_kl,
    reverse_kl_gradient,
    sample_gradients,
    sequence_gradients,
    sequence_logprobs,
    softmax,
    token_logprobs,
)

from opdjax.estimators import importance, losses

V, HUGE = 7, 1e30


@pytest.mark.usefixtures("x64")
class TestOneContext:
    @pytest.fixture
    def logits(self, rng):
        """Student, teacher, and the policy that drew the tokens, near the student."""
        student, teacher, noise = rng.normal(size=(3, V))
        return 1.2 * student, 1.2 * teacher, 1.2 * student + 0.7 * noise

    def found(self, logits, options, name="opd"):
        """(expected gradient under the behaviour policy, that gradient on-policy)."""
        student, teacher, behavior = logits
        drawn = log_softmax(behavior)
        options = options if name == "opd" else options | {"baseline": "full"}
        found = expected_gradient(
            name, options, student, teacher, np.exp(drawn), behavior_logprobs=drawn
        )
        return found, reverse_kl_gradient(student, teacher)

    def stated(self, logits, weight, value=0.0):
        """-sum_v weight_v (r_v - value) grad log student(v)."""
        student, teacher, _ = logits
        p, q = map(log_softmax, (student, teacher))
        return -(weight * (q - p - value)) @ (np.eye(V) - np.exp(p))

    def both(self, logits):
        return softmax(logits[0]), softmax(logits[2])

    def test_no_correction_is_biased(self, logits):
        found, exact = self.found(logits, {})
        print(f"one context, none: relative bias {relative_bias(found, exact):.3f}")
        assert relative_bias(found, exact) > 0.01

    @pytest.mark.parametrize("name", ["opd", "vopd"])
    def test_the_whole_ratio_is_exact(self, name, logits):
        for kind in (
            {"importance": "token_truncate"},
            {"importance": "token_mask"},
        ):
            found, exact = self.found(logits, kind | {"importance_cap": HUGE}, name)
            np.testing.assert_allclose(found, exact, atol=1e-10)

    @pytest.mark.parametrize("cap", [1.2, 2.0, None])
    def test_a_truncated_ratio_has_the_expectation_it_states(self, cap, logits):
        p, b = self.both(logits)
        options = {"importance": "token_truncate"} | (
            {} if cap is None else {"importance_cap": cap}
        )
        found, exact = self.found(logits, options)
        np.testing.assert_allclose(
            found, self.stated(logits, np.minimum(p, (2.0 if cap is None else cap) * b)), atol=1e-12
        )
        print(f"one context, min(rho, {cap}): relative bias {relative_bias(found, exact):.3f}")

    @pytest.mark.parametrize("cap", [1.25, 2.0])
    def test_a_masked_ratio_has_the_expectation_it_states(self, cap, logits):
        p, b = self.both(logits)
        inside = (p >= b / cap) & (p <= cap * b)
        found, exact = self.found(logits, {"importance": "token_mask", "importance_cap": cap})
        np.testing.assert_allclose(found, self.stated(logits, p * inside), atol=1e-12)
        if cap == 2.0:
            np.testing.assert_allclose(
                self.found(logits, {"importance": "token_mask"})[0], found, atol=1e-14
            )  # the defaults
        else:
            assert 0 < inside.sum() < V
        print(f"one context, mask {cap}: relative bias {relative_bias(found, exact):.3f}")

    def test_ppo_clip_drops_what_lies_beyond_the_band_in_its_own_favour(self, logits):
        student, teacher, _ = logits
        p, b = self.both(logits)
        reward = log_softmax(teacher) - log_softmax(student)
        for low, high in ((importance.CLIP_LOW, importance.CLIP_HIGH), (0.05, 0.1)):
            is_dropped = ((reward > 0) & (p > (1 + high) * b)) | (
                (reward < 0) & (p < (1 - low) * b)
            )
            assert is_dropped.any()
            assert not is_dropped.all()
            options = {"importance": "ppo_clip"} | (
                {} if low == importance.CLIP_LOW else {"clip_low": low, "clip_high": high}
            )
            found, exact = self.found(logits, options)
            np.testing.assert_allclose(found, self.stated(logits, p * ~is_dropped), atol=1e-12)
            print(
                f"one context, ppo_clip {low}, {high}: relative bias "
                f"{relative_bias(found, exact):.3f}"
            )

    @pytest.mark.parametrize("kind", importance.TOKEN_CORRECTIONS)
    def test_on_policy_every_correction_is_opd(self, kind, logits):
        student, teacher, _ = logits
        columns = {"behavior_logprobs": log_softmax(student)}
        found, _ = sample_gradients("opd", {"importance": kind}, student, teacher, **columns)
        np.testing.assert_allclose(
            found, sample_gradients("opd", {}, student, teacher)[0], atol=1e-12
        )

    def test_a_baseline_is_free_under_the_whole_ratio_alone(self, logits):
        """Under min(rho, C) it adds b sum_v min(p_v, C b_v) grad log student(v), which is not 0."""
        for cap in (HUGE, 2.0, 1.2):
            options = {"importance": "token_truncate", "importance_cap": cap}
            (with_baseline, exact), (without, _) = (
                self.found(logits, options, "vopd"),
                self.found(logits, options),
            )
            share = relative_bias(with_baseline - without + exact, exact)
            print(
                f"one context, vopd under min(rho, {cap:g}): the baseline moves the gradient by "
                f"{share:.1e}"
            )
            assert share < 1e-12 if cap == HUGE else share > 1e-3

    @pytest.mark.parametrize("name", ["opd", "vopd"])
    def test_no_ratio_brings_back_what_a_filter_took_away(self, name, logits):
        """The two least likely tokens are never drawn: the whole ratio then sums over the others,
        and the baseline is not free.
        """
        student, teacher, _ = logits
        p = softmax(student)
        kept = p > np.sort(p)[1]
        behavior = np.where(kept, student, -np.inf)
        found, exact = self.found(
            (student, teacher, behavior),
            {"importance": "token_truncate", "importance_cap": HUGE},
            name,
        )
        value = 0.0 if name == "opd" else -reverse_kl(student, teacher)
        np.testing.assert_allclose(found, self.stated(logits, p * kept, value), atol=1e-12)
        print(
            f"one context, {name}, {1 - p @ kept:.3f} of the mass filtered: relative bias "
            f"{relative_bias(found, exact):.3f}"
        )
        assert relative_bias(found, exact) > 0.01

    def test_every_importance_ratio_and_weight_is_detached(self, logits):
        """The ratio of token_truncate is differentiated by nobody: its gradient is a multiple of
        the score.
        """
        student, teacher, behavior = logits
        drawn = log_softmax(behavior)
        of_ratio = jax.jit(jax.grad(lambda x: jnp.sum(importance.token_ratio(x, drawn))))
        np.testing.assert_array_equal(of_ratio(student), 0)
        for kind in ("token_truncate", "token_mask"):
            options = {"importance": kind, "importance_cap": 5.0}
            found = np.asarray(
                sample_gradients("opd", options, student, teacher, behavior_logprobs=drawn)[0]
            )
            score = np.eye(V) - softmax(student)
            ratio = np.exp(log_softmax(student) - drawn)
            weight = (
                np.minimum(ratio, 5.0)
                if kind == "token_truncate"
                else np.where((ratio >= 1 / 5) & (ratio <= 5), ratio, 0)
            )
            reward = log_softmax(teacher) - log_softmax(student)
            np.testing.assert_allclose(found, -(weight * reward)[:, None] * score, atol=1e-12)

    def test_k1_k2_k3(self, logits):
        student, teacher, _ = logits
        p, q, kl = softmax(student), log_softmax(teacher), reverse_kl(student, teacher)
        kinds = (importance.k1, importance.k2, importance.k3)

        @jax.jit
        def estimates(x):
            of = lambda function: lambda x: function(jax.nn.log_softmax(x), q)
            return [(of(kind)(x), jax.jacrev(of(kind))(x)) for kind in kinds]

        (k1, of_k1), (k2, of_k2), (k3, of_k3) = estimates(student)
        np.testing.assert_allclose([p @ k1, p @ k3], kl, rtol=1e-12)
        assert np.all(k3 >= 0)
        assert abs(p @ k2 - kl) > 0.01 * kl
        np.testing.assert_allclose(
            of_k2, sample_gradients("opd", {}, student, teacher)[0], atol=1e-12
        )
        np.testing.assert_allclose(p @ of_k1, 0, atol=1e-12)
        np.testing.assert_allclose(p @ of_k3, forward_kl_gradient(student, teacher), atol=1e-12)


@pytest.mark.usefixtures("x64")
class TestTree:
    @pytest.fixture
    def tables(self, rng):
        """Student, teacher, and the policy that drew the sequences."""
        student, teacher, noise = rng.normal(size=(3, len(CONTEXTS), 3))
        return (student, teacher), student + 0.6 * noise

    @pytest.mark.parametrize("name", ["opd", "vopd"])
    def test_the_whole_prefix_ratio_is_exact_without_discount(self, name, tables):
        pair, behavior = tables
        found = expectation(
            pair, name, {"importance": "prefix_truncate", "importance_cap": HUGE}, behavior=behavior
        )
        np.testing.assert_allclose(found, exact_gradient(pair, 0.0), atol=1e-10)

    def test_what_follows_a_token_is_not_in_its_prefix_ratio(self, tables):
        pair, behavior = tables
        for how in ("sampled", "expected"):
            options = {
                "importance": "prefix_truncate",
                "importance_cap": HUGE,
                "discount": 1.0,
                "return_to_go": how,
            }
            bias = relative_bias(
                expectation(pair, "opd", options, behavior=behavior), exact_gradient(pair, 1.0)
            )
            print(f"tree, prefix ratio with discount 1, returns {how}: relative bias {bias:.3f}")
            assert bias > 0.01

    def test_an_exact_divergence_takes_the_ratio_of_reaching_its_context(self, tables):
        pair, behavior = tables
        options = {"importance": "prefix_truncate", "importance_cap": HUGE}
        np.testing.assert_allclose(
            expectation(pair, "full_kl", options, behavior=behavior),
            exact_gradient(pair, 0.0),
            atol=1e-10,
        )
        uncorrected = expectation(pair, "full_kl", {}, behavior=behavior)
        stale = reach(behavior)[:, None] * [reverse_kl_gradient(*rows) for rows in zip(*pair)]
        stale /= LENGTH
        np.testing.assert_allclose(uncorrected, stale, atol=1e-10)
        for cap in (2.0, 1.2):
            found = expectation(
                pair, "full_kl", options | {"importance_cap": cap}, behavior=behavior
            )
            print(
                f"tree, full_kl, exclusive prefix ratio below {cap}: relative bias "
                f"{relative_bias(found, exact_gradient(pair, 0.0)):.3f}"
            )
        print(
            f"tree, full_kl, none: relative bias "
            f"{relative_bias(uncorrected, exact_gradient(pair, 0.0)):.3f}"
        )

    @pytest.mark.parametrize("name", ["opd", "vopd"])
    @pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
    def test_the_ratio_of_the_whole_sequence_is_exact_whatever_the_discount(
        self, name, discount, tables
    ):
        pair, behavior = tables
        options = {"importance": "sequence_mask", "importance_cap": HUGE, "discount": discount}
        found = expectation(pair, name, options, behavior=behavior)
        np.testing.assert_allclose(found, exact_gradient(pair, discount), atol=1e-10)

    def test_realistic_bounds_are_biased(self, tables):
        pair, behavior = tables
        exact = exact_gradient(pair, 0.0)
        for options in (
            {},
            {"importance": "token_truncate", "importance_cap": 1.2},
            {"importance": "token_truncate"},
            {"importance": "token_mask"},
            {"importance": "token_mask", "importance_cap": 1.2},
            {"importance": "prefix_truncate"},
            {"importance": "sequence_mask"},
            {"importance": "ppo_clip"},
        ):
            biases = [
                relative_bias(expectation(pair, name, options, behavior=behavior), exact)
                for name in ("opd", "vopd")
            ]
            print(f"tree, {options or 'none'}: relative bias {biases[0]:.3f}, vopd {biases[1]:.3f}")
            assert min(biases) > 0

    def test_a_masked_sequence_is_dropped_whole_and_stays_in_the_denominator(self, tables):
        pair, behavior = tables
        ratio = np.exp(sequence_logprobs(pair[0]) - sequence_logprobs(behavior))
        cap = float(np.sort(ratio)[len(SEQUENCES) // 2]) * 1.001
        found = sequence_gradients(
            pair,
            "opd",
            {"importance": "sequence_mask", "importance_cap": cap},
            behavior_logprobs=token_logprobs(behavior),
        )
        plain = sequence_gradients(pair, "opd")
        weight = np.where(ratio <= cap, ratio, 0)
        assert 0 < np.sum(weight == 0) < len(SEQUENCES)
        np.testing.assert_allclose(found, weight[:, None, None] * plain, atol=1e-12)

    @pytest.mark.parametrize("kind", importance.SEQUENCE_CORRECTIONS)
    def test_on_policy_every_correction_is_opd(self, kind, tables):
        (student, teacher), _ = tables
        columns = {"behavior_logprobs": token_logprobs(student)}
        found = sequence_gradients((student, teacher), "opd", {"importance": kind}, **columns)
        np.testing.assert_allclose(found, sequence_gradients((student, teacher), "opd"), atol=1e-12)
        assert batch_probabilities(student).sum() == pytest.approx(1, rel=1e-12)


# By hand


def test_ratios_of_single_tokens_by_hand():
    student, behavior = np.log([0.1, 0.2, 0.5, 0.8]), np.log([0.4, 0.2, 0.2, 0.2])

    @jax.jit
    def found(ends):
        ratio = importance.token_ratio(jnp.asarray(student), jnp.asarray(behavior))
        truncated = importance.token_truncate(ratio, 2.0)
        masked = importance.token_mask(ratio, 0.5, 3.0)
        return ratio, truncated, masked, importance.token_mask(ends, 0.5, 3.0)

    ends = np.float32([0.5, 3.0])
    ratio, truncated, masked, at_ends = found(ends)
    np.testing.assert_allclose(ratio, [0.25, 1, 2.5, 4], rtol=1e-6)
    np.testing.assert_allclose(truncated, [0.25, 1, 2, 2], rtol=1e-6)
    np.testing.assert_allclose(masked, [0, 1, 2.5, 0], rtol=1e-6)
    np.testing.assert_array_equal(at_ends, ends)


NAN = np.nan
SEGMENTS = np.array([[1, 1, 1, 1, 0, 2, 2, 2], [0, 1, 1, 1, 1, 1, 0, 0]])
MASK = np.array([[0, 1, 1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 1, 0, 0]], bool)
LOG_RATIO = np.log(
    np.float32(
        [[NAN, 2.0, 0.5, 4.0, NAN, NAN, 3.0, 0.1], [NAN, NAN, 0.25, 2.0, NAN, 8.0, NAN, NAN]]
    )
)
prefix_truncate = jax.jit(importance.prefix_truncate, static_argnames=("cap", "is_inclusive"))
sequence_mask = jax.jit(importance.sequence_mask)
clipped_policy_gradient_loss = jax.jit(losses.clipped_policy_gradient_loss)


def test_ratios_of_prefixes_and_sequences_by_hand():
    """Two sequences packed into one row and one in another, with garbage wherever nothing was
    sampled.
    """

    def check(found, expected):
        np.testing.assert_allclose(np.where(MASK, found, 0), expected, rtol=1e-5)
        assert np.isfinite(found).all()

    inclusive = prefix_truncate(LOG_RATIO, MASK, SEGMENTS, 2.5, is_inclusive=True)
    check(inclusive, [[0, 2, 1, 2.5, 0, 0, 2.5, 0.3], [0, 0, 0.25, 0.5, 0, 2.5, 0, 0]])
    exclusive = prefix_truncate(LOG_RATIO, MASK, SEGMENTS, 2.5, is_inclusive=False)
    check(exclusive, [[0, 1, 2, 1, 0, 0, 1, 2.5], [0, 0, 1, 0.25, 0, 0.5, 0, 0]])
    whole = sequence_mask(LOG_RATIO, MASK, SEGMENTS, 3.9)
    check(whole, [[0, 0, 0, 0, 0, 0, 0.3, 0.3], [0, 0, 0, 0, 0, 0, 0, 0]])
    whole = sequence_mask(LOG_RATIO, MASK, SEGMENTS, 4.5)
    check(whole, [[0, 4, 4, 4, 0, 0, 0.3, 0.3], [0, 0, 4, 4, 0, 4, 0, 0]])


def test_a_ratio_too_large_for_float32_is_bounded_all_the_same():
    far, mask = np.full((1, 3), 80, np.float32), np.ones((1, 3), bool)
    segments = np.ones((1, 3), int)
    np.testing.assert_allclose(
        prefix_truncate(far, mask, segments, 2.0, is_inclusive=True), 2, rtol=1e-6
    )
    np.testing.assert_array_equal(sequence_mask(far, mask, segments, 3.0), 0)
    np.testing.assert_array_equal(
        sequence_mask(-far, mask, segments, 3.0), 0
    )  # e^-240 underflows to 0


def test_the_clipped_surrogate_by_hand():
    """Ratios 0.5, 1 and 2 under advantages of either sign, band 0.8 to 1.3: value and slope with
    respect to log student(y).
    """
    ratio = np.float32([0.5, 1.0, 2.0, 0.5, 1.0, 2.0])
    advantage = np.float32([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    student, behavior = np.log(ratio) - 3, np.full(6, -3, np.float32)
    loss = lambda s: clipped_policy_gradient_loss(advantage, s, behavior, 0.2, 0.3)
    np.testing.assert_allclose(loss(student), [-1, -2, -2.6, 1.6, 2, 4], rtol=1e-6)
    # Flat only where the ratio has already gone where the advantage sends it: above the band if
    # better, below it if worse.
    np.testing.assert_allclose(
        jax.grad(lambda s: jnp.sum(loss(s)))(student), [-1, -2, 0, 0, 2, 4], rtol=1e-5
    )
    held = jax.grad(
        lambda a: jnp.sum(clipped_policy_gradient_loss(a, student, behavior, 0.2, 0.3))
    )(advantage)
    np.testing.assert_array_equal(held, 0)


def test_k1_k2_k3_by_hand():
    student, teacher = np.log(np.float32([0.5, 0.25])), np.log(np.float32([0.25, 0.5]))
    ln2 = np.log(2)
    np.testing.assert_allclose(importance.k1(student, teacher), [ln2, -ln2], rtol=1e-6)
    np.testing.assert_allclose(importance.k2(student, teacher), [ln2**2 / 2] * 2, rtol=1e-6)
    np.testing.assert_allclose(importance.k3(student, teacher), [ln2 - 0.5, 1 - ln2], rtol=1e-5)
    near = importance.k3(
        jnp.float32(-1.0), jnp.float32(-1.0 - 2.0**-10)
    )  # of order k1^2 / 2: exp(-k1) - 1 would lose most of it
    np.testing.assert_allclose(near, 2.0**-21, rtol=1e-3)


def test_staleness_by_hand():
    """rho = 1/2, 1, 2 and e."""
    gap, ln2 = jnp.array([-np.log(2), 0, np.log(2), 1]), np.log(2)
    found = importance.kl_to_behavior(gap - 3.0, jnp.full(4, -3.0))
    np.testing.assert_allclose(found, [0.5 - ln2 / 2, 0, 2 * ln2 - 1, 1], rtol=2e-6)


def test_staleness_loses_no_digits_near_one_and_overflows_nowhere():
    gap = np.concatenate([s * 10.0 ** np.arange(-6, 1.8, 0.1) for s in (-1, 1)])
    gap = np.append(gap, [-0.5, 0.5, -0.5000001, 0.4999999]).astype(np.float32)
    wide = gap.astype(np.longdouble)
    small = np.abs(wide) < 1e-2
    exact = np.where(
        small,
        wide**2 / 2 + wide**3 / 3 + wide**4 / 8 + wide**5 / 30,
        wide * np.exp(wide) - np.expm1(wide),
    )
    np.testing.assert_allclose(
        importance.kl_to_behavior(jnp.asarray(gap), jnp.zeros(len(gap))),
        exact.astype(np.float64),
        rtol=2e-6,
    )
    extremes = importance.kl_to_behavior(jnp.float32([-np.inf, -300, 300]), jnp.zeros(3))
    np.testing.assert_allclose(extremes, [1, 1, 59 * np.exp(60.0)], rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_the_mean_staleness_of_a_policys_own_draws_is_the_kl(rng):
    """Over every token that the behaviour policy can draw: KL(student || behaviour), far apart and
    nearly the same.
    """
    behavior = np.log(rng.dirichlet(np.ones(9)))
    for scale in (1e-3, 0.1, 3.0):
        student = behavior + scale * rng.normal(size=9)
        student -= np.logaddexp.reduce(student)
        found = importance.kl_to_behavior(jnp.asarray(student), jnp.asarray(behavior))
        assert np.all(found >= 0)
        np.testing.assert_allclose(
            np.exp(behavior) @ found, np.exp(student) @ (student - behavior), rtol=1e-7
        )
