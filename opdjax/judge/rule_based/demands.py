"""Sentences that criteria of the rule-based judge consist of, and the check behind each.

An answer to the arithmetic task is read by its surface, `34-17=17;17+25=42#42`: steps are found
anywhere in the text, the value is the last number after a `#`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence

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
_STEP = rf"(-?{_DIGITS})([+-])({_DIGITS})=(-?{_DIGITS})"
# Not inside a longer sum or number: 34-17+25=42 does not contain the step 17+25=42.
_STEPS = re.compile(rf"(?<![0-9.=+\-]){_STEP}(?![0-9=+\-]|\.[0-9])")
_VALUE = re.compile(rf"#\s*(-?{_DIGITS})(?![0-9]|[.,][0-9])")
_FORM = re.compile(rf"\s*{_STEP}(?:;{_STEP})*#-?{_DIGITS}(?![0-9]|[.,][0-9])")
_SUM = re.compile(rf"(?<![0-9.])(-?{_DIGITS}(?:[+-]{_DIGITS})+)(?![0-9])(=?)")
_TERM = re.compile(rf"[+-]?{_DIGITS}")


@dataclasses.dataclass(frozen=True)
class Step:
    """`left sign right = result`; the sign is +1 or -1."""

    left: int
    sign: int
    right: int
    result: int

    @classmethod
    def of(cls, match: re.Match) -> Step:
        """The step that a match of `_STEP` holds."""
        return cls(int(match[1]), int(f"{match[2]}1"), int(match[3]), int(match[4]))

    def __str__(self) -> str:
        return f"{self.left}{self.term}={self.result}"

    @property
    def term(self) -> str:
        """The signed right operand as text, such as `-17`."""
        return f"{'+' if self.sign > 0 else '-'}{self.right}"

    @property
    def change(self) -> int:
        """The signed right operand."""
        return self.sign * self.right

    @property
    def sum(self) -> int:
        """The correct result."""
        return self.left + self.change

    @property
    def holds(self) -> bool:
        """Whether the result is correct."""
        return self.result == self.sum

    @property
    def operands(self) -> tuple[int, ...]:
        """The sign and the operands; 17+25 and 25+17 are equal."""
        pair = (self.left, self.right)
        return (1, *sorted(pair)) if self.sign > 0 else (-1, *pair)

    @property
    def key(self) -> tuple[int, ...]:
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
        _steps_in(text),
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
    return tuple(
        Step(left, -1 if term.startswith("-") else 1, abs(int(term)), total)
        for left, term, total in zip(totals, rest, totals[1:])
    )


def grade(criterion: str, answer: WorkedAnswer) -> int:
    """2 if the answer meets the criterion's text, 1 if in part, else 0.

    A text without a sentence of this file is checked for its first step, or else for its first
    value after a #. A text without either is never met.
    """
    # Searched, not matched: the criterion's id and category stand before its sentence.
    for sentence, check in _CHECKS:
        found = sentence.search(criterion)
        if found:
            return check(answer, *found.groups())
    steps, value = _steps_in(_without_spaces(criterion)), _VALUE.search(criterion)
    if steps:
        return _has_step(answer, str(steps[0]))
    return _has_value(answer, value[1]) if value else NOT_MET


def _without_spaces(text: str) -> str:
    """The text without spaces around signs."""
    # Runs of spaces first: searching them together with the signs takes quadratic time.
    return re.sub(r" ?([-+=#;]) ?", r"\1", re.sub(r"[ \t]+", " ", text))


def _steps_in(text: str) -> tuple[Step, ...]:
    return tuple(map(Step.of, _STEPS.finditer(text)))


def _met(is_met: bool) -> int:
    return MET if is_met else NOT_MET


def _all_or_part(hits: Sequence[bool]) -> int:
    return NOT_MET if not any(hits) else MET if all(hits) else PARTLY_MET


def _has_step(answer: WorkedAnswer, text: str) -> int:
    """In part: the right operands with another result."""
    match = _STEPS.fullmatch(text)
    if match is None:  # the numbers of a criterion from elsewhere may be too long
        return NOT_MET
    wanted = Step.of(match)
    results = [step.result for step in answer.steps if step.operands == wanted.operands]
    return MET if wanted.result in results else PARTLY_MET if results else NOT_MET


def _has_value(answer: WorkedAnswer, text: str) -> int:
    """In part: the last step has the value as its result, and there is no #."""
    if answer.value is not None:
        return _met(answer.value == int(text))
    return PARTLY_MET if answer.steps and answer.steps[-1].result == int(text) else NOT_MET


def _follows_last(answer: WorkedAnswer) -> int:
    return _met(bool(answer.steps) and answer.value == answer.steps[-1].result)


def _is_formed(answer: WorkedAnswer) -> int:
    parts = [bool(answer.steps), answer.value is not None, False]
    return MET if answer.is_formed else _all_or_part(parts)


def _sums(answer: WorkedAnswer) -> int:
    return _all_or_part([step.holds for step in answer.steps])


def _is_worked(answer: WorkedAnswer) -> int:
    return _all_or_part([_sums(answer) == MET, _follows_last(answer) == MET])


def _chain(answer: WorkedAnswer) -> int:
    links = [step.left == before.result for before, step in itertools.pairwise(answer.steps)]
    return _all_or_part(links or [bool(answer.steps)])  # a single step meets it


def _numbers(answer: WorkedAnswer, start: str, terms: str) -> int:
    wanted = [int(start), *map(int, _TERM.findall(terms))]
    found = [step.left for step in answer.steps[:1]] + [step.change for step in answer.steps]
    return _all_or_part([a == b for a, b in itertools.zip_longest(wanted, found)])


def _nth(answer: WorkedAnswer, number: str, is_right: Callable[[Step, int | None], bool]) -> int:
    """Checks step `number` and the result before it. In part: there is such a step."""
    place = int(number) - 1
    if not 0 <= place < len(answer.steps):
        return NOT_MET
    before = answer.steps[place - 1].result if place else None
    return MET if is_right(answer.steps[place], before) else PARTLY_MET


def _step_begins(answer: WorkedAnswer, number: str, start: str) -> int:
    wanted = lambda before: before if start == BEFORE else int(start)
    return _nth(answer, number, lambda step, before: step.left == wanted(before))


def _sentence(template: str, *holes: str) -> re.Pattern:
    """A pattern that finds the sentence in a criterion, with a group for each {}."""
    parts, groups = map(re.escape, template.split("{}")), (f"({hole})" for hole in holes)
    return re.compile("".join(itertools.chain(*itertools.zip_longest(parts, groups, fillvalue=""))))


# Numbers in criteria are as short as those in answers, hence int() accepts them.
_WHOLE, _PLACE, _SIGNED = rf"-?{_DIGITS}", "[0-9]{1,6}", rf"[+-]{_DIGITS}"
_CHECKS: tuple[tuple[re.Pattern, Callable[..., int]], ...] = (
    (_sentence(STEP, rf"-?{_DIGITS}[+-]{_DIGITS}=-?{_DIGITS}"), _has_step),
    (_sentence(VALUE, _WHOLE), _has_value),
    (_sentence(LAST), _follows_last),
    (_sentence(FORM), _is_formed),
    (_sentence(END), lambda answer: _met(answer.value is not None and not answer.goes_on)),
    (_sentence(SUMS), _sums),
    (_sentence(WORKED), _is_worked),
    (_sentence(CHAIN), _chain),
    (_sentence(NUMBERS, _WHOLE, rf"{_SIGNED}(?:, {_SIGNED})*"), _numbers),
    (_sentence(COUNT, _PLACE), lambda answer, number: _met(len(answer.steps) == int(number))),
    (
        _sentence(STEP_SUM, _PLACE),
        lambda answer, number: _nth(answer, number, lambda step, _: step.holds),
    ),
    (_sentence(STEP_BEGINS, _PLACE, rf"{_WHOLE}|{BEFORE}"), _step_begins),
    (
        _sentence(STEP_APPLIES, _PLACE, _SIGNED),
        lambda answer, number, term: _nth(answer, number, lambda step, _: step.change == int(term)),
    ),
    (_sentence(FLAW_SUM), lambda answer: _met(not all(step.holds for step in answer.steps))),
    (_sentence(FLAW_AFTER), lambda answer: _met(answer.goes_on)),
)
