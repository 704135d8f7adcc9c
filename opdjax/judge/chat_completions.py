"""Requests and responses of the OpenAI chat-completions protocol, as JSON documents."""

from __future__ import annotations

import datetime
import email.utils
import math
import re
import time
from collections.abc import Mapping
from typing import Any

from opdjax.config.api import Endpoint
from opdjax.judge.replies import Reply
from opdjax.runs.bounds import REQUEST_TOKENS, parse_json

_REASON_CHARS = 40
CHARS_PER_TOKEN = 4  # estimate, used where a server does not count and before a request is sent
_REFUSAL = "(?:unsupported|unrecogni[sz]ed|unknown|unexpected|extra|not? (?:support|permit|allow))"
_FORMAT_WORDS = re.compile("response_(format|schema)|json[_ ]schema|json_object|structured output")


def request_body(
    endpoint: Endpoint,
    messages: list[dict[str, str]],
    schema: dict[str, Any] | None,
    schema_name: str,
    output: str,
) -> dict[str, Any]:
    """The request; `output` is the reply format: "json_schema", "json_object" or "text"."""
    body = {
        "model": endpoint.model,
        "messages": [message | {"content": _valid(message["content"])} for message in messages],
        endpoint.limit_name: endpoint.max_tokens,
    }
    names = ("temperature", "top_p", "reasoning_effort")
    body |= {name: getattr(endpoint, name) for name in names if getattr(endpoint, name) is not None}
    if output == "json_object":
        return body | {"response_format": {"type": "json_object"}}
    if output == "json_schema":
        form = {"name": schema_name, "schema": schema, "strict": True}
        return body | {"response_format": {"type": "json_schema", "json_schema": form}}
    return body


def read_reply(document: Any, body: dict[str, Any], *, is_structured: bool) -> Reply:
    """The reply in a response to `body`.

    Raises LookupError, TypeError and the like if the document is no chat completion.
    """
    choice = document["choices"][0]
    message = choice["message"]
    # Servers that separate reasoning from content may leave the content empty. JSON is then looked
    # for in the reasoning; free text is not: reasoning is no answer.
    names = ("content", *(("reasoning_content", "reasoning") if is_structured else ()))
    texts = [message.get(name) or "" for name in names]
    text = _valid(next((text for text in texts if text.strip()), ""))
    usage = document.get("usage") or {}
    num_chars = sum(len(message["content"]) for message in body["messages"])
    tokens = []
    for name, chars in (("prompt_tokens", num_chars), ("completion_tokens", len(text))):
        is_counted = type(count := usage.get(name)) is int and 0 <= count <= REQUEST_TOKENS
        tokens.append(count if is_counted else -(-chars // CHARS_PER_TOKEN))
    reason = str(choice.get("finish_reason") or "stop")[:_REASON_CHARS]
    return Reply(text, reason, False, *tokens)


def _valid(text: str) -> str:
    """Half surrogate pairs (a text cut inside one) replaced: no request can carry them."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def error_message(text: str) -> str:
    """The server's message in an error body of any form; the whole body if it has none.

    The openai package keeps the message only of one exact form.
    """
    try:
        found = parse_json(text)
        for name in ("error", "message", "detail"):
            if isinstance(found, dict) and isinstance(found.get(name), (dict, str)):
                found = found[name]
    except ValueError:
        found = None
    return " ".join((found if isinstance(found, str) else text).split()) or "(nothing)"


def refused_parameter(message: str, body: dict[str, Any]) -> str | None:
    """The parameter of the request that the server says it does not support; None without one."""
    # The start: some servers repeat the request, and with it what a student wrote.
    sentence = message[:300]
    for name in sorted(body.keys() - {"model", "messages", "response_format"}):
        refusal = rf"{_REFUSAL}[^.]{{0,60}}\b{name}\b|\b{name}\b[^.]{{0,40}}{_REFUSAL}"
        if re.search(refusal, sentence, re.IGNORECASE):
            return name
    return None


def is_about_format(text: str) -> bool:
    """Whether an error body is about the requested reply format."""
    return _FORMAT_WORDS.search(text.lower()) is not None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds in a Retry-After header, a number or a date; None if absent or unreadable."""
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
