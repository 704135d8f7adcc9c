"""The client: chat models by role, over any server that speaks the OpenAI protocol. For one event loop, which is the caller's."""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import json
import os
import random
import sys
import time
from collections.abc import Mapping
from typing import Any

import openai

from opdjax.api.cache import ReplyCache, request_key
from opdjax.api.limits import Breaker, Budget
from opdjax.api.replies import (
    ApiRefusedError,
    ApiRequestError,
    ApiUnavailableError,
    MissingKeyError,
    OfflineMissError,
    Reply,
    SpendingCapError,
    Usage,
)
from opdjax.api_config import ApiConfig, EndpointConfig

_RETRIED = (408, 429)  # and 500 on; nothing else gets better by asking again
_OF_THE_REQUEST = (400, 413, 422)  # another request may well be accepted
_FIRST_WAIT, _LONGEST_WAIT, _LONGEST_RETRY_AFTER = 1.0, 8.0, 120.0  # seconds
_LESS_STRUCTURE = {"json_schema": "json_object", "json_object": "text"}
_CHARS_PER_TOKEN = 4  # where a server does not count, and for what is foreseen


class _TransientError(Exception):
    """A failure that may pass."""

    def __init__(self, cause: str, retry_after: float | None = None, *, is_rate_limit: bool = False):
        super().__init__(cause)
        self.retry_after, self.is_rate_limit = retry_after, is_rate_limit


class _Role:
    """One endpoint with its connections, limits and account."""

    def __init__(self, name: str, endpoint: EndpointConfig, api: ApiConfig):
        self.name, self.endpoint, self.output, self.usage = name, endpoint, endpoint.output, Usage()
        self.key = _key_of(name, endpoint)
        self.requests, self.tokens = Budget(endpoint.requests_per_minute), Budget(endpoint.tokens_per_minute)
        self.places = asyncio.Semaphore(endpoint.concurrency)
        self.breaker = Breaker(api.breaker_failures, api.breaker_seconds)
        self.sdk = openai.AsyncOpenAI(base_url=endpoint.base_url, api_key=self.key or "none", timeout=endpoint.timeout, max_retries=0)

    def redacted(self, text: str) -> str:
        """The text, short and without the key."""
        text = text.replace(self.key, "***") if self.key else text
        return text[:500]


def _key_of(name: str, endpoint: EndpointConfig) -> str:
    """The key from the environment; none where the endpoint wants none."""
    if not endpoint.api_key_env:
        return ""
    key = os.environ.get(endpoint.api_key_env, "")
    if not key:
        raise MissingKeyError(
            f"{name}.api_key_env names {endpoint.api_key_env}, which is not set; export the key of {endpoint.base_url} there"
        )
    return key


class ApiClient:
    """Asks whoever has a role, within that role's limits, at most once for each question."""

    def __init__(self, roles: Mapping[str, EndpointConfig], api: ApiConfig, cache: ReplyCache | None, spent: float = 0.0):
        self._roles = {name: _Role(name, endpoint, api) for name, endpoint in roles.items()}
        self._api, self._cache, self._spent = api, cache, spent
        self._open: dict[str, asyncio.Task[Reply]] = {}

    @property
    def spent(self) -> float:
        """Dollars, of the whole run."""
        return self._spent

    def take_usage(self) -> dict[str, Usage]:
        """What each role was asked since the last call."""
        taken = {name: role.usage for name, role in self._roles.items()}
        for role in self._roles.values():
            role.usage = Usage()
        return taken

    async def close(self) -> None:
        """End what is open, and let go of the connections."""
        for task in self._open.values():
            task.cancel()
        await asyncio.gather(*self._open.values(), return_exceptions=True)
        for role in self._roles.values():
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
        """The reply of whoever has the role: from the cache, or of a request, which several callers share where they ask the same.

        ApiUnavailableError and ApiRequestError: this question has no answer now, another may have one. Every other ApiError ends
        the run.
        """
        asked = self._roles[role]
        key = request_key(asked.endpoint, messages, schema, sample)
        if self._cache is not None and (known := self._cache.get(key)) is not None:
            asked.usage.cached += 1
            return Reply(known["text"], known["finish_reason"], True, known["input_tokens"], known["output_tokens"])
        if self._api.offline:
            raise OfflineMissError(
                f"api.offline is set and the {role}'s reply {key} is not in the cache; expected a cache of this very run"
            )
        if key in self._open:
            asked.usage.cached += 1
            return dataclasses.replace(await asyncio.shield(self._open[key]), is_cached=True)
        task = self._open[key] = asyncio.ensure_future(self._fetch(asked, key, messages, schema, schema_name))
        task.add_done_callback(lambda _: self._open.pop(key, None))
        return await asyncio.shield(task)

    async def _fetch(self, role: _Role, key: str, messages, schema, schema_name: str) -> Reply:
        """Ask until there is an answer, as often as the config allows."""
        cause = ""
        for attempt in range(self._api.max_retries + 1):
            self._check_cap()
            if not await role.breaker.enter():
                break
            try:
                reply = await self._send(role, messages, schema, schema_name)
            except _TransientError as error:
                cause = str(error)
                role.breaker.failed()
                wait = min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT) * random.uniform(0.5, 1.5)
                wait = wait if error.retry_after is None else min(error.retry_after, _LONGEST_RETRY_AFTER)
                if error.is_rate_limit:
                    role.requests.pause(wait)
                if attempt < self._api.max_retries:
                    role.usage.retries += 1
                    await asyncio.sleep(wait)
                continue
            except (ApiRequestError, ApiRefusedError):
                role.breaker.succeeded()  # somebody answers
                raise
            except (SpendingCapError, asyncio.CancelledError):
                role.breaker.abandoned()  # those who wait for this one as the probe would wait for ever
                raise
            role.breaker.succeeded()
            if self._cache is None:
                return reply
            self._cache.put(key, dataclasses.asdict(reply))
            # Of two runs that ask the same at once both go on with the reply that stays: a replay finds no other.
            return dataclasses.replace(reply, **self._cache.get(key))
        reason = cause or "no request has been answered lately"
        raise ApiUnavailableError(f"the {role.name} at {role.endpoint.base_url} does not answer: {reason}")

    def _check_cap(self) -> None:
        if self._api.max_dollars and self._spent >= self._api.max_dollars:
            raise SpendingCapError(
                f"the run has spent {self._spent:.4f} dollars; api.max_dollars is {self._api.max_dollars:g}, raise it to go on"
            )

    async def _send(self, role: _Role, messages, schema, schema_name: str) -> Reply:
        """One request within the role's limits, counted."""
        foreseen = sum(len(message["content"]) for message in messages) / _CHARS_PER_TOKEN + role.endpoint.max_tokens
        async with role.places:
            await role.requests.take(1)
            await role.tokens.take(foreseen)
            self._check_cap()
            began = time.monotonic()
            try:
                reply = await self._post(role, _body(role, messages, schema, schema_name))
            finally:
                role.usage.seconds += time.monotonic() - began
        role.tokens.give_back(foreseen - reply.input_tokens - reply.output_tokens)
        self._account(role, reply)
        return reply

    def _account(self, role: _Role, reply: Reply) -> None:
        usage, endpoint = role.usage, role.endpoint
        dollars = (reply.input_tokens * endpoint.input_price + reply.output_tokens * endpoint.output_price) / 1e6
        usage.calls, usage.dollars = usage.calls + 1, usage.dollars + dollars
        usage.input_tokens, usage.output_tokens = usage.input_tokens + reply.input_tokens, usage.output_tokens + reply.output_tokens
        self._spent += dollars

    async def _post(self, role: _Role, body: dict[str, Any]) -> Reply:
        try:
            raw = await role.sdk.chat.completions.with_raw_response.create(**body)
        except openai.APITimeoutError as error:
            raise _TransientError(f"no reply within endpoint.timeout, {role.endpoint.timeout:g} seconds") from error
        except openai.APIConnectionError as error:
            raise _TransientError(role.redacted(f"no connection ({error.__cause__ or error})")) from error
        except openai.APIStatusError as error:
            return await self._refused(role, body, error)
        except openai.OpenAIError as error:
            raise ApiRequestError(role.redacted(f"the {role.name}'s request failed: {type(error).__name__}: {error}")) from None
        return _reply_of(raw.http_response.content, body)

    async def _refused(self, role: _Role, body: dict[str, Any], error: openai.APIStatusError) -> Reply:
        """What a status other than 200 means; another form of the request is tried where the server knows no such structured output."""
        status, said = error.status_code, role.redacted(error.message)
        if status in _RETRIED or status >= 500:
            raise _TransientError(f"status {status}: {said}", _retry_after(error.response.headers), is_rate_limit=status == 429) from None
        if status in _OF_THE_REQUEST and "response_format" in body and _names_the_form(said):
            if role.output == body_output(body):
                role.output = _LESS_STRUCTURE[role.output]
                print(f"the {role.name}'s server takes no {body_output(body)} output; going on with {role.output}", file=sys.stderr)
            kept = {name: value for name, value in body.items() if name != "response_format"}
            form = {"response_format": {"type": "json_object"}} if role.output == "json_object" else {}
            return await self._post(role, kept | form)
        if status in _OF_THE_REQUEST:
            raise ApiRequestError(f"the {role.name} refuses a request with status {status}: {said}") from None
        raise ApiRefusedError(
            f"the {role.name} at {role.endpoint.base_url} answers with status {status}: {said}; check its base_url, model and the key in "
            f"{role.endpoint.api_key_env or 'api_key_env (none is named)'}"
        ) from None


def _names_the_form(said: str) -> bool:
    return any(word in said.lower() for word in ("response_format", "json_schema", "json_object", "structured output"))


def body_output(body: dict[str, Any]) -> str:
    """The form of output that a request asks for."""
    return body["response_format"]["type"] if "response_format" in body else "text"


def _body(role: _Role, messages, schema, schema_name: str) -> dict[str, Any]:
    endpoint = role.endpoint
    body = {"model": endpoint.model, "messages": messages, endpoint.max_tokens_field: endpoint.max_tokens}
    names = ("temperature", "top_p", "seed", "reasoning_effort")
    body |= {name: getattr(endpoint, name) for name in names if getattr(endpoint, name) is not None}
    if schema is None or role.output == "text":
        return body
    if role.output == "json_object":
        return body | {"response_format": {"type": "json_object"}}
    return body | {"response_format": {"type": "json_schema", "json_schema": {"name": schema_name, "schema": schema, "strict": True}}}


def _reply_of(content: bytes, body: dict[str, Any]) -> Reply:
    """The reply in a response's body; a body that is none may be a proxy's page, and is tried again."""
    try:
        document = json.loads(content)
        choice = document["choices"][0]
        message = choice["message"]
        said = message.get("content") or message.get("reasoning_content") or message.get("reasoning") or ""
        usage = document.get("usage") or {}
        if not isinstance(said, str):
            raise TypeError("the content is no text")
        asked = sum(len(each["content"]) for each in body["messages"])
        counts = (usage.get("prompt_tokens"), asked), (usage.get("completion_tokens"), len(said))
        tokens = [int(count) if isinstance(count, int) and count >= 0 else -(-chars // _CHARS_PER_TOKEN) for count, chars in counts]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _TransientError(f"the response is no chat completion ({type(error).__name__})") from error
    return Reply(said, str(choice.get("finish_reason") or "stop"), False, *tokens)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait, which it may say as a number or as a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
