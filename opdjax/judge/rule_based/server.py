"""The rule-based judge as a chat model: chat-completion requests in, responses out."""

from __future__ import annotations

import json
import math
import time
from typing import Any

from opdjax.judge.rule_based.rules import reply_to

Document = dict[str, Any]


async def answer(request: Document) -> bytes:
    """The body of the response to a chat-completion request."""
    return json.dumps(completion(request, json.dumps(reply_document(request)))).encode()


def reply_document(request: Document) -> Document:
    """The judge's reply, without keys that the request's schema excludes."""
    return _fitted(reply_to(request["messages"]), requested_schema(request))


def requested_schema(request: Document) -> Any:
    """The JSON schema that the reply must match; None without one."""
    match request.get("response_format"):
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return schema
    return None


def _fitted(value: Any, schema: Any) -> Any:
    if isinstance(value, list) and isinstance(schema, dict):
        return [_fitted(item, schema.get("items")) for item in value]
    if not isinstance(value, dict) or not isinstance(schema, dict):
        return value
    fields, is_strict = schema.get("properties") or {}, schema.get("additionalProperties") is False
    kept = {name: item for name, item in value.items() if name in fields or not is_strict}
    return {name: _fitted(item, fields.get(name)) for name, item in kept.items()}


def completion(request: Document, text: str, finish_reason: str = "stop") -> Document:
    """A chat completion, cut at the request's token limit; a token is four characters."""
    limit = request.get("max_completion_tokens") or request.get("max_tokens")
    if isinstance(limit, int) and len(text) > 4 * limit > 0:
        text, finish_reason = text[: 4 * limit], "length"
    contents = [message.get("content") for message in request["messages"]]
    shown = sum(len(content) for content in contents if isinstance(content, str))
    tokens = {"prompt_tokens": math.ceil(shown / 4), "completion_tokens": math.ceil(len(text) / 4)}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
    return {
        "id": "chatcmpl-rules",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request["model"],
        "choices": [choice],
        "usage": tokens | {"total_tokens": sum(tokens.values())},
    }
