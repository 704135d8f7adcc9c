"""What the client of judges costs: calls a second against a server that only waits, beside what its
wait alone allows.

    python scripts/benchmark_judge.py                        # 1,000 calls, 64 in flight, 200 ms each: about ten seconds
    python scripts/benchmark_judge.py --calls 2000 --in-flight 128 --milliseconds 100 --chars 20000

The server is a process of its own on the loopback interface: it reads each request in full, waits,
and answers with a text of a judge's usual length. `bare`: the same requests over plain sockets,
which is what this machine can do at all. `no cache`, `first pass` (every reply is written to a new
file) and `second pass` (every reply is read from it) go through `ApiClient`, prompts all different.
`allowed` is in-flight / wait. CPU seconds are those of the asking process alone, and on a machine
that does other work they say more than the wall does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator

from opdjax.config.api import ApiConfig, EndpointConfig
from opdjax.judge.cache import ReplyCache
from opdjax.judge.client import ApiClient

HOST = "127.0.0.1"
REPLY = json.dumps(
    {
        "answers": [
            {"answer_index": n, "verdicts": [{"criterion": c, "met": True} for c in range(8)]}
            for n in range(8)
        ]
    }
)
SCHEMA = {
    "type": "object",
    "properties": {"answers": {"type": "array", "items": {"type": "object"}}},
    "required": ["answers"],
}


async def serve(seconds: float) -> None:
    """Answer every request after so many seconds, until the process is ended; the port is printed."""
    document = {"choices": [{"message": {"content": REPLY}, "finish_reason": "stop"}]}
    body = json.dumps(
        document | {"usage": {"prompt_tokens": 1000, "completion_tokens": 300}}
    ).encode()
    response = (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        % len(body)
        + body
    )

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
                await asyncio.sleep(seconds)  # all that are in flight wait at once
                writer.write(response)
                await writer.drain()
        writer.close()

    listening = await asyncio.start_server(converse, HOST, 0, backlog=1024)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await listening.serve_forever()


@contextlib.contextmanager
def serving(seconds: float) -> Iterator[int]:
    """The port of a server in a process of its own."""
    with subprocess.Popen(
        [sys.executable, __file__, "--serve", str(seconds)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def prompt(number: int, chars: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{number} " + "An answer to be judged. " * (chars // 24)}]


async def in_flight(count: int, most: int, one: Callable[[int], Awaitable]) -> None:
    """All calls, so many at a time."""
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await one(number)

    await asyncio.gather(*(worker() for _ in range(most)))


async def bare(port: int, args: argparse.Namespace) -> None:
    """The requests over connections that are kept, without any client."""
    free: list = []  # connections

    async def one(number: int) -> None:
        body = json.dumps(
            {"model": "m", "messages": prompt(number, args.chars), "max_tokens": 8192}
        ).encode()
        reader, writer = free.pop() if free else await asyncio.open_connection(HOST, port)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
            % len(body)
            + body
        )
        head = await reader.readuntil(b"\r\n\r\n")
        json.loads(
            await reader.readexactly(
                int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            )
        )
        free.append((reader, writer))

    await in_flight(args.calls, args.in_flight, one)
    for _, writer in free:
        writer.close()


async def through_client(port: int, args: argparse.Namespace, path: pathlib.Path | None) -> None:
    endpoint = EndpointConfig(f"http://{HOST}:{port}/v1", "m", concurrency=args.in_flight)
    with contextlib.ExitStack() as stack:
        cache = None if path is None else stack.enter_context(contextlib.closing(ReplyCache(path)))
        client = ApiClient({"verifier": endpoint}, ApiConfig(), cache)

        async def one(number: int) -> None:
            reply = await client.complete(
                "verifier", prompt(number, args.chars), schema=SCHEMA, schema_name="verdicts"
            )
            # A fast answer that is another one's would be worth nothing.
            if reply.text != REPLY:
                raise RuntimeError(f"call {number} had another reply: {reply.text[:100]!r}")

        try:
            await in_flight(args.calls, args.in_flight, one)
        finally:
            await client.close()


def measured(name: str, work: Awaitable, args: argparse.Namespace) -> None:
    """One row of the table."""
    allowed = args.in_flight / (args.milliseconds / 1000)
    wall, cpu = time.perf_counter(), time.process_time()
    asyncio.run(work)  # connections are made anew in it, as at the start of a run
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    rate = args.calls / wall
    print(
        f"| {name} | {rate:,.0f} | {allowed:,.0f} | {rate / allowed:.0%} | {1000 * cpu / args.calls:.2f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--milliseconds", type=float, default=200.0, help="that the server waits")
    parser.add_argument("--chars", type=int, default=4000, help="of each prompt")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        asyncio.run(serve(args.serve))
        return
    with serving(args.milliseconds / 1000) as port, tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "replies.sqlite"
        asyncio.run(
            through_client(port, argparse.Namespace(**vars(args) | {"calls": 2}), None)
        )  # imports are paid for once
        print("| | calls/s | allowed | share | CPU ms a call |\n|---|---|---|---|---|")
        measured("bare", bare(port, args), args)
        measured("no cache", through_client(port, args, None), args)
        measured("first pass", through_client(port, args, path), args)
        measured("second pass", through_client(port, args, path), args)


if __name__ == "__main__":
    main()
