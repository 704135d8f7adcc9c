"""pass@k against the enumeration of every choice of k samples; intervals by hand."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import stdtr

from opdjax.runs.statistics import (
    Estimate,
    avg_at_k,
    clustered_ratio,
    crossed_estimate,
    holm,
    lies_within,
    maj_at_k,
    mean_and_interval,
    median_estimate,
    paired_by_seed,
    paired_difference,
    paired_ratios,
    pass_at_k,
    ratio_of_logarithm,
    ratio_with_interval,
    seed_estimate,
    shares_of_gap,
)

T_OF_3 = 3.1824463  # two-sided 95 % quantile of Student's t with 3 degrees of freedom


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_choices_with_a_right_answer(row, data):
    k = data.draw(st.integers(1, len(row)))
    choices = list(itertools.combinations(row, k))
    expected = sum(map(any, choices)) / len(choices)
    np.testing.assert_allclose(pass_at_k(np.array([row]), k), [expected], rtol=0, atol=1e-12)


def test_pass_at_k_of_several_prompts_by_hand():
    correct = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]])
    # 1 - C(n - c, 2) / C(4, 2) with C(4, 2) = 6: misses 3, 1, 6, 0.
    np.testing.assert_allclose(pass_at_k(correct, 2), [1 / 2, 5 / 6, 0, 1], atol=1e-15)
    np.testing.assert_allclose(pass_at_k(correct, 1), avg_at_k(correct), atol=1e-15)
    np.testing.assert_array_equal(pass_at_k(correct, 4), [1, 1, 0, 1])


def test_pass_at_k_is_exact_for_many_samples():
    # C(512, 256) overflows a float64 product; one right of 512 is found by 256 choices with
    # probability 1/2.
    correct = np.zeros((1, 512), bool)
    correct[0, 7] = True
    np.testing.assert_allclose(pass_at_k(correct, 256), [0.5], rtol=1e-12)


@pytest.mark.parametrize("k", [0, 4, -1])
def test_pass_at_k_refuses_more_answers_than_were_drawn(k):
    with pytest.raises(
        ValueError, match=rf"pass@{k} needs at least {k} samples a prompt, there are 3"
    ):
        pass_at_k(np.ones((2, 3)), k)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([None, 0, 1, 2, 3]), min_size=1, max_size=8), st.data())
def test_maj_at_k_is_the_mean_over_every_way_to_break_a_tie(row, data):
    right = {vote: data.draw(st.integers(0, 1)) for vote in {*row}} | {None: 0}
    values = [vote for vote in row if vote is not None]
    # Every order of preference breaks ties in one way.
    orders = list(itertools.permutations({*values}))
    chosen = [max(order, key=values.count) for order in orders if order]
    expected = np.mean([right[vote] for vote in chosen]) if values else 0
    found = maj_at_k([row], np.array([[right[vote] for vote in row]]))
    np.testing.assert_allclose(found, [expected], rtol=0, atol=1e-12)


def test_maj_at_k_by_hand():
    votes = [[0, 0, 1, None], [0, 1, None, None], [None] * 4, [0, 1, 1, 0]]
    correct = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]])
    # A value of which a half was graded right scores a half.
    np.testing.assert_array_equal(maj_at_k(votes, correct), [1, 0.5, 0, 0.75])


def test_avg_at_k_is_the_share_of_right_answers_of_each_prompt():
    np.testing.assert_allclose(avg_at_k(np.array([[1, 0, 0, 0], [1, 1, 1, 0]])), [0.25, 0.75])


def test_interval_by_hand():
    # mean 0.625; squared deviations .390625 + .140625 + .140625 + .015625 = .6875; / 3 = .2291667;
    # root / 2 = .2393568.
    mean, half = mean_and_interval(np.array([0.0, 1.0, 1.0, 0.5]))
    assert mean == 0.625
    assert half == pytest.approx(T_OF_3 * 0.2393568, rel=1e-6)


def test_interval_takes_the_prompt_as_the_unit():
    # Eight equal answers of each of four prompts say no more than one answer of each.
    answers = np.array([[0], [1], [1], [1]])
    single, repeated = (mean_and_interval(avg_at_k(np.repeat(answers, n, axis=1))) for n in (1, 8))
    assert single == repeated
    assert repeated[1] == pytest.approx(T_OF_3 * math.sqrt(0.75 * 0.25 / 3), rel=1e-6)


def test_interval_of_one_prompt_is_unknown():
    assert mean_and_interval(np.array([0.75])) == (0.75, math.inf)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_interval_of_a_share_that_is_0_or_1_is_not_0(share):
    assert mean_and_interval(np.full(64, share)) == (share, 3 / 64)
    assert mean_and_interval(np.full(2, share)) == (share, 1.0)
    assert paired_difference(np.full(64, share), np.full(64, share)) == (0.0, 3 / 64)


def test_the_interval_covers_the_truth_in_about_19_of_20_samples():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        mean, half = mean_and_interval(rng.binomial(1, 0.3, 200) / 1)
        hits += abs(mean - 0.3) <= half
    assert 920 <= hits <= 970


@pytest.mark.parametrize("num_problems", [30, 200])
def test_the_interval_of_a_paired_difference_covers_the_truth_in_about_19_of_20_samples(
    num_problems,
):
    rng, hits = np.random.default_rng(1), {"avg@8": 0, "pass@8": 0}
    chances = rng.beta(0.6, 0.6, (2000, num_problems))  # of each problem
    gained = 0.9 * chances + 0.04
    at_least_one = lambda chance: (1 - (1 - chance) ** 8).mean()
    truth = {"avg@8": gained.mean() - chances.mean()}
    truth["pass@8"] = at_least_one(gained) - at_least_one(chances)
    for before, after in zip(rng.binomial(8, chances), rng.binomial(8, gained)):
        scores = {"avg@8": (before / 8, after / 8), "pass@8": (before > 0, after > 0)}
        for name, (one, two) in scores.items():
            mean, half = paired_difference(one * 1.0, two * 1.0)
            hits[name] += abs(mean - truth[name]) <= half
    for found in hits.values():
        assert 0.93 <= found / 2000 <= 0.97


def test_paired_difference_by_hand():
    # Differences .5, 0, -.5, .75: mean .1875, squared deviations sum to .921875; / 3, root, / 2 =
    # .2771695.
    before, after = np.array([0.0, 0.5, 1.0, 0.25]), np.array([0.5, 0.5, 0.5, 1.0])
    mean, half = paired_difference(before, after)
    assert mean == 0.1875
    assert half == pytest.approx(T_OF_3 * 0.2771695, rel=1e-6)
    assert paired_difference(after, before) == (-mean, half)


def test_pairing_removes_what_differs_between_prompts():
    before = np.array([0.0, 0.25, 0.5, 0.75])
    mean, half = paired_difference(before, before + 0.25)
    assert (mean, half) == (0.25, 0.0)
    assert mean_and_interval(before)[1] > 0.3


def test_scores_of_different_prompts_are_not_paired():
    with pytest.raises(ValueError, match="4 and 3 prompts cannot be paired"):
        paired_difference(np.zeros(4), np.zeros(3))


def test_pairs_and_shares_by_seed():
    left, right = {0: 4.0, 1: 3.0, 2: 5.0}, {1: 1.5, 0: 1.0, 7: 9.0}
    assert paired_by_seed(left, right) == {0: 3.0, 1: 1.5}
    assert paired_by_seed(left, right, is_ratio=True) == {0: math.log(4), 1: math.log(2)}
    assert math.isnan(paired_by_seed({0: 1.0}, {0: 0.0}, is_ratio=True)[0])
    # Seed 2 has no start and no goal of its own: it takes the means 2 and 6.
    shares = shares_of_gap(left, {0: 1.0, 1: 3.0}, {0: 5.0, 1: 7.0})
    assert shares == {0: 0.75, 1: 0.0, 2: 0.75}
    assert math.isnan(shares_of_gap({0: 1.0}, {0: 1.0}, {0: 0.5})[0])
    assert shares_of_gap(left, {}, right) == {}


def test_the_interval_of_a_ratio_is_symmetric_in_its_logarithm():
    ratio, width, low, high = ratio_of_logarithm(math.log(8), math.log(2))
    assert (ratio, width, low, high) == pytest.approx((8, 8, 4, 16))
    assert ratio_of_logarithm(0.0, math.inf) == (1.0, math.inf, 0.0, math.inf)


@pytest.mark.parametrize(
    ("interval", "bounds", "expected"),
    [
        ((0.1, 0.3), (0.0, None), True),
        ((-0.3, -0.1), (0.0, None), False),
        ((-0.1, 0.1), (0.0, None), None),
        ((0.0, 0.0), (0.0, None), None),  # no spread, and on the bound
        ((-0.3, -0.1), (None, 0.0), True),
        ((-0.1, 0.1), (-0.2, 0.2), True),
        ((-0.1, 0.3), (-0.2, 0.2), None),
        ((-0.4, -0.3), (-0.2, 0.2), False),
        ((-math.inf, math.inf), (-0.2, 0.2), None),
    ],
)
def test_an_interval_is_inside_bounds_outside_or_neither(interval, bounds, expected):
    assert lies_within(interval, bounds) is expected


def test_scoring_needs_no_jax():
    code = (
        "import sys, opdjax.runs.statistics, opdjax.data.grading; print(sorted({'jax', "
        "'transformers', 'math_verify'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_a_ratio_and_its_interval(rng):
    plain = rng.exponential(size=400)
    ratio, low, high = ratio_with_interval(0.5 * plain, plain)
    assert (ratio, low, high) == pytest.approx((0.5, 0.5, 0.5))
    ratio, low, high = ratio_with_interval(rng.permutation(plain), plain)
    assert low < ratio < high
    assert ratio == pytest.approx(1)
    assert ratio_with_interval(plain[:3], np.zeros(3)) == (None, None, None)


def test_the_interval_of_a_share_is_that_of_clusters():
    # Three clusters of one size: the mean of three numbers.
    mean, half = clustered_ratio([2, 4, 3], [4, 4, 4])
    values = np.array([0.5, 1.0, 0.75])
    assert mean == 0.75
    assert half == pytest.approx(4.302653 * values.std(ddof=1) / math.sqrt(3), rel=1e-6)
    assert clustered_ratio([2], [4]) == (0.5, math.inf)


def test_a_difference_of_ratios_is_paired_by_cluster():
    # Clusters of one size: the differences 0.25, 0.75 and 0.5 of their means.
    ours, plain = [(3, 4), (5, 4), (4, 4)], [(2, 4), (2, 4), (2, 4)]
    values = np.array([0.25, 0.75, 0.5])
    expected = (0.5, 4.302653 * values.std(ddof=1) / math.sqrt(3))
    assert paired_ratios(ours, plain) == pytest.approx(expected, rel=1e-6)
    assert paired_ratios(ours, ours) == (0, 0)


# Seeds and prompts


def test_a_crossed_estimate_by_hand():
    # Seeds 0 and 2, prompts all alike: A = 3 * (1 + 1) / 1 = 6, B = E = 0, error^2 = 6 / 6.
    found = crossed_estimate(np.array([[0.0] * 3, [2.0] * 3]))
    assert (found.value, found.freedom) == (1.0, 1)
    assert found.half == pytest.approx(12.706205)
    # Prompts 0, 3, 6 in both seeds: B = 2 * (9 + 0 + 9) / 2 = 18, error^2 = 18 / 6, t of 2.
    found = crossed_estimate(np.array([[0.0, 3.0, 6.0]] * 2))
    assert found.half == pytest.approx(4.302653 * math.sqrt(3))
    assert found.freedom == pytest.approx(2, rel=1e-6)
    with pytest.raises(ValueError, match=r"shape \(1, 3\); expected 2 or more of each"):
        crossed_estimate(np.zeros((1, 3)))


@pytest.mark.parametrize(("seeds", "prompts"), [(3, 50), (3, 500), (4, 200), (5, 50), (5, 500)])
def test_a_crossed_interval_covers_the_true_difference(seeds, prompts):
    random, num = np.random.default_rng(seeds * prompts), 1500
    # Standard deviations of seeds and of prompts beside a rest of 0.3, from prompts to seeds.
    shares = ((0.0, 0.1), (0.01, 0.1), (0.02, 0.05), (0.02, 0.2), (0.05, 0.1))
    covered = []
    for between, of_prompts in shares:
        hits = 0
        for _ in range(num):
            rows, columns = (random.standard_normal(n) for n in (seeds, prompts))
            values = 0.3 * random.standard_normal((seeds, prompts)) + 0.07
            values += between * rows[:, None] + of_prompts * columns
            low, high = crossed_estimate(values).interval
            hits += low <= 0.07 <= high
        covered.append(hits / num)
    error = 3 * math.sqrt(0.95 * 0.05 / num)  # of the simulation
    assert 0.93 - error <= min(covered)
    assert max(covered) <= 0.97 + error
    assert 0.93 <= np.mean(covered) <= 0.97


def test_seeds_alone_would_cover_too_seldom_over_prompts():
    random, hits = np.random.default_rng(0), 0
    for _ in range(500):
        values = 0.3 * random.standard_normal((5, 50)) + 0.2 * random.standard_normal(50)
        low, high = seed_estimate(values.mean(axis=1)).interval
        hits += low <= 0 <= high
    assert hits / 500 < 0.85


def test_p_values_agree_with_intervals():
    found = seed_estimate([0.03, 0.02, 0.04])
    for end in found.interval:
        assert found.p_value(end) == pytest.approx(0.05)
    assert seed_estimate([1.0]).p_value(0.0) == 1.0
    assert found.p_value(found.value) == 1.0
    # With many degrees of freedom: 1.960 + 0.842 errors.
    assert Estimate(0.0, 1.959964, 1e6).detectable == pytest.approx(2.80, abs=0.01)


def test_a_median_needs_six_seeds_for_an_interval():
    assert median_estimate([1.0, 2.0, 3.0, 4.0, 50.0]).interval == (-math.inf, math.inf)
    found = median_estimate([1.0, 2.0, 3.0, 4.0, 5.0, 60.0])
    assert (found.value, found.interval) == (3.5, (1.0, 60.0))  # 2 / 2^6 = 3.1 %
    assert found.p_value(0.0) == pytest.approx(2 / 64)
    assert found.p_value(1.5) == pytest.approx(2 * 7 / 64)
    assert median_estimate(range(9)).interval == (1, 7)  # 2 * (1 + 9) / 2^9 = 3.9 %


def test_holms_correction_by_hand_and_its_family_wise_error():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    random, num = np.random.default_rng(1), 4000
    for correlation in (0.0, 0.7):
        shared = random.standard_normal((num, 1, 4)) * math.sqrt(correlation)
        values = shared + random.standard_normal((num, 8, 4)) * math.sqrt(1 - correlation)
        t = values.mean(axis=2) / (values.std(axis=2, ddof=1) / 2)
        p_values = 2 * stdtr(3, -abs(t))
        wrong = np.mean([min(holm(row)) <= 0.05 for row in p_values])
        assert wrong <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / num)
        assert np.mean((p_values <= 0.05).any(axis=1)) > 0.1  # without it
