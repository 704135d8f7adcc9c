"""Replies on disk, by what was asked: a run that is replayed asks nobody. One SQLite file, which
several processes may use at once.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sqlite3
import time
from typing import Any

from opdjax.config.api import EndpointConfig
from opdjax.judge.replies import ApiError, Reply

_VERSION = 1
_BUSY_SECONDS, _LOOK_AGAIN = 60.0, 0.05
# What of an endpoint decides a reply; how it is reached and paid does not.
_DECIDING = ("model", "temperature", "top_p", "seed", "reasoning_effort", "max_tokens", "output")
_KEPT = {"text": str, "finish_reason": str, "input_tokens": int, "output_tokens": int}
_COLUMNS = ["key", "version", "reply", "written"]


class CacheError(ApiError):
    """The file of replies cannot be read or written."""


def request_key(
    endpoint: EndpointConfig,
    messages: list[dict[str, str]],
    schema: dict[str, Any] | None,
    sample: int,
) -> str:
    """sha256 of all that decides a reply: the model and its sampling, the messages, the form asked
    for, the sample's number.
    """
    asked = {name: getattr(endpoint, name) for name in _DECIDING} | {
        "messages": messages,
        "schema": schema,
        "sample": sample,
    }
    return hashlib.sha256(
        json.dumps(asked, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()
    ).hexdigest()


class ReplyCache:
    """Replies by their key; of one and the same key the first that was written stays. Of any
    thread, one at a time.
    """

    def __init__(self, path: str | pathlib.Path):
        self._path = pathlib.Path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Opened in one thread and read in that of the event loop. Each statement is a
            # transaction: a reply is safe at once.
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
        # Two processes that make the file at once are not made to wait for each other by SQLite,
        # where it is the mode that changes.
        deadline = time.monotonic() + _BUSY_SECONDS
        while run("PRAGMA journal_mode").fetchone()[0] != "wal":
            try:
                run("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError as error:
                if (
                    error.sqlite_errorcode & 0xFF
                    not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
                    or time.monotonic() > deadline
                ):
                    raise
                time.sleep(_LOOK_AGAIN)
        # A power cut may then cost the last replies, which are asked for again, but never damages
        # the file.
        run("PRAGMA synchronous=NORMAL")
        run(
            "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, version INTEGER, reply TEXT, written REAL)"
        )
        columns = [row[1] for row in run("PRAGMA table_info(replies)")]
        if columns != _COLUMNS:
            raise ValueError(
                f"its table of replies has the columns {', '.join(columns)}, expected {', '.join(_COLUMNS)}"
            )

    def get(self, key: str) -> Reply | None:
        """The reply, or None; CacheError where what is there cannot be read."""
        try:
            row = self._file.execute(
                "SELECT version, reply FROM replies WHERE key = ?", (key,)
            ).fetchone()
            return None if row is None else _reply_of(key, *row)
        except (sqlite3.Error, ValueError, TypeError, RecursionError) as error:
            raise self._error("read", error) from error

    def put(self, key: str, reply: Reply) -> None:
        """Keep the reply, unless there is one already; CacheError where it cannot be written."""
        try:
            row = (
                key,
                _VERSION,
                json.dumps({name: getattr(reply, name) for name in _KEPT}),
                time.time(),
            )
            self._file.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?)", row)
        except sqlite3.Error as error:
            raise self._error("written", error) from error

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _error(self, what: str, error: Exception) -> CacheError:
        todo = {
            "opened": "see that the directory can be written and that the file is a cache of replies",
            "read": "the file is damaged or of another version: move it away together with its -wal and -shm",
            "written": "free the disk, or make the file and its directory writable",
        }[what]
        return CacheError(
            f"the replies in {self._path} could not be {what}: {error}; {todo}, or name another file in api.cache (replies that "
            "are not in it are asked for again)"
        )


def _reply_of(key: str, version: int, text: str) -> Reply:
    """The reply in a row; ValueError where it is none."""
    if version != _VERSION:
        raise ValueError(f"the row {key} is of version {version}, expected {_VERSION}")
    found = json.loads(text)
    values = [found.get(name) for name in _KEPT] if isinstance(found, dict) else []
    if not values or not all(
        isinstance(value, kind) for value, kind in zip(values, _KEPT.values())
    ):
        raise ValueError(f"the row {key} is no reply")
    return Reply(is_cached=False, **dict(zip(_KEPT, values)))
