"""Replies on disk by request, so that a replayed run sends none: one SQLite file.

Several processes may use the file at once.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sqlite3
import time
from typing import Any

from opdjax.config.api import Endpoint
from opdjax.judge.replies import ApiError, Reply

_VERSION = 1
_BUSY_SECONDS, _POLL_SECONDS = 60.0, 0.05
# Fields of an endpoint that the reply depends on (not its address, limits and prices).
_KEY_FIELDS = ("model", "temperature", "top_p", "reasoning_effort", "max_tokens")
# What all requests have in common, in the form that keys of earlier versions had.
_KEY_CONSTANTS = {"seed": None, "output": "json_schema"}
_REPLY_FIELDS = {"text": str, "finish_reason": str, "input_tokens": int, "output_tokens": int}
_COLUMNS = ["key", "version", "reply", "written"]


class CacheError(ApiError):
    """The cache file cannot be opened, read or written."""


def request_key(
    endpoint: Endpoint,
    messages: list[dict[str, str]],
    schema: dict[str, Any] | None,
    sample: int,
) -> str:
    """sha256 of everything the reply depends on; `sample` numbers repeats of one request."""
    request = _KEY_CONSTANTS | {name: getattr(endpoint, name) for name in _KEY_FIELDS}
    request |= {"messages": messages, "schema": schema, "sample": sample}
    text = json.dumps(request, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class ReplyCache:
    """Replies by key. The first reply written under a key stays.

    Any thread may use it, one at a time.
    """

    def __init__(self, path: str | pathlib.Path):
        self._path = pathlib.Path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Opened in one thread, used in the event loop's. Autocommit: a reply is stored at once.
            self._file = sqlite3.connect(
                self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        except (sqlite3.Error, OSError) as error:
            raise self._error("opened", error) from error
        try:
            self._prepare()
        except (sqlite3.Error, ValueError) as error:
            self._file.close()
            raise self._error("opened", error) from error

    def _prepare(self) -> None:
        run = self._file.execute
        # Copies of a running work directory leave out the files that this journal mode adds.
        # SQLite's busy timeout does not cover a change of journal mode by two processes at once.
        deadline = time.monotonic() + _BUSY_SECONDS
        busy = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
        while run("PRAGMA journal_mode").fetchone()[0] != "wal":
            try:
                run("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError as error:
                is_busy = error.sqlite_errorcode & 0xFF in busy
                if not is_busy or time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_SECONDS)
        # A power cut may lose the last replies, which are requested again; the file stays intact.
        run("PRAGMA synchronous=NORMAL")
        run(
            "CREATE TABLE IF NOT EXISTS replies "
            "(key TEXT PRIMARY KEY, version INTEGER, reply TEXT, written REAL)"
        )
        columns = [row[1] for row in run("PRAGMA table_info(replies)")]
        if columns != _COLUMNS:
            raise ValueError(
                f"its table of replies has the columns {', '.join(columns)}, expected "
                f"{', '.join(_COLUMNS)}"
            )

    def get(self, key: str) -> Reply | None:
        """The reply, or None if there is none; CacheError if it cannot be read."""
        query = "SELECT version, reply FROM replies WHERE key = ?"
        try:
            row = self._file.execute(query, (key,)).fetchone()
            return None if row is None else _parse_row(key, *row)
        except (sqlite3.Error, ValueError, TypeError, RecursionError) as error:
            raise self._error("read", error) from error

    def put(self, key: str, reply: Reply) -> None:
        """Store the reply unless the key has one; CacheError if it cannot be written."""
        try:
            fields = {name: getattr(reply, name) for name in _REPLY_FIELDS}
            text = json.dumps(fields | {"digest": _digest(key, fields)})
            row = (key, _VERSION, text, time.time())
            self._file.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?)", row)
        except sqlite3.Error as error:
            raise self._error("written", error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _error(self, action: str, error: Exception) -> CacheError:
        advice = {
            "opened": "check that the directory is writable and the file a cache of replies",
            "read": "the file is damaged or of another version: move it away together with its "
            "-wal and -shm files",
            "written": "free the disk, or make the file and its directory writable",
        }[action]
        return CacheError(
            f"the replies in {self._path} could not be {action}: {error}; {advice}, or name "
            "another file in api.cache (replies that are not in it are requested again)"
        )


def _parse_row(key: str, version: int, text: str) -> Reply:
    """The reply in a row; ValueError if it holds none."""
    if version != _VERSION:
        raise ValueError(f"the row {key} is of version {version}, expected {_VERSION}")
    found = json.loads(text)
    values = [found.get(name) for name in _REPLY_FIELDS] if isinstance(found, dict) else []
    kinds = _REPLY_FIELDS.values()
    if not values or not all(isinstance(value, kind) for value, kind in zip(values, kinds)):
        raise ValueError(f"the row {key} is no reply")
    fields = dict(zip(_REPLY_FIELDS, values))
    # Rows of earlier versions have no digest.
    if found.get("digest", digest := _digest(key, fields)) != digest:
        raise ValueError(f"the row {key} is not what was written")
    return Reply(is_cached=False, **fields)


def _digest(key: str, fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([key, fields]).encode()).hexdigest()[:16]
