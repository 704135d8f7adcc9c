"""Judges' replies (rubrics, verdicts, scores): the JSON schemas, and strict parsing.

A reply is parsed strictly, or after a repair that is cheap and keeps its meaning. Otherwise
ReplyError says what is wrong, and the judge is asked again with its text.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Literal

import pydantic

from opdjax.config.rubrics import RubricsConfig

# Why a reply cannot be used, and what was repaired: names of metrics.
ERRORS = ("empty", "truncated", "parse_error", "schema_error", "validation_error")
REPAIRS = ("fence", "prose", "unknown_keys", "id_case", "unknown_answers")
_FENCE = re.compile(r"\A\s*```[A-Za-z]*\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)
_MAX_STARTS = 64  # positions in prose at which an object may start


# Its text becomes part of the next prompt, and replies are cached by the prompt's bytes: messages
# below keep their wording.
class ReplyError(ValueError):
    """A reply that cannot be used; `kind` is one of ERRORS, the text says what was expected."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Criterion(pydantic.BaseModel):
    """One observable property of an answer, with its weight."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)

    id: str = pydantic.Field(pattern=r"^c[0-9]{1,3}$")
    category: str = pydantic.Field(min_length=1)
    text: str = pydantic.Field(min_length=1)
    weight: int = pydantic.Field(ge=1, le=5)
    polarity: Literal["positive", "negative"] = "positive"  # negative: a flaw; its absence scores
    grade: Literal["binary", "graded"] = "binary"  # verdicts are met or not, or 0, 1, 2
    stage: str | None = None  # the stage it applies to; None: the whole answer
    is_given: bool = False  # stored with the prompt, never dropped

    def share(self, verdict: int) -> float:
        """The share of the weight that a verdict earns, from 0 to 1.

        Verdicts are 0 or 1; of a graded criterion 0, 1 or 2, where 1 counts half. A negative
        criterion earns it for an absent flaw (RubricEM, arXiv 2605.10899, appendix C).
        """
        met = verdict / 2 if self.grade == "graded" else float(verdict)
        return 1 - met if self.polarity == "negative" else met


@dataclasses.dataclass(frozen=True)
class Rubric:
    """The criteria for all answers to one prompt. A total that a judge declares is never read."""

    criteria: tuple[Criterion, ...]

    def score(self, verdicts: Sequence[int], stage: str | None = None) -> float:
        """`sum_k w_k u_k / sum_k w_k` in [0, 1], u the earned share (ROPD, arXiv 2605.07396, 2.2).

        `stage`: only its criteria count. Without criteria: 0, in all rollouts of the group, so that
        the advantage of such a stage is 0.
        """
        pairs = zip(self.criteria, verdicts)
        counted = [pair for pair in pairs if stage is None or pair[0].stage == stage]
        total = sum(criterion.weight for criterion, _ in counted)
        if not total:
            return 0.0
        return sum(criterion.weight * criterion.share(u) for criterion, u in counted) / total


@dataclasses.dataclass(frozen=True)
class RolloutGroup:
    """One prompt with its references and rollouts, as judges see them (`judgement.group_of`)."""

    prompt_id: int
    question: str
    references: tuple[str, ...]
    answers: tuple[str, ...]  # by rollout
    samples: tuple[int, ...]  # the rollouts' numbers within the prompt
    rubric: Rubric | None = None  # None: induced from the rollouts
    existing: tuple[Criterion, ...] = ()  # kept; new criteria are induced in addition


class _Verdicts(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    answer_index: int
    verdicts: list[bool] | list[int]


class _Score(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    answer_index: int
    score: float = pydantic.Field(ge=0, le=1, allow_inf_nan=False)


@dataclasses.dataclass(frozen=True)
class ParsedAnswers:
    """The readable part of a reply about several answers, which are counted from 0."""

    values: dict[int, Any]  # by answer: verdicts (0, 1; graded: 0, 1, 2) or a score in [0, 1]
    problems: dict[int, str]  # by answer without a value: the reason
    repairs: tuple[str, ...]


def rubric_schema(config: RubricsConfig, stages: tuple[str, ...] = ()) -> dict[str, Any]:
    """The JSON schema of a rubric; every field is required, as servers' strict modes demand."""
    return _list_schema("criteria", _criterion_fields(config, stages))


def _criterion_fields(config: RubricsConfig, stages: tuple[str, ...]) -> dict[str, Any]:
    fields: dict[str, Any] = {name: {"type": "string"} for name in ("id", "category", "text")}
    fields["weight"] = {"type": "integer", "enum": [1, 2, 3, 4, 5]}
    if config.polarity == "signed":
        fields["polarity"] = {"type": "string", "enum": ["positive", "negative"]}
    if stages:
        fields["stage"] = {"type": "string", "enum": list(stages)}
    return fields


def verdict_schema(is_graded: bool) -> dict[str, Any]:
    """The JSON schema of verdicts on several answers."""
    verdict = {"type": "integer", "enum": [0, 1, 2]} if is_graded else {"type": "boolean"}
    verdicts = {"type": "array", "items": verdict}
    return _list_schema("answers", {"answer_index": {"type": "integer"}, "verdicts": verdicts})


def score_schema() -> dict[str, Any]:
    """The JSON schema of plain scores of several answers."""
    fields = {"answer_index": {"type": "integer"}, "score": {"type": "number"}}
    return _list_schema("answers", fields)


def _list_schema(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    return object_schema({name: {"type": "array", "items": object_schema(fields)}})


def object_schema(fields: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of an object with exactly these fields."""
    schema = {"type": "object", "properties": fields, "required": list(fields)}
    return schema | {"additionalProperties": False}


def parse_rubric(
    text: str,
    config: RubricsConfig,
    stages: tuple[str, ...] = (),
    bounds: tuple[int, int] | None = None,
) -> tuple[Rubric, tuple[str, ...]]:
    """The rubric in a reply, and the repairs made; ReplyError if the config does not allow it.

    `bounds`: minimum and maximum number of criteria; None: the config's.
    """
    items, repairs = _read_list(text, "criteria")
    known = _criterion_fields(config, stages).keys()  # others are dropped
    read = lambda number, item: _criterion(item, number, known, repairs, config.grades)
    criteria = tuple(itertools.starmap(read, enumerate(items, 1)))
    _check_rubric(criteria, bounds or config.num_criteria, stages)
    return Rubric(criteria), tuple(sorted(repairs))


def _criterion(item: Any, number: int, known: Set[str], repairs: set[str], grade: str) -> Criterion:
    if not isinstance(item, dict):
        message = f"criterion {number} is {_describe(item)}; expected an object"
        raise ReplyError("schema_error", message)
    item = _without_unknown(item, known, repairs)
    if isinstance(item.get("id"), str) and item["id"] != item["id"].lower():
        repairs.add("id_case")
        item = item | {"id": item["id"].lower()}
    try:
        return Criterion(**item, grade=grade)
    except pydantic.ValidationError as error:
        raise ReplyError("schema_error", f"criterion {number}: {_first_error(error)}") from error


def _check_rubric(
    criteria: tuple[Criterion, ...], bounds: tuple[int, int], stages: tuple[str, ...]
) -> None:
    (low, high), ids = bounds, [criterion.id for criterion in criteria]
    invalid = lambda message: ReplyError("validation_error", message)
    if not low <= len(criteria) <= high:
        raise invalid(f"there are {len(criteria)} criteria; expected from {low} to {high}")
    if len(set(ids)) < len(ids):
        raise invalid(f"the ids are {', '.join(ids)}; expected each once")
    if low and all(criterion.polarity == "negative" for criterion in criteria):
        raise invalid("all criteria are negative; expected at least one that an answer can meet")
    for criterion in criteria:
        if stages and criterion.stage not in stages:
            expected = f"expected one of {list(stages)}"
            raise invalid(f"criterion {criterion.id} has stage {criterion.stage!r}; {expected}")


def parse_verdicts(
    text: str, num_answers: int, num_criteria: int, is_graded: bool
) -> ParsedAnswers:
    """Verdicts by answer, in any order in the reply.

    An answer whose entry is wrong, missing or duplicated gets a problem instead. ReplyError if
    nothing can be read.
    """
    kind, highest, expected = (int, 2, "0, 1 and 2") if is_graded else (bool, 1, "true and false")

    def verdicts(item: dict[str, Any]) -> tuple[int, ...]:
        found = _Verdicts(**item).verdicts
        is_valid = all(type(verdict) is kind and 0 <= verdict <= highest for verdict in found)
        if len(found) != num_criteria or not is_valid:
            message = f"{len(found)} verdicts; expected {num_criteria}, of {expected}"
            raise ReplyError("validation_error", message)
        return tuple(int(verdict) for verdict in found)

    return _parse_answers(text, num_answers, {"answer_index", "verdicts"}, verdicts)


def parse_scores(text: str, num_answers: int) -> ParsedAnswers:
    """Scores in [0, 1] by answer, parsed as `parse_verdicts` does."""
    score = lambda item: _Score(**item).score
    return _parse_answers(text, num_answers, {"answer_index", "score"}, score)


def _parse_answers(
    text: str, num_answers: int, known: Set[str], parse_value: Callable[[dict[str, Any]], Any]
) -> ParsedAnswers:
    items, repairs = _read_list(text, "answers")
    values: dict[int, Any] = {}
    problems: dict[int, str] = {}
    for item in items:
        index = item.get("answer_index") if isinstance(item, dict) else None
        if type(index) is not int or not 1 <= index <= num_answers:
            repairs.add("unknown_answers")
            continue
        place = index - 1
        if place in values or place in problems:
            values.pop(place, None)
            problems[place] = f"answer {index} is there more than once"
            continue
        try:
            values[place] = parse_value(_without_unknown(item, known, repairs))
        except pydantic.ValidationError as error:
            problems[place] = f"answer {index}: {_first_error(error)}"
        except ReplyError as error:
            problems[place] = f"answer {index} has {error}"
    for place in range(num_answers):
        if place not in values:
            problems.setdefault(place, f"answer {place + 1} is missing")
    return ParsedAnswers(values, problems, tuple(sorted(repairs)))


def _read_list(text: str, key: str) -> tuple[list[Any], set[str]]:
    """The list under `key` of a reply's JSON object, and the repairs made; else ReplyError."""
    document, repairs = read_object(text, key)
    items = _without_unknown(document, {key}, repairs)[key]
    if not isinstance(items, list):
        message = f'"{key}" is {_describe(items)}; expected a list of objects'
        raise ReplyError("schema_error", message)
    return items, repairs


def read_object(text: str, key: str) -> tuple[dict[str, Any], set[str]]:
    """The JSON object with this key in a reply, and the repairs made; else ReplyError."""
    if not text.strip():
        raise ReplyError("empty", "the reply is empty; expected a JSON object")
    found, answer, repairs = _loaded(text), _after_reasoning(text), set()
    if found is None and (fenced := _FENCE.match(answer)):
        found, repairs = _loaded(fenced[1]), {"fence"}
    if found is None:
        found, repairs = _first_object(answer, key), {"prose"}
    if found is None:
        expected = f"expected one with {key!r}, and nothing around it"
        raise ReplyError("parse_error", f"the reply holds no JSON object; {expected}")
    if not isinstance(found, dict) or key not in found:
        message = f"the reply is {_describe(found)}; expected a JSON object with {key!r}"
        raise ReplyError("schema_error", message)
    return found, repairs


def _after_reasoning(text: str) -> str:
    """The text after the last `</think>`: a draft inside the reasoning is no answer."""
    _, closed, rest = text.rpartition("</think>")
    return "" if not closed and text.lstrip().startswith("<think>") else rest


def _loaded(text: str) -> Any:
    """The JSON value, or None; NaN, numbers of thousands of digits, endless nesting are None."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _first_object(text: str, key: str) -> dict[str, Any] | None:
    """The first object in the text that has this key, else the first object, else None."""
    decoder, objects, start = json.JSONDecoder(parse_constant=_refuse), [], 0
    for _ in range(_MAX_STARTS):
        if (start := text.find("{", start)) < 0:
            break
        try:
            found, start = decoder.raw_decode(text, start)
            objects.append(found)
        except (ValueError, RecursionError):
            start += 1
    return next((found for found in objects if key in found), objects[0] if objects else None)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _without_unknown(item: Mapping[str, Any], known: Set[str], repairs: set[str]) -> dict[str, Any]:
    if not item.keys() <= known:
        repairs.add("unknown_keys")
    return {name: value for name, value in item.items() if name in known}


def _first_error(error: pydantic.ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _describe(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return (names | {type(None): "null"}).get(type(value), "a number")
