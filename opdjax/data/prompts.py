"""Prompts as token ids, addressed by (seed, epoch, step): a restart needs no iterator state."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from opdjax.config import JUDGED_FIELDS, TEACHER_FIELDS, DataConfig
from opdjax.data.chat import Message, Messages, as_messages, reads_clock, render, text_of
from opdjax.data.prompt_rows import Prompt, read_prompts, require_field
from opdjax.data.references import read_index, references_of
from opdjax.data.sources import SKIP_ADVICE, ColumnMap, DataError
from opdjax.runs.object_store import local_copy
from opdjax.types import PromptBatch

_NO_TEXTS: Mapping[str, str] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts with their token ids; `prompt_id` is the index into it."""

    prompts: tuple[Prompt, ...]
    student_ids: tuple[tuple[int, ...], ...]
    teacher_ids: tuple[tuple[int, ...], ...] | None  # None: the same as the student's
    skipped: tuple[str, ...]  # descriptions of the prompts that are left out
    digest: str  # sha256 of the rows and of the token ids

    def __len__(self) -> int:
        return len(self.prompts)

    def max_width(self, *, of_teacher: bool = False) -> int:
        """Columns of the widest batch, of the student's or the teacher's prompts."""
        ids = self.teacher_ids if of_teacher and self.teacher_ids is not None else self.student_ids
        return padded_width(max(map(len, ids)))

    @property
    def num_skipped(self) -> int:
        """Number of prompts that are left out."""
        return len(self.skipped)


def dated(data: DataConfig, student: Any, teacher: Any, today: str | None = None) -> DataConfig:
    """The data section with a date if one of these tokenizers' templates reads the clock."""
    formats = (data.student_template[0], data.teacher_template[0])
    read = [reads_clock(t) for t, f in zip((student, teacher), formats) if f == "chat"]
    if data.date is not None or not any(read):
        return data
    return dataclasses.replace(data, date=today or datetime.date.today().isoformat())


def load_rows(
    data: DataConfig,
    tokenizer: Any,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
) -> list[Prompt]:
    """The rows of `data.source`; where `data.references` is set, with the answers it stores.

    A reference ends before the first special token of `stop_ids` in it, and after the first of the
    `stop_strings`. ReferenceMissError if the index lacks a prompt, except one that is too long for
    the student (whose tokenizer is given): every run leaves it out, so `opdjax references` skips
    it.
    """
    columns = ColumnMap(**data.column_names)
    rows = read_prompts(data.source, columns, skips_bad_rows=data.skip_bad_rows)
    if data.references is None:
        return _ended(rows, tokenizer, stop_ids, stop_strings)

    def is_left_out(number: int) -> bool:
        place = f"prompt {number} of {data.source}"
        return len(prompt_ids(rows[number], data, tokenizer, place)) > data.max_prompt_length

    index, prompts = read_index(local_copy(data.references)), [row.with_tools for row in rows]
    found = references_of(index, prompts, data.source, is_left_out)
    answered = [dataclasses.replace(row, references=texts) for row, texts in zip(rows, found)]
    return _ended(answered, tokenizer, stop_ids, stop_strings)


def _ended(
    rows: list[Prompt], tokenizer: Any, stop_ids: Sequence[int], stop_strings: Sequence[str]
) -> list[Prompt]:
    """The rows with references that end where a sampled answer would: see `load_rows`."""
    is_special = lambda token: not tokenizer.decode([token], skip_special_tokens=True)
    special = [tokenizer.convert_ids_to_tokens(n) for n in stop_ids if is_special(n)]

    def cut(text: str) -> str:
        starts = [at for end in special if (at := text.find(end)) >= 0]
        ends = [at + len(end) for end in stop_strings if (at := text.find(end)) >= 0]
        return text[: min(starts + ends, default=len(text))]

    ended = lambda texts: tuple(filter(None, map(cut, texts)))
    return [dataclasses.replace(row, references=ended(row.references)) for row in rows]


def messages_of(row: Prompt, data: DataConfig) -> list[Message]:
    """The row as a conversation for a chat API, with the student's format and system prompt.

    DataError for a row with tools, which are no part of a conversation.
    """
    if row.tools:
        raise DataError(
            f"{data.source} has rows with 'tools', which a model behind an API is not sent; let a "
            "checkpoint (teacher.path) write the answers"
        )
    turns, system = as_messages(_wrapped(row, data.prompt_format)), data.system_prompt
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def prompt_ids(
    row: Prompt,
    data: DataConfig,
    tokenizer: Any,
    place: str,
    *,
    of_teacher: bool = False,
    judge_texts: Mapping[str, str] = _NO_TEXTS,
) -> tuple[int, ...]:
    """Token ids of the row as the student, or the teacher, is shown it.

    `judge_texts`: a judge's texts on one rollout (`JUDGED_FIELDS`), for the teacher. DataError,
    which begins with `place`, if the row cannot be rendered or is empty.
    """
    format, thinking = data.teacher_template if of_teacher else data.student_template
    if of_teacher and data.teacher_prompt_format:
        prompt = _with_context(row, data.teacher_prompt_format, judge_texts)
    else:
        prompt = _wrapped(row, data.prompt_format)
    try:
        options = {"system_prompt": data.system_prompt, "enable_thinking": thinking}
        options |= {"tools": row.tools, "date": data.date}
        ids = render(prompt, tokenizer, format=format, **options)
    except ValueError as error:
        raise DataError(f"{place}: {error}") from error
    if not ids:
        raise DataError(
            f"{place} has no tokens: {prompt!r}; expected text, and a template that shows it"
        )
    return tuple(ids)


def _wrapped(row: Prompt, format: str) -> str | Messages:
    format = row.format if format == DataConfig.prompt_format else format
    return format.replace("{prompt}", row.prompt) if isinstance(row.prompt, str) else row.prompt


def _with_context(
    row: Prompt, format: str, judge_texts: Mapping[str, str] = _NO_TEXTS
) -> str | Messages:
    """The prompt, or the last user turn, in the teacher's own format (OPSD, arXiv 2601.18734)."""
    fields = {name: judge_texts.get(name, "") for name in JUDGED_FIELDS}
    fields |= {"answer": row.answer, "reference": row.references[0] if row.references else None}
    names = re.compile("{(" + "|".join((*TEACHER_FIELDS, *JUDGED_FIELDS)) + ")}")

    def shown(prompt: str) -> str:
        # One pass: braces in an inserted text stay text.
        return names.sub(lambda found: {**fields, "prompt": prompt}[found[1]], format)

    if isinstance(row.prompt, str):
        return shown(row.prompt)
    last = max(i for i, message in enumerate(row.prompt) if message["role"] == "user")
    wrapped, turn = list(row.prompt), row.prompt[last]
    is_text, text = isinstance(turn["content"], str), shown(text_of(turn))
    wrapped[last] = {**turn, "content": text if is_text else [{"type": "text", "text": text}]}
    return tuple(wrapped)


def _require_context(rows: Sequence[Prompt], data: DataConfig) -> None:
    """Raise DataError unless every row has the fields that `data.teacher_prompt_format` names."""
    format = data.teacher_prompt_format
    if not format:
        return
    # With an index of references, `load_rows` has checked that every row has one.
    fields = {"answer": "answer"} | ({} if data.references else {"references": "reference"})
    for field, name in fields.items():
        if f"{{{name}}}" in format:
            reason = (
                "data.teacher_prompt_format shows it to the teacher: add it, name its column in "
                f"data.columns ({name}=COLUMN), or take {{{name}}} out"
            )
            require_field(rows, field, data.column_names, data.source, reason)
    for number, row in enumerate(rows):
        if all(message["role"] != "user" for message in as_messages(row.prompt)):
            raise DataError(
                f"prompt {number} of {data.source} has no user's turn, which "
                "data.teacher_prompt_format wraps"
            )


def encode_prompts(
    rows: Sequence[Prompt], data: DataConfig, student_tokenizer: Any, teacher_tokenizer: Any
) -> PromptSet:
    """Render every row for student and teacher.

    A row over `max_prompt_length` tokens in either view is left out and counted; with
    `skip_bad_rows`, so is one that cannot be rendered.
    """
    _require_context(rows, data)
    limit, kept, skipped = data.max_prompt_length, [], []
    for number, row in enumerate(rows):
        place = f"prompt {number} of {data.source}"
        try:
            _require_unicode(row, place)
            ids = longest = prompt_ids(row, data, student_tokenizer, place)
            if len(ids) <= limit:
                shown = prompt_ids(row, data, teacher_tokenizer, place, of_teacher=True)
                longest = max(ids, shown, key=len)
        except DataError as error:
            if not data.skip_bad_rows:
                raise DataError(f"{error}; {SKIP_ADVICE}") from error
            skipped.append(f"{error}")
            continue
        if len(longest) > limit:
            text = str(_wrapped(row, data.prompt_format))[:80]
            skipped.append(f"{place} with {len(longest)} tokens: {text!r}")
        else:
            kept.append((row, ids, shown))
    if not kept:
        raise DataError(
            f"{data.source} has no prompt of at most {limit} tokens ({len(rows)} rows read); "
            f"raise data.max_prompt_length, or shorten the prompts, first {skipped[0]}"
        )
    prompts, *ids = zip(*kept)
    digest, (student_ids, teacher_ids) = _digest(list(prompts), *ids), ids
    if teacher_ids == student_ids:
        teacher_ids = None
    return PromptSet(prompts, student_ids, teacher_ids, tuple(skipped), digest)


def _digest(rows: list[Prompt], *ids: tuple[tuple[int, ...], ...]) -> str:
    """sha256 of the rows and their token ids; recorded by runs, so its bytes must not change."""
    optional = ([row.criteria for row in rows], [row.benchmark for row in rows])
    hashed = (rows, *ids, *(column for column in optional if any(column)))
    return hashlib.sha256(repr(hashed).encode()).hexdigest()


def _require_unicode(row: Prompt, place: str) -> None:
    """Raise DataError on half a surrogate pair: no tokenizer can encode it."""
    conversation = json.dumps(as_messages(row.with_tools), ensure_ascii=False)
    try:
        "".join([conversation, *row.references, row.answer or ""]).encode()
    except UnicodeEncodeError as error:
        found = error.object[error.start]
        raise DataError(
            f"{place} holds {found!r}, half a surrogate pair; expected Unicode text: write the row "
            "again"
        ) from error


def indices_at(step: int, prompts_per_step: int, num_prompts: int, seed: int) -> np.ndarray:
    """Prompt indices `[prompts_per_step]` of step `step`, counted from 0.

    Every epoch visits each prompt once, in a permutation of its own.
    """
    epoch, start = divmod(step * prompts_per_step, num_prompts)
    orders = []
    while num_prompts * len(orders) < start + prompts_per_step:
        bits = np.random.Philox(key=seed, counter=[0, 0, 0, epoch + len(orders)])
        orders.append(np.random.Generator(bits).permutation(num_prompts))
    return np.concatenate(orders)[start : start + prompts_per_step].astype(np.int32)


def collate(prompts: PromptSet, indices: np.ndarray, num_rows: int | None = None) -> PromptBatch:
    """The prompts at `indices`, left-padded to one of a few widths.

    `num_rows`: rows of the batch (None: `len(indices)`); those beyond the indices are empty.
    """
    num_rows = num_rows or len(indices)
    tokens, mask = _pad_left([prompts.student_ids[i] for i in indices], num_rows)
    teacher_tokens = teacher_mask = None
    if prompts.teacher_ids is not None:
        teacher_rows = [prompts.teacher_ids[i] for i in indices]
        teacher_tokens, teacher_mask = _pad_left(teacher_rows, num_rows)
    prompt_id = np.zeros(num_rows, np.int32)
    prompt_id[: len(indices)] = indices
    earlier = [np.sum(prompt_id[:row] == prompt_id[row]) for row in range(num_rows)]
    occurrence = np.array(earlier, np.int32)
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
