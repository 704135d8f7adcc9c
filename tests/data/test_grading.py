"""What of a completion counts as the answer, grader by grader."""

import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opdjax.config import EvaluationConfig
from opdjax.data import grading
from opdjax.data.grading import GRADERS, boxed, exact, final_number, last_boxed, require_grader


@pytest.mark.parametrize(
    ("completion", "answer", "is_right"),
    [
        ("34-17=17;17+25=42#42", "42", True),
        ("34-17=17;17+25=42#43", "42", False),
        ("3-17=-14#-14", "-14", True),
        ("3-17=-14#14", "-14", False),
        ("She sold 1,000 + 234.\n#### 1,234", "1234", True),
        ("#### 1234", "1,234", True),
        ("#### 12345", "1,234", False),
        ("#### 42.0", "42", True),
        ("#### 0.5", ".5", True),
        ("#### 42.", "42", True),
        ("#1 and then #2", "2", True),  # the last of several
        ("#1 and then #2", "1", False),
        ("#2 #none", "2", True),  # a hash without a number is no answer
        ("42", "42", False),  # no hash
        ("#", "42", False),
        ("", "42", False),
        ("42#", "42", False),
        ("#4 2", "42", False),
        ("#42", "forty-two", False),
    ],
)
def test_final_number(completion, answer, is_right):
    assert final_number(completion, answer) is is_right


@settings(max_examples=40, deadline=None)
@given(st.integers(-(10**9), 10**9), st.text(alphabet="ab +=;\n", max_size=8))
def test_final_number_reads_any_integer_with_or_without_commas(number, rest):
    assert final_number(f"{rest}# {number:,}{rest}", str(number))
    assert not final_number(f"{rest}# {number:,}{rest}", str(number + 1))


def test_exact_compares_everything_but_the_spaces_around():
    assert exact(" a b\n", "a b ")
    assert not exact("a  b", "a b")
    assert not exact("A b", "a b")


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
        (r"\boxed{2", None),
        (r"boxed{2}", None),
        ("", None),
    ],
)
def test_last_boxed_balances_braces(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("completion", "answer", "is_right"),
    [
        (r"\boxed{42}", "42", True),
        (r"\boxed{-3}", "3", False),
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"\boxed{\frac{1}{2}}", r"\frac{2}{4}", True),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{3}", False),
        (r"\boxed{x+1}", "1+x", True),
        (r"\boxed{x+1}", "x-1", False),
        (r"\boxed{\{1,2\}}", r"\{2,1\}", True),
        (r"42", "42", False),
        (r"\boxed{", "42", False),
        (r"\boxed{}", "42", False),
        (r"<think>maybe \boxed{1}</think> It is \boxed{2}.", "2", True),
        (r"<think>maybe \boxed{2}</think> It is 2.", "2", False),
        (r"<think>\boxed{1}</think>\boxed{2}</think>\boxed{3}", "3", True),
        (r"<think>\boxed{1}</think>\boxed{2}</think>3", "2", False),
    ],
)
def test_boxed_compares_as_mathematics(completion, answer, is_right):
    assert boxed(completion, answer) is is_right


def test_boxed_grades_off_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(boxed(r"\boxed{\frac{1}{2}}", "0.5")))
    thread.start()
    thread.join()
    assert found == [True]


def test_boxed_without_math_verify_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"pip install 'opdjax\[eval\]'"):
        require_grader("boxed")
    require_grader("exact")


def test_an_answer_that_cannot_be_computed_is_wrong_and_costs_seconds(monkeypatch):
    monkeypatch.setattr(grading, "_SECONDS_PER_ANSWER", 2.0)
    assert not boxed(r"\boxed{9^{9^{9^{9}}}}", "7")
    assert boxed(r"\boxed{\frac{2}{4}}", "0.5")  # a new process has taken over


def test_every_grader_of_the_config_exists():
    for name in ("final_number", "boxed", "exact"):
        assert EvaluationConfig(grader=name).grader in GRADERS
    assert len(GRADERS) == 3


def test_final_number_takes_the_value_out_of_a_worked_answer():
    assert final_number("so #### 72", "48 / 2 = 24\n48 + 24 = 72\n#### 72")
    assert not final_number("so #### 48", "48 / 2 = 24\n48 + 24 = 72\n#### 72")
