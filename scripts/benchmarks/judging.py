"""Requests a second of the judge's client, against a server on the loopback interface."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from benchmarks.core import alternate, progress, report
from opdjax.config.api import ApiConfig, Endpoint
from opdjax.judge.cache import ReplyCache
from opdjax.judge.client import ApiClient

SERVER = pathlib.Path(__file__).parents[1] / "serve_rule_judge.py"


def add_judge(parser: argparse.ArgumentParser) -> None:
    """Measure requests a second of the judge's client.

    `scripts/serve_rule_judge.py` answers every request after the given latency. `no cache`: the
    client. `first pass`, `second pass`: the client with its cache of replies, empty and then full.
    """
    parser.set_defaults(run=judge, repeats=3)
    add = parser.add_argument
    add("--calls", type=int, default=1000, help="requests of a run")
    add("--in-flight", type=int, default=64, help="requests at a time")
    add("--latency", type=float, default=0.2, help="seconds before each reply")
    add("--chars", type=int, default=4000, help="length of each prompt")


@contextlib.contextmanager
def serving(latency: float) -> Iterator[str]:
    """Yield the URL of a server in its own process."""
    command = [sys.executable, str(SERVER), "--port", "0", "--latency", str(latency)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()


async def make_calls(url: str, options: argparse.Namespace, path: pathlib.Path | None) -> None:
    """Make all calls, `options.in_flight` at a time, with a cache if there is a path for one."""
    endpoint = Endpoint(url, "m", concurrency=options.in_flight)
    numbers, text = iter(range(options.calls)), "An answer to be judged. " * (options.chars // 24)
    with contextlib.ExitStack() as stack:
        cache = path and stack.enter_context(contextlib.closing(ReplyCache(path)))
        client = ApiClient({"verifier": endpoint}, ApiConfig(), cache)

        async def work() -> None:
            for number in numbers:
                await client.complete("verifier", [{"role": "user", "content": f"{number} {text}"}])

        try:
            await asyncio.gather(*(work() for _ in range(options.in_flight)))
        finally:
            await client.close()


def judge(options: argparse.Namespace) -> None:
    with serving(options.latency) as url, tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "replies.sqlite"

        def first_pass() -> None:
            for old in file.parent.iterdir():  # the cache and its journal
                old.unlink()
            asyncio.run(make_calls(url, options, file))

        # Each opens new connections, as at the start of a run.
        works = {
            "no cache": lambda: asyncio.run(make_calls(url, options, None)),
            "first pass": first_pass,
            "second pass": lambda: asyncio.run(make_calls(url, options, file)),
        }
        found = alternate(works, options.repeats)
    rows = []
    for name, runs in found.items():
        row = {"form": name, "calls/s": [options.calls / seconds for seconds in runs.wall]}
        row["CPU ms a call"] = [1000 * seconds / options.calls for seconds in runs.cpu]
        rows.append(progress(row))
    report(rows, options)
