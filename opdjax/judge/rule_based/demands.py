"""What a criterion can demand of an answer to the arithmetic task: the sentence that says it, and
whether a text meets it.

An answer is read by its surface, `34-17=17;17+25=42#42`: steps are found wherever they stand, the
value is the last number after a `#`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence

# Sentences; what stands in {} is what a criterion asks for, and what a verifier reads back out of
# it.
STEP = "The answer contains the step {}."
VALUE = "The value after # is {}."
LAST = "The value after # is the result of the last step."
FORM = "Every step is of the form a+b=c or a-b=c with ; between two steps, and then come # and one whole number."
END = "The answer ends with the number after #: nothing follows it."
SUMS = "There are steps, and the sum of every one is right: what stands after = is what stands before it."
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
# More digits than any task has would cost time, and from some thousands on int() refuses them.
_DIGITS = "[0-9]{1,18}"
_STEP = rf"(-?{_DIGITS})([+-])({_DIGITS})=(-?{_DIGITS})"
# Not amid a longer sum or number: 34-17+25=42 has no step 17+25=42.
_STEPS = re.compile(rf"(?<![0-9.=+\-]){_STEP}(?![0-9=+\-]|\.[0-9])")
_VALUE = re.compile(rf"#\s*(-?{_DIGITS})(?![0-9]|[.,][0-9])")
_FORM = re.compile(rf"\s*{_STEP}(?:;{_STEP})*#-?{_DIGITS}(?![0-9]|[.,][0-9])")
_SUM = re.compile(rf"(?<![0-9.])(-?{_DIGITS}(?:[+-]{_DIGITS})+)(?![0-9])(=?)")
_TERM = re.compile(rf"[+-]?{_DIGITS}")


@dataclasses.dataclass(frozen=True)
class Step:
    """`left sign right = result`, the sign +1 or -1."""

    left: int
    sign: int
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left}{self.term}={self.result}"

    @property
    def term(self) -> str:
        """What is added or taken away, with its sign."""
        return f"{'+' if self.sign > 0 else '-'}{self.right}"

    @property
    def sum(self) -> int:
        """What the result should be."""
        return self.left + self.sign * self.right

    @property
    def holds(self) -> bool:
        """Whether the sum is right."""
        return self.result == self.sum

    @property
    def key(self) -> tuple[int, ...]:
        """Alike for steps that are one demand."""
        return (*self.terms, self.result)

    @property
    def terms(self) -> tuple[int, ...]:
        """Alike for 17+25 and 25+17, which are one demand."""
        return (
            (1, *sorted((self.left, self.right))) if self.sign > 0 else (-1, self.left, self.right)
        )


@dataclasses.dataclass(frozen=True)
class ParsedAnswer:
    """An answer as far as it is one."""

    steps: tuple[Step, ...]
    value: int | None  # after the last
    is_formed: bool  # steps, # and value begin it, in the task's notation
    goes_on: bool  # after its first value; a note that it was cut off counts

    @property
    def holds(self) -> bool:
        """Whether no sum is wrong, and the value that of the last step where there is one."""
        return all(step.holds for step in self.steps) and (
            not self.steps or self.steps[-1].result == self.value
        )


def read_answer(text: str) -> ParsedAnswer:
    """Any text, as an answer to the task."""
    text = _close(text)
    values = list(_VALUE.finditer(text))
    return ParsedAnswer(
        _steps_in(text),
        int(values[-1][1]) if values else None,
        _FORM.match(text) is not None,
        bool(values) and bool(text[values[0].end() :].strip()),
    )


def read_task(question: str) -> tuple[Step, ...]:
    """The steps, from left to right, of the first sum in a question, one before a `=` if there is
    one; () where there is no sum.
    """
    # False sorts first: a range such as 2-3 in the words around a task is no sum that asks for its
    # value.
    found = sorted(_SUM.finditer(_close(question)), key=lambda match: not match[2])
    if not found:
        return ()
    first, *rest = _TERM.findall(found[0][1])
    totals = list(itertools.accumulate(map(int, [first, *rest])))
    return tuple(
        Step(left, _sign(term), abs(int(term)), total)
        for left, term, total in zip(totals, rest, totals[1:])
    )


def _sign(text: str) -> int:
    return -1 if text.startswith("-") else 1


def grade(criterion: str, answer: ParsedAnswer) -> int:
    """2 where the answer meets what the criterion's text demands, 1 where in part, else 0.

    A text that is none of this file's sentences is held to the first equation in it, or else to the
    first value after a #; one without either is never met: what cannot be understood cannot be
    granted.
    """
    # Searched for, not matched: id, category and marks of a criterion stand before its sentence.
    for sentence, check in _CHECKS:
        found = sentence.search(criterion)
        if found:
            return check(answer, *found.groups())
    steps, value = _steps_in(_close(criterion)), _VALUE.search(criterion)
    if steps:
        return _has_step(answer, str(steps[0]))
    return _has_value(answer, value[1]) if value else NOT_MET


def _close(text: str) -> str:
    """The text without spaces around signs. Runs of spaces go first, or searching one would take
    the square of its length.
    """
    return re.sub(r" ?([-+=#;]) ?", r"\1", re.sub(r"[ \t]+", " ", text))


def _steps_in(text: str) -> tuple[Step, ...]:
    return tuple(_step_of(match) for match in _STEPS.finditer(text))


def _step_of(match: re.Match) -> Step:
    return Step(int(match[1]), _sign(match[2]), int(match[3]), int(match[4]))


def _all_or_part(hits: Sequence[bool]) -> int:
    return NOT_MET if not any(hits) else MET if all(hits) else PARTLY_MET


def _has_step(answer: ParsedAnswer, text: str) -> int:
    """In part: the right terms with another result."""
    match = _STEPS.fullmatch(text)
    if match is None:  # the numbers of a criterion that somebody else wrote may be too long
        return NOT_MET
    wanted = _step_of(match)
    alike = [step.result for step in answer.steps if step.terms == wanted.terms]
    return MET if wanted.result in alike else PARTLY_MET if alike else NOT_MET


def _has_value(answer: ParsedAnswer, text: str) -> int:
    """In part: a step ends with the value, and no # follows."""
    if answer.value is not None:
        return MET if answer.value == int(text) else NOT_MET
    return PARTLY_MET if answer.steps and answer.steps[-1].result == int(text) else NOT_MET


def _follows_last(answer: ParsedAnswer) -> int:
    return MET if answer.steps and answer.value == answer.steps[-1].result else NOT_MET


def _is_formed(answer: ParsedAnswer) -> int:
    return (
        MET
        if answer.is_formed
        else _all_or_part([bool(answer.steps), answer.value is not None, False])
    )


def _ends(answer: ParsedAnswer) -> int:
    return MET if answer.value is not None and not answer.goes_on else NOT_MET


def _sums(answer: ParsedAnswer) -> int:
    return _all_or_part([step.holds for step in answer.steps])


def _is_worked(answer: ParsedAnswer) -> int:
    return _all_or_part([_sums(answer) == MET, _follows_last(answer) == MET])


def _chain(answer: ParsedAnswer) -> int:
    # One step has nothing to link to, and meets this.
    links = [step.left == before.result for before, step in itertools.pairwise(answer.steps)]
    return _all_or_part(links or [bool(answer.steps)])


def _numbers(answer: ParsedAnswer, start: str, terms: str) -> int:
    wanted = [int(start), *(int(term) for term in _TERM.findall(terms))]
    found = [step.left for step in answer.steps[:1]] + [
        step.sign * step.right for step in answer.steps
    ]
    return _all_or_part([a == b for a, b in itertools.zip_longest(wanted, found)])


def _count(answer: ParsedAnswer, number: str) -> int:
    return MET if len(answer.steps) == int(number) else NOT_MET


def _nth(answer: ParsedAnswer, number: str, is_right: Callable[[int], bool]) -> int:
    """In part: the step is there."""
    place = int(number) - 1
    if not 0 <= place < len(answer.steps):
        return NOT_MET
    return MET if is_right(place) else PARTLY_MET


def _step_sum(answer: ParsedAnswer, number: str) -> int:
    return _nth(answer, number, lambda place: answer.steps[place].holds)


def _step_begins(answer: ParsedAnswer, number: str, start: str) -> int:
    def is_right(place: int) -> bool:
        wanted = (
            answer.steps[place - 1].result
            if start == BEFORE and place
            else None
            if start == BEFORE
            else int(start)
        )
        return answer.steps[place].left == wanted

    return _nth(answer, number, is_right)


def _step_applies(answer: ParsedAnswer, number: str, term: str) -> int:
    return _nth(
        answer,
        number,
        lambda place: answer.steps[place].sign * answer.steps[place].right == int(term),
    )


def _shows_wrong_sum(answer: ParsedAnswer) -> int:
    return NOT_MET if all(step.holds for step in answer.steps) else MET


def _shows_more(answer: ParsedAnswer) -> int:
    return MET if answer.goes_on else NOT_MET


def _sentence(template: str, *holes: str) -> re.Pattern:
    """What finds the sentence in a criterion, with a group for each {}."""
    parts = [re.escape(part) for part in template.split("{}")]
    return re.compile(
        "".join(
            itertools.chain(
                *itertools.zip_longest(parts, (f"({hole})" for hole in holes), fillvalue="")
            )
        )
    )


# The numbers in the holes are as short as those that are read of answers: int() then takes them
# all.
_WHOLE, _PLACE, _SIGN = rf"-?{_DIGITS}", "[0-9]{1,6}", rf"[+-]{_DIGITS}"
_CHECKS: tuple[tuple[re.Pattern, Callable[..., int]], ...] = (
    (_sentence(STEP, rf"-?{_DIGITS}[+-]{_DIGITS}=-?{_DIGITS}"), _has_step),
    (_sentence(VALUE, _WHOLE), _has_value),
    (_sentence(LAST), _follows_last),
    (_sentence(FORM), _is_formed),
    (_sentence(END), _ends),
    (_sentence(SUMS), _sums),
    (_sentence(WORKED), _is_worked),
    (_sentence(CHAIN), _chain),
    (_sentence(NUMBERS, _WHOLE, rf"{_SIGN}(?:, {_SIGN})*"), _numbers),
    (_sentence(COUNT, _PLACE), _count),
    (_sentence(STEP_SUM, _PLACE), _step_sum),
    (_sentence(STEP_BEGINS, _PLACE, rf"{_WHOLE}|{BEFORE}"), _step_begins),
    (_sentence(STEP_APPLIES, _PLACE, _SIGN), _step_applies),
    (_sentence(FLAW_SUM), _shows_wrong_sum),
    (_sentence(FLAW_AFTER), _shows_more),
)
