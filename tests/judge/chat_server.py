"""A chat server on a local socket with scripted replies, and a client for it."""

import asyncio
import contextlib
import dataclasses
import json
from unittest import mock

from waiting import HANG

from opdjax.config.api import ApiConfig, Endpoint
from opdjax.judge.client import ApiClient

ASKED = [{"role": "user", "content": "What is 1 + 1?"}]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}


def completion(text="two", finish_reason="stop", usage=(10, 5), **message):
    """The document of a chat completion."""
    counts = (
        {}
        if usage is None
        else {"usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}}
    )
    return {
        "choices": [{"message": {"content": text} | message, "finish_reason": finish_reason}],
        **counts,
    }


@dataclasses.dataclass
class Said:
    """One response, given after `delay` seconds and once the event `gate` is set; `cut`: the
    connection ends `before` it or `amid` it, or it `drips` byte by byte.
    """

    status: int = 200
    content: object = dataclasses.field(
        default_factory=completion
    )  # a document, or bytes as they are
    headers: tuple = ()
    delay: float = 0.0
    cut: str = ""
    raw: bytes = b""  # the whole response, in place of all of this
    gate: asyncio.Event | None = None

    def as_bytes(self):
        if self.raw:
            return self.raw
        body = (
            self.content if isinstance(self.content, bytes) else json.dumps(self.content).encode()
        )
        head = [
            f"HTTP/1.1 {self.status} Said",
            "content-type: application/json",
            f"content-length: {len(body)}",
            *self.headers,
        ]
        return "\r\n".join([*head, "", ""]).encode() + body


def refusal(status, message="no", *headers):
    """An error as servers say it."""
    return Said(status, {"error": {"message": message}}, headers)


class ChatServer:
    """Answers request number n, from 0, by `reply(body, n)`; knows what it was asked, when, and how
    many at once.
    """

    def __init__(self, reply):
        self._reply, self.bodies, self.heads, self.times = reply, [], [], []
        self.open = self.most_open = 0
        self._tasks = set()

    async def __aenter__(self):
        self._listening = await asyncio.start_server(self._converse, "127.0.0.1", 0, backlog=1024)
        self.url = f"http://127.0.0.1:{self._listening.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *_):
        self._listening.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _converse(self, reader, writer):
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next(
                    int(line.split(":")[1])
                    for line in head.lower().split("\r\n")
                    if line.startswith("content-length")
                )
                body = json.loads(await reader.readexactly(length))
                await self._answer(head, body, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            # whoever asked has gone, or the server goes: the streams of Python 3.11 complain of
            # handlers that are cancelled
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _answer(self, head, body, writer):
        number = len(self.bodies)
        self.bodies.append(body)
        self.heads.append(head)
        self.times.append(asyncio.get_running_loop().time())
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            said = self._reply(body, number)
            await asyncio.sleep(said.delay)
            if said.gate is not None:
                await said.gate.wait()
        finally:
            self.open -= 1
        content = said.as_bytes()
        if said.cut == "drips":
            for byte in content:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.02)
        elif said.cut:
            writer.write(content[: len(content) - 20] if said.cut == "amid" else b"")
            await writer.drain()
            raise ConnectionResetError
        writer.write(content)
        await writer.drain()


@contextlib.asynccontextmanager
async def calling(reply, cache=None, spent=0.0, api=None, breaker=(5, 30.0), **endpoint):
    """(client, server) with one role, `judge`; nothing may be left running once it is closed.

    `breaker`: failures that open the role's breaker, and seconds until it is tested.
    """
    others, (failures, seconds) = asyncio.all_tasks(), breaker
    constants = {"BREAKER_FAILURES": failures, "BREAKER_SECONDS": seconds}
    async with ChatServer(reply) as server:
        roles = {"judge": Endpoint(server.url, "model", **endpoint)}
        with mock.patch.multiple("opdjax.judge.client", **constants):
            client = ApiClient(roles, api or ApiConfig(), cache, spent)
        try:
            yield client, server
        finally:
            await client.close()
    # Of other calls that go on at the same time, and of their server, nothing is known here.
    left = {
        task
        for task in asyncio.all_tasks() - others
        if not task.done() and not task.get_coro().__qualname__.startswith("ChatServer")
    }
    assert not left, left


def run(scenario):
    """The result of a coroutine that ends in time, in a loop of its own; no task of it dies
    unheard.
    """
    unheard = []

    async def limited():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
        async with asyncio.timeout(HANG):
            return await scenario

    result = asyncio.run(limited())
    assert not unheard, unheard
    return result


async def until(condition):
    """Wait until it is so."""
    while not condition():
        await asyncio.sleep(0.002)


async def outcome(call):
    """The reply, or the error."""
    try:
        return await call
    except Exception as error:  # whatever it is, a test looks at it
        return error


def asked(text):
    """A question of its own."""
    return [{"role": "user", "content": str(text)}]


def ok(body, number):
    """A good response, whatever is asked."""
    return Said()


def first(*responses):
    """Those responses, one after the other, then good ones."""
    return lambda body, number: responses[number] if number < len(responses) else Said()
