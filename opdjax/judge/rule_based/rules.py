"""A judge of the arithmetic task that works by rules: it reads the prompts that are sent to any
judge, and nothing else.

The whole rubric machinery runs with it offline. It knows no answer key: a rubric says what most
references agree on, a verdict what stands in the criterion and the answer. It only adds and
subtracts whole numbers that it finds in texts.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from opdjax.judge.prompts import read_blocks
from opdjax.judge.rule_based import demands
from opdjax.judge.rule_based.demands import ParsedAnswer, Step, grade, read_answer, read_task

ROLES = ("rubricator", "verifier", "scalar_judge", "reflector")
_BLOCK = re.compile(
    r"^=== (\w+ \d+ [0-9a-f]{12}) ===\n.*?\n=== end of \1 ===$", re.DOTALL | re.MULTILINE
)
_STAGE = re.compile(r'^- stage "(.*)"$', re.MULTILINE)
_BOUNDS = re.compile(r"from ([0-9]{1,3}) to ([0-9]{1,3}) criteria")
_GRADED = re.compile(r'"verdicts": \[[0-9]')
_MAX_STEPS = 24  # of a task that criteria name one by one

Blocks = Mapping[str, Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Demand:
    """A criterion in the making."""

    text: str
    category: str
    weight: int
    step: int | None = (
        None  # the step it looks at, counted from 0; None: the end of the answer, or all of it
    )
    is_flaw: bool = False
    is_spare: bool = False  # taken only where the rubric would be shorter than it must be


def reply_to(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON object that a judge replies to this chat, of whatever role its first prompt asks
    for; never raises.

    A chat that holds no such prompt gets `{"note": ...}`, which says so.
    """
    prompt, role = _prompt(messages), role_of(messages)
    if role is None:
        return {
            "note": "none of these messages is the prompt of a rubricator, verifier, scalar judge or reflector"
        }
    blocks, words = read_blocks(prompt), _BLOCK.sub("", prompt)
    reply = {
        "rubricator": _rubric,
        "verifier": _verdicts,
        "scalar_judge": _scores,
        "reflector": _reflection,
    }[role]
    return reply(blocks, words)


def role_of(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """One of ROLES, by what stands between the fences of the prompt, and None where there are none."""
    prompt = _prompt(messages)
    try:
        blocks = read_blocks(prompt)
    except ValueError:
        return None
    # A rubric may have come out empty: its verifier's prompt is then told by the form of the reply
    # alone.
    if "criterion" in blocks or '"verdicts": [' in _BLOCK.sub("", prompt):
        return "verifier"
    if "verdicts" in blocks:
        return "reflector"
    if "student" in blocks or "reference" in blocks:
        return "rubricator"
    return "scalar_judge" if "answer" in blocks else None


def _prompt(messages: Sequence[Mapping[str, Any]]) -> str:
    """The first message with fenced blocks; what follows it are asks for the same reply."""
    texts = [message.get("content") for message in messages]
    return next((text for text in texts if isinstance(text, str) and "carry the tag" in text), "")


def _rubric(blocks: Blocks, words: str) -> dict[str, Any]:
    references, students = (
        [read_answer(text) for text in blocks.get(label, ())] for label in ("reference", "student")
    )
    found, stages, is_signed = _BOUNDS.search(words), _STAGE.findall(words), '"polarity":' in words
    low, high = (int(found[1]), int(found[2])) if found else (4, 12)
    demanded = list((_by_stage if stages else _overall)(_task(blocks), references, students))
    if is_signed:
        demanded = _with_flaws(demanded, is_whole=not stages)
    in_use, unique = (
        set(blocks.get("existing", ())),
        {demand.text: demand for demand in reversed(demanded)},
    )
    chosen = _chosen(
        [
            demand
            for demand in demanded
            if demand is unique[demand.text] and demand.text not in in_use
        ],
        low,
        high,
    )
    return {
        "criteria": [
            _criterion(place, demand, stages, is_signed) for place, demand in enumerate(chosen)
        ]
    }


def _task(blocks: Blocks) -> tuple[Step, ...]:
    return read_task("\n".join(blocks.get("question", ())))


def _criterion(
    place: int, demand: Demand, stages: Sequence[str], is_signed: bool
) -> dict[str, Any]:
    item: dict[str, Any] = {
        "id": f"c{place + 1}",
        "category": demand.category,
        "text": demand.text,
        "weight": demand.weight,
    }
    if is_signed:
        item["polarity"] = "negative" if demand.is_flaw else "positive"
    if stages:
        # The last stage holds the value; those before it hold the steps, one each as long as there
        # are stages.
        item["stage"] = (
            stages[-1] if demand.step is None else stages[min(demand.step, max(len(stages) - 2, 0))]
        )
    return item


def _chosen(demanded: Sequence[Demand], low: int, high: int) -> list[Demand]:
    """What counts, filled up to `low` with spare demands, and of too many the weightiest; in the
    order they came.
    """
    # Padding only lowers the share of what counts, so spare demands come in only for want of
    # others.
    wanted = [demand for demand in demanded if not demand.is_spare]
    spare = [demand for demand in demanded if demand.is_spare]
    known = {demand.text for demand in demanded}
    steps = (
        _spare(demands.STEP_SUM.format(number), "reasoning", 1) for number in itertools.count(1)
    )
    more = (demand for demand in steps if demand.text not in known)
    filled = [*wanted, *itertools.islice(itertools.chain(spare, more), max(low - len(wanted), 0))]
    # The sort is stable: of demands with one weight those stay that came first.
    kept = set(sorted(range(len(filled)), key=lambda place: -filled[place].weight)[:high])
    return [demand for place, demand in enumerate(filled) if place in kept]


def _overall(
    task: Sequence[Step], references: Sequence[ParsedAnswer], students: Sequence[ParsedAnswer]
) -> Iterator[Demand]:
    """Demands on an undivided answer: what references agree on by name, and where they differ that
    the arithmetic holds.
    """
    value = _agreed_value(references)
    # Steps by their place: a reference that goes another way from there on agrees with nobody after
    # it.
    steps = [_agreed_step(references, place) for place in range(_num_steps(task, references))]
    if value is not None:
        yield Demand(demands.VALUE.format(value), "task", 5)
    for place, text in enumerate(steps):
        if text is not None:
            yield Demand(text, "reasoning", _weight(text, students), place)
    is_disputed = value is None or None in steps
    if is_disputed:
        yield (
            Demand(demands.WORKED, "task", 5)
            if value is None
            else Demand(demands.SUMS, "reasoning", 4)
        )
    yield dataclasses.replace(
        _merit(demands.CHAIN, "reasoning", students), is_spare=not is_disputed
    )
    if task:
        # Where no value can be named, what is worked out rightly from other numbers is told from an
        # answer by this alone.
        numbers = _merit(
            demands.NUMBERS.format(task[0].left, ", ".join(step.term for step in task)),
            "task",
            students,
        )
        weight = 4 if value is None and numbers.weight > 1 else numbers.weight
        yield dataclasses.replace(numbers, weight=weight, is_spare=not is_disputed)
    yield _merit(demands.LAST, "quality", students)
    yield Demand(demands.FORM, "quality", 1)
    yield _spare(demands.END, "quality", 1)
    yield _spare(demands.COUNT.format(len(steps)), "quality", 1)


def _by_stage(
    task: Sequence[Step], references: Sequence[ParsedAnswer], students: Sequence[ParsedAnswer]
) -> Iterator[Demand]:
    """Demands that each look at one step, or at the end of the answer."""
    value = _agreed_value(references)
    if value is not None:
        yield Demand(demands.VALUE.format(value), "task", 5)
    yield Demand(demands.LAST, "quality", 2 if value is not None else 5)
    yield Demand(demands.END, "quality", 1)
    for place in range(_num_steps(task, references)):
        named, number = _agreed_step(references, place), place + 1
        if named is not None:
            yield Demand(named, "reasoning", _weight(named, students), place)
        holds = demands.STEP_SUM.format(number)
        yield Demand(
            holds, "reasoning", min(_weight(holds, students), 2 if named is not None else 4), place
        )
        start = demands.BEFORE if place else task[0].left if task else None
        if start is not None:
            yield dataclasses.replace(
                _merit(demands.STEP_BEGINS.format(number, start), "reasoning", students), step=place
            )
        if place < len(task):
            yield dataclasses.replace(
                _spare(demands.STEP_APPLIES.format(number, task[place].term), "task", 1), step=place
            )


def _with_flaws(demanded: Sequence[Demand], is_whole: bool) -> list[Demand]:
    """Flaws too, none of them the mirror image of a demand that is there."""
    kept = [demand for demand in demanded if demand.text != demands.END]
    # An undivided answer's alone: criteria of a stage look at nothing outside it.
    if is_whole and not {demand.text for demand in kept} & {demands.SUMS, demands.WORKED}:
        kept.append(Demand(demands.FLAW_SUM, "reasoning", 2, is_flaw=True))
    return [*kept, Demand(demands.FLAW_AFTER, "quality", 1, is_flaw=True)]


def _spare(text: str, category: str, weight: int) -> Demand:
    return Demand(text, category, weight, is_spare=True)


def _merit(text: str, category: str, students: Sequence[ParsedAnswer]) -> Demand:
    return Demand(text, category, min(_weight(text, students), 2))


def _weight(text: str, students: Sequence[ParsedAnswer]) -> int:
    """4 where most students miss it, 1 where all meet it, else 2."""
    met = sum(grade(text, student) == demands.MET for student in students)
    return 4 if 2 * met < len(students) else 1 if met == len(students) else 2


def _num_steps(task: Sequence[Step], references: Sequence[ParsedAnswer]) -> int:
    most = _majority([len(reference.steps) for reference in references], len(references))
    return min(max(most or len(task), 1), _MAX_STEPS)


def _agreed_step(references: Sequence[ParsedAnswer], place: int) -> str | None:
    """What most references do as this step, as a demand; none where a sum up to there is wrong,
    whoever agrees on it.
    """
    able = [reference.steps for reference in references if place < len(reference.steps)]
    most = _majority([steps[place].key for steps in able], len(references))
    holding = (steps[place] for steps in able if all(step.holds for step in steps[: place + 1]))
    agreed = next((step for step in holding if step.key == most), None)
    return None if agreed is None else demands.STEP.format(agreed)


def _agreed_value(references: Sequence[ParsedAnswer]) -> int | None:
    """The value most references give, where at least one of them comes to it without a wrong sum."""
    most = _majority(
        [reference.value for reference in references if reference.value is not None],
        len(references),
    )
    return (
        most
        if any(reference.value == most and reference.holds for reference in references)
        else None
    )


def _majority(values: Sequence[Hashable], count: int) -> Any:
    """The value that more than half of `count` have; None where there is none."""
    ((most, times),) = collections.Counter(values).most_common(1) or [(None, 0)]
    return most if 2 * times > count else None


def _verdicts(blocks: Blocks, words: str) -> dict[str, Any]:
    is_graded, criteria = _GRADED.search(words) is not None, blocks.get("criterion", ())

    def of(text: str) -> list[int] | list[bool]:
        grades = [
            grade(criterion, answer) for answer in [read_answer(text)] for criterion in criteria
        ]
        return grades if is_graded else [found == demands.MET for found in grades]

    return {
        "answers": [
            {"answer_index": place + 1, "verdicts": of(text)}
            for place, text in enumerate(blocks.get("answer", ()))
        ]
    }


def _scores(blocks: Blocks, words: str) -> dict[str, Any]:
    """Half for the form, half for the value that the judge finds itself."""
    task = _task(blocks)

    def of(text: str) -> float:
        answer = read_answer(text)
        return 0.5 * answer.is_formed + 0.5 * (bool(task) and answer.value == task[-1].result)

    return {
        "answers": [
            {"answer_index": place + 1, "score": of(text)}
            for place, text in enumerate(blocks.get("answer", ()))
        ]
    }


def _reflection(blocks: Blocks, words: str) -> dict[str, Any]:
    """What went wrong first, and what should stand there."""
    answer, task = read_answer("\n".join(blocks.get("answer", ()))), _task(blocks)
    return {"reflection": _first_wrong_step(answer, task) or _wrong_end(answer, task)}


def _first_wrong_step(answer: ParsedAnswer, task: Sequence[Step]) -> str | None:
    # Of a task that is no sum, only sums that are wrong in themselves can be told.
    expected = task or [dataclasses.replace(step, result=step.sum) for step in answer.steps]
    for number, (found, right) in enumerate(itertools.zip_longest(answer.steps, expected), 1):
        if found is None:
            return f"Step {number} is missing: it should be {right}. Write out one step for each number that is added or taken away."
        if right is None:
            return f"Step {number}, {found}, is one too many. Stop at the result of step {number - 1} and write it after #."
        if found.key != right.key:
            return f"Step {number} says {found}, but it should be {right}. What comes after it builds on its result."
    return None


def _wrong_end(answer: ParsedAnswer, task: Sequence[Step]) -> str:
    """What is wrong where no step is."""
    last = (task or answer.steps)[-1:]
    if last and answer.value != last[0].result:
        found = (
            "No value stands after #"
            if answer.value is None
            else f"The value after # is {answer.value}"
        )
        return f"{found}, but it should be {last[0].result}, the result of the last step. Copy that result."
    if answer.goes_on:
        return f"The steps and the value {answer.value} are there, but the answer goes on after it. Stop at the value."
    if not answer.steps:
        return "There is no step in the answer. Write each step as a sum with its result, then # and the value."
    return "Each step holds and the value follows from the last one. Work out each step before the next one in the same way."
