"""The client over real sockets: what is asked again and what is not, how a reply is had and read,
and what is left behind.
"""

import asyncio
import email.utils
import time

import pytest
from chat_server import (
    ASKED,
    SCHEMA,
    Said,
    asked,
    calling,
    completion,
    first,
    ok,
    outcome,
    refusal,
    run,
    until,
)
from waiting import HANG

from opdjax.config.api import ApiConfig, Endpoint
from opdjax.judge import client as client_module
from opdjax.judge.chat_completions import request_body, retry_after
from opdjax.judge.client import ApiClient
from opdjax.judge.replies import (
    ApiRefusedError,
    ApiRequestError,
    ApiUnavailableError,
    Reply,
)


def one_call(reply, api=None, **endpoint):
    """(what came of one question, requests, usage)."""

    async def scenario():
        async with calling(reply, api=api, **endpoint) as (client, server):
            found = await outcome(client.complete("judge", ASKED))
            return found, len(server.bodies), client.take_usage()["judge"]

    return run(scenario())


# What is asked again


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 529])
def test_a_failure_that_may_pass_is_tried_again(status):
    found, requests, usage = one_call(first(refusal(status), refusal(status)))
    assert found == Reply("two", "stop", False, 10, 5)
    assert (requests, usage.retries, usage.calls) == (3, 2, 1)


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, ApiRequestError), (413, ApiRequestError), (422, ApiRequestError)]
    + [(status, ApiRefusedError) for status in (300, 401, 402, 403, 404, 405, 409, 410)],
)
def test_a_refusal_is_never_tried_again(status, error):
    found, requests, usage = one_call(first(refusal(status, "the words of the server")))
    assert type(found) is error
    assert f"status {status}" in str(found)
    assert "the words of the server" in str(found)
    assert (requests, usage.retries, usage.calls) == (1, 0, 0)


@pytest.mark.parametrize(
    "broken",
    [
        Said(cut="before"),
        Said(cut="amid"),
        Said(content=b"<html>Bad gateway</html>"),
        Said(content=b"\xff\xfe"),
        Said(content=b""),
        Said(content=[]),
        Said(content={"choices": []}),
        Said(content={"choices": [None]}),
        Said(content={"choices": [{"message": None}]}),
        Said(content=completion(text=["two"])),
        Said(content=completion() | {"usage": [1]}),
        Said(content=b"[" * 100_000),
        Said(content={"error": {"message": "the upstream is gone", "code": 502}}),
        Said(headers=("content-encoding: gzip",)),
    ],
)
def test_what_is_no_reply_is_tried_again(broken):
    found, requests, usage = one_call(first(broken))
    assert found.text == "two"
    assert (requests, usage.retries, usage.calls) == (2, 1, 1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"error": {"message": "some words", "code": 1}}, "status 400: some words"),
        ({"error": "some words"}, "status 400: some words"),
        ({"object": "error", "message": "some words"}, "status 400: some words"),
        ({"detail": "some words"}, "status 400: some words"),
        ({"detail": [{"msg": "some words"}]}, 'status 400: {"detail": [{"msg": "some words"}]}'),
        (b"<p>some\n words</p>", "status 400: <p>some words</p>"),
        (b"", "status 400: (nothing)"),
        ("x" * 9000, "x" * 400),
    ],
)
def test_the_servers_own_words_are_told(content, words):
    found, _, _ = one_call(first(Said(400, content)))
    assert words in str(found)
    assert len(str(found)) < 700


def test_the_last_cause_is_told_when_attempts_are_used_up():
    api, breaker = ApiConfig(max_retries=2), (50, 30.0)
    found, requests, usage = one_call(
        lambda body, number: refusal(500, f"failure {number}"), api, breaker=breaker
    )
    assert type(found) is ApiUnavailableError
    assert all(
        words in str(found)
        for words in ("the judge at http://127.0.0.1:", "status 500", "failure 2")
    )
    assert (requests, usage.retries, usage.calls) == (3, 2, 0)
    found, _, _ = one_call(
        lambda body, number: Said(content={"error": "the upstream is gone"}), api, breaker=breaker
    )
    assert "no chat completion" in str(found)
    assert "the upstream is gone" in str(found)


@pytest.mark.parametrize("said", [Said(delay=5.0), Said(cut="drips")], ids=["silent", "drips"])
def test_a_request_has_one_time_limit_over_all_its_pieces(said):
    began = time.monotonic()
    # On a busy machine a good reply may be late too, and is asked for again.
    patient = {"api": ApiConfig(max_retries=20), "breaker": (50, 30.0)}
    found, requests, usage = one_call(first(said, said), **patient, timeout=0.25)
    assert (found.text, usage.retries) == ("two", requests - 1)
    assert requests >= 3
    assert time.monotonic() - began > 0.5
    found, _, _ = one_call(lambda *_: said, ApiConfig(max_retries=0), timeout=0.25)
    assert "no reply within endpoint.timeout, 0.25 seconds" in str(found)


def test_nobody_listens():
    async def scenario():
        client = ApiClient(
            {"judge": Endpoint("http://127.0.0.1:9/v1", "m")}, ApiConfig(max_retries=1), None
        )
        found = await outcome(client.complete("judge", ASKED))
        await client.close()
        return found, client.take_usage()["judge"].retries

    found, retries = run(scenario())
    assert type(found) is ApiUnavailableError
    assert "no connection" in str(found)
    assert "http://127.0.0.1:9/v1" in str(found)
    assert retries == 1


def test_pauses_grow_to_a_limit_and_differ(monkeypatch):
    monkeypatch.setattr(client_module, "_FIRST_WAIT", 1.0)
    monkeypatch.setattr(client_module, "_LONGEST_WAIT", 8.0)
    client = ApiClient({}, ApiConfig(), None)
    for attempt, middle in ((0, 1), (1, 2), (2, 4)):
        waits = [client._wait(attempt, None) for _ in range(200)]
        assert middle / 2 <= min(waits) < 0.7 * middle
        assert 1.3 * middle < max(waits) <= 1.5 * middle
    assert all(4 <= client._wait(attempt, None) <= 8 for attempt in (3, 9, 5000))
    assert client._wait(0, 3.0) == 3.0
    assert client._wait(0, 7200.0) == 120.0


# Retry-After


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        *[
            ("0.5", 0.5),
            ("7", 7),
            ("-3", 0),
            ("nan", None),
            ("inf", None),
            ("soon", None),
            ("", None),
            ("1e999", None),
        ],
        *[
            ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
            ("Thu, 99 Foo 1970", None),
            ("Thu, 01 Jan 99999999999999 00:00:00 GMT", None),
        ],
    ],
)
def test_what_retry_after_says(header, seconds):
    assert retry_after({"retry-after": header}) == seconds


@pytest.mark.parametrize("zone", ["GMT", "-0000"])
def test_retry_after_as_a_date(zone):
    date = email.utils.formatdate(time.time() + 30).replace("-0000", zone)
    assert 30 - HANG < retry_after({"retry-after": date}) <= 30


@pytest.mark.parametrize("status", [429, 503])
def test_the_server_says_when(status):
    async def scenario():
        async with calling(first(refusal(status, "later", "retry-after: 0.4"))) as (client, server):
            await client.complete("judge", ASKED)
            return server.times

    times = run(scenario())
    assert times[1] - times[0] >= 0.39


def test_a_rate_limit_delays_the_other_calls_of_its_role_only():
    async def scenario():
        async with (
            calling(first(refusal(429, "slower", "retry-after: 0.5"))) as (client, server),
            calling(ok) as (other, _),
        ):
            limited = asyncio.create_task(client.complete("judge", ASKED))
            await until(lambda: client._roles["judge"].requests._blocked_until)
            await other.complete("judge", ASKED)
            assert len(server.times) == 1
            await asyncio.gather(limited, *(client.complete("judge", asked(n)) for n in range(5)))
            return server.times

    times = run(scenario())
    assert len(times) == 7
    assert min(times[1:]) - times[0] >= 0.49


# The form of a reply


def test_what_is_sent():
    async def sent(**endpoint):
        async with calling(ok, **endpoint) as (client, server):
            await client.complete("judge", ASKED, schema=SCHEMA, schema_name="counts")
            await client.complete("judge", ASKED)
            return server.bodies

    with_schema, without = run(sent())
    assert without == {"model": "model", "messages": ASKED, "max_tokens": 8192}
    form = {
        "type": "json_schema",
        "json_schema": {"name": "counts", "schema": SCHEMA, "strict": True},
    }
    assert with_schema == without | {"response_format": form}
    sampling = {"temperature": 0.0, "top_p": 0.5, "reasoning_effort": "low"}
    _, body = run(sent(max_tokens=7, **sampling))
    assert body == {"model": "model", "messages": ASKED, "max_tokens": 7} | sampling


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://api.openai.com/v1", "max_completion_tokens"),
        ("https://eu.openai.azure.com/openai/v1", "max_completion_tokens"),
        ("https://openai.com.example/v1", "max_tokens"),
        ("http://127.0.0.1:8000/v1", "max_tokens"),
    ],
)
def test_the_limit_of_a_reply_has_the_name_that_the_server_knows(url, name):
    body = request_body(Endpoint(url, "m", max_tokens=7), ASKED, None, "reply", "text")
    assert body == {"model": "m", "messages": ASKED, name: 7}
    api = ApiConfig(url, max_tokens=7, max_tokens_field="max_completion_tokens")
    body = request_body(api.endpoint("verifier", "m", ""), ASKED, None, "reply", "text")
    assert body == {"model": "m", "messages": ASKED, "max_completion_tokens": 7}


# What servers say of a parameter, and the setting that is named.
UNSUPPORTED = {
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
    "'max_completion_tokens' instead.": "set api.max_tokens_field to max_completion_tokens",
    "max_tokens is not supported, use max_completion_tokens": "api.max_tokens_field",
    '{"detail":[{"type":"extra_forbidden","loc":["body","max_tokens"]}]}': "api.max_tokens_field",
    "Unrecognized request argument supplied: max_tokens": "api.max_tokens_field",
    "Unsupported value: 'temperature' does not support 0.5 with this model.": "judge.temperature",
    "reasoning_effort: unknown field": "leave judge.reasoning_effort out",
}


@pytest.mark.parametrize(("sentence", "advice"), UNSUPPORTED.items())
def test_a_server_that_refuses_a_parameter_is_quoted_and_the_setting_named(sentence, advice):
    found, requests, _ = one_call(
        lambda *_: refusal(400, sentence), temperature=0.5, reasoning_effort="low"
    )
    assert type(found) is ApiRefusedError  # no other request can succeed: the run stops
    assert requests == 1
    assert sentence.rstrip(".") in str(found)
    assert advice in str(found)


@pytest.mark.parametrize(
    "sentence",
    [
        "max_tokens is too large: 8192. This model supports at most 4096 tokens.",
        "This model's maximum context length is 4096 tokens, and max_tokens is 8192.",
        f"too long: {'x' * 300} an unknown max_tokens",
    ],
)
def test_a_request_that_is_refused_for_its_length_leaves_others_a_chance(sentence):
    assert type(one_call(lambda *_: refusal(400, sentence))[0]) is ApiRequestError


@pytest.mark.parametrize(
    ("known", "settled", "asked_for"),
    [
        (("json_object", "text"), "json_object", ["json_schema", "json_object", "json_object"]),
        (("text",), "text", ["json_schema", "json_object", "text", "text"]),
    ],
)
def test_less_structure_where_the_server_knows_no_more(known, settled, asked_for, capfd):
    def form_of(body):
        return body.get("response_format", {"type": "text"})["type"]

    def reply(body, number):
        # Each names it in another way: by a parameter, in words outside of an error.
        words = {
            "json_schema": {"error": {"message": "no", "param": "response_format"}},
            "json_object": {"message": "no JSON_OBJECT"},
        }
        return Said() if form_of(body) in known else Said(400, words[form_of(body)])

    async def scenario():
        async with calling(reply) as (client, server):
            for n in range(2):
                await client.complete("judge", asked(n), schema=SCHEMA)
            return [form_of(body) for body in server.bodies], client.take_usage()["judge"]

    forms, usage = run(scenario())
    assert forms == asked_for
    assert (usage.calls, usage.retries) == (2, 0)
    assert (
        capfd.readouterr().err
        == f"the judge's server does not support json_schema output; using {settled}\n"
    )


def test_a_refusal_that_only_mentions_the_form_costs_no_structure(capfd):
    def reply(body, number):
        return Said() if body["messages"] == ASKED else refusal(422, f"too long: {body}")

    async def scenario():
        async with calling(reply) as (client, server):
            found = await outcome(client.complete("judge", asked("long"), schema=SCHEMA))
            await client.complete("judge", ASKED, schema=SCHEMA)
            return type(found), server.bodies[-1]["response_format"]["type"]

    assert run(scenario()) == (ApiRequestError, "json_schema")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("document", "text", "finish"),
    [
        (completion("2", "length"), "2", "length"),
        (completion("2", None), "2", "stop"),
        (completion(None), "", "stop"),
        (completion("said", reasoning_content="thought"), "said", "stop"),
        (completion("not { JSON"), "not { JSON", "stop"),
        (completion("half \ud83d"), "half \ufffd", "stop"),
        (completion("a face \ud83d\ude00"), "a face \U0001f600", "stop"),
    ],
)
def test_what_is_read_of_a_reply(document, text, finish):
    found, _, _ = one_call(lambda *_: Said(content=document))
    assert (found.text, found.finish_reason) == (text, finish)


@pytest.mark.parametrize(
    "thought",
    [
        {"reasoning_content": "{}"},
        {"reasoning": "{}"},
        {"reasoning_content": None, "reasoning": "{}"},
    ],
)
@pytest.mark.parametrize("content", [None, "", " \n"])
def test_a_form_is_looked_for_in_what_was_thought_and_an_answer_is_not(content, thought):
    async def scenario():
        async with calling(lambda *_: Said(content=completion(content, **thought))) as (client, _):
            return [
                (await client.complete("judge", ASKED, schema=schema)).text.strip()
                for schema in (SCHEMA, None)
            ]

    assert run(scenario()) == ["{}", ""]


@pytest.mark.parametrize("usage", [None, (None, None), (-1, "7")])
def test_tokens_that_nobody_counts_are_estimated(usage):
    found, _, _ = one_call(lambda *_: Said(content=completion("x" * 9, usage=usage)))
    assert (found.input_tokens, found.output_tokens) == (4, 3)  # of 14 and 9 characters


def test_half_a_surrogate_pair_can_be_asked_about():
    async def scenario():
        async with calling(ok) as (client, server):
            await client.complete("judge", asked("half \ud83d, a face \U0001f600"))
            return server.bodies[0]["messages"][0]["content"]

    assert run(scenario()) == "half \ufffd, a face \U0001f600"
