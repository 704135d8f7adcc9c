"""The line from a thread that computes to judges: their calls run in an event loop in a thread of
its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pathlib
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from opdjax.config.api import RULE_JUDGE, ApiConfig, EndpointConfig
from opdjax.config.rubrics import RubricsConfig
from opdjax.judge.cache import ReplyCache
from opdjax.judge.client import ApiClient
from opdjax.judge.rule_based.server import answer
from opdjax.judge.structured_output import Judge
from opdjax.runs.workdir import append_lines, read_lines

# what was asked and what it cost, by step and role; of it nothing is ever cut back
SPENDING = "spending.jsonl"


@dataclasses.dataclass(frozen=True)
class BackgroundJudge:
    """Judges that can be asked."""

    client: ApiClient
    judge: Judge
    loop: asyncio.AbstractEventLoop
    workdir: pathlib.Path

    def submit(self, question: Coroutine) -> Future:
        """Begin a question."""
        return asyncio.run_coroutine_threadsafe(question, self.loop)

    def results(self, futures: Sequence[Future]) -> list[Any]:
        """All answers; the first error ends the questions that are still open."""
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def record_usage(self, step: int) -> dict[str, float]:
        """What was asked since the last call, by role: returned as metrics, and written where a
        continued run finds what it has spent.
        """
        usage = self._taken()
        self._write(step, usage)
        return {
            f"api/{role}/{name}": float(value)
            for role, used in usage.items()
            for name, value in used.items()
        }

    def record_remaining_usage(self) -> None:
        """What was answered since the last step was counted: it is paid for, though the run ended
        before it could use it.
        """
        usage = {role: used for role, used in self._taken().items() if used["calls"]}
        self._write(
            max((row["step"] for row in read_lines(self.workdir / SPENDING)), default=0), usage
        )

    def _taken(self) -> dict[str, dict[str, Any]]:
        """Counted in the loop that counts, between two replies and not amid one."""
        taken = self.submit(_made(self.client.take_usage)).result()
        return {role: dataclasses.asdict(used) for role, used in taken.items()}

    def _write(self, step: int, usage: Mapping[str, dict[str, Any]]) -> None:
        append_lines(
            self.workdir / SPENDING,
            [{"step": step, "role": role, **used} for role, used in usage.items()],
        )


@contextlib.contextmanager
def open_background_judge(
    roles: Mapping[str, EndpointConfig],
    api: ApiConfig,
    rubrics: RubricsConfig,
    workdir: pathlib.Path,
) -> Iterator[BackgroundJudge]:
    """The line to those who have a role: replies are cached, and the spending cap counts from what
    the run has spent before.
    """
    given = {name: endpoint for name, endpoint in roles.items() if endpoint.is_given}
    spent = sum(row["dollars"] for row in read_lines(workdir / SPENDING))
    with (
        contextlib.closing(ReplyCache(api.cache or workdir / "replies.sqlite")) as cache,
        _running_loop() as loop,
    ):
        run = lambda work: asyncio.run_coroutine_threadsafe(work, loop).result()
        client = run(_made(lambda: ApiClient(given, api, cache, spent, {RULE_JUDGE: answer})))
        line = BackgroundJudge(client, Judge(client.complete, rubrics), loop, workdir)
        try:
            yield line
        finally:
            run(client.close())
            line.record_remaining_usage()


async def _made(make):
    """What is made in the loop that it is used in."""
    return make()


@contextlib.contextmanager
def _running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="judges", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        asyncio.run_coroutine_threadsafe(_end_others(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end_others() -> None:
    """Cancel what is still open, and wait until it has ended."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
