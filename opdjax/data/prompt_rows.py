"""Rows of a data source, parsed into prompts with their answers, references and criteria."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opdjax.data.chat import CALLS, Message, Messages, as_messages, text_of
from opdjax.data.decontamination import parts_of, share_words
from opdjax.data.presets import read_source
from opdjax.data.sources import SKIP_ADVICE, ColumnMap, DataError, value_at
from opdjax.data.tokenizer import REASONING
from opdjax.runs.bounds import parse_json

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
    # repr=False: rows without these keep the digest they always had.
    criteria: tuple[GivenCriterion, ...] = dataclasses.field(default=(), repr=False)
    benchmark: str | None = dataclasses.field(default=None, repr=False)
    tools: tuple[dict[str, Any], ...] = dataclasses.field(default=(), repr=False)  # JSON schemas
    # The field of the assistant's last turn that keeps it from being a reference, which is a text.
    not_a_text: str | None = dataclasses.field(default=None, repr=False)
    format: str = dataclasses.field(default="{prompt}", repr=False)  # its own template

    @property
    def with_tools(self) -> str | Messages:
        """The prompt after a turn of `tools` that lists them, for readers without a template."""
        listed = {"role": "tools", "content": json.dumps(self.tools, ensure_ascii=False)}
        return (listed, *as_messages(self.prompt)) if self.tools else self.prompt


def read_prompts(
    source: str, columns: ColumnMap = ColumnMap(), *, skips_bad_rows: bool = False
) -> list[Prompt]:
    """All rows of a data source (`sources`, `presets`), in their stored order. DataError at the
    first bad one, unless these are to be skipped: then their number is printed.

    SOURCE without OTHER [by N]: the rows of SOURCE that share no N words in a row (13) with one of
    OTHER; the number of those left out is printed.
    """
    if parts := parts_of(source):
        source, other, size = parts
        rows = read_prompts(source, columns, skips_bad_rows=skips_bad_rows)
        held_out = read_prompts(other, columns, skips_bad_rows=skips_bad_rows)
        is_shared = share_words(
            [row.prompt for row in rows], [row.prompt for row in held_out], size
        )
        total = f"{sum(is_shared)} of {len(rows)} rows of {source}"
        print(f"left out {total}: they share {size} words in a row, or their text, with {other}")
        return [row for row, is_out in zip(rows, is_shared) if not is_out]
    rows, skipped = [], [] if skips_bad_rows else None
    for place, row in read_source(source, columns, skipped):
        try:
            rows.append(_parse_row(row, columns))
        except (DataError, RecursionError) as error:  # values of tables may be nested without end
            if skipped is None:
                raise DataError(f"{place}: {error}; {SKIP_ADVICE}") from error
            skipped.append(f"{place}: {error}")
    if skipped:
        print(f"skipped {len(skipped)} bad rows (data.skip_bad_rows), first {skipped[0]}")
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
        column, held = columns.get(field.removesuffix("s"), field), rows[lacking[0]].not_a_text
        if held is not None and field == "references":
            reason += f"; its last turn holds {held!r}, write the whole answer as a text"
        raise DataError(
            f"prompt {lacking[0]} of {source} has no {column!r} ({len(lacking)} such rows); "
            f"{reason}"
        )


def _parse_row(row: dict[str, Any], columns: ColumnMap) -> Prompt:
    def read(name: str, *, is_needed: bool = True) -> Any:
        return _plain(value_at(row, name), name) if is_needed or name in row else None

    prompt, last = _parse_prompt(read(columns.prompt), columns.prompt)
    name = columns.answer or "answer"
    answer = read(name, is_needed=columns.answer is not None)
    is_number = type(answer) is int or (type(answer) is float and math.isfinite(answer))
    if not is_number and not isinstance(answer, (str, type(None))):
        raise DataError(f"{name!r} is {answer!r}; expected a string or a number, or null for none")
    name = columns.reference or ("references" if "references" in row else "reference")
    references = _parse_references(read(name, is_needed=columns.reference is not None), name)
    last = None if references else last
    held = [field for field in (*CALLS, *REASONING) if last and field in last]
    return Prompt(
        prompt,
        None if answer is None else str(answer),
        (text_of(last),) if last and not held else references,
        _parse_criteria(read(columns.rubric), columns.rubric) if columns.rubric else (),
        _parse_benchmark(read(columns.benchmark), columns.benchmark) if columns.benchmark else None,
        _parse_tools(read("tools", is_needed=False)),
        held[0] if held else None,
        _parse_format(read("prompt_format", is_needed=False)),
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


def _parse_format(value: Any) -> str:
    if value is not None and (not isinstance(value, str) or "{prompt}" not in value):
        raise DataError(f"'prompt_format' is {value!r}; expected a text that contains {{prompt}}")
    return value or "{prompt}"


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


def _parse_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """The JSON schemas of the functions that the model may call: a list, or its JSON text."""
    tools = value or []
    with contextlib.suppress(ValueError):
        tools = parse_json(value) if value and isinstance(value, str) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"'tools' is {value!r}; expected a list of JSON schemas, or its JSON text")
    return tuple(tools)


def _parse_prompt(value: Any, name: str) -> tuple[str | Messages, Message | None]:
    """The prompt, and the final assistant turn of a conversation: a reference, not the prompt."""
    if isinstance(value, str) and value:
        return value, None
    messages = _parse_messages(value, name)
    if not messages:
        raise DataError(
            f"{name!r} is {value!r}; expected a non-empty string or a list of {{role, content}} "
            "messages"
        )
    if messages[-1]["role"] != "assistant":
        return messages, None
    if len(messages) == 1:
        raise DataError(
            f"{name!r} holds only an assistant's turn: {value!r}; expected a user's turn before it"
        )
    if messages[-2]["role"] == "assistant":
        raise DataError(
            f"{name!r} ends in two of the assistant's turns; expected one, the reference answer: "
            "join them, or remove one"
        )
    return messages[:-1], messages[-1]


def _parse_messages(value: Any, name: str) -> Messages:
    """() if it is no conversation; DataError, which names the field, for an unusable content."""
    if isinstance(value, dict) and value and all(isinstance(x, list) for x in value.values()):
        # TFDS stores a sequence of records as a record of sequences.
        value = [dict(zip(value, turn)) for turn in zip(*value.values())]
    is_turn = lambda turn: isinstance(turn, dict) and isinstance(turn.get("role"), str)
    if not isinstance(value, list) or not all(map(is_turn, value)):
        return ()
    return tuple(_parse_message(turn, f"{name}.{n}") for n, turn in enumerate(value))


def _parse_message(turn: dict[str, Any], place: str) -> Message:
    """A turn with the fields that it has; tables hold null for each one that a turn lacks."""
    turn = {name: value for name, value in turn.items() if value is not None or name == "content"}
    content = turn.get("content")
    if isinstance(content, list):
        turn["content"] = [_parse_part(x, f"{place}.content.{n}") for n, x in enumerate(content)]
    elif content is None and not turn.keys() & set(CALLS):
        raise DataError(f"'{place}.content' is null; expected a text, or calls of tools beside it")
    if content == [] or not isinstance(content, (str, list, type(None))):
        raise DataError(f"'{place}.content' is {content!r}; expected a text, or parts of text")
    # default=str: columns beside the text, such as times, may be no JSON.
    return json.loads(json.dumps(turn, default=str))


def _parse_part(part: Any, place: str) -> dict[str, str]:
    part = {n: x for n, x in part.items() if x is not None} if isinstance(part, dict) else part
    is_text = isinstance(part, dict) and part.get("type") == "text"
    if not is_text or not isinstance(part.get("text"), str):
        raise DataError(f"{place!r} is {part!r}; expected a text part, {{type: text, text: …}}")
    return part


def _parse_references(value: Any, name: str) -> tuple[str, ...]:
    """Worked answers: a string, a list of strings, or a conversation's last assistant turn."""
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        return tuple(filter(None, texts))
    turns = [turn for turn in _parse_messages(value, name) if turn["role"] == "assistant"]
    if held := turns and [field for field in (*CALLS, *REASONING) if field in turns[-1]]:
        raise DataError(f"the last turn of {name!r} holds {held[0]!r}; expected its text alone")
    if not turns:
        raise DataError(
            f"the reference answers {name!r} are {value!r}; expected a string, a list of strings "
            "or messages with an assistant's turn"
        )
    return (text_of(turns[-1]),)
