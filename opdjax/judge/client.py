"""The client: chat models by role, over any server that speaks the OpenAI protocol. For one event
loop, which is the caller's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import email.utils
import json
import math
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any

import openai

from opdjax.config.api import ApiConfig, EndpointConfig
from opdjax.judge.cache import ReplyCache, request_key
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

_RETRIED = (408, 429)  # and 500 on; nothing else gets better by asking again
_OF_THE_REQUEST = (400, 413, 422)  # another request may well be accepted
_FIRST_WAIT, _LONGEST_WAIT, _LONGEST_RETRY_AFTER = 1.0, 8.0, 120.0  # seconds
_LESS_STRUCTURE = {"json_schema": "json_object", "json_object": "text"}
_CHARS_PER_TOKEN = 4  # where a server does not count, and for what is foreseen

Answer = Callable[
    [dict[str, Any]], Awaitable[bytes]
]  # a request for a chat completion -> the response's body


class _TransientError(Exception):
    """A failure that may pass."""

    def __init__(
        self, cause: str, retry_after: float | None = None, *, is_rate_limit: bool = False
    ):
        super().__init__(cause)
        self.retry_after, self.is_rate_limit = retry_after, is_rate_limit


class _PostponedError(Exception):
    """The role was taken for down before the request's turn came."""


class _FormRefusedError(Exception):
    """The server knows no such structured output."""


class _Role:
    """One endpoint with its connections, limits and account."""

    def __init__(
        self, name: str, endpoint: EndpointConfig, api: ApiConfig, answer: Answer | None = None
    ):
        self.name, self.endpoint, self.output, self.usage = name, endpoint, endpoint.output, Usage()
        self._key = "" if api.offline else _key_of(name, endpoint)
        self.requests, self.tokens = (
            RateLimiter(endpoint.requests_per_minute),
            RateLimiter(endpoint.tokens_per_minute),
        )
        self.places = asyncio.Semaphore(endpoint.concurrency)
        self.breaker = CircuitBreaker(api.breaker_failures, api.breaker_seconds)
        self._answer = answer
        if answer is not None:
            return
        # The package's own limits keep 100 connections at most.
        limits = type(openai.DEFAULT_CONNECTION_LIMITS)(
            max_connections=None, max_keepalive_connections=endpoint.concurrency
        )
        http = openai.DefaultAsyncHttpxClient(limits=limits, timeout=endpoint.timeout)
        self._sdk = openai.AsyncOpenAI(
            base_url=endpoint.base_url,
            api_key=self._key or "none",
            timeout=endpoint.timeout,
            max_retries=0,
            http_client=http,
        )

    async def post(self, body: dict[str, Any]) -> bytes:
        """The response to a request for a chat completion."""
        if self._answer is not None:
            return await self._answer(body)
        # And not chat.completions.create, whose check of each field of the request costs a seventh
        # of the call.
        return await self._sdk.post("/chat/completions", cast_to=bytes, body=body)

    async def close(self) -> None:
        """Let go of the connections."""
        if self._answer is None:
            await self._sdk.close()

    def redacted(self, text: str, longest: int = 500) -> str:
        """The text, short and without the key, in whatever quotes it stands."""
        # Bodies and representations that quote it escape it as well.
        for form in {self._key, repr(self._key)[1:-1], json.dumps(self._key)[1:-1]} - {""}:
            text = text.replace(form, "***")
        return text[:longest]

    def settle_on(self, output: str) -> None:
        """Ask for no more structure than the server has."""
        if output != self.output:
            print(
                f"the {self.name}'s server takes no {self.output} output; going on with {output}",
                file=sys.stderr,
            )
            self.output = output


@dataclasses.dataclass
class _Question:
    """What is being asked for somebody."""

    key: str
    messages: list[dict[str, str]]
    schema: dict[str, Any] | None
    schema_name: str
    task: asyncio.Task[Reply] | None = None
    callers: int = 0  # who wait for the reply
    is_sent: bool = False  # on the wire, and so to be paid for

    @property
    def num_chars(self) -> int:
        """Of the prompt."""
        return sum(len(message["content"]) for message in self.messages)


def _key_of(name: str, endpoint: EndpointConfig) -> str:
    """The key from the environment; none where the endpoint wants none."""
    if not endpoint.api_key_env:
        return ""
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if not key:
        raise MissingKeyError(
            f"{name}.api_key_env names {endpoint.api_key_env}, which is not set; export the key of {endpoint.base_url} there"
        )
    if not (key.isascii() and key.isprintable()):
        raise MissingKeyError(
            f"{endpoint.api_key_env} holds characters that no key has; expected plain ASCII on one line, export the key again"
        )
    return key


class ApiClient:
    """Asks whoever has a role, within that role's limits, at most once for each question."""

    def __init__(
        self,
        roles: Mapping[str, EndpointConfig],
        api: ApiConfig,
        cache: ReplyCache | None,
        spent: float = 0.0,
        built_in: Mapping[str, Answer] = MappingProxyType({}),
    ):
        """`built_in`: by base_url, who answers in this process instead of over HTTP."""
        self._roles = {
            name: _Role(name, endpoint, api, built_in.get(endpoint.base_url))
            for name, endpoint in roles.items()
        }
        self._api, self._cache, self._spent = api, cache, spent
        self._open: dict[str, _Question] = {}
        self._jitter = random.Random()

    @property
    def spent(self) -> float:
        """Dollars, of the whole run."""
        return self._spent

    def take_usage(self) -> dict[str, Usage]:
        """What each role was asked since the last call; to be called in the client's loop, as all
        else.
        """
        taken = {name: role.usage for name, role in self._roles.items()}
        for role in self._roles.values():
            role.usage = Usage()
        return taken

    async def close(self) -> None:
        """End what is open, and let go of the connections."""
        tasks = [question.task for question in self._open.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for role in self._roles.values():
            await role.close()

    async def complete(
        self,
        role: str,
        messages: list[dict[str, str]],
        *,
        schema: dict[str, Any] | None = None,
        schema_name: str = "reply",
        sample: int = 0,
    ) -> Reply:
        """The reply of whoever has the role: from the cache, or of a request, which several callers
        share where they ask the same.

        ApiUnavailableError and ApiRequestError: this question has no answer now, another may have
        one. Every other ApiError ends the run. A caller who is cancelled leaves behind what is on
        the wire and nothing else: its reply is counted and cached.
        """
        if role not in self._roles:
            raise ValueError(
                f"nobody is the {role}; the roles are {', '.join(self._roles) or 'none'}, give {role}.base_url and {role}.model"
            )
        asked = self._roles[role]
        key = request_key(asked.endpoint, messages, schema, sample)
        if self._cache is not None and (known := self._cache.get(key)) is not None:
            asked.usage.cached += 1
            return dataclasses.replace(known, is_cached=True)
        if self._api.offline:
            raise OfflineMissError(
                f"api.offline is set and the {role}'s reply {key} is not in the cache; expected a cache of this very run"
            )
        if (question := self._open.get(key)) is not None:
            reply = await self._answer(question)
            asked.usage.cached += 1
            return dataclasses.replace(reply, is_cached=True)
        question = self._open[key] = _Question(key, messages, schema, schema_name)
        question.task = asyncio.ensure_future(self._fetch(asked, question))
        question.task.add_done_callback(lambda _: self._forget(question))
        return await self._answer(question)

    async def _answer(self, question: _Question) -> Reply:
        """What comes of the question, for one of its callers."""
        question.callers += 1
        try:
            return await asyncio.shield(question.task)
        except SpendingCapError:
            # Whoever hears of the cap ends the run: what has been paid for is counted and kept
            # before.
            if sent := [other.task for other in self._open.values() if other.is_sent]:
                await asyncio.wait(sent)
            raise
        finally:
            question.callers -= 1
            if not question.callers and not question.is_sent:
                question.task.cancel()
                self._forget(question)

    def _forget(self, question: _Question) -> None:
        if self._open.get(question.key) is question:
            del self._open[question.key]
        if question.task.done() and not question.task.cancelled():
            question.task.exception()  # which nobody may have waited for

    async def _fetch(self, role: _Role, question: _Question) -> Reply:
        """Ask until there is an answer, as often as the config allows."""
        cause, attempt = "no request has been answered lately", 0
        while True:
            self._check_cap()
            if (admission := await role.breaker.enter()) == "down":
                break
            try:
                reply = await self._attempt(role, question, admission)
            except _PostponedError:
                continue
            except _TransientError as error:
                cause, question.is_sent = str(error), False
                wait = self._wait(attempt, error.retry_after)
                if error.is_rate_limit:
                    # The limit is the role's and not this request's: the others would only hear the
                    # same.
                    role.requests.pause(wait)
                attempt += 1
                if attempt > self._api.max_retries or admission == "probe" or not question.callers:
                    break
                self._check_cap()  # before the pause: others may wait until this one is told
                role.usage.retries += 1
                await asyncio.sleep(wait)
                continue
            if self._cache is None:
                return reply
            self._cache.put(question.key, reply)
            # Of two runs that ask the same at once both go on with the reply that stays: a replay
            # finds no other.
            return dataclasses.replace(self._cache.get(question.key) or reply, is_cached=False)
        raise ApiUnavailableError(
            f"the {role.name} at {role.endpoint.base_url} does not answer: {cause}"
        )

    def _wait(self, attempt: int, retry_after: float | None) -> float:
        """Seconds until a request is tried again: what the server says, else ever longer ones."""
        if retry_after:
            # Who says an hour is asked sooner: a run that stands still so long looks like one that
            # hangs.
            return min(retry_after, _LONGEST_RETRY_AFTER)
        # By chance too, lest those who failed together come back together.
        return min(
            _FIRST_WAIT * 2.0 ** min(attempt, 10) * self._jitter.uniform(0.5, 1.5), _LONGEST_WAIT
        )

    def _check_cap(self) -> None:
        if self._api.max_dollars and self._spent >= self._api.max_dollars:
            raise SpendingCapError(
                f"the run has spent {self._spent:.4f} dollars; api.max_dollars is {self._api.max_dollars:g}, raise it to go on"
            )

    async def _attempt(self, role: _Role, question: _Question, admission: Admission) -> Reply:
        """One attempt, of which the breaker hears whether the server answered, be it with a
        refusal.
        """
        is_answered = None
        try:
            reply = await self._send(role, question, admission)
            is_answered = True
        except _TransientError as error:
            is_answered = error.is_rate_limit
            raise
        except (ApiRequestError, ApiRefusedError):
            is_answered = True
            raise
        finally:
            role.breaker.leave(admission, is_answered)
        return reply

    async def _send(self, role: _Role, question: _Question, admission: Admission) -> Reply:
        """One request within the role's limits, counted."""
        foreseen, used = question.num_chars / _CHARS_PER_TOKEN + role.endpoint.max_tokens, 0
        async with role.places:
            await role.tokens.take(foreseen)
            try:
                await role.requests.take(1)
                self._check_cap()
                if role.breaker.is_open and admission != "probe":
                    raise _PostponedError
                question.is_sent = True
                reply = await self._timed(role, question)
                used = reply.input_tokens + reply.output_tokens
            finally:
                role.tokens.give_back(foreseen - used)
        self._account(role, reply)
        return reply

    async def _timed(self, role: _Role, question: _Question) -> Reply:
        began = time.monotonic()
        try:
            return await self._in_some_form(role, question)
        finally:
            role.usage.seconds += time.monotonic() - began

    def _account(self, role: _Role, reply: Reply) -> None:
        usage, endpoint = role.usage, role.endpoint
        dollars = (
            reply.input_tokens * endpoint.input_price + reply.output_tokens * endpoint.output_price
        ) / 1e6
        usage.calls, usage.dollars = usage.calls + 1, usage.dollars + dollars
        usage.input_tokens, usage.output_tokens = (
            usage.input_tokens + reply.input_tokens,
            usage.output_tokens + reply.output_tokens,
        )
        self._spent += dollars

    async def _in_some_form(self, role: _Role, question: _Question) -> Reply:
        """The reply, in the most structured form that the server takes; what it takes is known once
        it has answered.
        """
        output = "text" if question.schema is None else role.output
        while True:
            try:
                reply = await self._post(
                    role,
                    _body(role.endpoint, question, output),
                    is_form=question.schema is not None,
                )
            except _FormRefusedError:
                output = _LESS_STRUCTURE[output]
                await role.requests.take(1)
                continue
            if question.schema is not None:
                role.settle_on(output)
            return reply

    async def _post(self, role: _Role, body: dict[str, Any], *, is_form: bool) -> Reply:
        """One request on the wire."""
        try:
            # The package's own limit is on the wait for each piece of a response, which may come in
            # very many.
            async with asyncio.timeout(role.endpoint.timeout):
                content = await role.post(body)
        except (openai.APITimeoutError, TimeoutError):
            raise _TransientError(
                f"no reply within endpoint.timeout, {role.endpoint.timeout:g} seconds"
            ) from None
        except openai.APIConnectionError as error:
            raise _TransientError(
                role.redacted(f"no connection ({error.__cause__ or error})")
            ) from None
        except openai.APIStatusError as error:
            raise _refusal(role, body, error) from None
        except openai.OpenAIError as error:
            raise ApiRequestError(
                role.redacted(f"the {role.name}'s request failed: {type(error).__name__}: {error}")
            ) from None
        try:
            return _reply_of(json.loads(content), body, is_form=is_form)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            # A proxy's page, perhaps, or an error under a status of 200.
            said = role.redacted(content.decode(errors="replace"), 200)
            raise _TransientError(f"the response is no chat completion: {said!r}") from None


def _refusal(role: _Role, body: dict[str, Any], error: openai.APIStatusError) -> Exception:
    """What a status other than 200 means."""
    status, said = error.status_code, role.redacted(_words_of(error.response.text))
    if status in _RETRIED or status >= 500:
        return _TransientError(
            f"status {status}: {said}",
            _retry_after(error.response.headers),
            is_rate_limit=status == 429,
        )
    if (
        status in _OF_THE_REQUEST
        and "response_format" in body
        and _names_the_form(error.response.text)
    ):
        return _FormRefusedError()
    if status in _OF_THE_REQUEST:
        return ApiRequestError(f"the {role.name} refuses a request with status {status}: {said}")
    return ApiRefusedError(
        f"the {role.name} at {role.endpoint.base_url} answers with status {status}: {said}; check its base_url, model and the key in "
        f"{role.endpoint.api_key_env or 'api_key_env (none is named)'}"
    )


def _words_of(text: str) -> str:
    """What a server says in the body of a refusal; the package's own error keeps it only where it
    has one certain form.
    """
    try:
        said = json.loads(text)
        for name in ("error", "message", "detail"):
            said = (
                said[name]
                if isinstance(said, dict) and isinstance(said.get(name), (dict, str))
                else said
            )
    except (ValueError, RecursionError):
        said = None
    return " ".join((said if isinstance(said, str) else text).split()) or "(nothing)"


def _names_the_form(said: str) -> bool:
    words = (
        "response_format",
        "response_schema",
        "json_schema",
        "json schema",
        "json_object",
        "structured output",
    )
    return any(word in said.lower() for word in words)


def _body(endpoint: EndpointConfig, question: _Question, output: str) -> dict[str, Any]:
    """The request, whose reply is to have that form."""
    messages = [
        message | {"content": _as_unicode(message["content"])} for message in question.messages
    ]
    body = {
        "model": endpoint.model,
        "messages": messages,
        endpoint.max_tokens_field: endpoint.max_tokens,
    }
    names = ("temperature", "top_p", "seed", "reasoning_effort")
    body |= {name: getattr(endpoint, name) for name in names if getattr(endpoint, name) is not None}
    if output == "json_object":
        return body | {"response_format": {"type": "json_object"}}
    if output == "json_schema":
        form = {"name": question.schema_name, "schema": question.schema, "strict": True}
        return body | {"response_format": {"type": "json_schema", "json_schema": form}}
    return body


def _as_unicode(text: str) -> str:
    """Half a surrogate pair, where somebody cut a text there, replaced: no request can carry it."""
    return (
        text
        if text.isascii()
        else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    )


def _reply_of(document: Any, body: dict[str, Any], *, is_form: bool) -> Reply:
    """The reply in a response; LookupError, TypeError and the like where it is no chat completion."""
    choice = document["choices"][0]
    message = choice["message"]
    # Servers that part what was thought from what is said may leave the second empty; a filled form
    # is looked for there as well, but what was thought aloud is no answer to a prompt.
    forms = [
        message.get(name) or ""
        for name in ("content", *(("reasoning_content", "reasoning") if is_form else ()))
    ]
    said = _as_unicode(next((form for form in forms if form.strip()), ""))
    usage = document.get("usage") or {}
    asked = sum(len(each["content"]) for each in body["messages"])
    counts = (usage.get("prompt_tokens"), asked), (usage.get("completion_tokens"), len(said))
    tokens = [
        count if isinstance(count, int) and count >= 0 else -(-chars // _CHARS_PER_TOKEN)
        for count, chars in counts
    ]
    return Reply(said, str(choice.get("finish_reason") or "stop"), False, *tokens)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait, which it may say as a number or as a date; None where
    it says neither.
    """
    value = headers.get("retry-after", "")
    try:
        return max(seconds, 0.0) if math.isfinite(seconds := float(value)) else None
    except ValueError:
        pass
    try:
        date = email.utils.parsedate_to_datetime(value)
        return max(date.replace(tzinfo=date.tzinfo or datetime.UTC).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, LookupError, OverflowError):
        return None
