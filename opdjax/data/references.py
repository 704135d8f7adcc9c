"""A teacher's answers on disk, by the content of the prompt: the index that `opdjax teach` writes
and runs read.

JSONL. The first row says who answered and how; every other row holds answers to one prompt, under a
key that is a digest of the prompt's own text and never a row number, so that data may be reordered,
cut or joined.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from opdjax.config.validation import differences
from opdjax.data.chat import Messages
from opdjax.data.sources import DataError
from opdjax.runs.workdir import append_lines

_SCHEMA = "opdjax.references/1"
_BEGINNING = f'{{"schema": "{_SCHEMA}"'  # of every index


class ReferenceMissError(DataError):
    """A prompt has no answers in the index."""


class ReferenceIndexError(DataError):
    """The index is damaged, of another teacher, or no index."""


@dataclasses.dataclass(frozen=True)
class ReferenceAnswer:
    """One answer of the teacher."""

    text: str
    is_truncated: bool  # its length ran out before it ended


@dataclasses.dataclass(frozen=True)
class ReferenceIndex:
    """Answers by prompt."""

    path: pathlib.Path
    teacher: dict[str, Any]  # who answered, how sampled, how asked
    answers: dict[str, dict[int, ReferenceAnswer]]  # by key and number of the draw

    def usable(self, prompt: str | Messages) -> tuple[str, ...]:
        """The prompt's answers in the order of their draws, those without text and those that were
        cut off left out.
        """
        found = self.answers.get(key_of(prompt), {})
        return tuple(
            answer.text
            for _, answer in sorted(found.items())
            if not answer.is_truncated and answer.text.strip()
        )

    def missing(self, prompt: str | Messages, count: int) -> list[int]:
        """The numbers of the draws, of `count`, that are still to be made."""
        return [
            number for number in range(count) if number not in self.answers.get(key_of(prompt), {})
        ]


def key_of(prompt: str | Messages) -> str:
    """sha256 of the prompt as a conversation, in canonical JSON; a text is one turn of the user."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return hashlib.sha256(json.dumps(turns, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def read_index(path: pathlib.Path) -> ReferenceIndex:
    """The whole index; ReferenceIndexError where there is none, or it cannot be trusted. A last row
    cut off in mid-write is ignored.
    """
    if not path.is_file():
        found = "is a directory" if path.is_dir() else "does not exist"
        raise ReferenceIndexError(
            f"data.references names {path}, which {found}; write the file with opdjax teach EXPERIMENT"
        )
    rows = _rows(path)
    _, header = next(rows, ("", {}))
    if header.get("schema") != _SCHEMA or not isinstance(header.get("teacher"), dict):
        raise ReferenceIndexError(
            f"{path} does not begin as {_SCHEMA} does; expected an index written by this version of opdjax teach: name another file in "
            "data.references"
        )
    answers: dict[str, dict[int, ReferenceAnswer]] = {}
    for place, row in rows:
        _add(answers, row, place)
    return ReferenceIndex(path, header["teacher"], answers)


def _rows(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each whole row stands, and the row, one at a time: thousands of long answers are
    gigabytes.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # of bytes that are no text as well
                row = None
            if not isinstance(row, dict):
                raise _damaged(
                    f"{path}, line {number}", f"expected a JSON object, found {line[:60]!r}"
                )
            yield f"{path}, line {number}", row


def _damaged(place: str, what: str) -> ReferenceIndexError:
    return ReferenceIndexError(
        f"{place} is damaged: {what}. Delete the line, and run opdjax teach again: it asks for what is missing"
    )


def _add(answers: dict[str, dict[int, ReferenceAnswer]], row: dict[str, Any], place: str) -> None:
    key, found = row.get("key"), row.get("answers")
    fields = {"draw": int, "text": str, "is_truncated": bool}
    is_whole = isinstance(key, str) and isinstance(found, list)
    if not is_whole or not all(
        isinstance(one, dict) and all(type(one.get(n)) is t for n, t in fields.items())
        for one in found
    ):
        raise _damaged(
            place, "expected a key and a list of answers with draw, text and is_truncated"
        )
    known = answers.setdefault(key, {})
    for one in found:
        if one["draw"] in known:
            raise _damaged(
                place,
                f"draw {one['draw']} of the prompt {str(row.get('prompt'))[:80]!r} stands above already",
            )
        known[one["draw"]] = ReferenceAnswer(one["text"], one["is_truncated"])


def open_index(path: pathlib.Path, teacher: dict[str, Any]) -> ReferenceIndex:
    """The index to add to: a new one, or one by the same teacher; ReferenceIndexError that names
    what differs.
    """
    if _is_new(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        append_lines(path, [{"schema": _SCHEMA, "teacher": teacher}])
    found = read_index(path)
    changed = differences(found.teacher, json.loads(json.dumps(teacher)))
    if changed:
        listed = "\n  ".join(changed)
        raise ReferenceIndexError(
            f"{path} was written by another teacher; name another file in data.references or undo (there -> now):\n  {listed}"
        )
    return found


def _is_new(path: pathlib.Path) -> bool:
    """Whether nothing is there yet, or what a writer left that was killed in its first line; any
    other file is left alone.
    """
    if not path.exists():
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        line = file.readline().decode(errors="replace")
    return not line.endswith("\n") and (line.startswith(_BEGINNING) or _BEGINNING.startswith(line))


def add_answers(
    path: pathlib.Path, answers: Iterable[tuple[str | Messages, dict[int, ReferenceAnswer]]]
) -> None:
    """Append answers by prompt and number of the draw."""
    append_lines(
        path,
        [
            {
                "key": key_of(prompt),
                "prompt": prompt,
                "answers": [
                    {"draw": n, **dataclasses.asdict(answer)} for n, answer in found.items()
                ],
            }
            for prompt, found in answers
        ],
    )


def references_of(
    index: ReferenceIndex,
    prompts: Sequence[str | Messages],
    source: str,
    is_left_out: Callable[[int], bool] = lambda _: False,
) -> list[tuple[str, ...]]:
    """The references of all prompts; ReferenceMissError where some have none: no reward can be made
    of nothing.

    A prompt that the run leaves out anyway (`is_left_out` by its number, asked only of those
    without answers) may have none.
    """
    found = [index.usable(prompt) for prompt in prompts]
    lacking = [
        number for number, texts in enumerate(found) if not texts and not is_left_out(number)
    ]
    if not lacking:
        return found
    first = prompts[lacking[0]]
    unasked = sum(key_of(prompts[number]) not in index.answers for number in lacking)
    told = (
        f"{index.path} has no answers to {len(lacking)} of the {len(prompts)} prompts of {source}, first prompt {lacking[0]}, "
        f"{str(first)[:80]!r} (key {key_of(first)[:12]})."
    )
    if unasked:
        told += f" {unasked} have never been answered: opdjax teach EXPERIMENT, with the same data, adds what is missing."
    if unasked < len(lacking):
        told += (
            f" {len(lacking) - unasked} were answered with nothing, or with what was cut off: draw more (teach.num_answers), allow "
            "longer answers in another index (teach.max_completion_length, teacher_api.max_tokens), or take them out of the data."
        )
    raise ReferenceMissError(told)
