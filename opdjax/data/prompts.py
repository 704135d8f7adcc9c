"""Prompts as token ids, addressed by (seed, epoch, step): a restart needs no iterator state."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from opdjax.config import JUDGED_FIELDS, TEACHER_FIELDS, DataConfig
from opdjax.data.chat import Messages, render
from opdjax.data.prompt_rows import Prompt, read_prompts, require_field
from opdjax.data.references import read_index, references_of
from opdjax.data.sources import ColumnMap, DataError
from opdjax.runs.object_store import local_copy
from opdjax.types import PromptBatch

_NO_TEXTS: Mapping[str, str] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts with their token ids; `prompt_id` is the index into it."""

    prompts: tuple[Prompt, ...]
    student_ids: tuple[tuple[int, ...], ...]
    teacher_ids: tuple[tuple[int, ...], ...] | None  # None: the same as the student's
    skipped: tuple[str, ...]  # descriptions of the prompts over the length limit
    digest: str  # sha256 of the rows and of the token ids

    def __len__(self) -> int:
        return len(self.prompts)

    def max_width(self, *, of_teacher: bool = False) -> int:
        """Columns of the widest batch, of the student's or the teacher's prompts."""
        ids = self.teacher_ids if of_teacher and self.teacher_ids is not None else self.student_ids
        return padded_width(max(map(len, ids)))

    @property
    def num_skipped(self) -> int:
        """Number of prompts over the length limit."""
        return len(self.skipped)


def load_rows(data: DataConfig, tokenizer: Any) -> list[Prompt]:
    """The rows of `data.source`; where `data.references` is set, with the answers it stores.

    Raises ReferenceMissError if the index lacks a prompt, except one that is too long for the
    student (whose tokenizer is given): every run leaves it out, so `opdjax references` skips it.
    """
    rows = read_prompts(data.source, ColumnMap.from_config(data))
    if data.references is None:
        return rows
    view = _views(data, tokenizer, tokenizer)[0]

    def is_left_out(number: int) -> bool:
        ids = view.ids(rows[number], f"prompt {number} of {data.source}")
        return len(ids) > data.max_prompt_length

    index, prompts = read_index(local_copy(data.references)), [row.prompt for row in rows]
    found = references_of(index, prompts, data.source, is_left_out)
    return [dataclasses.replace(row, references=texts) for row, texts in zip(rows, found)]


def messages_of(row: Prompt, data: DataConfig) -> list[dict[str, str]]:
    """The row as a conversation for a chat API, with the student's format and system prompt."""
    prompt = _wrapped(row, data.prompt_format)
    system = [] if data.system_prompt is None else [_message("system", data.system_prompt)]
    return [*system, *([_message("user", prompt)] if isinstance(prompt, str) else prompt)]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def teacher_prompt_ids(
    row: Prompt, data: DataConfig, tokenizer: Any, judge_texts: Mapping[str, str]
) -> tuple[int, ...]:
    """Token ids of the teacher's prompt with a judge's texts on one rollout (`JUDGED_FIELDS`)."""
    view = _views(data, tokenizer, tokenizer)[1]
    return view.ids(row, f"a prompt of {data.source}", judge_texts)


@dataclasses.dataclass(frozen=True)
class _View:
    """How the student or the teacher is shown a row."""

    tokenizer: Any
    format: str
    enable_thinking: bool | None
    system_prompt: str | None
    prompt_format: str
    has_context: bool = False  # prompt_format is the teacher's own: it may name fields of the row

    def ids(
        self, row: Prompt, place: str, judge_texts: Mapping[str, str] = _NO_TEXTS
    ) -> tuple[int, ...]:
        """Token ids of the row; DataError if it cannot be rendered or is empty."""
        if self.has_context:
            prompt = _with_context(row, self.prompt_format, judge_texts)
        else:
            prompt = _wrapped(row, self.prompt_format)
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
    system = {"chat": data.system_prompt, "raw": None}
    format, thinking = data.student_template
    student = _View(student_tokenizer, format, thinking, system[format], data.prompt_format)
    format, thinking = data.teacher_template
    teacher = _View(
        teacher_tokenizer,
        format,
        thinking,
        system[format],
        data.teacher_prompt_format or data.prompt_format,
        has_context=bool(data.teacher_prompt_format),
    )
    return student, teacher


def _wrapped(row: Prompt, format: str) -> str | Messages:
    return format.replace("{prompt}", row.prompt) if isinstance(row.prompt, str) else row.prompt


def _with_context(
    row: Prompt, format: str, judge_texts: Mapping[str, str] = _NO_TEXTS
) -> str | Messages:
    """The prompt, or the last user turn of a conversation, inside the teacher's own format.

    Privileged context: SDFT and OPSD (arXiv 2601.18734), whose teacher is the student that also
    sees a solution.
    """
    fields = {name: judge_texts.get(name, "") for name in JUDGED_FIELDS}
    fields |= {"answer": row.answer, "reference": row.references[0] if row.references else None}
    names = re.compile("{(" + "|".join((*TEACHER_FIELDS, *JUDGED_FIELDS)) + ")}")

    def shown(prompt: str) -> str:
        # One pass: braces in an inserted text stay text.
        return names.sub(lambda found: {**fields, "prompt": prompt}[found[1]], format)

    if isinstance(row.prompt, str):
        return shown(row.prompt)
    last = max(i for i, message in enumerate(row.prompt) if message["role"] == "user")
    return tuple(
        {**m, "content": shown(m["content"])} if i == last else m for i, m in enumerate(row.prompt)
    )


def _require_context(rows: Sequence[Prompt], data: DataConfig) -> None:
    """Raise DataError unless every row has the fields that `data.teacher_prompt_format` names."""
    format = data.teacher_prompt_format
    if not format:
        return
    names = data.column_names
    fields = {"answer": ("answer", "{answer}")}
    # With an index of references, `load_rows` has checked that every row has one.
    if not data.references:
        fields["references"] = ("reference", "{reference}")
    for field, (name, shown) in fields.items():
        if shown in format:
            reason = (
                "data.teacher_prompt_format shows it to the teacher: add it, name its column in "
                f"data.columns ({name}=COLUMN), or take {shown} out"
            )
            require_field(rows, field, names.get(name, field), data.source, reason)
    for number, row in enumerate(rows):
        is_text = isinstance(row.prompt, str)
        if not is_text and all(message["role"] != "user" for message in row.prompt):
            raise DataError(
                f"prompt {number} of {data.source} has no user's turn, which "
                "data.teacher_prompt_format wraps"
            )


def encode_prompts(
    rows: Sequence[Prompt], data: DataConfig, student_tokenizer: Any, teacher_tokenizer: Any
) -> PromptSet:
    """Render every row for student and teacher.

    A row over `max_prompt_length` tokens in either view is left out and counted.
    """
    _require_context(rows, data)
    views = _views(data, student_tokenizer, teacher_tokenizer)
    limit, kept, ids, skipped = data.max_prompt_length, [], ([], []), []
    for number, row in enumerate(rows):
        place = f"prompt {number} of {data.source}"
        _require_unicode(row, place)
        rendered = [views[0].ids(row, place)]
        if len(rendered[0]) <= limit:
            rendered.append(views[1].ids(row, place))
        longest = max(map(len, rendered))
        if longest > limit:
            text = str(_wrapped(row, data.prompt_format))[:80]
            skipped.append(f"{place} with {longest} tokens: {text!r}")
            continue
        kept.append(row)
        for view, tokens in zip(ids, rendered):
            view.append(tokens)
    if not kept:
        raise DataError(
            f"{data.source} has no prompt of at most {limit} tokens ({len(rows)} rows read); "
            f"raise data.max_prompt_length, or shorten the prompts, first {skipped[0]}"
        )
    student_ids, teacher_ids = map(tuple, ids)
    is_same, digest = student_ids == teacher_ids, _digest(kept, student_ids, teacher_ids)
    return PromptSet(
        tuple(kept), student_ids, None if is_same else teacher_ids, tuple(skipped), digest
    )


def _digest(rows: list[Prompt], *ids: tuple[tuple[int, ...], ...]) -> str:
    """sha256 of the rows and their token ids; recorded by runs, so its bytes must not change."""
    optional = ([row.criteria for row in rows], [row.benchmark for row in rows])
    hashed = (rows, *ids, *(column for column in optional if any(column)))
    return hashlib.sha256(repr(hashed).encode()).hexdigest()


def _require_unicode(row: Prompt, place: str) -> None:
    """Raise DataError on half a surrogate pair: no tokenizer can encode it."""
    is_text = isinstance(row.prompt, str)
    contents = [row.prompt] if is_text else [message["content"] for message in row.prompt]
    try:
        "".join([*contents, *row.references, row.answer or ""]).encode()
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
    positions = np.arange(step * prompts_per_step, (step + 1) * prompts_per_step)
    epochs = np.unique(positions // num_prompts)
    orders = {epoch: _epoch_order(int(epoch), num_prompts, seed) for epoch in epochs}
    return np.array([orders[p // num_prompts][p % num_prompts] for p in positions], np.int32)


def _epoch_order(epoch: int, num_prompts: int, seed: int) -> np.ndarray:
    bits = np.random.Philox(key=seed, counter=[0, 0, 0, epoch])
    return np.random.Generator(bits).permutation(num_prompts)


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
