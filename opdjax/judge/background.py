"""Runs judge requests on an asyncio loop in a background thread, while the caller computes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pathlib
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

from opdjax.config.api import RULE_JUDGE, ApiConfig, Endpoint
from opdjax.config.rubrics import RubricsConfig
from opdjax.judge.cache import ReplyCache
from opdjax.judge.client import ApiClient
from opdjax.judge.replies import ApiError
from opdjax.judge.rule_based.rules import answer
from opdjax.judge.structured_output import Judge
from opdjax.runs.workdir import SPENDING, append_lines, read_lines

_POLL_SECONDS = 0.2  # between looks for a request to stop


class WaitStoppedError(ApiError):
    """The run was asked to stop while it waited for judges."""


@dataclasses.dataclass(frozen=True)
class BackgroundJudge:
    """A judge whose requests run in a loop in a background thread."""

    client: ApiClient
    judge: Judge
    loop: asyncio.AbstractEventLoop
    workdir: pathlib.Path
    is_stop_requested: Callable[[], bool] = lambda: False

    def submit(self, request: Coroutine) -> Future:
        """Start a request (a coroutine); returns its future."""
        return asyncio.run_coroutine_threadsafe(request, self.loop)

    def results(self, futures: Sequence[Future]) -> list[Any]:
        """Wait for all results; the first error cancels the other requests and is raised. A judge
        may take minutes, so that a request to stop ends the wait: WaitStoppedError.
        """
        found = []
        try:
            for future in futures:
                while not wait([future], _POLL_SECONDS).done:
                    if self.is_stop_requested():
                        raise WaitStoppedError("the run was asked to stop")
                found.append(future.result())
            return found
        finally:
            for future in futures:
                future.cancel()

    def record_usage(self, step: int) -> dict[str, float]:
        """Write the usage since the last call to spending.jsonl; returns it as metrics by role."""
        usage = self._take_usage()
        self._write(step, usage)
        return {
            f"api/{role}/{name}": float(value)
            for role, counts in usage.items()
            for name, value in counts.items()
        }

    def record_remaining_usage(self) -> None:
        """Write usage since the last step: replies paid for that the run ended before using."""
        last_step = max((row["step"] for row in read_lines(self.workdir / SPENDING)), default=0)
        usage = self._take_usage().items()
        self._write(last_step, {role: counts for role, counts in usage if counts["calls"]})

    def _take_usage(self) -> dict[str, dict[str, Any]]:
        """Read in the client's loop, hence never in the middle of a reply's accounting."""

        async def read() -> dict[str, dict[str, Any]]:
            usage = self.client.take_usage()
            return {role: dataclasses.asdict(counts) for role, counts in usage.items()}

        return self.submit(read()).result()

    def _write(self, step: int, usage: Mapping[str, dict[str, Any]]) -> None:
        rows = [{"step": step, "role": role, **counts} for role, counts in usage.items()]
        append_lines(self.workdir / SPENDING, rows)


@contextlib.contextmanager
def open_background_judge(
    roles: Mapping[str, Endpoint],
    api: ApiConfig,
    rubrics: RubricsConfig,
    workdir: pathlib.Path,
    is_stop_requested: Callable[[], bool] = lambda: False,
) -> Iterator[BackgroundJudge]:
    """A judge with these endpoints by role; on exit its requests are cancelled.

    Replies are cached. The spending cap includes what earlier runs in this work directory spent.
    """
    spent = sum(row["dollars"] for row in read_lines(workdir / SPENDING))
    with (
        contextlib.closing(ReplyCache(api.cache or workdir / "replies.sqlite")) as cache,
        _running_loop() as loop,
    ):
        client = ApiClient(roles, api, cache, spent, {RULE_JUDGE: answer})
        judge = Judge(client.complete, rubrics)
        background = BackgroundJudge(client, judge, loop, workdir, is_stop_requested)
        try:
            yield background
        finally:
            background.submit(client.close()).result()
            background.record_remaining_usage()


@contextlib.contextmanager
def _running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop in a thread of its own; at the end its tasks are cancelled and awaited."""
    started: Future = Future()

    async def serve() -> None:
        end = asyncio.Event()
        started.set_result((asyncio.get_running_loop(), end))
        await end.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="judges", daemon=True)
    thread.start()
    loop, end = started.result()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()
