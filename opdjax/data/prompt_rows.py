"""Rows of a data source, parsed into prompts with their answers, references and criteria."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opdjax.data.chat import Messages
from opdjax.data.sources import ColumnMap, DataError, read_rows, value_at

MEAN = "mean"  # reserved: names the mean over all benchmarks in metrics


# The digest of a PromptSet hashes the repr of the next two classes: their names and fields stay.
@dataclasses.dataclass(frozen=True)
class GivenCriterion:
    """A rubric criterion stored with its prompt."""

    text: str
    weight: int  # 1 to 5
    is_flaw: bool  # stored with a negative weight: an answer without the flaw earns the points
    stage: str | None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One row of a data source."""

    prompt: str | Messages
    answer: str | None = None  # the final value, for grading
    references: tuple[str, ...] = ()  # worked answers
    # repr=False: rows without criteria or benchmark keep the digest they always had.
    criteria: tuple[GivenCriterion, ...] = dataclasses.field(default=(), repr=False)
    benchmark: str | None = dataclasses.field(default=None, repr=False)


def read_prompts(source: str, columns: ColumnMap = ColumnMap()) -> list[Prompt]:  # noqa: B008
    """All rows of a data source (formats: `sources`), in their stored order."""
    rows = []
    for place, row in read_rows(source, columns):
        try:
            rows.append(_parse_row(row, columns))
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
    if not rows:
        raise DataError(f"{source} holds no prompts; expected at least one row")
    return rows


def first_of_each(rows: Sequence[Prompt], count: int) -> list[Prompt]:
    """The first `count` rows of each benchmark, in order; without benchmarks, of all rows."""
    taken, kept = Counter(), []
    for row in rows:
        taken[row.benchmark] += 1
        if taken[row.benchmark] <= count:
            kept.append(row)
    return kept


def require_field(
    rows: Sequence[Prompt], field: str, columns: Mapping[str, str], source: str, reason: str
) -> None:
    """Raise DataError naming the first row whose `answer` or `references` is missing or blank.

    `columns`: the columns that the config names.
    """
    values = (getattr(row, field) or () for row in rows)
    texts = ((value,) if isinstance(value, str) else value for value in values)
    lacking = [n for n, row in enumerate(texts) if not row or not all(t.strip() for t in row)]
    if lacking:
        column = columns.get(field.removesuffix("s"), field)
        raise DataError(
            f"prompt {lacking[0]} of {source} has no {column!r} ({len(lacking)} such rows); "
            f"{reason}"
        )


def _parse_row(row: dict[str, Any], columns: ColumnMap) -> Prompt:
    def read(name: str, *, is_needed: bool = True) -> Any:
        return _plain(value_at(row, name), name) if is_needed or name in row else None

    prompt, completion = _parse_prompt(read(columns.prompt), columns.prompt)
    name = columns.answer or "answer"
    answer = read(name, is_needed=columns.answer is not None)
    is_number = type(answer) in (int, float) and math.isfinite(answer)
    if not is_number and not isinstance(answer, (str, type(None))):
        raise DataError(f"{name!r} is {answer!r}; expected a string or a number, or null for none")
    name = columns.reference or ("references" if "references" in row else "reference")
    references = _parse_references(read(name, is_needed=columns.reference is not None), name)
    return Prompt(
        prompt,
        None if answer is None else str(answer),
        references or completion,
        _parse_criteria(read(columns.rubric), columns.rubric) if columns.rubric else (),
        _parse_benchmark(read(columns.benchmark), columns.benchmark) if columns.benchmark else None,
    )


def _plain(value: Any, path: str) -> Any:
    """Python's own types in place of the bytes and numpy values that TFDS returns."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{path!r} is not UTF-8 text ({error.reason})") from error
    if isinstance(value, (np.generic, np.ndarray)):
        return _plain(value.tolist(), path)
    if isinstance(value, dict):
        return {name: _plain(item, path) for name, item in value.items()}
    return [_plain(item, path) for item in value] if isinstance(value, list) else value


def _parse_benchmark(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip() or value == MEAN:
        raise DataError(
            f"the benchmark {name!r} is {value!r}; expected its name, other than {MEAN!r}, which "
            "names the mean over all benchmarks"
        )
    return value


def _parse_criteria(value: Any, name: str) -> tuple[GivenCriterion, ...]:
    """Criteria stored as texts, or as records with a text and a weight (negative: a flaw)."""
    if not isinstance(value, list):
        raise DataError(f"the rubric {name!r} is {value!r}; expected a list of criteria")
    return tuple(_parse_criterion(item, f"criterion {n}") for n, item in enumerate(value, 1))


def _parse_criterion(item: Any, place: str) -> GivenCriterion:
    record = {"text": item} if isinstance(item, str) else item if isinstance(item, dict) else {}
    text = record.get("text", record.get("description"))
    weight = record.get("weight", record.get("points", 1))
    stage = record.get("stage")
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"{place} is {record or item!r}; expected a text, or a record with text (or "
            "description)"
        )
    if type(weight) is not int or not 1 <= abs(weight) <= 5:
        raise DataError(
            f"{place} has weight {weight!r}; expected a whole number from 1 to 5, or from -5 to -1 "
            "for a flaw"
        )
    if not isinstance(stage, (str, type(None))):
        raise DataError(f"{place} has stage {stage!r}; expected the name of a stage, or none")
    return GivenCriterion(text, abs(weight), weight < 0, stage)


def _parse_prompt(value: Any, name: str) -> tuple[str | Messages, tuple[str, ...]]:
    """The prompt, and the final assistant turn of a conversation: a reference, not the prompt."""
    if isinstance(value, str) and value:
        return value, ()
    messages = _parse_messages(value)
    if not messages:
        raise DataError(
            f"{name!r} is {value!r}; expected a non-empty string or a list of {{role, content}} "
            "messages"
        )
    if messages[-1]["role"] != "assistant":
        return messages, ()
    if len(messages) == 1:
        raise DataError(
            f"{name!r} holds only an assistant's turn: {value!r}; expected a user's turn before it"
        )
    return messages[:-1], (messages[-1]["content"],)


def _parse_messages(value: Any) -> Messages | None:
    fields = ("role", "content")
    is_record = isinstance(value, dict) and value.keys() >= set(fields)
    if is_record and all(isinstance(column, list) for column in value.values()):
        # TFDS stores a sequence of records as a record of sequences.
        value = [dict(zip(fields, pair)) for pair in zip(*(value[name] for name in fields))]
    if not isinstance(value, list) or not all(
        isinstance(m, dict) and all(isinstance(m.get(name), str) for name in fields) for m in value
    ):
        return None
    return tuple({name: message[name] for name in fields} for message in value)


def _parse_references(value: Any, name: str) -> tuple[str, ...]:
    """Worked answers: a string, a list of strings, or a conversation's last assistant turn."""
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        return tuple(filter(None, texts))
    messages = _parse_messages(value) or ()
    turns = [message["content"] for message in messages if message["role"] == "assistant"]
    if not turns:
        raise DataError(
            f"the reference answers {name!r} are {value!r}; expected a string, a list of strings "
            "or messages with an assistant's turn"
        )
    return (turns[-1],)
