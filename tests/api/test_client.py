"""The client over real sockets: what is asked again, what is not, within which limits, and what is left behind."""

import asyncio
import dataclasses
import email.utils
import gc
import logging
import time

import pytest
from chat_server import ASKED, SCHEMA, Said, calling, completion, outcome, refusal, run, until

from opdjax.api import client as client_module
from opdjax.api.cache import ReplyCache, request_key
from opdjax.api.client import ApiClient
from opdjax.api.replies import (
    ApiRefusedError,
    ApiRequestError,
    ApiUnavailableError,
    MissingKeyError,
    OfflineMissError,
    Reply,
    SpendingCapError,
)
from opdjax.api_config import ApiConfig, EndpointConfig

KEY = "sk-planted-8d1f'0b\\z"


def asked(text):
    return [{"role": "user", "content": str(text)}]


def ok(body, number):
    return Said()


def first(*responses):
    """Those responses, one after the other, then good ones."""
    return lambda body, number: responses[number] if number < len(responses) else Said()


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
    api = ApiConfig(max_retries=2, breaker_failures=50)
    found, requests, usage = one_call(lambda body, number: refusal(500, f"failure {number}"), api)
    assert type(found) is ApiUnavailableError
    assert all(words in str(found) for words in ("the judge at http://127.0.0.1:", "status 500", "failure 2"))
    assert (requests, usage.retries, usage.calls) == (3, 2, 0)
    found, _, _ = one_call(lambda body, number: Said(content={"error": "the upstream is gone"}), api)
    assert "no chat completion" in str(found)
    assert "the upstream is gone" in str(found)


@pytest.mark.parametrize("said", [Said(delay=5.0), Said(cut="drips")], ids=["silent", "drips"])
def test_a_request_has_one_time_limit_over_all_its_pieces(said):
    began = time.monotonic()
    found, requests, usage = one_call(first(said, said), timeout=0.25)
    assert (found.text, requests, usage.retries) == ("two", 3, 2)
    assert 0.5 < time.monotonic() - began < 4
    found, _, _ = one_call(lambda *_: said, ApiConfig(max_retries=0), timeout=0.25)
    assert "no reply within endpoint.timeout, 0.25 seconds" in str(found)


def test_nobody_listens():
    async def scenario():
        client = ApiClient({"judge": EndpointConfig("http://127.0.0.1:9/v1", "m")}, ApiConfig(max_retries=1), None)
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
        ("0.5", 0.5),
        ("7", 7),
        ("-3", 0),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("", None),
        ("1e999", None),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("Thu, 99 Foo 1970", None),
        ("Thu, 01 Jan 99999999999999 00:00:00 GMT", None),
    ],
)
def test_what_retry_after_says(header, seconds):
    assert client_module._retry_after({"retry-after": header}) == seconds


@pytest.mark.parametrize("zone", ["GMT", "-0000"])
def test_retry_after_as_a_date(zone):
    date = email.utils.formatdate(time.time() + 30).replace("-0000", zone)
    assert 27 < client_module._retry_after({"retry-after": date}) <= 30


@pytest.mark.parametrize("status", [429, 503])
def test_the_server_says_when(status):
    async def scenario():
        async with calling(first(refusal(status, "later", "retry-after: 0.4"))) as (client, server):
            await client.complete("judge", ASKED)
            return server.times

    times = run(scenario())
    assert 0.39 <= times[1] - times[0] < 3


def test_a_rate_limit_delays_the_other_calls_of_its_role_only():
    async def scenario():
        async with calling(first(refusal(429, "slower", "retry-after: 0.5"))) as (client, server), calling(ok) as (other, _):
            limited = asyncio.create_task(client.complete("judge", ASKED))
            await until(lambda: client._roles["judge"].requests._blocked_until)
            await other.complete("judge", ASKED)
            assert len(server.times) == 1
            await asyncio.gather(limited, *(client.complete("judge", asked(n)) for n in range(5)))
            return server.times

    times = run(scenario())
    assert len(times) == 7
    assert min(times[1:]) - times[0] >= 0.49


# Limits


def test_no_more_than_so_many_at_once():
    async def scenario():
        async with calling(lambda *_: Said(delay=0.03), concurrency=5) as (client, server):
            await asyncio.gather(*(client.complete("judge", asked(n)) for n in range(40)))
            return server.most_open, len(server.bodies)

    assert run(scenario()) == (5, 40)


def test_more_connections_than_the_package_keeps_by_itself():
    async def scenario():
        async with calling(lambda *_: Said(delay=0.5), concurrency=150) as (client, server):
            await asyncio.gather(*(client.complete("judge", asked(n)) for n in range(150)))
            return server.most_open

    assert run(scenario()) == 150


def test_requests_and_tokens_a_minute():
    async def seconds(count, **endpoint):
        async with calling(ok, **endpoint) as (client, server):
            await asyncio.gather(*(client.complete("judge", asked(n)) for n in range(count)))
            return server.times[-1] - server.times[0]

    # A second's worth is there at the start: 10 of 14 at once, the rest at 10 a second.
    assert 0.3 < run(seconds(14, requests_per_minute=600)) < 3
    # 6,000 tokens a second are one request's 6,000, of which its 15 are counted once it was answered.
    assert run(seconds(8, tokens_per_minute=360_000, max_tokens=6_000)) < 3
    assert 0.9 < run(seconds(8, tokens_per_minute=360_000, max_tokens=6_000, concurrency=1)) + 1 < 4


def test_failed_requests_use_no_tokens():
    async def scenario():
        async with calling(first(*[refusal(500)] * 4), tokens_per_minute=60_000, max_tokens=30_000) as (client, server):
            await client.complete("judge", ASKED)
            return server.times[-1] - server.times[0]

    assert run(scenario()) < 5  # and not 30 seconds for each failure


# The breaker


def test_the_breaker_opens_and_a_probe_closes_it():
    api = ApiConfig(max_retries=1, breaker_failures=4, breaker_seconds=0.4)

    async def scenario():
        async with calling(first(*[refusal(500)] * 4), api=api) as (client, server):
            failed = [await outcome(client.complete("judge", asked(n))) for n in range(2)]
            assert [type(error) for error in failed] == [ApiUnavailableError] * 2
            assert len(server.bodies) == 4
            replies = await asyncio.gather(*(client.complete("judge", asked(n)) for n in range(2, 8)))
            assert [reply.text for reply in replies] == ["two"] * 6
            return server.times

    times = run(scenario())
    assert len(times) == 10
    assert times[4] - times[3] >= 0.39  # the probe, alone
    assert times[5] > times[4]


def test_all_who_wait_hear_of_a_failed_probe():
    api = ApiConfig(max_retries=4, breaker_failures=3, breaker_seconds=0.2)

    async def scenario():
        async with calling(lambda *_: refusal(503, "away"), api=api) as (client, server):
            found = await asyncio.gather(*(outcome(client.complete("judge", asked(n))) for n in range(3)))
            assert [type(error) for error in found] == [ApiUnavailableError] * 3
            assert all("503" in str(error) for error in found)
            return len(server.bodies), await outcome(client.complete("judge", asked(9))), len(server.bodies)

    before, found, after = run(scenario())
    assert before == 4  # the three and one probe, whatever attempts each had left
    assert type(found) is ApiUnavailableError
    assert after == before + 1


def test_a_rate_limit_and_a_refusal_are_answers():
    api = ApiConfig(max_retries=0, breaker_failures=2, breaker_seconds=60.0)
    answers = (refusal(500), refusal(429), refusal(500), refusal(400), refusal(500))

    async def scenario():
        async with calling(first(*answers), api=api) as (client, _server):
            for n in range(5):
                await outcome(client.complete("judge", asked(n)))
            return await client.complete("judge", asked(9))

    assert run(scenario()).text == "two"


def open_breaker(seconds):
    """Settings with which two failures open it."""
    return ApiConfig(max_retries=0, breaker_failures=2, breaker_seconds=seconds)


async def opened(client):
    await asyncio.gather(*(outcome(client.complete("judge", asked(f"opens {n}"))) for n in range(2)))
    assert client._roles["judge"].breaker.is_open


def test_a_probe_that_is_called_off_leaves_nobody_waiting():
    async def scenario():
        async with calling(first(refusal(500), refusal(500)), api=open_breaker(0.1), requests_per_minute=120) as (client, server):
            await opened(client)  # which used up the first second's requests: the probe waits for its turn
            probe = asyncio.create_task(client.complete("judge", asked("probe")))
            await until(lambda: client._roles["judge"].breaker._is_probing)
            waiting = asyncio.create_task(client.complete("judge", asked("waits")))
            await asyncio.sleep(0.01)
            probe.cancel()
            return (await waiting).text, [body["messages"][0]["content"] for body in server.bodies]

    text, contents = run(scenario())
    assert text == "two"
    assert contents[2:] == ["waits"]


def test_a_probe_that_meets_the_cap_leaves_nobody_waiting():
    api = dataclasses.replace(open_breaker(0.2), max_dollars=1.0)

    async def scenario():
        async with calling(lambda *_: refusal(500), api=api) as (client, _):
            await opened(client)
            calls = [asyncio.create_task(outcome(client.complete("judge", asked(n)))) for n in range(3)]
            await asyncio.sleep(0.05)
            client._spent = 1.0
            return await asyncio.gather(*calls)

    assert {type(found) for found in run(scenario())} == {SpendingCapError}


def test_what_was_sent_before_does_not_end_the_wait_by_failing():
    def reply(body, number):
        if body["messages"][0]["content"] == "slow":
            return dataclasses.replace(refusal(500), delay=0.3)
        return refusal(500) if number < 3 else Said()

    async def scenario():
        async with calling(reply, api=open_breaker(0.8)) as (client, server):
            slow = asyncio.create_task(outcome(client.complete("judge", asked("slow"))))
            await until(lambda: server.bodies)
            await opened(client)
            waiting = asyncio.create_task(client.complete("judge", asked("waits")))
            assert type(await slow) is ApiUnavailableError
            return await waiting, server.times

    reply, times = run(scenario())
    assert reply.text == "two"
    assert times[-1] - times[-2] > 0.7


def test_what_was_sent_before_ends_the_wait_by_succeeding():
    def reply(body, number):
        return Said(delay=0.3) if body["messages"][0]["content"] == "slow" else refusal(500) if number < 3 else Said()

    async def scenario():
        async with calling(reply, api=open_breaker(600.0)) as (client, server):
            slow = asyncio.create_task(client.complete("judge", asked("slow")))
            await until(lambda: server.bodies)
            await opened(client)
            return await client.complete("judge", asked("waits")), await slow

    assert [reply.text for reply in run(scenario())] == ["two", "two"]


def test_who_queues_asks_nobody_who_is_taken_for_down():
    api = ApiConfig(max_retries=0, breaker_failures=2, breaker_seconds=0.3)

    async def scenario():
        async with calling(lambda *_: refusal(500), api=api, concurrency=1) as (client, server):
            found = await asyncio.gather(*(outcome(client.complete("judge", asked(n))) for n in range(20)))
            return {type(error) for error in found}, len(server.bodies)

    assert run(scenario()) == ({ApiUnavailableError}, 3)  # two that opened it, one probe


def test_cached_replies_are_answered_whatever_the_breaker_says(tmp_path):
    cache = ReplyCache(tmp_path / "r.sqlite")

    async def scenario():
        async with calling(first(Said(), refusal(500), refusal(500)), cache, api=open_breaker(600.0)) as (client, _):
            await client.complete("judge", ASKED)
            await opened(client)
            return await client.complete("judge", ASKED)

    assert run(scenario()) == Reply("two", "stop", True, 10, 5)


# Money, and what may not be asked

PRICED = {"input_price": 1e5, "output_price": 2e5}  # a reply of 10 and 5 tokens costs 2 dollars


def test_the_cap_is_checked_before_each_call_and_counts_what_was_spent_before():
    async def scenario(spent, cap):
        async with calling(ok, spent=spent, api=ApiConfig(max_dollars=cap), **PRICED) as (client, _server):
            found = [await outcome(client.complete("judge", asked(n))) for n in range(4)]
            return sum(isinstance(reply, Reply) for reply in found), found[-1], client.spent, client.take_usage()["judge"].dollars

    assert run(scenario(0.0, 0.0))[::2] == (4, 8.0)
    count, error, spent, dollars = run(scenario(0.0, 5.0))
    assert (count, spent, dollars) == (3, 6.0, 6.0)
    assert type(error) is SpendingCapError
    assert "6.0000 dollars" in str(error)
    assert "api.max_dollars is 5" in str(error)
    assert run(scenario(4.5, 5.0))[::2] == (1, 6.5)
    assert run(scenario(5.0, 5.0))[::2] == (0, 5.0)


def test_who_hears_of_the_cap_hears_it_when_all_that_is_paid_for_is_kept(tmp_path):
    cache = ReplyCache(tmp_path / "r.sqlite")

    def reply(body, number):
        return Said(delay=0.4 if body["messages"][0]["content"] == "slow" else 0.0)

    async def scenario():
        async with calling(reply, cache, api=ApiConfig(max_dollars=2.0), **PRICED) as (client, server):
            slow = asyncio.create_task(client.complete("judge", asked("slow")))
            await until(lambda: server.bodies)
            await client.complete("judge", asked("quick"))
            slow.cancel()  # as a run does that stops
            with pytest.raises(SpendingCapError, match=r"4\.0000|2\.0000"):
                await client.complete("judge", asked("too much"))
            usage = client.take_usage()["judge"]
            return usage.calls, usage.dollars, client.spent, (await client.complete("judge", asked("slow"))).is_cached, len(server.bodies)

    assert run(scenario()) == (2, 4.0, 4.0, True, 2)


def test_offline_nobody_is_asked_and_no_key_is_needed(tmp_path, monkeypatch):
    cache = ReplyCache(tmp_path / "r.sqlite")
    monkeypatch.setenv("A_KEY", "sk-1")

    async def scenario(api):
        async with calling(ok, cache, api=api, api_key_env="A_KEY") as (client, server):
            found = [await outcome(client.complete("judge", asked(n))) for n in range(1 + api.offline)]
            return found, len(server.bodies), client.take_usage()["judge"]

    run(scenario(ApiConfig()))
    monkeypatch.delenv("A_KEY")
    (known, missing), requests, usage = run(scenario(ApiConfig(offline=True)))
    assert known == Reply("two", "stop", True, 10, 5)
    assert (requests, usage.calls, usage.cached) == (0, 0, 1)
    key = request_key(EndpointConfig("http://x", "model"), asked(1), None, 0)
    assert type(missing) is OfflineMissError
    assert "judge" in str(missing)
    assert key in str(missing)


def test_an_unknown_role_is_named():
    found = run(outcome(ApiClient({"a": EndpointConfig("http://x", "m")}, ApiConfig(), None).complete("b", ASKED)))
    assert type(found) is ValueError
    assert "nobody is the b" in str(found)
    assert "b.base_url" in str(found)


# Keys


@pytest.mark.parametrize("value", [None, "", "  \n"])
def test_a_key_that_is_not_set(value, monkeypatch):
    monkeypatch.delenv("A_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("A_KEY", value)
    with pytest.raises(MissingKeyError, match=r"judge.api_key_env names A_KEY, which is not set; .* http://x"):
        ApiClient({"judge": EndpointConfig("http://x", "m", api_key_env="A_KEY")}, ApiConfig(), None)


@pytest.mark.parametrize("value", [f"{KEY}\n{KEY}", f"{KEY}é", f"{KEY}\x01"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(value, monkeypatch):
    monkeypatch.setenv("A_KEY", value)
    with pytest.raises(MissingKeyError, match="A_KEY holds characters") as error:
        ApiClient({"judge": EndpointConfig("http://x", "m", api_key_env="A_KEY")}, ApiConfig(), None)
    assert KEY not in str(error.value)


@pytest.mark.parametrize("value", [KEY, f"{KEY}\r\n"])
def test_the_key_is_sent_and_stands_nowhere_else(value, monkeypatch, tmp_path, caplog, capfd):
    monkeypatch.setenv("A_KEY", value)
    caplog.set_level(logging.DEBUG)
    echo = f"bad key {KEY} or {KEY!r}"
    statuses = (400, 401, 403, 404, 422, 429, 500, 503)
    refused = [refusal(status, echo) for status in statuses] + [Said(500, echo.encode()), Said(200, echo.encode()), Said(cut="before")]
    cache = ReplyCache(tmp_path / "r.sqlite")

    async def scenario():
        api = ApiConfig(max_retries=0, breaker_failures=100)
        async with calling(first(Said(), *refused), cache, api=api, api_key_env="A_KEY") as (client, server):
            found = [await outcome(client.complete("judge", asked(n))) for n in range(1 + len(refused))]
            assert all(f"authorization: bearer {KEY}\r\n".lower() in head.lower() for head in server.heads)
            shown = [repr(client), repr(vars(client)), *(repr(vars(role)) for role in client._roles.values())]
            return found, "".join(shown[:1])

    found, shown = run(scenario())
    assert [isinstance(reply, Exception) for reply in found] == [False] + [True] * len(refused)
    assert sum("***" in str(error) for error in found[1:]) == len(refused) - 1
    texts = [shown, caplog.text, *capfd.readouterr(), *(f"{error} {error!r} {error.__cause__!r}" for error in found[1:])]
    files = [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 1
    for form in (KEY, repr(KEY)[1:-1], KEY.replace("'", "\\'")):
        assert not [text for text in texts + files if form in text]


def test_who_wants_no_key_gets_none(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, KEY)

    async def scenario():
        async with calling(ok) as (client, server):
            await client.complete("judge", ASKED)
            return server.heads[0].lower()

    head = run(scenario())
    assert "authorization: bearer none\r\n" in head
    assert KEY.lower() not in head


# Shared and called-off questions


def test_the_same_question_in_flight_is_asked_once(tmp_path):
    cache = ReplyCache(tmp_path / "r.sqlite")

    async def scenario():
        async with calling(lambda *_: Said(delay=0.1), cache) as (client, server):
            replies = await asyncio.gather(*(client.complete("judge", ASKED) for _ in range(10)), client.complete("judge", ASKED, sample=1))
            return [reply.is_cached for reply in replies], len(server.bodies), client.take_usage()["judge"]

    cached, requests, usage = run(scenario())
    assert cached == [False] + [True] * 9 + [False]
    assert requests == 2
    assert (usage.calls, usage.cached, usage.input_tokens) == (2, 9, 20)


def test_an_error_is_shared_and_the_next_one_asks_anew():
    async def scenario():
        async with calling(first(dataclasses.replace(refusal(400), delay=0.1))) as (client, server):
            found = await asyncio.gather(*(outcome(client.complete("judge", ASKED)) for _ in range(3)))
            assert [type(error) for error in found] == [ApiRequestError] * 3
            assert len(server.bodies) == 1
            assert client.take_usage()["judge"].cached == 0
            return (await client.complete("judge", ASKED)).is_cached

    assert run(scenario()) is False


def test_one_of_two_callers_goes():
    async def scenario():
        async with calling(lambda *_: Said(delay=0.2)) as (client, server):
            one, two = (asyncio.create_task(client.complete("judge", ASKED)) for _ in range(2))
            await until(lambda: server.bodies)
            one.cancel()
            return (await two).text, one.cancelled(), len(server.bodies)

    assert run(scenario()) == ("two", True, 1)


def test_what_is_on_the_wire_is_kept_though_nobody_waits(tmp_path):
    cache = ReplyCache(tmp_path / "r.sqlite")

    async def scenario():
        async with calling(lambda *_: Said(delay=0.2), cache) as (client, server):
            call = asyncio.create_task(client.complete("judge", ASKED))
            await until(lambda: server.bodies)
            call.cancel()
            await until(lambda: not client._open)
            return await client.complete("judge", ASKED), client.take_usage()["judge"].calls, len(server.bodies)

    assert run(scenario()) == (Reply("two", "stop", True, 10, 5), 1, 1)


def test_nothing_is_sent_that_nobody_waits_for():
    async def scenario():
        slow = {"delay": 0.2}
        answers = (dataclasses.replace(refusal(500), **slow), Said(**slow))
        async with calling(first(*answers), concurrency=1) as (client, server):
            calls = [asyncio.create_task(client.complete("judge", asked(n))) for n in range(4)]
            await until(lambda: server.bodies)
            for call in calls:
                call.cancel()  # one on the wire, which is going to fail, and three that queue
            await until(lambda: not client._open)
            await asyncio.gather(*calls, return_exceptions=True)
            assert len(server.bodies) == 1
            return (await client.complete("judge", asked(3))).text

    assert run(scenario()) == "two"


def test_closing_ends_what_is_open():
    async def scenario():
        async with calling(lambda *_: Said(delay=20.0), concurrency=2) as (client, server):
            calls = [asyncio.create_task(client.complete("judge", asked(n))) for n in range(5)]
            await until(lambda: len(server.bodies) == 2)
            await client.close()
            found = await asyncio.gather(*calls, return_exceptions=True)
            return {type(error) for error in found}

    assert run(scenario()) == {asyncio.CancelledError}


# The form of a reply


def test_what_is_sent():
    async def sent(**endpoint):
        async with calling(ok, **endpoint) as (client, server):
            await client.complete("judge", ASKED, schema=SCHEMA, schema_name="counts")
            await client.complete("judge", ASKED)
            return server.bodies

    with_schema, without = run(sent())
    assert without == {"model": "model", "messages": ASKED, "max_tokens": 8192}
    form = {"type": "json_schema", "json_schema": {"name": "counts", "schema": SCHEMA, "strict": True}}
    assert with_schema == without | {"response_format": form}
    sampling = {"temperature": 0.0, "top_p": 0.5, "seed": 3, "reasoning_effort": "low"}
    body, _ = run(sent(output="json_object", max_tokens_field="max_completion_tokens", max_tokens=7, **sampling))
    rest = {"model": "model", "messages": ASKED, "max_completion_tokens": 7, "response_format": {"type": "json_object"}}
    assert body == rest | sampling
    assert "response_format" not in run(sent(output="text"))[0]


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
        words = {"json_schema": {"error": {"message": "no", "param": "response_format"}}, "json_object": {"message": "no JSON_OBJECT"}}
        return Said() if form_of(body) in known else Said(400, words[form_of(body)])

    async def scenario():
        async with calling(reply) as (client, server):
            for n in range(2):
                await client.complete("judge", asked(n), schema=SCHEMA)
            return [form_of(body) for body in server.bodies], client.take_usage()["judge"]

    forms, usage = run(scenario())
    assert forms == asked_for
    assert (usage.calls, usage.retries) == (2, 0)
    assert capfd.readouterr().err == f"the judge's server takes no json_schema output; going on with {settled}\n"


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


@pytest.mark.parametrize("thought", [{"reasoning_content": "{}"}, {"reasoning": "{}"}, {"reasoning_content": None, "reasoning": "{}"}])
@pytest.mark.parametrize("content", [None, "", " \n"])
def test_a_form_is_looked_for_in_what_was_thought_and_an_answer_is_not(content, thought):
    async def scenario():
        async with calling(lambda *_: Said(content=completion(content, **thought))) as (client, _):
            return [(await client.complete("judge", ASKED, schema=schema)).text.strip() for schema in (SCHEMA, None)]

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


# Replays


def test_a_second_run_asks_nobody_and_reads_the_same(tmp_path):
    replies = [completion("not JSON", usage=(3, 2)), completion("", usage=None), completion("cut", "length"), completion("é\u2028")]
    path = tmp_path / "r.sqlite"

    async def scenario(api, **endpoint):
        cache = ReplyCache(path)
        async with calling(lambda body, number: Said(content=replies[number]), cache, api=api, **endpoint) as (client, server):
            found = [await client.complete("judge", asked(n), schema=SCHEMA, sample=n) for n in range(len(replies))]
        cache.close()
        return found, len(server.bodies), client.spent

    once, requests, spent = run(scenario(ApiConfig(), **PRICED))
    assert requests == 4
    assert spent > 0
    again, requests, spent = run(scenario(ApiConfig(offline=True), timeout=1.0, concurrency=2, requests_per_minute=1, input_price=9.0))
    assert again == [dataclasses.replace(reply, is_cached=True) for reply in once]
    assert (requests, spent) == (0, 0.0)


def test_usage_is_told_once_and_by_role():
    async def scenario():
        async with calling(first(Said(delay=0.05), refusal(500)), **PRICED) as (client, _):
            await client.complete("judge", asked(0))
            one = client.take_usage()["judge"]
            await client.complete("judge", asked(1))
            return one, client.take_usage()["judge"], client.take_usage()["judge"]

    one, two, none = run(scenario())
    assert (one.calls, one.retries, one.input_tokens, one.output_tokens, one.dollars) == (1, 0, 10, 5, 2.0)
    assert one.seconds >= 0.05
    assert (two.calls, two.retries) == (1, 1)
    assert dataclasses.asdict(none) == dict.fromkeys(dataclasses.asdict(none), 0)


def test_no_connection_is_left_open(recwarn):
    run(_some_calls())
    gc.collect()
    assert not [warning for warning in recwarn if issubclass(warning.category, ResourceWarning)]


async def _some_calls():
    async with calling(ok) as (client, _):
        await asyncio.gather(*(client.complete("judge", asked(n)) for n in range(8)))
