"""A teacher's answers on disk, by prompt: the index that `opdjax references` writes and runs read.

JSONL: a row on the teacher and its sampling, then rows of answers to one prompt, by a digest of its
text, so that data may be reordered, cut or concatenated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from opdjax.config.validation import differences
from opdjax.data.chat import Messages, as_messages
from opdjax.data.sources import DataError
from opdjax.runs.bounds import lines_of, parse_json
from opdjax.runs.workdir import append_lines

_SCHEMA = "opdjax.references/1"
_BEGINNING = f'{{"schema": "{_SCHEMA}"'  # the first bytes of every index


class ReferenceMissError(DataError):
    """There is no index, or it has no answers to a prompt."""


class ReferenceIndexError(DataError):
    """The file is damaged, written by another teacher, or no index."""


@dataclasses.dataclass(frozen=True)
class ReferenceAnswer:
    """One answer of the teacher."""

    text: str
    is_truncated: bool  # it reached the length limit before it ended


@dataclasses.dataclass(frozen=True)
class ReferenceIndex:
    """Answers by prompt."""

    path: pathlib.Path
    teacher: dict[str, Any]  # the model, its sampling and its prompt format
    answers: dict[str, dict[int, ReferenceAnswer]]  # by key and draw number

    def usable(self, prompt: str | Messages) -> tuple[str, ...]:
        """The prompt's answers in draw order, without empty and truncated ones."""
        draws = sorted(self.answers.get(key_of(prompt), {}).items())
        return tuple(a.text for _, a in draws if not a.is_truncated and a.text.strip())

    def missing(self, prompt: str | Messages, count: int) -> list[int]:
        """The draw numbers below `count` that the prompt has no answer for."""
        found = self.answers.get(key_of(prompt), {})
        return [number for number in range(count) if number not in found]


def key_of(prompt: str | Messages) -> str:
    """sha256 of the prompt as a conversation, in canonical JSON; a text is one user turn."""
    text = json.dumps(as_messages(prompt), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_index(path: pathlib.Path) -> ReferenceIndex:
    """The whole index; ReferenceMissError if there is none, ReferenceIndexError if it is damaged.

    An incomplete last row (an interrupted write) is ignored.
    """
    if not path.is_file():
        found = "is a directory" if path.is_dir() else "does not exist"
        raise (ReferenceIndexError if path.is_dir() else ReferenceMissError)(
            f"data.references names {path}, which {found}; write the file with opdjax references "
            "EXPERIMENT"
        )
    rows = _rows(path)
    _, header = next(rows, ("", {}))
    if header.get("schema") != _SCHEMA or not isinstance(header.get("teacher"), dict):
        raise ReferenceIndexError(
            f"{path} does not begin as {_SCHEMA} does; expected an index written by this version "
            "of opdjax references: name another file in data.references"
        )
    answers: dict[str, dict[int, ReferenceAnswer]] = {}
    for place, row in rows:
        _add(answers, row, place)
    return ReferenceIndex(path, header["teacher"], answers)


def _rows(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of each complete row, one at a time: long answers add up to gigabytes."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines_of(lines, path, ReferenceIndexError), 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = parse_json(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                found = f"expected a JSON object, found {line[:60]!r}"
                raise _damaged(f"{path}, line {number}", found)
            yield f"{path}, line {number}", row


def _damaged(place: str, what: str) -> ReferenceIndexError:
    return ReferenceIndexError(
        f"{place} is damaged: {what}. Delete the line, and run opdjax references again: it adds "
        "what is missing"
    )


def _add(answers: dict[str, dict[int, ReferenceAnswer]], row: dict[str, Any], place: str) -> None:
    key, draws = row.get("key"), row.get("answers")
    is_valid = lambda draw: (
        isinstance(draw, dict)
        and [type(draw.get(name)) for name in ("draw", "text", "is_truncated")] == [int, str, bool]
    )
    if not isinstance(key, str) or not isinstance(draws, list) or not all(map(is_valid, draws)):
        expected = "expected a key and a list of answers with draw, text and is_truncated"
        raise _damaged(place, expected)
    known = answers.setdefault(key, {})
    for draw in draws:
        number = draw["draw"]
        if number in known:
            prompt = str(row.get("prompt"))[:80]
            found = f"draw {number} of the prompt {prompt!r} is also on an earlier line"
            raise _damaged(place, found)
        known[number] = ReferenceAnswer(draw["text"], draw["is_truncated"])


def open_index(
    path: pathlib.Path, teacher: dict[str, Any], may_differ: Sequence[str] = ()
) -> ReferenceIndex:
    """The index to append to: a new one, or one by the same teacher, but for `may_differ`.

    Raises ReferenceIndexError with the differences if another teacher wrote it.
    """
    if _is_new(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        append_lines(path, [{"schema": _SCHEMA, "teacher": teacher}])
    found = read_index(path)
    described = (found.teacher, json.loads(json.dumps(teacher)))
    changed = differences(
        *({k: v for k, v in each.items() if k not in may_differ} for each in described)
    )
    if changed:
        listed = "\n  ".join(changed)
        raise ReferenceIndexError(
            f"{path} was written by another teacher; name another file in data.references or undo "
            f"(there -> now):\n  {listed}"
        )
    return found


def _is_new(path: pathlib.Path) -> bool:
    """Whether the file is missing or holds only an incomplete first line of an index."""
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
    """Append answers, given by prompt and draw number."""
    rows = []
    for prompt, draws in answers:
        stored = [{"draw": n, **dataclasses.asdict(answer)} for n, answer in draws.items()]
        rows.append({"key": key_of(prompt), "prompt": prompt, "answers": stored})
    append_lines(path, rows)


def references_of(
    index: ReferenceIndex,
    prompts: Sequence[str | Messages],
    source: str,
    is_left_out: Callable[[int], bool] = lambda _: False,
) -> list[tuple[str, ...]]:
    """The references of all prompts; ReferenceMissError if a prompt has none.

    `is_left_out` takes the index of a prompt without answers: True if the run leaves it out anyway.
    `source` names the data in the message.
    """
    found = [index.usable(prompt) for prompt in prompts]
    lacking = [n for n, texts in enumerate(found) if not texts and not is_left_out(n)]
    if not lacking:
        return found
    first = prompts[lacking[0]]
    num_unasked = sum(key_of(prompts[number]) not in index.answers for number in lacking)
    message = (
        f"{index.path} has no answers to {len(lacking)} of the {len(prompts)} prompts of {source}, "
        f"first prompt {lacking[0]}, {str(first)[:80]!r} (key {key_of(first)[:12]})."
    )
    if num_unasked:
        message += (
            f" {num_unasked} have never been answered: opdjax references EXPERIMENT, with the same "
            "data, adds what is missing."
        )
    if num_unasked < len(lacking):
        message += (
            f" {len(lacking) - num_unasked} have only empty or truncated answers: sample more "
            "(teach.num_answers), allow longer answers in another index "
            "(teach.max_completion_length), or remove them from the data."
        )
    raise ReferenceMissError(message)
