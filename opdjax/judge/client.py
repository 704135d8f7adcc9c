"""Client of chat models by role, over any server that speaks the OpenAI protocol."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import os
import random
import re
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

import openai

from opdjax.config.api import ApiConfig, Endpoint
from opdjax.judge.bounded_http import REDIRECT, bound, httpx
from opdjax.judge.cache import ReplyCache, request_key
from opdjax.judge.chat_completions import (
    CHARS_PER_TOKEN,
    error_message,
    is_about_format,
    read_reply,
    refused_parameter,
    request_body,
    retry_after,
)
from opdjax.judge.limits import Admission, CircuitBreaker, RateLimiter
from opdjax.judge.replies import (
    ApiRefusedError,
    ApiRequestError,
    ApiUnavailableError,
    MissingKeyError,
    OfflineMissError,
    Reply,
    SpendingCapError,
    Usage,
)
from opdjax.runs.bounds import parse_json

_SECRET_CHARS = 8  # shorter ones stand in texts that have nothing to do with a key
_RETRIED = (408, 429)  # and 500 and above; other statuses would only repeat
_REJECTS_REQUEST = (400, 413, 422)  # the server may accept another request
_FIRST_WAIT, _LONGEST_WAIT, _LONGEST_RETRY_AFTER = 1.0, 8.0, 120.0  # seconds
# Failed requests in a row, retries included, after which an endpoint counts as down: five are no
# coincidence where most requests succeed. Status 429 does not count. Then a pause in seconds, in
# which a server can restart a worker, before a single request tests it while the others wait.
BREAKER_FAILURES, BREAKER_SECONDS = 5, 30.0
# Replies are requested as JSON by a schema that the server enforces. A server that refuses this is
# asked for its JSON mode, then by the prompt alone.
_LESS_STRUCTURE = {"json_schema": "json_object", "json_object": "text"}

# The body of a chat-completion request -> the body of its response.
Responder = Callable[[dict[str, Any]], Awaitable[bytes]]


@dataclasses.dataclass(eq=False)
class _TransientError(Exception):
    """A failure that a retry may cure."""

    cause: str
    retry_after: float | None = None  # seconds, if the server says so
    is_rate_limit: bool = False


class _PostponedError(Exception):
    """The circuit breaker opened while the request waited for its turn."""


class _FormatRefusedError(Exception):
    """The server does not support the requested structured output."""


class _Role:
    """A chat model behind an OpenAI-compatible endpoint: connections, limits and usage."""

    def __init__(self, name: str, endpoint: Endpoint, responder: Responder | None):
        self.name, self.endpoint, self.output, self.usage = name, endpoint, "json_schema", Usage()
        self._key = _api_key(endpoint) if endpoint.concurrency else ""
        self._secret = key_pattern(self._key)
        self.requests = RateLimiter(endpoint.requests_per_minute)
        self.tokens = RateLimiter(endpoint.tokens_per_minute)
        self.slots = asyncio.Semaphore(endpoint.concurrency)
        self.breaker = CircuitBreaker(BREAKER_FAILURES, BREAKER_SECONDS)
        # A chat-completion request -> the body of its response.
        self.post, self.sdk = responder, None
        if responder is not None:
            return
        # The package's default limit is 100 kept connections.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=endpoint.concurrency)
        http = openai.DefaultAsyncHttpxClient(
            limits=limits,
            timeout=endpoint.timeout,
            headers={"accept-encoding": "gzip, deflate"},
            event_hooks={"response": [bound]},
        )
        self.sdk = openai.AsyncOpenAI(
            base_url=endpoint.base_url,
            api_key=self._key or "none",
            timeout=endpoint.timeout,
            max_retries=0,
            http_client=http,
        )
        # chat.completions.create would validate each field, a seventh of the call's time.
        self.post = lambda body: self.sdk.post("/chat/completions", cast_to=bytes, body=body)

    def redacted(self, text: str, max_chars: int = 500) -> str:
        """The text without the API key, cut to `max_chars`."""
        return (self._secret.sub("***", text) if self._secret else text)[:max_chars]

    def without_key(self, reply: Reply) -> Reply:
        """The reply without the API key: replies are stored, and shown to teachers."""
        if len(self._key) < _SECRET_CHARS:  # a word such as "none", for servers without keys
            return reply
        texts = (self.redacted(each, len(each)) for each in (reply.text, reply.finish_reason))
        return Reply(*texts, *dataclasses.astuple(reply)[2:])


@dataclasses.dataclass
class _Request:
    """A request in flight, shared by all callers that make the same one."""

    key: str
    messages: list[dict[str, str]]
    schema: dict[str, Any] | None
    schema_name: str
    task: asyncio.Task[Reply] | None = None
    num_callers: int = 0  # callers waiting for the reply
    is_sent: bool = False  # sent, hence billed


def _api_key(endpoint: Endpoint) -> str:
    """The API key from the environment; "" if the endpoint needs none."""
    if not endpoint.api_key_env:
        return ""
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if not key:
        raise MissingKeyError(
            f"api.api_key_env names {endpoint.api_key_env}, which is not set; export the key of "
            f"{endpoint.base_url} there"
        )
    if not (key.isascii() and key.isprintable()):
        raise MissingKeyError(
            f"{endpoint.api_key_env} holds characters that no key has; expected plain ASCII on one "
            "line, export the key again"
        )
    return key


def key_pattern(key: str) -> re.Pattern | None:
    """Matches the key as it is and as it may be encoded in a text; None without a key."""
    escaped = r"\\*".join(map(re.escape, key))  # also in a text within a text
    if len(key) < _SECRET_CHARS:
        return re.compile(escaped) if key else None
    forms = [key[::-1], key.encode().hex(), quote(key, ""), quote(key), quote_plus(key)]
    for skipped in range(3):  # base64 depends on where in its text the key begins
        whole = base64.b64encode(b" " * skipped + key.encode()).decode().rstrip("=")
        # Without the characters that also depend on the text before and after the key.
        end = len(whole) - ((len(key) + skipped) % 3 > 0)
        forms.append(whole[(0, 2, 3)[skipped] : end])
    forms += [form.replace("+", "-").replace("/", "_") for form in forms[-3:]]  # base64 of URLs
    return re.compile("|".join([escaped, *map(re.escape, forms)]), re.IGNORECASE)


class ApiClient:
    """Sends requests to chat models by role, within each role's limits, in one event loop.

    Replies are cached, and identical requests in flight are sent once.
    """

    def __init__(
        self,
        roles: Mapping[str, Endpoint],
        api: ApiConfig,
        cache: ReplyCache | None,
        spent: float = 0.0,
        in_process: Mapping[str, Responder] | None = None,
    ):
        """`spent`: dollars spent earlier. `in_process`: by base_url, responders called directly."""
        self._roles = {
            name: _Role(name, endpoint, (in_process or {}).get(endpoint.base_url))
            for name, endpoint in roles.items()
        }
        self._api, self._cache = api, cache
        self.spent = spent  # dollars, by the whole run
        self._open: dict[str, _Request] = {}
        self._jitter = random.Random()

    def take_usage(self) -> dict[str, Usage]:
        """Usage by role since the last call, reset to zero."""
        taken = {name: role.usage for name, role in self._roles.items()}
        for role in self._roles.values():
            role.usage = Usage()
        return taken

    async def close(self) -> None:
        """Cancel open requests and close the connections."""
        tasks = [request.task for request in self._open.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for role in self._roles.values():
            if role.sdk is not None:
                await role.sdk.close()

    async def complete(
        self,
        role: str,
        messages: list[dict[str, str]],
        *,
        schema: dict[str, Any] | None = None,
        schema_name: str = "reply",
        sample: int = 0,
    ) -> Reply:
        """The role's reply: from the cache, from an identical request in flight, or from a new one.

        `sample` separates repeated requests with the same messages. Raises ApiUnavailableError or
        ApiRequestError if this request has no reply; a later request may have one. Every other
        ApiError ends the run. If the caller is cancelled, a request already sent still completes:
        its reply is counted and cached.
        """
        if role not in self._roles:
            raise ValueError(
                f"no endpoint has the role {role}; the roles are {', '.join(self._roles) or 'none'}"
                f", set {role}.model"
            )
        endpoint_role = self._roles[role]
        key = request_key(endpoint_role.endpoint, messages, schema, sample)
        if self._cache is not None and (reply := self._cache.get(key)) is not None:
            endpoint_role.usage.cached += 1
            return dataclasses.replace(reply, is_cached=True)
        if not endpoint_role.endpoint.concurrency:
            raise OfflineMissError(
                f"api.concurrency is 0 and the {role}'s reply {key} is not in the cache; expected "
                "the cache of the same run"
            )
        is_shared = key in self._open
        if not is_shared:
            request = self._open[key] = _Request(key, messages, schema, schema_name)
            request.task = asyncio.ensure_future(self._fetch(endpoint_role, request))
            request.task.add_done_callback(lambda _: self._forget(request))
        reply = await self._result(self._open[key])
        endpoint_role.usage.cached += is_shared
        return dataclasses.replace(reply, is_cached=is_shared)

    async def _result(self, request: _Request) -> Reply:
        """The request's reply, for one of its callers."""
        request.num_callers += 1
        try:
            return await asyncio.shield(request.task)
        except SpendingCapError:
            # The caller ends the run on this error: first, count and cache what is already billed.
            if sent := [other.task for other in self._open.values() if other.is_sent]:
                await asyncio.wait(sent)
            raise
        finally:
            request.num_callers -= 1
            if not request.num_callers and not request.is_sent:
                request.task.cancel()
                self._forget(request)

    def _forget(self, request: _Request) -> None:
        if self._open.get(request.key) is request:
            del self._open[request.key]
        if request.task.done() and not request.task.cancelled():
            request.task.exception()  # retrieved: no caller may be left to do so

    async def _fetch(self, role: _Role, request: _Request) -> Reply:
        """Send the request until it has a reply, at most 1 + api.max_retries times."""
        cause, attempt = "no request has been answered lately", 0
        while True:
            self._check_cap()
            if (admission := await role.breaker.enter()) == "down":
                break
            try:
                reply = await self._attempt(role, request, admission)
            except _PostponedError:
                continue
            except _TransientError as error:
                cause, request.is_sent = error.cause, False
                wait = self._wait(attempt, error.retry_after)
                if error.is_rate_limit:
                    # The limit is the role's, not this request's: others would be refused as well.
                    role.requests.pause(wait)
                attempt += 1
                is_last = attempt > self._api.max_retries or admission == "probe"
                if is_last or not request.num_callers:
                    break
                self._check_cap()  # before the pause: `_result` may wait for this request
                role.usage.retries += 1
                await asyncio.sleep(wait)
                continue
            if self._cache is None:
                return reply
            self._cache.put(request.key, reply)
            # If another run stored its reply first, use that one: a replay finds no other.
            return self._cache.get(request.key) or reply
        raise ApiUnavailableError(
            f"the {role.name} at {role.endpoint.base_url} does not answer: {cause}"
        )

    def _wait(self, attempt: int, retry_after: float | None) -> float:
        """Seconds before a retry: the server's Retry-After, else exponential backoff."""
        if retry_after:
            # Capped: a run that sleeps for an hour looks hung.
            return min(retry_after, _LONGEST_RETRY_AFTER)
        # Random, so that requests which failed together do not return together.
        factor = 2.0 ** min(attempt, 10) * self._jitter.uniform(0.5, 1.5)
        return min(_FIRST_WAIT * factor, _LONGEST_WAIT)

    def _check_cap(self) -> None:
        if self._api.max_dollars and self.spent >= self._api.max_dollars:
            raise SpendingCapError(
                f"the run has spent {self.spent:.4f} dollars; api.max_dollars is "
                f"{self._api.max_dollars:g}; raise api.max_dollars to go on"
            )

    async def _attempt(self, role: _Role, request: _Request, admission: Admission) -> Reply:
        """Send once within the role's limits; count the usage, tell the breaker the outcome."""
        num_chars = sum(len(message["content"]) for message in request.messages)
        expected = num_chars / CHARS_PER_TOKEN + role.endpoint.max_tokens
        num_unused, is_answered = 0.0, None
        try:
            async with role.slots:
                await role.tokens.acquire(expected)
                num_unused = expected
                await role.requests.acquire(1)
                self._check_cap()
                if role.breaker.is_open and admission != "probe":
                    raise _PostponedError
                request.is_sent = True
                began = time.monotonic()
                try:
                    reply = await self._negotiate(role, request)
                finally:
                    role.usage.seconds += time.monotonic() - began
            num_unused -= reply.input_tokens + reply.output_tokens
            is_answered = True
        except (_TransientError, ApiRequestError, ApiRefusedError) as error:
            # A refusal is an answer.
            is_answered = not isinstance(error, _TransientError) or error.is_rate_limit
            raise
        finally:
            role.tokens.give_back(num_unused)
            role.breaker.leave(admission, is_answered)
        price = role.endpoint.input_price, role.endpoint.output_price
        dollars = (reply.input_tokens * price[0] + reply.output_tokens * price[1]) / 1e6
        role.usage.calls += 1
        role.usage.dollars += dollars
        role.usage.input_tokens += reply.input_tokens
        role.usage.output_tokens += reply.output_tokens
        self.spent += dollars
        return reply

    async def _negotiate(self, role: _Role, request: _Request) -> Reply:
        """The reply, in the most structured format that the server supports."""
        is_structured = request.schema is not None
        output = role.output if is_structured else "text"
        while True:
            form = request.schema, request.schema_name, output
            body = request_body(role.endpoint, request.messages, *form)
            try:
                reply = await _post(role, body, is_structured=is_structured)
            except _FormatRefusedError:
                output = _LESS_STRUCTURE[output]
                await role.requests.acquire(1)
                continue
            if is_structured and output != role.output:
                change = f"does not support {role.output} output; using {output}"
                print(f"the {role.name}'s server {change}", file=sys.stderr)
                role.output = output  # from now on
            return reply


async def _post(role: _Role, body: dict[str, Any], *, is_structured: bool) -> Reply:
    """Send the body once; every failure becomes one of this package's errors."""
    try:
        # The package's own timeout applies to each chunk of a response, of which there may be many.
        async with asyncio.timeout(role.endpoint.timeout):
            content = await role.post(body)
    except (openai.APITimeoutError, TimeoutError):
        cause = f"no reply within endpoint.timeout, {role.endpoint.timeout:g} seconds"
        raise _TransientError(cause) from None
    except openai.APIConnectionError as error:
        cause = role.redacted(f"no connection ({error.__cause__ or error})")
        raise _TransientError(cause) from None
    except openai.APIStatusError as error:
        raise _status_error(role, body, error) from None
    except (openai.OpenAIError, httpx.InvalidURL) as error:
        cause = f"the {role.name}'s request failed: {type(error).__name__}: {error}"
        raise ApiRequestError(role.redacted(cause)) from None
    try:
        return role.without_key(read_reply(parse_json(content), body, is_structured=is_structured))
    except (ValueError, LookupError, TypeError, AttributeError):
        # For instance a proxy's page, or an error with status 200.
        text = role.redacted(content.decode(errors="replace"), 200)
        raise _TransientError(f"the response is no chat completion: {text!r}") from None


def _status_error(role: _Role, body: dict[str, Any], error: openai.APIStatusError) -> Exception:
    """The error for a status other than 200."""
    status, text, endpoint = error.status_code, error.response.text, role.endpoint
    message = error_message(text)
    if location := error.response.headers.get(REDIRECT):
        message = f"it redirects to {location}, which is not followed; {message}"
    message = role.redacted(message)
    if status in _RETRIED or status >= 500:
        wait = retry_after(error.response.headers)
        return _TransientError(f"status {status}: {message}", wait, is_rate_limit=status == 429)
    if status in _REJECTS_REQUEST:
        if "response_format" in body and is_about_format(text):
            return _FormatRefusedError()
        if (name := refused_parameter(message, body)) is None:
            text = f"the {role.name} refuses a request with status {status}: {message}"
            return ApiRequestError(text)
        return ApiRefusedError(
            f"the {role.name} at {endpoint.base_url} refuses every request with status {status}: "
            f"{message.rstrip('.')}; {_advice(role, name)}"
        )
    key = endpoint.api_key_env or "api_key_env (none is named)"
    return ApiRefusedError(
        f"the {role.name} at {endpoint.base_url} answers with status {status}: {message}; check "
        f"its base_url, model and the key in {key}"
    )


def _advice(role: _Role, parameter: str) -> str:
    """What to set where the server does not support a parameter of the request."""
    names = {"max_tokens", "max_completion_tokens"}
    if parameter in names:
        return f"set api.max_tokens_field to {(names - {parameter}).pop()}"
    section = "teach" if role.name == "teacher" else role.name
    return f"leave {section}.{parameter} out, or set it to a value that the server supports"
