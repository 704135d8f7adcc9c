"""What judges write: rubrics, verdicts, scores, as they are asked for and as they are read.

A reply is parsed strictly; then repaired where that is cheap and cannot change its meaning (a code
fence, prose around the object, unknown keys, the case of ids); else it is a `ReplyError` that says
what is wrong, so that the judge can be asked again. A total that a judge declares is an unknown
key: scores are made of the single verdicts alone (`scores.py`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import pydantic

from opdjax.config.rubrics import RubricsConfig

ERRORS = (
    "empty",
    "truncated",
    "parse_error",
    "schema_error",
    "validation_error",
)  # why a reply cannot be used
REPAIRS = ("fence", "prose", "unknown_keys", "id_case", "unknown_answers")  # what was put right
_FENCE = re.compile(r"\A\s*```[A-Za-z]*\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)
_MAX_STARTS = 64  # places at which an object is looked for amid prose


class ReplyError(ValueError):
    """A reply that cannot be used; `kind` is one of ERRORS, the text says what was expected."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Criterion(pydantic.BaseModel):
    """One thing that an answer does or does not do."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)

    id: str = pydantic.Field(pattern=r"^c[0-9]{1,3}$")
    category: str = pydantic.Field(min_length=1)
    text: str = pydantic.Field(min_length=1)
    weight: int = pydantic.Field(ge=1, le=5)
    polarity: Literal["positive", "negative"] = "positive"  # negative: a flaw, whose absence scores
    grade: Literal["binary", "graded"] = "binary"  # met or not, or 0, 1, 2
    stage: str | None = None  # the part of an answer that it looks at; None: all of it
    is_given: bool = False  # it came with the prompt, and stays


@dataclasses.dataclass(frozen=True)
class Rubric:
    """Criteria that all answers to one prompt are held to."""

    criteria: tuple[Criterion, ...]


class _Verdicts(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    answer_index: int
    verdicts: list[bool] | list[int]


class _Score(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    answer_index: int
    score: float = pydantic.Field(ge=0, le=1, allow_inf_nan=False)


@dataclasses.dataclass(frozen=True)
class Read:
    """What could be read of a reply about several answers."""

    found: dict[
        int, Any
    ]  # by answer, counted from 0: verdicts (0, 1 or, graded, 0, 1, 2) or a score in [0, 1]
    problems: dict[int, str]  # by answer: why it has none
    repairs: tuple[str, ...]


def rubric_schema(config: RubricsConfig, stages: tuple[str, ...] = ()) -> dict[str, Any]:
    """The JSON schema of a rubric, every field required, as servers that enforce schemas want it."""
    fields: dict[str, Any] = {
        "id": {"type": "string"},
        "category": {"type": "string"},
        "text": {"type": "string"},
        "weight": {"type": "integer", "enum": [1, 2, 3, 4, 5]},
    }
    if config.polarity == "signed":
        fields["polarity"] = {"type": "string", "enum": ["positive", "negative"]}
    if stages:
        fields["stage"] = {"type": "string", "enum": list(stages)}
    return _object({"criteria": {"type": "array", "items": _object(fields)}})


def verdict_schema(is_graded: bool) -> dict[str, Any]:
    """The JSON schema of verdicts on several answers."""
    verdict = {"type": "integer", "enum": [0, 1, 2]} if is_graded else {"type": "boolean"}
    return _of_answers({"verdicts": {"type": "array", "items": verdict}})


def score_schema() -> dict[str, Any]:
    """The JSON schema of plain scores of several answers."""
    return _of_answers({"score": {"type": "number"}})


def _of_answers(fields: dict[str, Any]) -> dict[str, Any]:
    return _object(
        {
            "answers": {
                "type": "array",
                "items": _object({"answer_index": {"type": "integer"}, **fields}),
            }
        }
    )


def _object(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }


def parse_rubric(
    text: str,
    config: RubricsConfig,
    stages: tuple[str, ...] = (),
    bounds: tuple[int, int] | None = None,
) -> tuple[Rubric, tuple[str, ...]]:
    """The rubric in a reply, and the repairs it took; ReplyError where there is none that the
    config allows.

    `bounds`: fewest and most criteria; None: the config's.
    """
    document, repairs = read_object(text, "criteria")
    document = _without_unknown(document, {"criteria"}, repairs)
    items = document["criteria"]
    if not isinstance(items, list):
        raise ReplyError(
            "schema_error", f'"criteria" is {_shown(items)}; expected a list of objects'
        )
    # What was not asked for is not taken from whoever offers it.
    known = (
        {"id", "category", "text", "weight"}
        | ({"polarity"} if config.polarity == "signed" else set())
        | ({"stage"} if stages else set())
    )
    criteria = tuple(
        _criterion(item, place, known, repairs, config.grades) for place, item in enumerate(items)
    )
    _check_rubric(criteria, bounds or (config.min_criteria, config.max_criteria), stages)
    return Rubric(criteria), tuple(sorted(repairs))


def _criterion(item: Any, place: int, known: set[str], repairs: set[str], grade: str) -> Criterion:
    if not isinstance(item, dict):
        raise ReplyError(
            "schema_error", f"criterion {place + 1} is {_shown(item)}; expected an object"
        )
    item = _without_unknown(item, known, repairs)
    if isinstance(item.get("id"), str) and item["id"] != item["id"].lower():
        repairs.add("id_case")
        item = item | {"id": item["id"].lower()}
    try:
        return Criterion(**item, grade=grade)
    except pydantic.ValidationError as error:
        raise ReplyError("schema_error", f"criterion {place + 1}: {_first_of(error)}") from error


def _check_rubric(
    criteria: tuple[Criterion, ...], bounds: tuple[int, int], stages: tuple[str, ...]
) -> None:
    (low, high), ids = bounds, [criterion.id for criterion in criteria]
    if not low <= len(criteria) <= high:
        raise ReplyError(
            "validation_error", f"there are {len(criteria)} criteria; expected from {low} to {high}"
        )
    if len(set(ids)) < len(ids):
        raise ReplyError("validation_error", f"the ids are {', '.join(ids)}; expected each once")
    if low and all(criterion.polarity == "negative" for criterion in criteria):
        raise ReplyError(
            "validation_error",
            "all criteria are negative; expected at least one that an answer can meet",
        )
    for criterion in criteria if stages else ():
        if criterion.stage not in stages:
            raise ReplyError(
                "validation_error",
                f"criterion {criterion.id} has stage {criterion.stage!r}; expected one of {list(stages)}",
            )


def parse_verdicts(text: str, num_answers: int, num_criteria: int, is_graded: bool) -> Read:
    """Verdicts by answer, in whatever order they came; an answer whose entry is wrong, missing or
    there twice has a problem instead.

    ReplyError where nothing can be read at all.
    """

    def verdicts(item: dict[str, Any]) -> tuple[int, ...]:
        entry = _Verdicts(**item)
        found, kind = entry.verdicts, "0, 1 and 2" if is_graded else "true and false"
        is_right = (
            (lambda v: type(v) is int and 0 <= v <= 2) if is_graded else (lambda v: type(v) is bool)
        )
        if len(found) != num_criteria or not all(is_right(v) for v in found):
            raise ReplyError(
                "validation_error", f"{len(found)} verdicts; expected {num_criteria}, of {kind}"
            )
        return tuple(int(v) for v in found)

    return _parse_answers(text, num_answers, {"answer_index", "verdicts"}, verdicts)


def parse_scores(text: str, num_answers: int) -> Read:
    """Scores in [0, 1] by answer, as `parse_verdicts` reads verdicts."""

    def score(item: dict[str, Any]) -> float:
        if type(item.get("score")) is int:
            item = item | {"score": float(item["score"])} if abs(item["score"]) < 2 else item
        return _Score(**item).score

    return _parse_answers(text, num_answers, {"answer_index", "score"}, score)


def _parse_answers(text: str, num_answers: int, known: set[str], value_of) -> Read:
    document, repairs = read_object(text, "answers")
    items = _without_unknown(document, {"answers"}, repairs)["answers"]
    if not isinstance(items, list):
        raise ReplyError(
            "schema_error", f'"answers" is {_shown(items)}; expected a list of objects'
        )
    found: dict[int, Any] = {}
    problems: dict[int, str] = {}
    for item in items:
        index = item.get("answer_index") if isinstance(item, dict) else None
        if type(index) is not int or not 1 <= index <= num_answers:
            repairs.add("unknown_answers")
            continue
        place = index - 1
        if place in found or place in problems:
            found.pop(place, None)
            problems[place] = f"answer {index} is there more than once"
            continue
        try:
            found[place] = value_of(_without_unknown(item, known, repairs))
        except pydantic.ValidationError as error:
            problems[place] = f"answer {index}: {_first_of(error)}"
        except ReplyError as error:
            problems[place] = f"answer {index} has {error}"
    for place in range(num_answers):
        if place not in found:
            problems.setdefault(place, f"answer {place + 1} is missing")
    return Read(found, problems, tuple(sorted(repairs)))


def read_object(text: str, key: str) -> tuple[dict[str, Any], set[str]]:
    """The JSON object of a reply that has this key, and the repairs it took; ReplyError where there
    is none.
    """
    if not text.strip():
        raise ReplyError("empty", "the reply is empty; expected a JSON object")
    found, said = _loaded(text), _after_thought(text)
    fenced, repairs = _FENCE.match(said), set()
    if found is None and fenced:
        found, repairs = _loaded(fenced.group(1)), {"fence"}
    if found is None:
        found, repairs = _first_object(said, key), {"prose"}
    if found is None:
        raise ReplyError(
            "parse_error",
            f"the reply holds no JSON object; expected one with {key!r}, and nothing around it",
        )
    if not isinstance(found, dict) or key not in found:
        raise ReplyError(
            "schema_error", f"the reply is {_shown(found)}; expected a JSON object with {key!r}"
        )
    return found, repairs


def _after_thought(text: str) -> str:
    """What is said after thinking aloud, which servers may leave in a reply: a draft in there is no
    answer.
    """
    _, closed, rest = text.rpartition("</think>")
    return "" if not closed and text.lstrip().startswith("<think>") else rest


def _loaded(text: str) -> Any:
    """JSON, or None; what JSON does not know (NaN, numbers of thousands of digits, endless nesting)
    is none.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _first_object(text: str, key: str) -> dict[str, Any] | None:
    """The first object in the text that has this key, or else the first there is."""
    decoder, first, start = json.JSONDecoder(parse_constant=_refuse), None, text.find("{")
    for _ in range(_MAX_STARTS):
        if start < 0:
            break
        try:
            found, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            start = text.find("{", start + 1)
            continue
        if key in found:
            return found
        first, start = first if first is not None else found, text.find("{", end)
    return first


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _without_unknown(item: Mapping[str, Any], known: set[str], repairs: set[str]) -> dict[str, Any]:
    if item.keys() <= known:
        return dict(item)
    repairs.add("unknown_keys")
    return {name: value for name, value in item.items() if name in known}


def _first_of(error: pydantic.ValidationError) -> str:
    """The first thing that is wrong, in the words that a re-ask hands on."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _shown(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "a number that is not finite"
    return {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        type(None): "null",
    }.get(type(value), "a number")
