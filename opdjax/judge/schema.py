"""Judges' replies (rubrics, verdicts, scores): the JSON schemas, and strict parsing.

A reply is parsed strictly, or after a repair that is cheap and keeps its meaning. Otherwise
ReplyError says what is wrong, and the judge is asked again with its text.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Literal

import pydantic

from opdjax.config.rubrics import RubricsConfig
from opdjax.judge.reply_object import ReplyError, describe, is_written, read_object
from opdjax.runs.bounds import CRITERION_CHARS


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
        message = f"criterion {number} is {describe(item)}; expected an object"
        raise ReplyError("schema_error", message)
    item = _without_unknown(item, known, repairs)
    if isinstance(item.get("id"), str) and item["id"] != item["id"].lower():
        repairs.add("id_case")
        item = item | {"id": item["id"].lower()}
    try:
        return Criterion(**item, grade=grade)
    except pydantic.ValidationError as error:
        raise ReplyError("schema_error", f"criterion {number}: {first_error(error)}") from error


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
        if not is_written(criterion.text):
            raise invalid(f"criterion {criterion.id} has no words; expected a demand")
        if (length := len(criterion.category + criterion.text)) > CRITERION_CHARS:
            expected = f"expected at most {CRITERION_CHARS}, as one demand needs"
            raise invalid(f"criterion {criterion.id} has {length} characters; {expected}")
        if stages and criterion.stage not in stages:
            expected = f"expected one of {list(stages)}"
            raise invalid(f"criterion {criterion.id} has stage {criterion.stage!r}; {expected}")


def parse_verdicts(
    text: str, num_answers: int, num_criteria: int, is_graded: bool
) -> ParsedAnswers:
    """Verdicts by answer, in any order in the reply.

    An answer whose entry is wrong gets a problem instead. ReplyError if nothing can be read, or if
    the entries are not one for each answer: their numbers may then be shifted.
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
    indices = [item.get("answer_index") if isinstance(item, dict) else None for item in items]
    numbers = [index for index in indices if type(index) is int]
    # A missing or an additional entry, or a count from 0, can shift the numbers of all others.
    if sorted(numbers) != list(range(1, num_answers + 1)) or len(items) != num_answers:
        expected = f"expected one entry for each answer_index from 1 to {num_answers}"
        found = f"there are {len(items)}, with {', '.join(map(str, numbers)) or 'none'}"
        raise ReplyError("answer_index", f"{expected}; {found}")
    values: dict[int, Any] = {}
    problems: dict[int, str] = {}
    for index, item in zip(indices, items):
        try:
            values[index - 1] = parse_value(_without_unknown(item, known, repairs))
        except pydantic.ValidationError as error:
            problems[index - 1] = f"answer {index}: {first_error(error)}"
        except ReplyError as error:
            problems[index - 1] = f"answer {index} has {error}"
    return ParsedAnswers(values, problems, tuple(sorted(repairs)))


def _read_list(text: str, key: str) -> tuple[list[Any], set[str]]:
    """The list under `key` of a reply's JSON object, and the repairs made; else ReplyError."""
    document, repairs = read_object(text, key)
    items = _without_unknown(document, {key}, repairs)[key]
    if not isinstance(items, list):
        message = f'"{key}" is {describe(items)}; expected a list of objects'
        raise ReplyError("schema_error", message)
    return items, repairs


def _without_unknown(item: Mapping[str, Any], known: Set[str], repairs: set[str]) -> dict[str, Any]:
    """The item's known keys; ReplyError if another key competes, as final_score does with score."""
    unknown = sorted(item.keys() - known)
    for name, wanted in itertools.product(unknown, sorted(known & item.keys())):
        is_alike = describe(item[name]) == describe(item[wanted])
        if is_alike and name.lower().endswith(wanted):
            message = f"both {wanted!r} and {name!r}; expected {wanted!r} alone"
            raise ReplyError("ambiguous", message)
    if unknown:
        repairs.add("unknown_keys")
    return {name: value for name, value in item.items() if name in known}


def first_error(error: pydantic.ValidationError) -> str:
    """The first problem: the field and what is wrong with it."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
