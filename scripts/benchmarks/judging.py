"""Requests a second of the judge's client, against a server on the loopback interface."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator

from benchmarks.core import alternate, progress, report
from opdjax.config.api import ApiConfig, EndpointConfig
from opdjax.judge.cache import ReplyCache
from opdjax.judge.client import ApiClient

SERVER = pathlib.Path(__file__).parents[1] / "serve_rule_judge.py"


def add_judge(parser: argparse.ArgumentParser) -> None:
    """Measure requests a second of the judge's client.

    `scripts/serve_rule_judge.py` answers every request after the given latency, so the most that
    the requests in flight allow is their number divided by the latency. `bare`: HTTP over
    connections that are kept, without a client. `no cache`: the client. `first pass`, `second
    pass`: the client with its cache of replies, empty and then full.
    """
    parser.set_defaults(run=judge, repeats=3)
    add = parser.add_argument
    add("--calls", type=int, default=1000, help="requests of a run")
    add("--in-flight", type=int, default=64, help="requests at a time")
    add("--latency", type=float, default=0.2, help="seconds before each reply")
    add("--chars", type=int, default=4000, help="length of each prompt")


@contextlib.contextmanager
def serving(latency: float) -> Iterator[tuple[str, int]]:
    """Yield (host, port) of a server in its own process."""
    command = [sys.executable, str(SERVER), "--port", "0", "--latency", str(latency)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            found = re.search(r"http://([\w.]+):(\d+)", process.stdout.readline())
            yield found[1], int(found[2])
        finally:
            process.terminate()


def prompt(number: int, chars: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{number} " + "An answer to be judged. " * (chars // 24)}]


async def in_flight(one: Callable[[int], Awaitable], options: argparse.Namespace) -> None:
    """Make all calls, `options.in_flight` at a time."""
    numbers = iter(range(options.calls))

    async def work() -> None:
        for number in numbers:
            await one(number)

    await asyncio.gather(*(work() for _ in range(options.in_flight)))


async def bare(host: str, port: int, options: argparse.Namespace) -> None:
    free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def one(number: int) -> None:
        messages = prompt(number, options.chars)
        body = json.dumps({"model": "m", "messages": messages, "max_tokens": 8192}).encode()
        reader, writer = free.pop() if free else await asyncio.open_connection(host, port)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"\r\n" + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(answer.partition("content-length:")[2].splitlines()[0])
        json.loads(await reader.readexactly(length))
        free.append((reader, writer))

    await in_flight(one, options)
    for _, writer in free:
        writer.close()


async def through_client(
    host: str, port: int, options: argparse.Namespace, path: pathlib.Path | None = None
) -> None:
    endpoint = EndpointConfig(f"http://{host}:{port}/v1", "m", concurrency=options.in_flight)
    with contextlib.ExitStack() as stack:
        cache = path and stack.enter_context(contextlib.closing(ReplyCache(path)))
        client = ApiClient({"verifier": endpoint}, ApiConfig(), cache)
        try:
            await in_flight(
                lambda number: client.complete("verifier", prompt(number, options.chars)), options
            )
        finally:
            await client.close()


def judge(options: argparse.Namespace) -> None:
    with serving(options.latency) as address, tempfile.TemporaryDirectory() as folder:
        files = (pathlib.Path(folder) / f"{number}.sqlite" for number in itertools.count())
        file = next(files)

        def passing(is_first: bool) -> None:
            nonlocal file
            file = next(files) if is_first else file
            asyncio.run(through_client(*address, options, file))

        # Each opens new connections, as at the start of a run.
        works = {
            "bare": lambda: asyncio.run(bare(*address, options)),
            "no cache": lambda: asyncio.run(through_client(*address, options)),
            "first pass": lambda: passing(is_first=True),
            "second pass": lambda: passing(is_first=False),
        }
        found = alternate(works, options.repeats)
    allowed = options.in_flight / options.latency if options.latency else math.inf
    rows = []
    for name, runs in found.items():
        rates = [options.calls / seconds for seconds in runs.wall]
        row = {"form": name, "calls/s": rates}
        row["% of what is allowed"] = [100 * rate / allowed for rate in rates]
        row["CPU ms a call"] = [1000 * seconds / options.calls for seconds in runs.cpu]
        rows.append(progress(row))
    report(rows, options)
