"""The judge that goes by rules as a chat model: OpenAI chat completions in, chat completions out;
over a wire or in this process.
"""

from __future__ import annotations

import json
import math
import time
from typing import Any

from opdjax.judge.rule_based.rules import reply_to

Document = dict[str, Any]


async def answer(asked: Document) -> bytes:
    """The response to a request for a chat completion, as it would come over the wire."""
    return json.dumps(completion(asked, json.dumps(reply_document(asked)))).encode()


def reply_document(asked: Document) -> Document:
    """What the judge says, without what a strict schema leaves no room for."""
    return fitted(reply_to(asked["messages"]), asked_schema(asked))


def asked_schema(asked: Document) -> Any:
    """The JSON schema that the reply must have; None where there is none."""
    form = asked.get("response_format")
    if (
        not isinstance(form, dict)
        or form.get("type") != "json_schema"
        or not isinstance(form.get("json_schema"), dict)
    ):
        return None
    return form["json_schema"].get("schema")


def fitted(value: Any, schema: Any) -> Any:
    """The value without the keys that a strict schema leaves no room for."""
    if isinstance(value, dict) and isinstance(schema, dict):
        fields, is_strict = (
            schema.get("properties") or {},
            schema.get("additionalProperties") is False,
        )
        return {
            name: fitted(item, fields.get(name))
            for name, item in value.items()
            if name in fields or not is_strict
        }
    if isinstance(value, list) and isinstance(schema, dict):
        return [fitted(item, schema.get("items")) for item in value]
    return value


def completion(asked: Document, text: str, finish_reason: str = "stop") -> Document:
    """A chat completion, cut at the request's own limit; a token is four characters."""
    limit = asked.get("max_completion_tokens") or asked.get("max_tokens")
    if isinstance(limit, int) and len(text) > 4 * limit > 0:
        text, finish_reason = text[: 4 * limit], "length"
    shown = sum(
        len(message["content"])
        for message in asked["messages"]
        if isinstance(message.get("content"), str)
    )
    tokens = {"prompt_tokens": math.ceil(shown / 4), "completion_tokens": math.ceil(len(text) / 4)}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
    named = {
        "id": "chatcmpl-rules",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": asked["model"],
    }
    return named | {"choices": [choice], "usage": tokens | {"total_tokens": sum(tokens.values())}}
