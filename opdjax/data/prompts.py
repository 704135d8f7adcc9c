"""Prompts: read once, encoded once, and then addressed at random by (seed, epoch, step), so that a
restart needs no iterator state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from opdjax.config import JUDGED_FIELDS, TEACHER_FIELDS, DataConfig
from opdjax.data.chat import Messages, render
from opdjax.data.references import read_index, references_of
from opdjax.data.sources import ColumnMap, DataError, read_rows, value_at
from opdjax.runs.object_store import local_copy
from opdjax.types import PromptBatch

MEAN = "mean"  # of all benchmarks, beside their names


@dataclasses.dataclass(frozen=True)
class GivenCriterion:
    """A criterion that comes with its prompt."""

    text: str
    weight: int  # 1 to 5
    is_flaw: bool  # written with a negative weight: its absence scores
    stage: str | None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One row of a data source."""

    prompt: str | Messages
    answer: str | None = None  # the final value, for grading
    references: tuple[str, ...] = ()  # worked answers
    # What any answer is held to, beside what judges think of; no part of a digest where there are
    # none.
    criteria: tuple[GivenCriterion, ...] = dataclasses.field(default=(), repr=False)
    benchmark: str | None = dataclasses.field(
        default=None, repr=False
    )  # that it belongs to, of an evaluation; as criteria


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts with their token ids; `prompt_id` everywhere is the index into it."""

    prompts: tuple[Prompt, ...]
    student_ids: tuple[tuple[int, ...], ...]
    teacher_ids: tuple[tuple[int, ...], ...] | None  # None: the student's view
    skipped: tuple[str, ...]  # what was left out for its length, described
    digest: str  # sha256 of the rows and of the token ids

    def __len__(self) -> int:
        return len(self.prompts)

    def columns(self, *, of_teacher: bool = False) -> int:
        """The widest batch's columns, in that model's view."""
        ids = self.teacher_ids if of_teacher and self.teacher_ids is not None else self.student_ids
        return padded_width(max(map(len, ids)))

    @property
    def num_skipped(self) -> int:
        """Prompts over the length limit."""
        return len(self.skipped)


def read_prompts(source: str, columns: ColumnMap = ColumnMap()) -> list[Prompt]:  # noqa: B008
    """The rows of a data source (see `sources`), in their stored order."""
    rows = [_parse_row(row, columns, place) for place, row in read_rows(source, columns)]
    if not rows:
        raise DataError(f"{source} holds no prompts; expected at least one row")
    return rows


def _parse_row(row: dict[str, Any], columns: ColumnMap, place: str) -> Prompt:
    prompt, completion = _parse_prompt(_value(row, columns.prompt, place), columns.prompt, place)
    name = columns.answer or "answer"
    answer = _value(row, name, place) if columns.answer or name in row else None
    is_number = (
        isinstance(answer, (int, float)) and not isinstance(answer, bool) and math.isfinite(answer)
    )
    if not is_number and not isinstance(answer, (str, type(None))):
        raise DataError(
            f"{place}: {name!r} is {answer!r}; expected a string or a number, or null where there is none"
        )
    name = columns.reference or ("references" if "references" in row else "reference")
    references = _value(row, name, place) if columns.reference or name in row else None
    criteria = (
        _parse_criteria(_value(row, columns.rubric, place), columns.rubric, place)
        if columns.rubric
        else ()
    )
    references = _parse_references(references, name, place) or completion
    benchmark = (
        _parse_benchmark(_value(row, columns.benchmark, place), columns.benchmark, place)
        if columns.benchmark
        else None
    )
    return Prompt(prompt, None if answer is None else str(answer), references, criteria, benchmark)


def first_of_each(rows: Sequence[Prompt], count: int) -> list[Prompt]:
    """The first so many rows of every benchmark (of all rows, where they belong to none), in their
    order.
    """
    taken: dict[str | None, int] = {}
    kept = []
    for row in rows:
        taken[row.benchmark] = taken.get(row.benchmark, 0) + 1
        if taken[row.benchmark] <= count:
            kept.append(row)
    return kept


def _parse_benchmark(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str) or not value.strip() or value == MEAN:
        raise DataError(
            f"{place}: the benchmark {name!r} is {value!r}; expected its name, and not {MEAN!r}, which all of them together have"
        )
    return value


def _parse_criteria(value: Any, name: str, place: str) -> tuple[GivenCriterion, ...]:
    """A prompt's own criteria: texts, or records with a text and a weight from -5 to 5, of which a
    negative one marks a flaw.
    """
    if not isinstance(value, list):
        raise DataError(f"{place}: the rubric {name!r} is {value!r}; expected a list of criteria")
    return tuple(
        _parse_criterion(
            {"text": item} if isinstance(item, str) else item, f"{place}: criterion {n + 1}"
        )
        for n, item in enumerate(value)
    )


def _parse_criterion(item: Any, place: str) -> GivenCriterion:
    found = item if isinstance(item, dict) else {}
    text, weight, stage = (
        found.get("text", found.get("description")),
        found.get("weight", found.get("points", 1)),
        found.get("stage"),
    )
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"{place} is {item!r}; expected a text, or a record with text (or description)"
        )
    if type(weight) is not int or not 1 <= abs(weight) <= 5:
        raise DataError(
            f"{place} has weight {weight!r}; expected a whole number from 1 to 5, or from -5 to -1 for a flaw"
        )
    if not isinstance(stage, (str, type(None))):
        raise DataError(f"{place} has stage {stage!r}; expected the name of one, or none")
    return GivenCriterion(text, abs(weight), weight < 0, stage)


def _value(row: dict[str, Any], path: str, place: str) -> Any:
    return _plain(value_at(row, path, place), path, place)


def _plain(value: Any, path: str, place: str) -> Any:
    """Python's own types in place of the bytes and numpy values that TFDS returns."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{place}: {path!r} is not UTF-8 text ({error.reason})") from error
    if isinstance(value, (np.generic, np.ndarray)):
        return _plain(value.tolist(), path, place)
    if isinstance(value, dict):
        return {name: _plain(item, path, place) for name, item in value.items()}
    return [_plain(item, path, place) for item in value] if isinstance(value, list) else value


def _parse_prompt(value: Any, name: str, place: str) -> tuple[str | Messages, tuple[str, ...]]:
    """The prompt, and the assistant's turn that a whole conversation ends in: what the student is
    to write is not its prompt.
    """
    if isinstance(value, str) and value:
        return value, ()
    messages = _parse_messages(value)
    if not messages:
        raise DataError(
            f"{place}: {name!r} is {value!r}; expected a non-empty string or a list of {{role, content}} messages"
        )
    if messages[-1]["role"] != "assistant":
        return messages, ()
    if len(messages) == 1:
        raise DataError(
            f"{place}: {name!r} holds only an assistant's turn: {value!r}; expected a turn of the user before it"
        )
    return messages[:-1], (messages[-1]["content"],)


def _parse_messages(value: Any) -> Messages | None:
    if (
        isinstance(value, dict)
        and value.keys() >= {"role", "content"}
        and all(isinstance(column, list) for column in value.values())
    ):
        # TFDS stores a sequence of records as a record of sequences.
        value = [
            {"role": role, "content": content}
            for role, content in zip(value["role"], value["content"])
        ]
    is_messages = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value
    )
    return (
        tuple({"role": m["role"], "content": m["content"]} for m in value) if is_messages else None
    )


def _parse_references(value: Any, name: str, place: str) -> tuple[str, ...]:
    """Worked answers: a string, several, or a conversation whose last assistant's turn is one."""
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        return tuple(filter(None, texts))
    turns = [
        message["content"]
        for message in _parse_messages(value) or ()
        if message["role"] == "assistant"
    ]
    if not turns:
        expected = "a string, a list of strings or messages with a turn of the assistant"
        raise DataError(
            f"{place}: the reference answers {name!r} are {value!r}; expected {expected}"
        )
    return (turns[-1],)


@dataclasses.dataclass(frozen=True)
class _View:
    """How one of the two models is shown a row."""

    tokenizer: Any
    format: str
    enable_thinking: bool | None
    system_prompt: str | None
    prompt_format: str
    is_teachers: bool = False  # its format then has the fields of a row, and takes messages as well

    def ids(
        self, row: Prompt, place: str, said: Mapping[str, str] = MappingProxyType({})
    ) -> tuple[int, ...]:
        """The row's tokens, `said` what judges say of a rollout; DataError where it cannot be
        shown.
        """
        prompt = (
            _with_context(row, self.prompt_format, said)
            if self.is_teachers
            else _wrapped(row, self.prompt_format)
        )
        try:
            ids = render(
                prompt,
                self.tokenizer,
                format=self.format,
                system_prompt=self.system_prompt,
                enable_thinking=self.enable_thinking,
            )
        except ValueError as error:
            raise DataError(f"{place}: {error}") from error
        if not ids:
            raise DataError(
                f"{place} has no tokens: {prompt!r}; expected text, and a template that shows it"
            )
        return tuple(ids)


def _views(data: DataConfig, student_tokenizer: Any, teacher_tokenizer: Any) -> tuple[_View, _View]:
    format, thinking = data.teacher_format or data.format, data.teacher_enable_thinking
    system = {"chat": data.system_prompt, "raw": None}
    student = _View(
        student_tokenizer,
        data.format,
        data.enable_thinking,
        system[data.format],
        data.prompt_format,
    )
    thinking = data.enable_thinking if thinking is None else thinking
    wrap = data.teacher_prompt_format
    return student, _View(
        teacher_tokenizer,
        format,
        thinking,
        system[format],
        wrap or data.prompt_format,
        is_teachers=bool(wrap),
    )


def messages_of(row: Prompt, data: DataConfig) -> list[dict[str, str]]:
    """The row as a conversation for a model behind an interface of its own: the student's words,
    and the system's.
    """
    prompt = _wrapped(row, data.prompt_format)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return (
        turns
        if data.system_prompt is None
        else [{"role": "system", "content": data.system_prompt}, *turns]
    )


def load_rows(data: DataConfig, tokenizer: Any) -> list[Prompt]:
    """The rows of a config's source, with a teacher's answers for references where it names an
    index of them.

    ReferenceMissError where the index lacks a prompt. One that is too long for the student
    (`tokenizer`) is left out by every run, so that `opdjax teach` does not ask for it.
    """
    rows = read_prompts(data.source, ColumnMap.of(data))
    if data.references is None:
        return rows
    view = _views(data, tokenizer, tokenizer)[0]

    def is_left_out(number: int) -> bool:
        ids = view.ids(rows[number], f"prompt {number} of {data.source}")
        return data.overlong == "skip" and len(ids) > data.max_prompt_length

    found = references_of(
        read_index(local_copy(data.references)),
        [row.prompt for row in rows],
        data.source,
        is_left_out,
    )
    return [dataclasses.replace(row, references=texts) for row, texts in zip(rows, found)]


def _wrapped(row: Prompt, format: str) -> str | Messages:
    return format.replace("{prompt}", row.prompt) if isinstance(row.prompt, str) else row.prompt


def teacher_ids_with(
    row: Prompt, data: DataConfig, tokenizer: Any, said: Mapping[str, str]
) -> tuple[int, ...]:
    """The row as the teacher is shown it with what judges say of one rollout (`JUDGED_FIELDS`)."""
    return _views(data, tokenizer, tokenizer)[1].ids(row, f"a prompt of {data.source}", said)


def _with_context(
    row: Prompt, format: str, said: Mapping[str, str] = MappingProxyType({})
) -> str | Messages:
    """What only the teacher is shown, around the prompt or, in messages, around the last turn of
    the user.

    Privileged context: SDFT and OPSD (arXiv 2601.18734), whose teacher is the student that also
    sees a solution.
    """
    fields = {name: said.get(name, "") for name in JUDGED_FIELDS}
    fields |= {"answer": row.answer, "reference": row.references[0] if row.references else None}

    def shown(prompt: str) -> str:
        # In one go: braces in what is put in are text.
        return re.sub(
            "{(" + "|".join((*TEACHER_FIELDS, *JUDGED_FIELDS)) + ")}",
            lambda found: {**fields, "prompt": prompt}[found[1]],
            format,
        )

    if isinstance(row.prompt, str):
        return shown(row.prompt)
    last = max(i for i, message in enumerate(row.prompt) if message["role"] == "user")
    return tuple(
        {**m, "content": shown(m["content"])} if i == last else m for i, m in enumerate(row.prompt)
    )


def _require_context(rows: Sequence[Prompt], data: DataConfig) -> None:
    """Every row has what the teacher is to be shown of it."""
    columns = {
        "answer": data.answer_column or "answer",
        "references": data.reference_column or "references",
    }
    # Those of an index are there for all rows that are not left out.
    wanted = (
        (("answer", "{answer}"),)
        if data.references
        else (("answer", "{answer}"), ("references", "{reference}"))
    )
    for field, shown in wanted:
        if shown in (data.teacher_prompt_format or ""):
            reason = f"data.teacher_prompt_format shows it to the teacher: add it, name its column in data.{field.removesuffix('s')}_column"
            require_of_each(
                rows, field, columns[field], data.source, f"{reason}, or take {shown} out"
            )
    for number, row in enumerate(rows if data.teacher_prompt_format else ()):
        if not isinstance(row.prompt, str) and not any(
            message["role"] == "user" for message in row.prompt
        ):
            raise DataError(
                f"prompt {number} of {data.source} has no turn of the user, around which data.teacher_prompt_format goes"
            )


def require_of_each(
    rows: Sequence[Prompt], field: str, column: str, source: str, reason: str
) -> None:
    """DataError that names the first row whose `answer` or `references` is missing or blank."""
    given = (getattr(row, field) or () for row in rows)
    texts = ((value,) if isinstance(value, str) else value for value in given)
    lacking = [
        number
        for number, found in enumerate(texts)
        if not found or not all(text.strip() for text in found)
    ]
    if lacking:
        raise DataError(
            f"prompt {lacking[0]} of {source} has no {column!r} ({len(lacking)} such rows); {reason}"
        )


def encode_prompts(
    rows: Sequence[Prompt], data: DataConfig, student_tokenizer: Any, teacher_tokenizer: Any
) -> PromptSet:
    """Render every row for student and teacher; rows over `max_prompt_length` in either view are
    left out and counted, or refused.
    """
    _require_context(rows, data)
    views = _views(data, student_tokenizer, teacher_tokenizer)
    kept, ids, skipped = [], ([], []), []
    for number, row in enumerate(rows):
        place = f"prompt {number} of {data.source}"
        _require_text(row, place)
        rendered = [views[0].ids(row, place)]
        if len(rendered[0]) <= data.max_prompt_length:
            rendered.append(views[1].ids(row, place))
        longest = max(map(len, rendered))
        if longest > data.max_prompt_length:
            skipped.append(
                f"{place} with {longest} tokens: {str(_wrapped(row, data.prompt_format))[:80]!r}"
            )
            if data.overlong == "error":
                raise DataError(
                    f"data.max_prompt_length is {data.max_prompt_length}, exceeded by {skipped[0]}; raise it or set data.overlong to skip"
                )
            continue
        kept.append(row)
        for view, tokens in zip(ids, rendered):
            view.append(tokens)
    if not kept:
        raise DataError(
            f"{data.source} has no prompt of at most {data.max_prompt_length} tokens ({len(rows)} rows read); "
            f"raise it, or see why {skipped[0]} is so long"
        )
    student_ids, teacher_ids = map(tuple, ids)
    unseen = ([row.criteria for row in kept], [row.benchmark for row in kept])
    digest = hashlib.sha256(
        repr(
            (kept, student_ids, teacher_ids, *(column for column in unseen if any(column)))
        ).encode()
    ).hexdigest()
    same = student_ids == teacher_ids
    return PromptSet(
        tuple(kept), student_ids, None if same else teacher_ids, tuple(skipped), digest
    )


def _require_text(row: Prompt, place: str) -> None:
    """Half a surrogate pair, as text cut between two escapes leaves it, has no bytes that a
    tokenizer could read.
    """
    contents = (
        [row.prompt]
        if isinstance(row.prompt, str)
        else [message["content"] for message in row.prompt]
    )
    try:
        "".join([*contents, *row.references, row.answer or ""]).encode()
    except UnicodeEncodeError as error:
        found = error.object[error.start]
        raise DataError(
            f"{place} holds {found!r}, half a surrogate pair; expected Unicode text: write the row again"
        ) from error


def indices_at(step: int, prompts_per_step: int, num_prompts: int, seed: int) -> np.ndarray:
    """Which prompts step `step` (counted from 0) takes: every prompt once an epoch, in an order of
    that epoch's own.
    """
    positions = np.arange(step * prompts_per_step, (step + 1) * prompts_per_step)
    orders = {
        epoch: _order_of(int(epoch), num_prompts, seed)
        for epoch in np.unique(positions // num_prompts)
    }
    return np.array([orders[p // num_prompts][p % num_prompts] for p in positions], np.int32)


def _order_of(epoch: int, num_prompts: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, epoch])).permutation(
        num_prompts
    )


def collate(prompts: PromptSet, indices: np.ndarray, num_rows: int | None = None) -> PromptBatch:
    """The prompts at `indices`, padded on the left to one of a few widths, and with empty rows up
    to `num_rows`.
    """
    num_rows = num_rows or len(indices)
    tokens, mask = _pad_left([prompts.student_ids[i] for i in indices], num_rows)
    teacher_tokens = teacher_mask = None
    if prompts.teacher_ids is not None:
        teacher_tokens, teacher_mask = _pad_left(
            [prompts.teacher_ids[i] for i in indices], num_rows
        )
    prompt_id = np.zeros(num_rows, np.int32)
    prompt_id[: len(indices)] = indices
    occurrence = np.array(
        [np.sum(prompt_id[:i] == prompt_id[i]) for i in range(num_rows)], np.int32
    )
    return PromptBatch(tokens, mask, prompt_id, teacher_tokens, teacher_mask, occurrence)


def _pad_left(rows: Sequence[Sequence[int]], num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    width = padded_width(max(map(len, rows)))
    tokens, mask = np.zeros((num_rows, width), np.int32), np.zeros((num_rows, width), bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], mask[i, width - len(row) :] = row, True
    return tokens, mask


def padded_width(width: int) -> int:
    """Few widths mean few compiled programs: multiples of 16 up to 128, then of 128."""
    unit = 16 if width <= 128 else 128
    return -(-width // unit) * unit
