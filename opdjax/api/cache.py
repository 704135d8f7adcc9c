"""Replies on disk, by what was asked: a run that is replayed asks nobody. One SQLite file, which several processes may use at once."""

from __future__ import annotations

import hashlib
import json
import pathlib
import sqlite3
import time
from typing import Any

from opdjax.api.replies import ApiError
from opdjax.api_config import EndpointConfig

_VERSION = 1
_BUSY_SECONDS = 60.0
# What of an endpoint decides a reply; how it is reached and paid does not.
_DECIDING = ("model", "temperature", "top_p", "seed", "reasoning_effort", "max_tokens", "output")


class CacheError(ApiError):
    """The file of replies cannot be read or written."""


def request_key(endpoint: EndpointConfig, messages: list[dict[str, str]], schema: dict[str, Any] | None, sample: int) -> str:
    """sha256 of all that decides a reply: the model and its sampling, the messages, the form asked for, the sample's number."""
    asked = {name: getattr(endpoint, name) for name in _DECIDING} | {"messages": messages, "schema": schema, "sample": sample}
    return hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()


class ReplyCache:
    """Replies by their key; of one and the same key the first that was written stays."""

    def __init__(self, path: str | pathlib.Path):
        self._path = pathlib.Path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=NORMAL")
            self._file.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, version INTEGER, reply TEXT, written REAL)")
        except (sqlite3.Error, OSError) as error:
            raise self._error("opened", error) from error

    def get(self, key: str) -> dict[str, Any] | None:
        """The reply, or None; CacheError where what is there cannot be read."""
        try:
            row = self._file.execute("SELECT version, reply FROM replies WHERE key = ?", (key,)).fetchone()
            if row is None:
                return None
            reply = json.loads(row[1])
            if row[0] != _VERSION or not isinstance(reply, dict) or not isinstance(reply.get("text"), str):
                raise ValueError(f"the row {key} is of version {row[0]}, expected {_VERSION}")
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise self._error("read", error) from error
        return reply

    def put(self, key: str, reply: dict[str, Any]) -> None:
        """Keep the reply, unless there is one already."""
        try:
            row = (key, _VERSION, json.dumps(reply), time.time())
            self._file.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?)", row)
        except sqlite3.Error as error:
            raise self._error("written", error) from error

    def __len__(self) -> int:
        return self._file.execute("SELECT count(*) FROM replies").fetchone()[0]

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _error(self, what: str, error: Exception) -> CacheError:
        return CacheError(
            f"the replies in {self._path} could not be {what}: {error}; free the disk, or name another file in api.cache (replies that "
            "are not in it are asked for again)"
        )
