"""The rule-based judge of the built-in task over HTTP, optionally with injected faults.

    python scripts/serve_rule_judge.py --port 8321                      # until it is interrupted
    python scripts/serve_rule_judge.py --port 0 --faults 0.3 -- COMMAND {url} ...  # during a
    command, whose exit status it returns

It serves OpenAI chat completions on the loopback interface (`POST /v1/chat/completions`, without
streaming; `GET /v1/models`) and its counts at `GET /stats`. The rules are in
`opdjax.judge.rule_based.rules`.

`--faults` is the share of requests that fail. Which ones, and how, is a hash of the seed, the
request's body and the number of earlier requests with that body: it does not depend on the order of
requests or on the number of connections, and a repeated request may succeed.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import copy
import dataclasses
import hashlib
import json
import signal
import sys
from collections.abc import Callable
from typing import Any

from opdjax.judge.rule_based.rules import role_of
from opdjax.judge.rule_based.server import completion, reply_document, requested_schema

HOST, MODEL = "127.0.0.1", "rule-judge"
MAX_BODY = 64 * 2**20
REASONS = {
    **{200: "OK", 400: "Bad Request", 404: "Not Found", 411: "Length Required"},
    **{413: "Content Too Large", 429: "Too Many Requests", 500: "Internal Server Error"},
}
Document = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Request:
    method: str
    path: str
    body: bytes
    is_last: bool  # of its connection


@dataclasses.dataclass(frozen=True)
class Response:
    status: int
    document: Document
    headers: tuple[str, ...] = ()


class ProtocolError(Exception):
    """A malformed request; the connection ends with this response."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.response = refused(status, message)


# Faults of the transport, of the reply's text, and of its content.
TRANSPORT_FAULTS = ("rate_limit", "server_error", "timeout")
TEXT_FAULTS: dict[str, Callable[[str], str]] = {
    "truncated": lambda text: text[: len(text) // 2],
    "prose": lambda text: f"Here is what I found.\n\n{text}\n\nTell me if you need more.",
    "empty": lambda text: "",
    "fence": lambda text: f"```json\n{text}\n```",
}


def missing_verdict(document: Document, pick: int) -> Document | None:
    able = [answer for answer in document.get("answers", ()) if answer.get("verdicts")]
    if not able:
        return None
    able[pick % len(able)]["verdicts"].pop()
    return document


def missing_answer(document: Document, pick: int) -> Document | None:
    answers = document.get("answers")
    if not answers:
        return None
    answers.pop(pick % len(answers))
    return document


def bad_weight(document: Document, pick: int) -> Document | None:
    criteria = document.get("criteria")
    if not criteria:
        return None
    criteria[pick % len(criteria)]["weight"] = (0, 9, -1, 100)[pick % 4]
    return document


def lying_total(document: Document, pick: int) -> Document | None:
    if not document.keys() & {"answers", "criteria"}:
        return None
    for answer in document.get("answers", ()):
        answer["final_score"] = 1000 + pick % 7
    return document | {"total": 10_000}


def reordered(document: Document, pick: int) -> Document | None:
    answers = document.get("answers", ())
    if len(answers) < 2:
        return None
    turn = 1 + pick % (len(answers) - 1)
    return document | {"answers": answers[turn:] + answers[:turn]}


# They return None for a reply that the fault does not apply to: another fault is then taken.
CONTENT_FAULTS: dict[str, Callable[[Document, int], Document | None]] = {
    f.__name__: f for f in (missing_verdict, missing_answer, bad_weight, lying_total, reordered)
}
FAULTS = (*TRANSPORT_FAULTS, *TEXT_FAULTS, *CONTENT_FAULTS)


@dataclasses.dataclass(frozen=True)
class Options:
    port: int = 0  # 0: any free one
    latency: float = 0.0  # seconds before each reply
    faults: float = 0.0  # share of requests
    fault_kinds: tuple[str, ...] = FAULTS
    seed: int = 0
    hang: float = 5.0  # seconds of a timeout
    down_after: int = 0  # number of requests after which connections are refused; 0: never


class JudgeServer:
    """The server and its counts; `start` and `stop` it inside one running loop."""

    def __init__(self, options: Options):
        self._options, self._seen = options, collections.Counter()
        self._roles, self._faults = collections.Counter(), collections.Counter()
        self._counts = {"requests": 0, "connections": 0, "in_flight": 0, "max_in_flight": 0}
        self._connections: dict[asyncio.Task, asyncio.StreamWriter] = {}
        self._idle: set[asyncio.Task] = set()
        self._listening: asyncio.Server | None = None

    async def start(self) -> JudgeServer:
        """Listen; OSError if the port is taken."""
        self._listening = await asyncio.start_server(
            self._converse, HOST, self._options.port, backlog=1024
        )
        self.port = self._listening.sockets[0].getsockname()[1]
        return self

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}/v1"

    @property
    def stats(self) -> Document:
        return {**self._counts, "roles": dict(self._roles), "faults": dict(self._faults)}

    @property
    def is_down(self) -> bool:
        return not self._listening.is_serving()

    async def stop(self) -> None:
        """Refuse new connections and abort the open ones."""
        self._listening.close()
        # Aborted, not closed: a client that does not read would keep a closed connection open
        # until its buffer is sent.
        for task, writer in self._connections.items():
            writer.transport.abort()
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _go_down(self) -> None:
        """Refuse new connections; received requests are still answered."""
        self._listening.close()
        for task in self._idle:
            self._connections[task].transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._connections[task] = writer
        self._counts["connections"] += 1
        try:
            await self._answer_all(reader, writer, task)
        except ProtocolError as error:
            writer.write(as_bytes(error.response, is_last=True))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has disconnected
        finally:
            del self._connections[task]
            self._idle.discard(task)
            writer.close()

    async def _answer_all(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, task: asyncio.Task
    ) -> None:
        is_last = False
        while not is_last:
            self._idle.add(task)
            request = await read_request(reader)
            self._idle.discard(task)
            response = None if request is None or self.is_down else await self._answer(request)
            if response is None:
                return
            is_last = request.is_last or self.is_down
            writer.write(as_bytes(response, is_last))
            await writer.drain()

    async def _answer(self, request: Request) -> Response | None:
        """None: close the connection without a response."""
        route = (request.method, request.path)
        if route == ("POST", "/v1/chat/completions"):
            return await self._counted(request.body)
        if route == ("GET", "/v1/models"):
            model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "opdjax"}
            return Response(200, {"object": "list", "data": [model]})
        if route == ("GET", "/stats"):
            return Response(200, self.stats)
        return refused(
            404,
            f"there is no {request.method} {request.path}; expected POST /v1/chat/completions, "
            "GET /v1/models or GET /stats",
        )

    async def _counted(self, body: bytes) -> Response | None:
        counts = self._counts
        counts["requests"] += 1
        counts["in_flight"] += 1
        counts["max_in_flight"] = max(counts["max_in_flight"], counts["in_flight"])
        # Before the reply: a server that crashes does not wait for its last request.
        if counts["requests"] == self._options.down_after:
            self._go_down()
        try:
            return await self._complete(body)
        finally:
            counts["in_flight"] -= 1

    async def _complete(self, body: bytes) -> Response | None:
        try:
            request = checked(body)
        except ValueError as error:
            return refused(400, str(error))
        self._roles[role_of(request["messages"]) or "other"] += 1
        document = reply_document(request)
        fault, digest = self._fault(body, document)
        self._faults.update([fault] if fault else [])
        pick = int.from_bytes(digest[16:20])
        if fault == "rate_limit":
            header = f"Retry-After: {0.05 + 0.15 * pick / 2**32:.3f}"
            return dataclasses.replace(refused(429, "too many requests"), headers=(header,))
        await asyncio.sleep(self._options.hang if fault == "timeout" else self._options.latency)
        if fault == "timeout":
            return None
        if fault == "server_error":
            return refused(500, "the server failed")
        return Response(200, completion(request, *spoiled(document, fault, pick)))

    def _fault(self, body: bytes, document: Document) -> tuple[str | None, bytes]:
        """The fault of this request, and the digest that decided it."""
        key = hashlib.sha256(body).digest()  # whole bodies would fill the memory
        digest = hashlib.sha256(f"{self._options.seed} {self._seen[key]} ".encode() + body).digest()
        self._seen[key] += 1
        if int.from_bytes(digest[:8]) >= self._options.faults * 2**64:
            return None, digest
        able = [
            kind
            for kind in self._options.fault_kinds
            if kind not in CONTENT_FAULTS or CONTENT_FAULTS[kind](copy.deepcopy(document), 0)
        ]
        return (able[int.from_bytes(digest[8:16]) % len(able)] if able else None), digest


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    """The next request; None if the connection ended after the last one.

    Raises ProtocolError if it is not HTTP/1.1 with a Content-Length.
    """
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError as error:
        if error.partial.strip():
            raise
        return None
    except asyncio.LimitOverrunError:
        message = "the request's head is too long; expected at most 64 KiB"
        raise ProtocolError(400, message) from None
    first, *lines = head.strip().split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise ProtocolError(400, "expected an HTTP/1.1 request")
    pairs = (line.partition(":") for line in lines)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    if "transfer-encoding" in headers:
        raise ProtocolError(411, "expected a body with Content-Length, not a chunked one")
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()) or len(length) > 18:
        raise ProtocolError(400, "Content-Length is no number")
    if int(length) > MAX_BODY:
        raise ProtocolError(413, f"the body has {length} bytes; expected at most {MAX_BODY}")
    is_last = headers.get("connection", "").lower() == "close" or words[2] == "HTTP/1.0"
    body = await reader.readexactly(int(length))
    return Request(words[0], words[1].partition("?")[0], body, is_last)


def as_bytes(response: Response, is_last: bool) -> bytes:
    body = json.dumps(response.document).encode()
    head = [
        f"HTTP/1.1 {response.status} {REASONS[response.status]}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        f"Connection: {'close' if is_last else 'keep-alive'}",
        *response.headers,
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


def refused(status: int, message: str) -> Response:
    kind = REASONS[status].lower().replace(" ", "_")
    return Response(status, {"error": {"message": message, "type": kind, "code": status}})


def checked(body: bytes) -> Document:
    """The request; ValueError if it needs something that is not offered."""
    try:
        request = json.loads(body)
    except RecursionError:
        raise ValueError("the body is nested too deeply") from None
    if not isinstance(request, dict) or not isinstance(request.get("model"), str):
        raise ValueError('expected a JSON object with "model" and "messages"')
    messages = request.get("messages")
    is_list = isinstance(messages, list) and bool(messages)
    if not is_list or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages: expected a list of objects that is not empty")
    if request.get("stream") or request.get("n", 1) != 1:
        raise ValueError("stream, n: expected one reply that is not streamed")
    form = request.get("response_format")
    kind = form.get("type") if isinstance(form, dict) else None if form else "text"
    has_schema = kind != "json_schema" or isinstance(requested_schema(request), dict)
    if kind not in ("text", "json_object", "json_schema") or not has_schema:
        raise ValueError(
            "response_format: expected a type of text, json_object, or json_schema with a schema"
        )
    return request


def spoiled(document: Document, fault: str | None, pick: int) -> tuple[str, str]:
    """Text and finish_reason of the reply with its fault."""
    if fault in CONTENT_FAULTS:
        document = CONTENT_FAULTS[fault](copy.deepcopy(document), pick)
    text = json.dumps(document)
    text = TEXT_FAULTS[fault](text) if fault in TEXT_FAULTS else text
    return text, "length" if fault == "truncated" else "stop"


async def serve(options: Options, command: list[str]) -> int:
    """Serve until SIGINT or SIGTERM, or until the command ends; returns the exit status."""
    try:
        server = await JudgeServer(options).start()
    except OSError as error:
        print(
            f"port {options.port} is not available ({error.strerror}); take another with --port, "
            "or any free one with --port 0",
            file=sys.stderr,
        )
        return 2
    print(f"serving at {server.url}", file=sys.stderr if command else sys.stdout, flush=True)
    try:
        return await run_command(server, command) if command else await until_signal()
    finally:
        await server.stop()
        print(f"served: {json.dumps(server.stats)}", file=sys.stderr, flush=True)


async def until_signal() -> int:
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await ended.wait()
    return 0


async def run_command(server: JudgeServer, command: list[str]) -> int:
    """The exit status of the command, with {url} replaced by the server's address."""
    words = [word.replace("{url}", server.url) for word in command]
    try:
        process = await asyncio.create_subprocess_exec(*words)
    except OSError as error:
        print(f"{command[0]} does not run: {error.strerror}", file=sys.stderr)
        return 127
    # The terminal sends an interrupt to the command directly.
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    loop.add_signal_handler(signal.SIGTERM, process.terminate)
    status = await process.wait()
    return status if status >= 0 else 128 - status


def parsed(words: list[str]) -> tuple[Options, list[str]]:
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--port", type=int, default=8321, help="the port; 0: any free one")
    add("--latency", type=float, default=0.0, help="seconds before each reply")
    add("--faults", type=float, default=0.0, help="share of requests that fail, from 0 to 1")
    add(
        "--fault-kinds",
        default=",".join(FAULTS),
        help="kinds of faults, separated by commas; default: %(default)s",
    )
    add("--seed", type=int, default=0, help="seed that selects the requests which fail")
    add("--hang", type=float, default=5.0, help="seconds until a timeout fault ends the connection")
    add(
        "--down-after",
        type=int,
        default=0,
        help="number of requests after which connections are refused; 0: never",
    )
    given = parser.parse_args(words[:split])
    kinds = tuple(filter(None, given.fault_kinds.split(",")))
    if unknown := sorted(set(kinds) - set(FAULTS)):
        parser.error(f"--fault-kinds is {', '.join(unknown)}; expected some of {', '.join(FAULTS)}")
    if not 0 <= given.faults <= 1:
        parser.error(f"--faults is {given.faults}; expected a share from 0 to 1")
    if min(given.latency, given.hang, given.down_after) < 0:
        parser.error("--latency, --hang and --down-after must be 0 or more")
    return Options(**vars(given) | {"fault_kinds": kinds}), words[split + 1 :]


def main() -> None:
    try:
        sys.exit(asyncio.run(serve(*parsed(sys.argv[1:]))))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
