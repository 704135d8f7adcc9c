"""The built-in word problems: right solutions, stated mistakes, and splits that never meet."""

import fractions
import random
import re
import statistics

import pytest

from opdjax.data.grading import grader_named
from opdjax.data.tasks import stories
from opdjax.data.tasks.stories import WordProblem, draw, parts, problems, solution, split_of

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
STORY = WordProblem("", 24, (("+", 13), ("-", 5)), "Ada", "apples")


def equations(text):
    """Each (equation, whether it is right), computed with exact fractions."""
    apply = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "/": lambda a, b: fractions.Fraction(a, b),
    }
    return [apply[s](int(a), int(b)) == int(c) for a, s, b, c in EQUATION.findall(text)]


def final(text):
    return re.fullmatch(r".*#### (\d+)", text)[1]


@pytest.fixture(scope="module")
def splits():
    return {name: problems(name) for name in ("validation", "test")}


def test_an_answer_by_hand():
    assert STORY.answer == "32"
    long = WordProblem("", 6, (("*", 3), ("/", 2), ("+", 1), ("-", 10)), "Ada", "apples")
    assert long.answer == "0"


def test_every_solution_is_right_and_the_grader_agrees(splits):
    is_right = grader_named("gsm8k")
    for problem in splits["validation"] + splits["test"]:
        texts = {solution(problem, seed) for seed in range(4)}
        for text in texts:
            found = equations(text)
            assert found == [True] * len(problem.changes), text
            assert final(text) == problem.answer
            assert is_right(text, problem.answer)


def test_each_number_of_the_chain_stands_in_the_prompt_in_order(splits):
    for problem in splits["validation"] + splits["test"]:
        numbers = [problem.start, *(number for _, number in problem.changes)]
        assert list(map(int, re.findall(r"\d+", problem.prompt))) == numbers


def test_a_carried_mistake_is_one_wrong_equation_and_a_wrong_answer(splits):
    for problem in splits["validation"]:
        found = parts(problem, random.Random(0), "carried")
        text = "".join(piece for piece, _ in found)
        assert equations(text).count(False) == 1
        assert final(text) != problem.answer
        wrong = [piece for piece, is_trained in found if not is_trained]
        assert len(wrong) == 1
        assert wrong[0].isdigit()


def test_a_corrected_mistake_ends_in_the_right_answer(splits):
    for problem in splits["validation"]:
        text = "".join(piece for piece, _ in parts(problem, random.Random(0), "corrected"))
        found = equations(text)
        assert found.count(False) == 1
        assert final(text) == problem.answer
        assert found[found.index(False) + 1]  # the correction comes next


def test_solutions_are_wrong_at_the_stated_rate(splits):
    wrong = [final(solution(p, s, 0.3)) != p.answer for p in splits["test"] for s in range(4)]
    # 4096 draws: the standard error is 0.007.
    assert statistics.mean(wrong) == pytest.approx(0.3, abs=0.03)


def test_a_problem_is_a_function_of_its_seed_and_index(splits):
    assert draw("validation", 0, 7) == splits["validation"][7]
    assert draw("validation", 1, 7) != splits["validation"][7]
    assert solution(STORY, 3) == solution(STORY, 3)


def test_splits_share_no_chain_of_numbers(splits):
    for name, rows in splits.items():
        assert {split_of(row.start, row.changes) for row in rows} == {name}
        assert len({row.prompt for row in rows}) == len(rows)


def test_half_of_the_test_problems_use_words_of_no_other_split(splits):
    words = stories._words()
    for key in ("names", "items"):
        assert not set(words[key]["train"]) & set(words[key]["test"])
    for index, row in enumerate(splits["test"]):
        part = "test" if index % 2 else "train"
        assert row.name in words["names"][part]
        assert row.items in words["items"][part]
    held_out = set(words["names"]["test"] + words["items"]["test"])
    assert not any(held_out & {row.name, row.items} for row in splits["validation"])


def test_lengths_spread(splits):
    lengths = [len(re.findall(r"\w+|[^\w ]", solution(p, 0))) for p in splits["test"]]
    assert statistics.pstdev(lengths) >= 0.45 * statistics.mean(lengths)


def test_a_problem_has_many_solutions():
    # Two of three are told with words; the others are equations alone.
    assert len({solution(STORY, seed) for seed in range(100)}) >= 50


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="stories has no split 'tset'; expected one of"):
        problems("tset")
