"""Servers that lie over HTTP: a lie costs one request, never the process, the run or the key."""

import asyncio
import base64
import dataclasses
import gzip
import json
import resource
import time
import urllib.parse
import zlib

import pytest
from chat_server import ASKED, Said, calling, completion, outcome, run

from opdjax.config.api import ApiConfig
from opdjax.judge.cache import ReplyCache
from opdjax.judge.client import key_pattern
from opdjax.judge.replies import (
    ApiRefusedError,
    ApiRequestError,
    ApiUnavailableError,
    Reply,
)

KEY = "sk-Aq3/Zr+9'\"x\\LmN0pQ7sTuV"
NESTED = b"[" * 50_000 + b"]" * 50_000
MANY = b"[" + b"[]," * 2_000_000 + b"[]]"


def packed(data, count=1):
    for _ in range(count):
        data = gzip.compress(data)
    return data


def said(content, *headers, **options):
    return Said(content=content, headers=headers, **options)


def raw(head, body=b""):
    return Said(raw=head.encode() + b"\r\n\r\n" + body)


def choice(**fields):
    return {"choices": [{"message": {"content": "two"}, "finish_reason": "stop"} | fields]}


BOMB = packed(b"x" * (300 << 20))
DOCUMENT = json.dumps(completion()).encode()
OK, CHUNKED = "HTTP/1.1 200 OK", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked"
# Responses that are no reply; the request is given up after its retries.
NO_REPLIES = {
    "a gzip bomb": said(BOMB, "content-encoding: gzip"),
    "a bomb of zlib": said(zlib.compress(b"x" * (64 << 20)), "content-encoding: deflate"),
    "a bomb of raw deflate": said(zlib.compress(b"x" * 10**6)[2:], "content-encoding: deflate"),
    "a bomb in a bomb": said(packed(b"x" * (64 << 20), 2), "content-encoding: gzip, gzip"),
    "an encoding that nobody asked for": said(DOCUMENT, "content-encoding: br"),
    "an encoding without a name": said(DOCUMENT, "content-encoding: \xff"),
    "an encoding of a million letters": said(DOCUMENT, "content-encoding: " + "x" * 50_000),
    "gzip that is none": said(DOCUMENT, "content-encoding: gzip"),
    "gzip that is cut": said(packed(DOCUMENT)[:-20], "content-encoding: gzip"),
    "a body of 9 MB": said(b'"' + b"x" * (9 << 20) + b'"'),
    "a body of 30 MB in chunks": raw(
        CHUNKED, (b"100000\r\n" + b"x" * (1 << 20) + b"\r\n") * 30 + b"0\r\n\r\n"
    ),
    "a chunk of 2^60 bytes": raw(CHUNKED, b"1000000000000000\r\nxx"),
    "a chunk of less than none": raw(CHUNKED, b"-5\r\nxx\r\n0\r\n\r\n"),
    "chunks of noise": raw(CHUNKED, b"zz\r\nxx\r\n"),
    "a length of 2^70": raw(f"{OK}\r\ncontent-length: {2**70}", b"xx"),
    "a length of less than none": raw(f"{OK}\r\ncontent-length: -5", b"xx"),
    "two lengths": raw(f"{OK}\r\ncontent-length: 2\r\ncontent-length: 3", b"xxx"),
    "a length of text": raw(f"{OK}\r\ncontent-length: many", b"xx"),
    "no HTTP": raw("SSH-2.0-OpenSSH_9.6"),
    "an HTTP of its own": raw("HTTP/9.9 200 OK\r\ncontent-length: 2", b"{}"),
    "a status of 20 digits": raw("HTTP/1.1 20000000000000000000 OK"),
    "a head of a megabyte": raw(OK + "\r\nx: " + "y" * (1 << 20)),
    "ten thousand headers": raw(OK + "\r\nx: y" * 10_000),
    "a hundred continuations": Said(raw=b"HTTP/1.1 100 Continue\r\n\r\n" * 100 + b"HTTP/1.1"),
    "nothing": said(b""),
    "one byte of zero": said(b"\0"),
    "no UTF-8": said(b"\xff\xfe\x00"),
    "a charset of Python": said(b"\xff", "content-type: application/json; charset=unicode_escape"),
    "a charset that is none": said(b"\xff", "content-type: text/html; charset=base64"),
    "a page": said(b"<html><script>alert(1)</script>"),
    "nested lists": said(NESTED),
    "lists without end": said(b"[" * 1_000_000),
    "nested objects": said(b'{"choices":' * 10_000 + b"1" + b"}" * 10_000),
    "two million lists": said(MANY),
    "two million lists as choices": said(b'{"choices": %s}' % MANY),
    "thousands of digits": said(b'{"choices": ' + b"9" * 6000 + b"}"),
    "a list": said([]),
    "null": said(b"null"),
    "no choices": said({}),
    "choices that are a number": said({"choices": 3}),
    "choices that are a text": said({"choices": "two"}),
    "no choice": said({"choices": []}),
    "a choice that is a list": said({"choices": [[]]}),
    "no message": said({"choices": [{}]}),
    "a message that is a text": said(choice(message="two")),
    "a content that is a number": said(choice(message={"content": 2})),
    "a content that is a list": said(choice(message={"content": ["two"]})),
    "a content that is an object": said(choice(message={"content": {"text": "two"}})),
    "usage that is a list": said(completion() | {"usage": [1]}),
    "usage that is a text": said(completion() | {"usage": "many"}),
    "an error with status 200": said({"error": {"message": "gone", "code": "x" * 10**6}}),
    "a stream of events": said(b'data: {"choices": []}\n\ndata: [DONE]\n\n'),
}
# Replies whose text is one and whose tokens, or reason, are a lie; the number of counted tokens.
LIES = {
    "a googol of tokens": (completion(usage=(10**100, 5)), (4, 5)),
    "tokens of 4,000 digits": (completion(usage=(10, 10**4000)), (10, 1)),
    "less than no tokens": (completion(usage=(-10, -5)), (4, 1)),
    "tokens that are text": (completion(usage=("10", [5])), (4, 1)),
    "tokens that are true": (completion(usage=(True, False)), (4, 1)),
    "half a token": (completion(usage=(0.5, 1e300)), (4, 1)),
    "no tokens": (completion(usage=(0, 0)), (0, 0)),
    "a reason of a megabyte": (choice(finish_reason="x" * 10**6), (4, 1)),
    "a reason that is an object": (choice(finish_reason={"a": "b" * 10**6}), (4, 1)),
    "ten thousand choices": ({"choices": choice()["choices"] * 10_000}, (4, 1)),
}
# Statuses that no second request would change.
LEADS_AWAY = {
    f"status {status} to {url[:12]}": Said(status, b"", (f"location: {url}",))
    for status in (301, 302, 303, 307, 308)
    for url in ("http://127.0.0.1:1/v1", "https://evil.example/", "file:///etc/passwd", "/v2")
}
REFUSALS = {
    "a status without words": Said(400, b""),
    "words of 9 MB": Said(400, b"x" * (9 << 20)),
    "a bomb of words": Said(400, BOMB, ("content-encoding: gzip",)),
    "nested words": Said(400, NESTED),
    "words in a charset of Python": Said(422, b"\xff", ("content-type: x; charset=punycode",)),
    "status 999": Said(999, b"{}"),
}


def test_the_corpus_is_large():
    assert len({**NO_REPLIES, **LIES, **LEADS_AWAY, **REFUSALS}) >= 60


def answers_to(said, monkeypatch, **options):
    """(What came of one question, how many were asked, seconds, megabytes)."""
    monkeypatch.setenv("A_KEY", KEY)

    async def scenario():
        settings = {"timeout": 3.0, "api_key_env": "A_KEY"} | options
        api = ApiConfig(max_retries=0)
        async with calling(lambda *_: said, api=api, **settings) as (client, server):
            found = await outcome(client.complete("judge", ASKED))
            return found, len(server.bodies)

    size, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = run(scenario())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size
    return *found, time.process_time() - began, grown / 1024


@pytest.mark.parametrize("name", NO_REPLIES)
def test_what_is_no_reply_costs_a_request(name, monkeypatch):
    found, requests, seconds, megabytes = answers_to(NO_REPLIES[name], monkeypatch)
    assert type(found) is ApiUnavailableError, found
    assert requests == 1
    assert "the judge at http://127.0.0.1:" in str(found)
    assert len(str(found)) < 1000
    assert seconds < 5
    assert megabytes < 500


@pytest.mark.parametrize("name", LIES)
def test_what_no_request_can_cost_is_not_counted(name, monkeypatch):
    content, tokens = LIES[name]
    prices = {"input_price": 1.0, "output_price": 1.0}
    found, *_ = answers_to(said(content), monkeypatch, **prices)
    assert isinstance(found, Reply), found
    assert (found.text, found.input_tokens, found.output_tokens) == ("two", *tokens)
    assert len(found.finish_reason) <= 40


@pytest.mark.parametrize("name", LEADS_AWAY)
def test_no_server_leads_to_another(name, monkeypatch):
    found, requests, *_ = answers_to(LEADS_AWAY[name], monkeypatch)
    assert type(found) is ApiRefusedError, found
    assert requests == 1
    assert "which is not followed" in str(found)


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_may_say_anything(name, monkeypatch):
    found, requests, seconds, megabytes = answers_to(REFUSALS[name], monkeypatch)
    assert type(found) in (ApiRequestError, ApiRefusedError, ApiUnavailableError), found
    assert requests == 1
    assert len(str(found)) < 1000
    assert seconds < 5
    assert megabytes < 500


def encodings():
    for before in ("", "a", "ab", "Bearer "):
        whole = (before + KEY + "!").encode()
        yield base64.b64encode(whole).decode()
        yield base64.urlsafe_b64encode(whole).decode()
    yield from (KEY, KEY[::-1], KEY.encode().hex(), repr(KEY), json.dumps(KEY))
    yield from (urllib.parse.quote(KEY), urllib.parse.quote_plus(KEY), json.dumps(json.dumps(KEY)))


def pieces():
    """What of the key no text may show: every part of it that is long enough to be its own."""
    for form in encodings():
        yield from (form[n : n + 16] for n in range(4, len(form) - 20))


@pytest.mark.parametrize("form", list(encodings()))
@pytest.mark.parametrize(
    "kind",
    ["reply", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("refusal", "no reply"))],
)
def test_a_key_in_any_form_reaches_neither_message_nor_cache(form, kind, monkeypatch, tmp_path):
    content = {
        "reply": said(completion(f"the key is {form}, you see")),
        "refusal": Said(400, {"error": {"message": f"no {form} here"}}),
        "no reply": said(f"<p>{form}</p>".encode()),
    }[kind]
    monkeypatch.setenv("A_KEY", KEY)
    cache = ReplyCache(tmp_path / "replies.sqlite")

    async def scenario():
        api = ApiConfig(max_retries=0)
        async with calling(lambda *_: content, cache, api=api, api_key_env="A_KEY") as (client, _):
            return await outcome(client.complete("judge", ASKED))

    found = run(scenario())
    cache.close()
    written = b"".join(file.read_bytes() for file in tmp_path.iterdir()).decode(errors="replace")
    shown = found.text if isinstance(found, Reply) else str(found)
    assert "***" in shown
    for text in (shown, written):
        assert not any(piece in text for piece in pieces())


def test_a_short_key_is_a_word_of_replies(monkeypatch):
    monkeypatch.setenv("A_KEY", "none")

    async def scenario():
        said = Said(content=completion("none of the two"))
        async with calling(lambda *_: said, api_key_env="A_KEY") as (client, _):
            return await client.complete("judge", ASKED)

    assert run(scenario()).text == "none of the two"
    assert key_pattern("") is None


def test_many_lies_at_once_leave_an_honest_reply(monkeypatch):
    lies = [*NO_REPLIES.values()][11:30]

    def reply(body, number):
        return lies[number] if number < len(lies) else Said()

    async def scenario():
        api = ApiConfig(max_retries=0)
        async with calling(reply, api=api, breaker=(100, 30.0), timeout=2.0) as (client, _):
            questions = [[{"role": "user", "content": str(n)}] for n in range(len(lies))]
            asked = (outcome(client.complete("judge", question)) for question in questions)
            found = await asyncio.gather(*asked)
            return found, await client.complete("judge", ASKED)

    found, last = run(scenario())
    assert {type(each) for each in found} == {ApiUnavailableError}
    assert dataclasses.replace(last, is_cached=False) == Reply("two", "stop", False, 10, 5)
