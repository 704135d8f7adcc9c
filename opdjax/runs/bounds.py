"""Limits on what is read from files and servers, and JSON within them. Standard library only.

They are far above what published checkpoints, data and judges hold, and low enough that a file or
a reply made to hang a process or to fill its memory ends in an error instead.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

CONFIG_BYTES = 8 << 20  # of a JSON file of a checkpoint; in memory JSON may take 50 times as much
TOKENIZER_BYTES = 64 << 20  # of tokenizer.json, of which the largest published have 35 MB
WEIGHTS_HEADER_BYTES = 16 << 20  # of a safetensors file: 100,000 tensors
TEMPLATE_CHARS = 1 << 18  # of a chat template, of which the longest published have 30,000
PROMPT_CHARS = 1 << 22  # of one prompt: a million tokens
ROW_BYTES = 16 << 20  # of one row of data, as JSON or as values
LIST_BYTES = 1 << 28  # of a .json file of one list, which is read as a whole, unlike JSON lines
# A table may hold this many times the bytes of its file, and EXPANDED_BYTES whatever its file has.
EXPANSION, EXPANDED_BYTES = 200, 64 << 20
REPLY_BYTES = 8 << 20  # of a server's response, decompressed; a judge's reply may have a tenth
CRITERION_CHARS = 2000  # of one that a judge writes; verifiers read all of them with every answer
REQUEST_TOKENS = 10**8  # that a server may count for one request; more is no count
MODEL_SIZE = 1 << 24  # of every number of a model's config: width, vocabulary, positions …
MODEL_LAYERS = 10_000
JSON_DEPTH = 100  # lists and objects within each other
ERROR_CHARS = 2000  # of a message, which may quote what was found

_NO_BRACKETS = re.compile(r'(?:"(?:[^"\\]++|\\.)*+"?|[^][{}"]++)++', re.DOTALL)


class BoundedError(ValueError):
    """An error whose message may quote what was found: its middle is left out if it is long."""

    def __init__(self, message: str):
        half = ERROR_CHARS // 2
        is_long = len(message) > ERROR_CHARS
        super().__init__(f"{message[:half]} … {message[-half:]}" if is_long else message)


def parse_json(text: str | bytes, **options: Any) -> Any:
    """The JSON value (`options` of json.loads); ValueError also for bytes that are no UTF-8, for
    numbers of thousands of digits, and for deep nesting.
    """
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    if text.count("[") + text.count("{") > JSON_DEPTH and _is_deep(text):
        raise ValueError(f"more than {JSON_DEPTH} lists and objects are nested in each other")
    return json.loads(text, **options)


def _is_deep(text: str) -> bool:
    brackets = _NO_BRACKETS.sub("", text)
    for _ in range(JSON_DEPTH):  # each time without the innermost pairs
        brackets, before = brackets.replace("[]", "").replace("{}", ""), len(brackets)
        if len(brackets) == before:
            return brackets.count("[") + brackets.count("{") > JSON_DEPTH
    return bool(brackets)


def read_bytes(path: str | os.PathLike, limit: int) -> bytes:
    """The whole file; ValueError if it has more bytes than `limit`, or is no regular file, which
    may have no end.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is no regular file")
    with open(path, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise ValueError(f"it has {size} bytes; expected at most {limit}")
        return file.read(limit)


def lines_of(file: BinaryIO, path: os.PathLike, error: type[Exception]) -> Iterator[bytes]:
    """The lines of a file; the error, which names it, at one that is longer than ROW_BYTES."""
    for number in itertools.count(1):
        line = file.readline(ROW_BYTES + 1)
        if len(line) > ROW_BYTES:
            found = f"{path}, line {number} has more than {ROW_BYTES} bytes"
            raise error(f"{found}; expected lines of one row each: shorten it")
        if not line:
            return
        yield line
