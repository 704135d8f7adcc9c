"""A judge of the arithmetic task without a model, as a chat model: judged runs work offline.

It sees the prompts of any judge, and no answer key. Its rubric asks for what most references agree
on; its verdicts compare a criterion with an answer, by the sums that it finds in the texts.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from opdjax.judge.prompts import read_blocks
from opdjax.judge.rule_based import demands
from opdjax.judge.rule_based.demands import Step, WorkedAnswer, grade, read_answer, read_task

_BLOCK = re.compile(
    r"^=== (\w+ \d+ [0-9a-f]{12}) ===\n.*?\n=== end of \1 ===$", re.DOTALL | re.MULTILINE
)
_STAGE = re.compile(r'^- stage "(.*)"$', re.MULTILINE)
_BOUNDS = re.compile(r"from ([0-9]{1,3}) to ([0-9]{1,3}) criteria")
_GRADED = re.compile(r'"verdicts": \[[0-9]')
_MAX_STEPS = 24  # of a task: no criteria name later steps
_NO_PROMPT = (
    "none of these messages is the prompt of a rubricator, verifier, scalar judge or reflector"
)

Document = dict[str, Any]
Blocks = Mapping[str, Sequence[str]]
Answers = Sequence[WorkedAnswer]


@dataclasses.dataclass(frozen=True)
class Demand:
    """A candidate criterion."""

    text: str
    category: str
    weight: int
    step: int | None = None  # the step it checks, from 0; None: the end or the whole of the answer
    is_flaw: bool = False
    is_spare: bool = False  # used only to reach the rubric's minimum length


@dataclasses.dataclass(frozen=True)
class Errors:
    """How often a verdict is wrong. Which ones is a hash of the seed, the criterion and the answer:
    a repeated question gets the same verdict.
    """

    false_accepts: float = 0.0  # share of the unmet criteria that the judge calls met
    false_rejects: float = 0.0  # share of the met criteria that it calls not met
    seed: int = 0

    def verdict(self, right: int, criterion: str, answer: str) -> int:
        """The verdict on a criterion whose right one is `right`."""
        text = "\0".join((str(self.seed), criterion, answer))
        draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
        if right == demands.MET:
            return demands.NOT_MET if draw < self.false_rejects else right
        return demands.MET if draw < self.false_accepts else right


NO_ERRORS = Errors()


async def answer(request: Document) -> bytes:
    """The body of the response to a chat-completion request."""
    return json.dumps(completion(request, json.dumps(reply_document(request)))).encode()


def reply_document(request: Document, errors: Errors = NO_ERRORS) -> Document:
    """The judge's reply, without keys that the request's schema excludes."""
    return _fitted(reply_to(request["messages"], errors), requested_schema(request))


def requested_schema(request: Document) -> Any:
    """The JSON schema that the reply must match; None without one."""
    match request.get("response_format"):
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return schema
    return None


def _fitted(value: Any, schema: Any) -> Any:
    if isinstance(value, list) and isinstance(schema, dict):
        return [_fitted(item, schema.get("items")) for item in value]
    if not isinstance(value, dict) or not isinstance(schema, dict):
        return value
    fields, is_strict = schema.get("properties") or {}, schema.get("additionalProperties") is False
    kept = {name: item for name, item in value.items() if name in fields or not is_strict}
    return {name: _fitted(item, fields.get(name)) for name, item in kept.items()}


def completion(request: Document, text: str, finish_reason: str = "stop") -> Document:
    """A chat completion, cut at the request's token limit; a token is four characters."""
    limit = request.get("max_completion_tokens") or request.get("max_tokens")
    if isinstance(limit, int) and len(text) > 4 * limit > 0:
        text, finish_reason = text[: 4 * limit], "length"
    contents = [message.get("content") for message in request["messages"]]
    shown = sum(len(content) for content in contents if isinstance(content, str))
    tokens = {"prompt_tokens": math.ceil(shown / 4), "completion_tokens": math.ceil(len(text) / 4)}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
    return {
        "id": "chatcmpl-rules",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request["model"],
        "choices": [choice],
        "usage": tokens | {"total_tokens": sum(tokens.values())},
    }


def reply_to(messages: Sequence[Mapping[str, Any]], errors: Errors = NO_ERRORS) -> Document:
    """The JSON object with which the judge replies to a chat; never raises. A verifier is wrong at
    the rates of `errors`.

    A chat without a judge's prompt gets `{"note": ...}`.
    """
    prompt, role = _prompt(messages), role_of(messages)
    if role is None:
        return {"note": _NO_PROMPT}
    verdicts = functools.partial(_verdicts, errors=errors)
    replies = {"rubricator": _rubric, "verifier": verdicts, "scalar_judge": _scores}
    reply = replies.get(role, _reflection)
    return reply(read_blocks(prompt), _BLOCK.sub("", prompt))


def role_of(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The role that the prompt is for, by its blocks; None if it has no blocks."""
    prompt = _prompt(messages)
    try:
        blocks = read_blocks(prompt)
    except ValueError:
        return None
    # The verifier's prompt for an empty rubric differs from others only by the reply's format.
    if "criterion" in blocks or '"verdicts": [' in _BLOCK.sub("", prompt):
        return "verifier"
    if "verdicts" in blocks:
        return "reflector"
    if "student" in blocks or "reference" in blocks:
        return "rubricator"
    return "scalar_judge" if "answer" in blocks else None


def _prompt(messages: Sequence[Mapping[str, Any]]) -> str:
    """The first message with fenced blocks; later ones ask for the same reply again."""
    texts = [message.get("content") for message in messages]
    return next((text for text in texts if isinstance(text, str) and "carry the tag" in text), "")


def _task(blocks: Blocks) -> tuple[Step, ...]:
    return read_task("\n".join(blocks.get("question", ())))


def _rubric(blocks: Blocks, words: str) -> Document:
    references, students = (
        [read_answer(text) for text in blocks.get(label, ())] for label in ("reference", "student")
    )
    bounds, stages, is_signed = _BOUNDS.search(words), _STAGE.findall(words), '"polarity":' in words
    low, high = map(int, bounds.groups()) if bounds else (4, 12)
    found = list((_by_stage if stages else _overall)(_task(blocks), references, students))
    if is_signed:
        found = _with_flaws(found, is_whole=not stages)
    unique: dict[str, Demand] = {}
    for demand in found:
        unique.setdefault(demand.text, demand)
    in_use = blocks.get("existing", ())
    chosen = _chosen([demand for text, demand in unique.items() if text not in in_use], low, high)
    numbered = enumerate(chosen, 1)
    return {"criteria": [_criterion(n, demand, stages, is_signed) for n, demand in numbered]}


def _criterion(number: int, demand: Demand, stages: list[str], is_signed: bool) -> Document:
    item: Document = {"id": f"c{number}", "category": demand.category}
    item |= {"text": demand.text, "weight": demand.weight}
    if is_signed:
        item["polarity"] = "negative" if demand.is_flaw else "positive"
    if stages:
        # The last stage has the value. The others have one step each, the last of them the rest.
        place = -1 if demand.step is None else min(demand.step, len(stages) - 2)
        item["stage"] = stages[place]
    return item


def _chosen(found: Sequence[Demand], low: int, high: int) -> list[Demand]:
    """The demands that count, spare ones up to `low`; above `high` the heaviest; order is kept."""
    # Only then: padding lowers the share of the criteria that count.
    wanted = [demand for demand in found if not demand.is_spare]
    spare = [demand for demand in found if demand.is_spare]
    known = {demand.text for demand in found}
    texts = (demands.STEP_SUM.format(number) for number in itertools.count(1))
    more = (_spare(text, "reasoning") for text in texts if text not in known)
    filled = [*wanted, *itertools.islice(itertools.chain(spare, more), max(low - len(wanted), 0))]
    # The sort is stable: of equal weights the first stay.
    heaviest = sorted(filled, key=lambda demand: -demand.weight)[:high]
    return [demand for demand in filled if demand in heaviest]


def _overall(task: Sequence[Step], references: Answers, students: Answers) -> Iterator[Demand]:
    """Demands on a whole answer, by name where the references agree, else for correct sums."""
    value = _agreed_value(references)
    # By position: after a reference takes another way, its steps agree with no other's.
    steps = [_agreed_step(references, place) for place in range(_num_steps(task, references))]
    if value is not None:
        yield Demand(demands.VALUE.format(value), "task", 5)
    for place, text in enumerate(steps):
        if text is not None:
            yield Demand(text, "reasoning", _weight(text, students), place)
    is_disputed = value is None or None in steps
    if value is None:
        yield Demand(demands.WORKED, "task", 5)
    elif is_disputed:
        yield Demand(demands.SUMS, "reasoning", 4)
    yield _merit(demands.CHAIN, "reasoning", students, is_spare=not is_disputed)
    if task:
        text = demands.NUMBERS.format(task[0].left, ", ".join(step.term for step in task))
        numbers = _merit(text, "task", students, is_spare=not is_disputed)
        # Without an agreed value, only this separates a correct sum of other numbers.
        is_decisive = value is None and numbers.weight > 1
        yield dataclasses.replace(numbers, weight=4) if is_decisive else numbers
    yield _merit(demands.LAST, "quality", students)
    yield Demand(demands.FORM, "quality", 1)
    yield _spare(demands.END, "quality")
    yield _spare(demands.COUNT.format(len(steps)), "quality")


def _by_stage(task: Sequence[Step], references: Answers, students: Answers) -> Iterator[Demand]:
    """Demands that each check one step, or the end of the answer."""
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
        weight = min(_weight(holds, students), 2 if named is not None else 4)
        yield Demand(holds, "reasoning", weight, place)
        start = demands.BEFORE if place else task[0].left if task else None
        if start is not None:
            text = demands.STEP_BEGINS.format(number, start)
            yield _merit(text, "reasoning", students, step=place)
        if place < len(task):
            yield _spare(demands.STEP_APPLIES.format(number, task[place].term), "task", place)


def _with_flaws(found: Sequence[Demand], is_whole: bool) -> list[Demand]:
    """Adds flaws, none of which mirrors a positive demand."""
    kept = [demand for demand in found if demand.text != demands.END]
    # Only for a whole answer: a stage's criteria check nothing outside it.
    if is_whole and not {demand.text for demand in kept} & {demands.SUMS, demands.WORKED}:
        kept.append(Demand(demands.FLAW_SUM, "reasoning", 2, is_flaw=True))
    return [*kept, Demand(demands.FLAW_AFTER, "quality", 1, is_flaw=True)]


def _spare(text: str, category: str, step: int | None = None) -> Demand:
    return Demand(text, category, 1, step, is_spare=True)


def _merit(text: str, category: str, students: Answers, **fields: Any) -> Demand:
    return Demand(text, category, min(_weight(text, students), 2), **fields)


def _weight(text: str, students: Answers) -> int:
    """4 if most students miss it, 1 if all meet it, else 2."""
    met = sum(grade(text, student) == demands.MET for student in students)
    return 4 if 2 * met < len(students) else 1 if met == len(students) else 2


def _num_steps(task: Sequence[Step], references: Answers) -> int:
    most = _majority([len(reference.steps) for reference in references], len(references))
    return min(max(most or len(task), 1), _MAX_STEPS)


def _agreed_step(references: Answers, place: int) -> str | None:
    """A demand for the step that most references take here, if one gets there without an error."""
    able = [reference.steps for reference in references if place < len(reference.steps)]
    most = _majority([steps[place].key for steps in able], len(references))
    holding = (steps[place] for steps in able if all(step.holds for step in steps[: place + 1]))
    agreed = next((step for step in holding if step.key == most), None)
    return None if agreed is None else demands.STEP.format(agreed)


def _agreed_value(references: Answers) -> int | None:
    """The value of most references, if at least one of them reaches it without a wrong sum."""
    values = [reference.value for reference in references if reference.value is not None]
    most = _majority(values, len(references))
    is_reached = any(reference.value == most and reference.holds for reference in references)
    return most if is_reached else None


def _majority(values: Sequence[Hashable], count: int) -> Any:
    """The value that occurs more than count / 2 times; None without one."""
    ((most, times),) = collections.Counter(values).most_common(1) or [(None, 0)]
    return most if 2 * times > count else None


def _verdicts(blocks: Blocks, words: str, errors: Errors) -> Document:
    is_graded, criteria = _GRADED.search(words) is not None, blocks.get("criterion", ())

    def verdicts(text: str) -> list[int] | list[bool]:
        answer = read_answer(text)
        grades = [errors.verdict(grade(each, answer), each, text) for each in criteria]
        return grades if is_graded else [value == demands.MET for value in grades]

    return _per_answer(blocks, "verdicts", verdicts)


def _scores(blocks: Blocks, words: str) -> Document:
    """0.5 for the form, 0.5 for the value that the judge computes itself."""
    task = _task(blocks)

    def score(text: str) -> float:
        answer = read_answer(text)
        return 0.5 * answer.is_formed + 0.5 * (bool(task) and answer.value == task[-1].result)

    return _per_answer(blocks, "score", score)


def _per_answer(blocks: Blocks, name: str, judge) -> Document:
    answers = enumerate(blocks.get("answer", ()), 1)
    return {"answers": [{"answer_index": n, name: judge(text)} for n, text in answers]}


def _reflection(blocks: Blocks, words: str) -> Document:
    """The first mistake, and its correction."""
    answer, task = read_answer("\n".join(blocks.get("answer", ()))), _task(blocks)
    return {"reflection": _first_wrong_step(answer, task) or _wrong_end(answer, task)}


def _first_wrong_step(answer: WorkedAnswer, task: Sequence[Step]) -> str | None:
    # If the question has no sum, only the answer's own sums can be checked.
    corrected = lambda step: dataclasses.replace(step, result=step.total)
    expected = task or map(corrected, answer.steps)
    for number, (found, right) in enumerate(itertools.zip_longest(answer.steps, expected), 1):
        if found is None:
            advice = "Write out one step for each number that is added or taken away."
            return f"Step {number} is missing: it should be {right}. {advice}"
        if right is None:
            advice = f"Stop at the result of step {number - 1} and write it after #."
            return f"Step {number}, {found}, is one too many. {advice}"
        if found.key != right.key:
            advice = "What comes after it builds on its result."
            return f"Step {number} says {found}, but it should be {right}. {advice}"
    return None


def _wrong_end(answer: WorkedAnswer, task: Sequence[Step]) -> str:
    """The mistake of an answer without a wrong step."""
    last, value = (task or answer.steps)[-1:], answer.value
    if last and value != last[0].result:
        found = "No value stands after #" if value is None else f"The value after # is {value}"
        right = f"{last[0].result}, the result of the last step"
        return f"{found}, but it should be {right}. Copy that result."
    if answer.goes_on:
        advice = "Stop at the value."
        return (
            f"The steps and the value {value} are there, but the answer goes on after it. {advice}"
        )
    if not answer.steps:
        advice = "Write each step as a sum with its result, then # and the value."
        return f"There is no step in the answer. {advice}"
    advice = "Work out each step before the next one in the same way."
    return f"Each step holds and the value follows from the last one. {advice}"
