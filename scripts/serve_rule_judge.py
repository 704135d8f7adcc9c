"""The rule-based judge of the built-in task over HTTP, optionally with injected faults.

    python scripts/serve_rule_judge.py --port 8321                      # until it is interrupted
    python scripts/serve_rule_judge.py --port 0 --faults 0.3 -- COMMAND {url} ...  # during a
    command, whose exit status it returns

It serves OpenAI chat completions on the loopback interface (`POST /v1/chat/completions`, without
streaming; `GET /v1/models`) and its counts at `GET /stats`. `--faults` is the share of requests
that fail. Which ones, and how, is a hash of the seed, the body and the number of earlier requests
with that body: the order of other requests has no effect, and a repeated request may succeed.
"""

from __future__ import annotations

import argparse
import collections
import copy
import hashlib
import http.server
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from opdjax.judge.rule_based import rules

HOST, MODEL = "127.0.0.1", "rule-judge"
MAX_BODY = 64 * 2**20
Document = dict[str, Any]

# Faults of the transport, of the reply's text, and of its content.
TRANSPORT_FAULTS = ("rate_limit", "server_error", "timeout")
TEXT_FAULTS: dict[str, Callable[[str], str]] = {
    "truncated": lambda text: text[: len(text) // 2],
    "prose": lambda text: f"Here is what I found.\n\n{text}\n\nTell me if you need more.",
    "empty": lambda text: "",
    "fence": lambda text: f"```json\n{text}\n```",
}


def missing_verdict(document: Document, pick: int) -> Document | None:
    if able := [answer for answer in document.get("answers", ()) if answer.get("verdicts")]:
        able[pick % len(able)]["verdicts"].pop()
    return document if able else None


def missing_answer(document: Document, pick: int) -> Document | None:
    if answers := document.get("answers"):
        answers.pop(pick % len(answers))
        return document
    return None


def bad_weight(document: Document, pick: int) -> Document | None:
    if criteria := document.get("criteria"):
        criteria[pick % len(criteria)]["weight"] = (0, 9, -1, 100)[pick % 4]
        return document
    return None


def lying_total(document: Document, pick: int) -> Document | None:
    for answer in document.get("answers", ()):
        answer["final_score"] = 1000 + pick % 7
    is_able = document.keys() & {"answers", "criteria"}
    return document | {"total": 10_000} if is_able else None


def reordered(document: Document, pick: int) -> Document | None:
    answers = document.get("answers", ())
    turn = 1 + pick % max(len(answers) - 1, 1)
    return document | {"answers": answers[turn:] + answers[:turn]} if len(answers) > 1 else None


# They return None for a reply that the fault does not apply to: another fault is then taken.
CONTENT_FAULTS: dict[str, Callable[[Document, int], Document | None]] = {
    f.__name__: f for f in (missing_verdict, missing_answer, bad_weight, lying_total, reordered)
}
FAULTS = (*TRANSPORT_FAULTS, *TEXT_FAULTS, *CONTENT_FAULTS)


def spoiled(document: Document, fault: str | None, pick: int) -> Document | None:
    """Return a copy of a reply with its fault, if that is one of the content."""
    return CONTENT_FAULTS.get(fault, lambda same, _: same)(copy.deepcopy(document), pick)


class JudgeServer(http.server.ThreadingHTTPServer):
    """The server, its options and its counts; OSError if the port is taken."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, options: argparse.Namespace):
        super().__init__((HOST, options.port), Handler)
        self.options, self.lock, self.is_down = options, threading.Lock(), False
        rates = options.false_accepts, options.false_rejects
        self.errors = rules.Errors(*rates, options.seed)
        self.url = f"http://{HOST}:{self.server_port}/v1"
        self.idle: set[socket.socket] = set()  # connections that wait for a request
        self.stats = {"requests": 0, "connections": 0, "in_flight": 0, "max_in_flight": 0}
        self.stats |= {"roles": collections.Counter(), "faults": collections.Counter()}
        self._seen = collections.Counter()

    def begin_request(self) -> bool:
        """Count a request; the last one before `--down-after` closes the server to others. False
        for a request that comes after it.
        """
        stats = self.stats
        with self.lock:
            if self.is_down:
                return False
            stats["requests"] += 1
            stats["in_flight"] += 1
            stats["max_in_flight"] = max(stats["max_in_flight"], stats["in_flight"])
            is_last = stats["requests"] == self.options.down_after
            self.is_down |= is_last
        # Before the reply: a server that crashes does not wait for its last request.
        if is_last:
            self.shutdown()
            self.socket.close()
            for connection in list(self.idle):
                connection.shutdown(socket.SHUT_RDWR)
        return True

    def fault(self, body: bytes, document: Document) -> tuple[str | None, int]:
        """Return the fault of this request, if any, and a number of 32 bits that varies it."""
        key = hashlib.sha256(body).digest()  # whole bodies would fill the memory
        with self.lock:
            count = self._seen[key]
            self._seen[key] += 1
        digest = hashlib.sha256(f"{self.options.seed} {count} ".encode() + body).digest()
        pick = int.from_bytes(digest[16:20])
        is_able = lambda kind: spoiled(document, kind, 0) is not None
        able = list(filter(is_able, self.options.fault_kinds))
        if int.from_bytes(digest[:8]) >= self.options.faults * 2**64 or not able:
            return None, pick
        kind = able[int.from_bytes(digest[8:16]) % len(able)]
        with self.lock:
            self.stats["faults"][kind] += 1
        return kind, pick


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.stats["connections"] += 1

    def handle_one_request(self) -> None:
        self.server.idle.add(self.connection)
        try:
            super().handle_one_request()
        except ConnectionError:  # the client has disconnected
            self.close_connection = True
        finally:
            self.server.idle.discard(self.connection)

    def parse_request(self) -> bool:
        self.server.idle.discard(self.connection)
        return super().parse_request()

    def log_message(self, *_: Any) -> None:
        """Do not log requests."""

    def send_error(self, code: int, message: str | None = None, *_: Any, **headers: str) -> None:
        """Refuse a request, also one that is not HTTP, and end the connection."""
        self.close_connection, phrase = True, HTTPStatus(code).phrase
        error = {"message": message or phrase, "type": phrase.lower().replace(" ", "_")}
        self.reply(code, {"error": error | {"code": code}}, **headers)

    def reply(self, status: int, document: Document, **headers: str) -> None:
        body = json.dumps(document).encode()
        self.close_connection |= self.server.is_down
        self.send_response(status)
        headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        headers["Connection"] = "close" if self.close_connection else "keep-alive"
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def refuse_path(self) -> None:
        offered = "POST /v1/chat/completions, GET /v1/models or GET /stats"
        self.send_error(404, f"there is no {self.command} {self.path}; expected {offered}")

    def do_GET(self) -> None:
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "opdjax"}
        documents = {"/v1/models": {"object": "list", "data": [model]}, "/stats": self.server.stats}
        if (path := self.path.partition("?")[0]) in documents:
            self.reply(200, documents[path])
        else:
            self.refuse_path()

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "0")
        if not (length.isascii() and length.isdigit()) or len(length) > 18:
            self.send_error(400, "Content-Length is no number")
        elif int(length) > MAX_BODY:
            self.send_error(413, f"the body has {length} bytes; expected at most {MAX_BODY}")
        elif len(body := self.rfile.read(int(length))) < int(length):
            self.close_connection = True  # the client has disconnected
        elif self.path.partition("?")[0] != "/v1/chat/completions":
            self.refuse_path()
        elif not self.server.begin_request():
            self.close_connection = True  # without a response
        else:
            try:
                self.complete(body)
            finally:
                with self.server.lock:
                    self.server.stats["in_flight"] -= 1

    def complete(self, body: bytes) -> None:
        try:
            request = checked(body)
        except ValueError as error:
            self.send_error(400, str(error))
            return
        options, document = self.server.options, rules.reply_document(request, self.server.errors)
        with self.server.lock:
            self.server.stats["roles"][rules.role_of(request["messages"]) or "other"] += 1
        fault, pick = self.server.fault(body, document)
        if fault == "rate_limit":
            seconds = f"{0.05 + 0.15 * pick / 2**32:.3f}"
            self.send_error(429, "too many requests", Retry_After=seconds)
            return
        time.sleep(options.hang if fault == "timeout" else options.latency)
        if fault == "timeout":
            self.close_connection = True  # without a response
        elif fault == "server_error":
            self.send_error(500, "the server failed")
        else:
            text = json.dumps(spoiled(document, fault, pick))
            text = TEXT_FAULTS[fault](text) if fault in TEXT_FAULTS else text
            reason = "length" if fault == "truncated" else "stop"
            self.reply(200, rules.completion(request, text, reason))


def checked(body: bytes) -> Document:
    """The request; ValueError if it needs something that is not offered."""
    try:
        request = json.loads(body)
    except RecursionError:
        raise ValueError("the body is nested too deeply") from None
    if not isinstance(request, dict) or not isinstance(request.get("model"), str):
        raise ValueError('expected a JSON object with "model" and "messages"')
    messages = request.get("messages")
    is_list = isinstance(messages, list) and messages
    if not is_list or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages: expected a list of objects that is not empty")
    if request.get("stream") or request.get("n", 1) != 1:
        raise ValueError("stream, n: expected one reply that is not streamed")
    form = request.get("response_format")
    kind = form.get("type") if isinstance(form, dict) else None if form else "text"
    has_schema = kind != "json_schema" or isinstance(rules.requested_schema(request), dict)
    if kind not in ("text", "json_object", "json_schema") or not has_schema:
        expected = "a type of text, json_object, or json_schema with a schema"
        raise ValueError(f"response_format: expected {expected}")
    return request


def parsed(words: list[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--port", type=int, default=8321, help="the port; 0: any free one")
    add("--latency", type=float, default=0.0, help="seconds before each reply")
    add("--faults", type=float, default=0.0, help="share of requests that fail, from 0 to 1")
    kinds = "kinds of faults, separated by commas; default: %(default)s"
    add("--fault-kinds", default=",".join(FAULTS), help=kinds)
    unmet, met = "share of unmet criteria called met", "share of met criteria called not met"
    add("--false-accepts", type=float, default=0.0, help=unmet)
    add("--false-rejects", type=float, default=0.0, help=met)
    add("--seed", type=int, default=0, help="selects the requests that fail and wrong verdicts")
    add("--hang", type=float, default=5.0, help="seconds until a timeout fault ends the connection")
    down = "number of requests after which connections are refused; 0: never"
    add("--down-after", type=int, default=0, help=down)
    given = parser.parse_args(words)
    given.fault_kinds = tuple(filter(None, given.fault_kinds.split(",")))
    if unknown := ", ".join(set(given.fault_kinds) - set(FAULTS)):
        parser.error(f"--fault-kinds is {unknown}; expected some of {', '.join(FAULTS)}")
    for name in ("faults", "false_accepts", "false_rejects"):
        if not 0 <= (share := getattr(given, name)) <= 1:
            option = name.replace("_", "-")
            parser.error(f"--{option} is {share}; expected a share from 0 to 1")
    if min(given.latency, given.hang, given.down_after) < 0:
        parser.error("--latency, --hang and --down-after must be 0 or more")
    return given


def run_command(server: JudgeServer, command: list[str]) -> int:
    """Return the exit status of the command, with {url} replaced by the server's address."""
    # The terminal sends an interrupt to the command directly.
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        process = subprocess.Popen([word.replace("{url}", server.url) for word in command])
    except OSError as error:
        print(f"{command[0]} does not run: {error.strerror}", file=sys.stderr)
        return 127
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    status = process.wait()
    return status if status >= 0 else 128 - status


def main() -> None:
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    options, command = parsed(words[:split]), words[split + 1 :]
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        server = JudgeServer(options)
    except OSError as error:
        advice = "take another with --port, or any free one with --port 0"
        print(f"port {options.port} is not available ({error.strerror}); {advice}", file=sys.stderr)
        sys.exit(2)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    print(f"serving at {server.url}", file=sys.stderr if command else sys.stdout, flush=True)
    status = run_command(server, command) if command else int(not ended.wait())
    print(f"served: {json.dumps(server.stats)}", file=sys.stderr, flush=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
