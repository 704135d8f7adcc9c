"""The built-in task: right answers, a fixed problem format, and splits that never meet."""

import collections
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opdjax.data.tasks.arithmetic import Problem, draw, problems, split_of

SIZES = {"train": 16384, "validation": 1024, "test": 2048}
PROBLEMS = st.builds(
    Problem, st.tuples(*[st.integers(0, 49)] * 3), st.tuples(*[st.sampled_from([-1, 1])] * 2)
)

# First and last problem of each split: recorded results are comparable only while these stand.
PINNED = (
    {"train": "0+14-16=", "validation": "49+39-40=", "test": "47+9+3="},
    {"train": "31+18+5=", "validation": "31+28+11=", "test": "26-47+35="},
)


@pytest.fixture(scope="module")
def splits():
    return {name: problems(name) for name in SIZES}


def test_the_worked_example_of_the_documentation():
    problem = Problem((34, 17, 25), (-1, 1))
    assert problem.prompt == "34-17+25="
    assert problem.answer == "42"
    assert problem.reference == "34-17=17;17+25=42#42"
    assert problem.steps == ((34, -1, 17, 17), (17, 1, 25, 42))


def test_a_negative_intermediate_value_is_carried_with_its_sign():
    problem = Problem((3, 17, 25), (-1, -1))
    assert problem.prompt == "3-17-25="
    assert problem.reference == "3-17=-14;-14-25=-39#-39"


@settings(max_examples=60, deadline=None)
@given(PROBLEMS)
def test_every_statement_of_a_reference_is_true(problem):
    chain, _, stated = problem.reference.partition("#")
    statements = [statement.split("=") for statement in chain.split(";")]
    assert len(statements) == 2
    for left, right in statements:
        assert eval(left) == int(right)
    # Each step goes on from the last, and the chain computes what was asked.
    assert statements[1][0].startswith(statements[0][1])
    assert (
        eval(problem.prompt.removesuffix("="))
        == int(statements[1][1])
        == int(stated)
        == int(problem.answer)
    )


def test_the_problem_format_and_its_whole_range_occur(splits):
    form = re.compile(r"(\d|[1-4]\d)([+-])(\d|[1-4]\d)([+-])(\d|[1-4]\d)=")
    operands, signs = collections.Counter(), collections.Counter()
    for problem in splits["train"]:
        a, s, b, t, c = form.fullmatch(problem.prompt).groups()
        operands.update(map(int, (a, b, c)))
        signs[s + t] += 1
    assert set(operands) == set(range(50))
    assert set(signs) == {"++", "+-", "-+", "--"}
    # Uniform: 16384 * 3 operands over 50 values have a standard deviation of 3 % a value.
    expected = 3 * len(splits["train"]) / 50
    assert max(abs(count / expected - 1) for count in operands.values()) < 0.15
    assert max(abs(count / (len(splits["train"]) / 4) - 1) for count in signs.values()) < 0.1


def test_splits_have_their_sizes_without_repeats(splits):
    for name, size in SIZES.items():
        assert len(splits[name]) == len({problem.prompt for problem in splits[name]}) == size


def test_splits_are_disjoint_and_agree_with_split_of(splits):
    for name, members in splits.items():
        assert {split_of(problem) for problem in members} == {name}
    texts = {name: {problem.prompt for problem in members} for name, members in splits.items()}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]


def test_shares_of_the_problem_space():
    rng = np.random.default_rng(0)
    drawn = collections.Counter(split_of(draw(rng)) for _ in range(4000))
    # 90, 5 and 5 %; three standard deviations of a binomial of 4000 draws.
    assert abs(drawn["train"] / 4000 - 0.90) < 0.015
    assert abs(drawn["validation"] / 4000 - 0.05) < 0.011
    assert abs(drawn["test"] / 4000 - 0.05) < 0.011


def test_the_same_problems_in_every_process(splits):
    assert problems("validation") == splits["validation"]
    first = {name: splits[name][0].prompt for name in SIZES}
    last = {name: splits[name][-1].prompt for name in SIZES}
    assert (first, last) == PINNED


def test_an_unknown_split_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no split 'tset'.*\['test', 'train', 'validation'\]"):
        problems("tset")
