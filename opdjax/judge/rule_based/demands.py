"""Sentences that criteria of the rule-based judge consist of, and the check behind each.

In an answer, `34-17=17;17+25=42#42`, steps are found anywhere; the value is the last one after `#`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable

# Replies contain these sentences, and replies are cached: they must not change. The verifier parses
# what stands in {}.
STEP = "The answer contains the step {}."
VALUE = "The value after # is {}."
LAST = "The value after # is the result of the last step."
FORM = (
    "Every step is of the form a+b=c or a-b=c with ; between two steps, and then come # and one "
    "whole number."
)
END = "The answer ends with the number after #: nothing follows it."
SUMS = (
    "There are steps, and the sum of every one is right: what stands after = is what stands before "
    "it."
)
WORKED = "The sum of every step is right, and the value after # is the result of the last one."
CHAIN = "Every step but the first begins with the result of the step before it."
NUMBERS = "The steps start from {} and apply {} in this order."
COUNT = "The number of steps is {}."
STEP_SUM = "Step number {} is there and its sum is right."
STEP_BEGINS = "Step number {} is there and begins with {}."
STEP_APPLIES = "Step number {} is there and applies {}."
FLAW_SUM = "The answer states a step whose sum is wrong."
FLAW_AFTER = "The answer goes on after its value: something follows the number after #."
BEFORE = "the result of the step before it"

NOT_MET, PARTLY_MET, MET = 0, 1, 2
# No task has longer numbers; int() refuses more than some thousand digits.
_DIGITS = "[0-9]{1,18}"
_STEP = rf"(-?{_DIGITS})([-+*/]{_DIGITS})=(-?{_DIGITS})"
_SUM_STEP = _STEP.replace("[-+*/]", "[+-]")
# Not inside a longer sum or number: 34-17+25=42 does not contain the step 17+25=42.
_STEPS = re.compile(rf"(?<![0-9.=+*/\-]){_STEP}(?![0-9=+*/\-]|\.[0-9])")
_VALUE = re.compile(rf"#\s*(-?{_DIGITS})(?![0-9]|[.,][0-9])")
_FORM = re.compile(rf"\s*{_SUM_STEP}(?:;{_SUM_STEP})*#-?{_DIGITS}(?![0-9]|[.,][0-9])")
_SUM = re.compile(rf"(?<![0-9.])(-?{_DIGITS}(?:[+-]{_DIGITS})+)(?![0-9])(=?)")
_TERM = re.compile(rf"[+-]?{_DIGITS}")


@dataclasses.dataclass(frozen=True)
class Step:
    """`left term = result`; the term is the right operand with its sign, such as `-17` or `*3`."""

    left: int
    term: str
    result: int

    @classmethod
    def of(cls, left: str | int, term: str, result: str | int) -> Step:
        """The step of numbers that are written in any way, such as `+07`."""
        return cls(int(left), f"{term[0]}{int(term[1:])}", int(result))

    def __str__(self) -> str:
        return f"{self.left}{self.term}={self.result}"

    @property
    def change(self) -> int | None:
        """The value of a term that is added; None of a factor or divisor."""
        return int(self.term) if self.term[0] in "+-" else None

    @property
    def total(self) -> int:
        """The right result; of a division, the whole part."""
        sign, number = self.term[0], int(self.term[1:])
        if sign == "*":
            return self.left * number
        if sign == "/":
            return self.left // number if number else 0
        return self.left + int(self.term)

    @property
    def holds(self) -> bool:
        """Whether the result is correct."""
        if self.term[0] == "/":
            return self.left == self.result * int(self.term[1:]) and int(self.term[1:]) > 0
        return self.result == self.total

    @property
    def operands(self) -> tuple[str | int, ...]:
        """The sign and the operands; 17+25 and 25+17 are equal."""
        sign, pair = self.term[0], (self.left, int(self.term[1:]))
        return (sign, *(sorted(pair) if sign in "+*" else pair))

    @property
    def key(self) -> tuple[str | int, ...]:
        """Equal for steps that make the same demand."""
        return (*self.operands, self.result)


@dataclasses.dataclass(frozen=True)
class WorkedAnswer:
    """The steps and the value found in an answer."""

    steps: tuple[Step, ...]
    value: int | None  # the last one
    is_formed: bool  # the text begins with steps, # and value in the task's notation
    goes_on: bool  # text follows the first value, for instance the note that it was cut off

    @property
    def holds(self) -> bool:
        """Whether every sum is correct and the value, if there are steps, is the last result."""
        is_last = not self.steps or self.steps[-1].result == self.value
        return is_last and all(step.holds for step in self.steps)


def read_answer(text: str) -> WorkedAnswer:
    """Parse any text as an answer to the task."""
    text = _without_spaces(text)
    values = list(_VALUE.finditer(text))
    return WorkedAnswer(
        tuple(Step.of(*numbers) for numbers in _STEPS.findall(text)),
        int(values[-1][1]) if values else None,
        _FORM.match(text) is not None,
        bool(values) and bool(text[values[0].end() :].strip()),
    )


def read_task(question: str) -> tuple[Step, ...]:
    """The steps of the first sum in a question, preferably one before a `=`; () without a sum."""
    # False sorts first: a range such as 2-3 in the text around a task is no sum to compute.
    found = sorted(_SUM.finditer(_without_spaces(question)), key=lambda match: not match[2])
    if not found:
        return ()
    first, *rest = _TERM.findall(found[0][1])
    totals = list(itertools.accumulate(map(int, [first, *rest])))
    return tuple(map(Step.of, totals, rest, totals[1:]))


def grade(criterion: str, answer: WorkedAnswer) -> int:
    """2 if the answer meets the criterion's text, 1 if in part, else 0.

    A text without a sentence of this file is checked for its first step, or else for its first
    value after a #. A text without either is never met.
    """
    parts = _parts(criterion, answer)
    return NOT_MET if not any(parts) else MET if all(parts) else PARTLY_MET


def _parts(criterion: str, answer: WorkedAnswer) -> list[bool]:
    """Which parts of the criterion the answer meets."""
    # Searched, not matched: the criterion's id and category stand before its sentence.
    for sentence, check in _CHECKS:
        if found := sentence.search(criterion):
            return check(answer, *found.groups())
    text = _without_spaces(criterion)
    if step := _STEPS.search(text):
        return _has_step(answer, step[0])
    value = _VALUE.search(criterion)
    return _has_value(answer, value[1]) if value else []


def _without_spaces(text: str) -> str:
    """The text without spaces around signs."""
    # Runs of spaces first: searching them together with the signs takes quadratic time.
    return re.sub(r" ?([-+*/=#;]) ?", r"\1", re.sub(r"[ \t]+", " ", text))


def _has_step(answer: WorkedAnswer, text: str) -> list[bool]:
    """In part: the right operands with another result."""
    wanted = Step.of(*_STEPS.fullmatch(text).groups())
    results = [step.result for step in answer.steps if step.operands == wanted.operands]
    return [bool(results), wanted.result in results]


def _has_value(answer: WorkedAnswer, text: str) -> list[bool]:
    """In part: the last step has the value as its result, and there is no #."""
    if answer.value is not None:
        return [answer.value == int(text)]
    return [False, *(step.result == int(text) for step in answer.steps[-1:])]


def _form(answer: WorkedAnswer) -> list[bool]:
    parts = [bool(answer.steps), answer.value is not None, False]
    return [True] if answer.is_formed else parts


def _worked(answer: WorkedAnswer) -> list[bool]:
    return [bool(answer.steps) and all(_sums(answer)), any(_follows_last(answer))]


def _chain(answer: WorkedAnswer) -> list[bool]:
    links = [step.left == before.result for before, step in itertools.pairwise(answer.steps)]
    return links or [bool(answer.steps)]  # a single step meets it


def _numbers(answer: WorkedAnswer, start: str, terms: str) -> list[bool]:
    wanted = [int(start), *map(int, _TERM.findall(terms))]
    found = [step.left for step in answer.steps[:1]] + [step.change for step in answer.steps]
    return [a == b for a, b in itertools.zip_longest(wanted, found)]


def _nth(is_right: Callable[..., bool]) -> Callable[..., list[bool]]:
    """A check of one step by the result before it and the sentence; in part: the step is there."""

    def check(answer: WorkedAnswer, number: str, *words: str) -> list[bool]:
        place = int(number) - 1
        if not 0 <= place < len(answer.steps):
            return []
        before = answer.steps[place - 1].result if place else None
        return [True, is_right(answer.steps[place], before, *words)]

    return check


def _sentence(template: str, *holes: str) -> re.Pattern:
    """A pattern that finds the sentence in a criterion, with a group for each {}."""
    parts, groups = map(re.escape, template.split("{}")), (f"({hole})" for hole in holes)
    return re.compile("".join(itertools.chain(*itertools.zip_longest(parts, groups, fillvalue=""))))


# Numbers in criteria are as short as those in answers, hence int() accepts them.
_WHOLE, _PLACE, _SIGNED = rf"-?{_DIGITS}", "[0-9]{1,6}", rf"[+-]{_DIGITS}"
_START = rf"{_WHOLE}|{BEFORE}"
_sums = lambda answer: [step.holds for step in answer.steps]
_follows_last = lambda answer: [answer.value == step.result for step in answer.steps[-1:]]
_begins = lambda step, before, start: step.left == (before if start == BEFORE else int(start))
_applies = lambda step, before, term: step.change == int(term)
_CHECKS: tuple[tuple[re.Pattern, Callable[..., list[bool]]], ...] = (
    (_sentence(STEP, _STEP.replace("(", "").replace(")", "")), _has_step),
    (_sentence(VALUE, _WHOLE), _has_value),
    (_sentence(LAST), _follows_last),
    (_sentence(FORM), _form),
    (_sentence(END), lambda answer: [answer.value is not None and not answer.goes_on]),
    (_sentence(SUMS), _sums),
    (_sentence(WORKED), _worked),
    (_sentence(CHAIN), _chain),
    (_sentence(NUMBERS, _WHOLE, rf"{_SIGNED}(?:, {_SIGNED})*"), _numbers),
    (_sentence(COUNT, _PLACE), lambda answer, number: [len(answer.steps) == int(number)]),
    (_sentence(STEP_SUM, _PLACE), _nth(lambda step, before: step.holds)),
    (_sentence(STEP_BEGINS, _PLACE, _START), _nth(_begins)),
    (_sentence(STEP_APPLIES, _PLACE, _SIGNED), _nth(_applies)),
    (_sentence(FLAW_SUM), lambda answer: [not all(_sums(answer))]),
    (_sentence(FLAW_AFTER), lambda answer: [answer.goes_on]),
)
