r"""Graders: whether a completion gives the right answer. They differ in what they read.

Each grader reads one value out of the completion and one out of the answer in the data, and
compares the two. A completion without a value, or with several that contradict each other, is
wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from opdjax.config.experiments import errors_of, load_function
from opdjax.config.sampling import GRADERS
from opdjax.config.validation import MissingExtraError
from opdjax.data import isolated
from opdjax.data.rational import numbers_in, rational
from opdjax.data.sources import DataError
from opdjax.data.tasks import ifeval, reasoning

Grade = Callable[[str, str], bool]  # of a completion and the answer in the data
_MAX_CHARS = 100_000  # the end of a longer completion is read; no answer starts before it
_HASH = re.compile(r"#+[ \t]*([^\n#]*)")
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*(?:{|(?P<bare>[0-9A-Za-z.]+))|[{}]")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_LETTER = r"(?:\(?([A-J])\)?|\(([a-j])\))(?![A-Za-z0-9'])"
_STATED = re.compile(
    r"(?i:\banswer\b)[\"'*:= ]*(?:(?i:\b(?:is|would be|must be|option|choice)\b)[\"'*_:\[ ]*)*"
    rf"{_LETTER}(\s*(?:or|and|/|,|&)\s*\(?[A-Ja-j]\b)?"
)


@dataclasses.dataclass(frozen=True)
class _Grader:
    """How a grader reads a completion and the answer in the data, and compares the two values."""

    read: Callable[[str], Any | None]
    read_answer: Callable[[str], Any | None]
    is_equal: Callable[[Any, Any], bool] = lambda found, expected: found == expected
    is_same: Callable[[Any, Any], bool] = operator.eq  # of what two completions say

    def __call__(self, completion: str, answer: str) -> bool:
        expected, found = self.read_answer(answer), self.read(completion[-_MAX_CHARS:])
        return found is not None and expected is not None and self.is_equal(found, expected)

    def can_read(self, answer: str) -> bool:
        """Whether the answer in the data has a value, so that a completion can be right."""
        return self.read_answer(answer) is not None


def _after_hash(text: str) -> str | None:
    """The rest of the line after the last `#` that has a digit behind it."""
    lines = [line for line in _HASH.findall(text) if re.search("[0-9]", line)]
    return lines[-1] if lines else None


def _only_number(text: str | None) -> Any | None:
    """The value of the only number of a line, with its unit or decoration; None for `5 or 6`."""
    found = numbers_in(text or "")
    return rational(found[0]) if len(found) == 1 else None


def _last_number(text: str) -> Any | None:
    found = numbers_in(text.rsplit("</think>", 1)[-1])
    return rational(found[-1]) if found else None


def _gsm8k_answer(answer: str) -> Any | None:
    """An answer may be a worked solution that ends in `#### 42`, or the number alone."""
    return _only_number(_after_hash(answer) or answer)


def boxes(text: str) -> list[str]:
    r"""The contents of every `\boxed{...}` or `\fbox{...}` with balanced braces, and of `\boxed 5`.

    Of a box inside of another, the inner one. Linear in the length of the text.
    """
    found: list[str] = []
    opened: list[tuple[int | None, int]] = []  # (where the box's content starts, boxes before it)
    for match in _BRACE.finditer(text):
        if match["bare"]:
            found.append(match["bare"])
        elif match[0] != "}":
            opened.append((None if match[0] == "{" else match.end(), len(found)))
        elif opened:
            start, before = opened.pop()
            if start is not None and len(found) == before:
                found.append(text[start : match.start()])
    return found


def _boxes_after_thinking(text: str) -> list[str] | None:
    return boxes(text.rsplit("</think>", 1)[-1]) or None


def _is_equal_math(found: list[str], answer: str) -> bool:
    """The last box equals the answer, or the last n boxes the n parts of an answer `a, b`."""
    parts = [part.strip() for part in answer.split(",")]
    if _is_same_value(found[-1], answer):
        return True
    is_list = len(parts) > 1 and rational(answer) is None and not re.search(r"[()\[\]{}]", answer)
    last = found[-len(parts) :]
    return is_list and len(last) == len(parts) and all(map(_is_same_value, last, parts))


def _is_same_value(found: str, answer: str) -> bool:
    """Exactly where both are numbers; else as math-verify compares them, within a time limit."""
    if found.strip() == answer.strip():
        return True
    numbers = rational(found), rational(answer)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return bool(isolated.call("verify_math", answer, found))


def _letter(text: str) -> str | None:
    """The letter that a completion chooses; None if there is none, or several."""
    text = text.rsplit("</think>", 1)[-1].strip()
    if found := boxes(text):
        return _letter_alone(found[-1])
    if stated := list(_STATED.finditer(text)):
        return None if stated[-1][3] else (stated[-1][1] or stated[-1][2]).upper()
    last_line = (text.splitlines() or [""])[-1]
    marked = set(re.findall(r"(?:\(|\*\*\(?)([A-J])\b", last_line))
    return _letter_alone(text) or (marked.pop() if len(marked) == 1 else None)


def _letter_alone(text: str) -> str | None:
    """`C`, `(c)`, `\\text{C}`, or `C. Paris`, `C) Paris`: a letter as the name of an option."""
    match = re.match(r"(?:\\text)?[\W_]*([A-Ja-j])(?:[\W_]*$|[).:]\s)", text.strip())
    return match[1].upper() if match else None


def _tagged(text: str) -> str:
    """What stands in the last `<answer>…</answer>`; without one, the whole text."""
    text = text.rsplit("</think>", 1)[-1]
    return (_TAGGED.findall(text) or [text])[-1].strip()


@functools.cache
def _task_answer(answer: str) -> tuple[str, int, str] | None:
    """(task, number of the question, answer) of a row of `tasks:NAME#SPLIT`, which has to score."""
    try:
        row = json.loads(answer)
        found = str(row["task"]), int(row["number"]), str(row["answer"])
    except (ValueError, LookupError, TypeError):
        return None
    return found if _solves_task(found[2], found) else None


def _solves_task(answer: str, row: tuple[str, int, str]) -> bool:
    return bool(isolated.call("is_right", *row[:2], answer, module=reasoning.__name__))


def _text(text: str) -> str | None:
    return text.strip() or None


def _reply(text: str) -> str | None:
    return _text(text.rsplit("</think>", 1)[-1])


def _follows(reply: str, row: str) -> bool:
    return bool(isolated.call("is_followed", row, reply, module=ifeval.__name__))


def votes(grader: str, completions: Sequence[str]) -> list[int | None]:
    """The number of each completion's value, counted from 0: equal values have the same one. None
    where the grader reads no value. Your own function reads the whole text.
    """
    grade, values, found = grader_named(grader), [], []
    for completion in completions:
        value = grade.read(completion[-_MAX_CHARS:])
        known = (n for n, other in enumerate(values) if grade.is_same(value, other))
        found.append(None if value is None else next(known, len(values)))
        if found[-1] == len(values):
            values.append(value)
    return found


_GRADERS: dict[str, _Grader] = {
    "gsm8k": _Grader(lambda text: _only_number(_after_hash(text)), _gsm8k_answer),
    "last_number": _Grader(_last_number, _last_number),
    "boxed": _Grader(
        _boxes_after_thinking,
        lambda answer: (boxes(answer) or [answer.strip()])[-1] or None,
        _is_equal_math,
        lambda found, other: _is_same_value(found[-1], other[-1]),
    ),
    "choice": _Grader(_letter, _letter),
    "exact": _Grader(_text, _text),
    "tasks": _Grader(_tagged, _task_answer, _solves_task),
    "ifeval": _Grader(_reply, ifeval.instructions, _follows),
}


@functools.cache
def grader_named(name: str) -> Grade:
    """`grade(completion, answer)` of a name as `evaluation.grader` has it.

    ConfigError for a name that does not exist; MissingExtraError if its package is missing.
    """
    require_grader(name)
    if name in _GRADERS:
        return _GRADERS[name]
    if name.startswith("regex:"):
        return _by_pattern(name.removeprefix("regex:"))
    return _Own(name, load_function(*name.rsplit(":", 1)))


def _by_pattern(pattern: str) -> _Grader:
    """The last match of a pattern, or its first group; run apart, because patterns may hang."""
    read = lambda text: isolated.call("last_match", pattern, text)
    return _Grader(read, lambda answer: read(answer) or _text(answer))


@dataclasses.dataclass(frozen=True)
class _Own:
    """A user's function."""

    name: str
    function: Callable[[str, str], Any]
    read, is_same = staticmethod(_text), staticmethod(operator.eq)

    def __call__(self, completion: str, answer: str) -> bool:
        with errors_of(self.name.rpartition(":")[0]):
            result = self.function(completion, answer)
        if result not in (0, 1):
            raise DataError(
                f"evaluation.grader {self.name} returned {result!r}; expected True or False"
            )
        return bool(result)

    def can_read(self, answer: str) -> bool:
        """True once the function has run; an answer alone need not have a completion's form."""
        self(answer, answer)
        return True


def require_grader(name: str) -> None:
    """Raise MissingExtraError if the grader's package is missing."""
    if name == "boxed" and importlib.util.find_spec("math_verify") is None:
        raise MissingExtraError("the grader 'boxed' needs math-verify: pip install 'opdjax[eval]'")
    if name in ("tasks", "ifeval"):
        {"tasks": reasoning, "ifeval": ifeval}[name].require_package()


def require_readable(name: str, answers: Sequence[str], source: str) -> None:
    """DataError naming the answers of the data that the grader cannot read: no completion could be
    right there.
    """
    grade = grader_named(name)
    wrong = [(row, answer) for row, answer in enumerate(answers) if not grade.can_read(answer)]
    if wrong:
        shown = ", ".join(f"prompt {row}: {answer[:40]!r}" for row, answer in wrong[:3])
        raise DataError(
            f"the grader {name!r} reads no answer in {len(wrong)} of {len(answers)} rows of "
            f"{source} ({shown}); correct them, or choose another evaluation.grader: "
            f"{', '.join(GRADERS)}, regex:PATTERN or FILE.py:FUNCTION"
        )
