"""What of a completion counts as the answer, grader by grader."""

import collections
import json
import pathlib
import subprocess
import sys
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import HANG

from opdjax.config import EvaluationConfig
from opdjax.config.sampling import GRADERS
from opdjax.config.validation import ConfigError
from opdjax.data import isolated
from opdjax.data.grading import boxes, grader_named, require_grader, require_readable, votes
from opdjax.data.rational import numbers_in, rational
from opdjax.data.sources import DataError

_ROWS = [
    json.loads(line)
    for line in (pathlib.Path(__file__).parent / "graded_answers.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize("grader", dict.fromkeys(row["grader"] for row in _ROWS))
def test_graders_mean_what_they_say(grader):
    rows = [row for row in _ROWS if row["grader"] == grader]
    grade = grader_named(grader)
    wrong = [r for r in rows if grade(r["completion"], r["answer"]) is not r["is_right"]]
    assert not wrong
    assert {row["is_right"] for row in rows} == {True, False}


def test_the_table_has_rows_for_every_grader():
    assert len(_ROWS) >= 200
    counts = collections.Counter(row["grader"].partition(":")[0] for row in _ROWS)
    # Those of `tasks` and `ifeval` need other packages: test_reasoning.py, test_ifeval.py.
    assert counts.keys() == {*GRADERS, "regex"} - {"tasks", "ifeval"}


@settings(max_examples=40, deadline=None)
@given(st.integers(-(10**9), 10**9), st.text(alphabet="ab +=;\n", max_size=8))
def test_gsm8k_reads_any_integer_with_or_without_commas(number, rest):
    grade = grader_named("gsm8k")
    assert grade(f"{rest}# {number:,}\n{rest}", str(number))
    assert not grade(f"{rest}# {number:,}\n{rest}", str(number + 1))


@settings(max_examples=100, deadline=None)
@given(st.fractions(), st.integers(-300, 300))
def test_numbers_are_read_exactly(value, exponent):
    above, below = value.numerator, value.denominator
    assert rational(f"{above}/{below}") == value
    assert rational(rf"\frac{{{above}}}{{{below}}}") == value
    assert rational(f"{above}e{exponent}") == above * Fraction(10) ** exponent


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789.,+-/^*(){}\\frac $e:'", max_size=60))
def test_no_text_makes_the_number_reader_fail(text):
    for written in [text, *numbers_in(text)]:
        assert rational(written) is None or isinstance(rational(written), Fraction)


@pytest.mark.parametrize(
    "text",
    [r"\boxed{" * 40_000, r"\boxed{" * 9000 + "}" * 9000, "1," * 50_000, r"\frac{1}{" * 9000],
)
def test_long_completions_are_read_in_linear_time(text):
    start = time.process_time()
    for grader in ("gsm8k", "last_number", "choice"):
        assert not grader_named(grader)(f"# {text}", "42")
    boxes(text)
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{\frac{1}{2}} rest }", r"\frac{1}{2}"),
        (r"\boxed{\sqrt{\frac{a}{b}}+{c}}", r"\sqrt{\frac{a}{b}}+{c}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{}", ""),
        (r"\boxed{1} then \boxed{2", "1"),  # cut off: the last one that is whole
        (r"\boxed 5 kg", "5"),
        (r"\boxed{2", None),
        (r"boxed{2}", None),
        ("", None),
    ],
)
def test_boxes_balance_braces(text, content):
    assert (boxes(text) or [None])[-1] == content


def test_boxed_grades_off_the_main_thread():
    found, grade = [], grader_named("boxed")
    thread = threading.Thread(target=lambda: found.append(grade(r"\boxed{x+1}", "1+x")))
    thread.start()
    thread.join()
    assert found == [True]


def test_boxed_without_math_verify_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"pip install 'opdjax\[eval\]'"):
        require_grader("boxed")
    require_grader("exact")


def test_an_answer_that_cannot_be_computed_is_wrong_and_costs_seconds(monkeypatch):
    monkeypatch.setattr(isolated, "_SECONDS_PER_CALL", 0.5)
    assert not grader_named("boxed")(r"\boxed{9^{9^{9^{9}}}+x}", "7")
    assert not grader_named("regex:(a+)+$")("a" * 60 + "b", "aaa")
    monkeypatch.setattr(isolated, "_SECONDS_PER_CALL", HANG)
    assert grader_named("boxed")(r"\boxed{x+x}", "2x")  # a new process has taken over


def test_a_script_without_a_main_guard_can_grade(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from opdjax.data.grading import grader_named\n"
        r"print(grader_named('boxed')(r'\boxed{x+1}', '1+x'))"
    )
    command = [sys.executable, str(script)]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "True\n"


def test_a_grader_of_ones_own_is_a_function_of_a_file(tmp_path):
    file = tmp_path / "graders.py"
    file.write_text(
        "def is_longer(completion, answer):\n    return len(completion) >= len(answer)\n"
        "def wrong(completion, answer):\n    return 'yes'\n"
        "def has_hash(completion, answer): return completion.endswith('#' + answer)\n"
        "\ndef fails(completion, answer): return {}[answer]\n"
    )
    name = f"{file}:is_longer"
    assert EvaluationConfig(grader=name).grader == name
    assert grader_named(name)("abc", "ab") is True
    assert grader_named(name)("a", "ab") is False
    with pytest.raises(DataError, match="returned 'yes'; expected True or False"):
        grader_named(f"{file}:wrong")("a", "b")
    require_readable(f"{file}:has_hash", ["1"], "held.jsonl")
    with pytest.raises(ConfigError, match=r"graders.py does not run: KeyError.* .line 7."):
        require_readable(f"{file}:fails", ["1"], "held.jsonl")
    with pytest.raises(ConfigError, match="defines no missing"):
        grader_named(f"{file}:missing")


@pytest.mark.parametrize(
    ("grader", "completions", "expected"),
    [
        (
            "boxed",
            [r"\boxed{0.5}", r"\boxed{\frac{1}{2}}", "none", r"\boxed{x+1}"],
            [0, 0, None, 1],
        ),
        ("boxed", [r"\boxed{x+1}", r"\boxed{2}", r"\boxed{1+x}"], [0, 1, 0]),
        ("gsm8k", ["# 1,000", "# 7", "#### 1000.0"], [0, 1, 0]),
        ("choice", ["The answer is B.", "no idea", "(B)", r"\boxed{A}"], [0, None, 0, 1]),
        ("exact", ["a", " a", "b", " "], [0, 0, 1, None]),
        ("regex:x(.)", ["x1", "y", "x2 x1"], [0, None, 0]),
    ],
)
def test_completions_vote_for_the_values_that_graders_read(grader, completions, expected):
    assert votes(grader, completions) == expected


def test_a_function_of_ones_own_votes_with_whole_texts(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def same(completion, answer):\n    return completion == answer\n")
    assert votes(f"{file}:same", ["a", "b", "a", ""]) == [0, 1, 0, None]


def test_graders_that_do_not_exist_are_refused():
    for name in (*GRADERS, "auto", "regex:x+"):
        assert EvaluationConfig(grader=name).grader == name
    with pytest.raises(
        ConfigError, match="expected gsm8k, last_number, boxed, choice, exact, tasks, ifeval, auto"
    ):
        EvaluationConfig(grader="final_number")
    with pytest.raises(ConfigError, match="expected a regular expression after regex:"):
        EvaluationConfig(grader="regex:(")


@pytest.mark.parametrize(
    ("grader", "answer"),
    [
        ("gsm8k", "5 or 6"),
        ("last_number", "forty"),
        ("choice", "2"),
        ("boxed", " "),
        ("exact", " "),
        ("regex:x", ""),
    ],
)
def test_an_answer_that_no_completion_could_match_is_refused_by_row(grader, answer):
    with pytest.raises(DataError, match=r"in 1 of 2 rows of held\.jsonl \(prompt 1: "):
        require_readable(grader, ["A" if grader == "choice" else "1", answer], "held.jsonl")
