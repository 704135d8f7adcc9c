"""Questions over real sockets: shared, called off, capped, offline, replayed, counted; and the key
that opens the line.
"""

import asyncio
import dataclasses
import gc
import logging

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

from opdjax.config.api import ApiConfig, Endpoint
from opdjax.judge.cache import ReplyCache, request_key
from opdjax.judge.client import ApiClient
from opdjax.judge.replies import (
    ApiRequestError,
    MissingKeyError,
    OfflineMissError,
    Reply,
    SpendingCapError,
)

PRICED = {"input_price": 1e5, "output_price": 2e5}  # a reply of 10 and 5 tokens costs 2 dollars
KEY = "sk-planted-8d1f'0b\\z"


# Shared and called-off questions


def test_the_same_question_in_flight_is_asked_once(tmp_path):
    cache = ReplyCache(tmp_path / "r.sqlite")

    async def scenario():
        async with calling(lambda *_: Said(delay=0.1), cache) as (client, server):
            replies = await asyncio.gather(
                *(client.complete("judge", ASKED) for _ in range(10)),
                client.complete("judge", ASKED, sample=1),
            )
            return (
                [reply.is_cached for reply in replies],
                len(server.bodies),
                client.take_usage()["judge"],
            )

    cached, requests, usage = run(scenario())
    assert cached == [False] + [True] * 9 + [False]
    assert requests == 2
    assert (usage.calls, usage.cached, usage.input_tokens) == (2, 9, 20)


def test_an_error_is_shared_and_the_next_one_asks_anew():
    async def scenario():
        async with calling(first(dataclasses.replace(refusal(400), delay=0.1))) as (client, server):
            found = await asyncio.gather(
                *(outcome(client.complete("judge", ASKED)) for _ in range(3))
            )
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
            return (
                await client.complete("judge", ASKED),
                client.take_usage()["judge"].calls,
                len(server.bodies),
            )

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


# Money, and what may not be asked


def test_the_cap_is_checked_before_each_call_and_counts_what_was_spent_before():
    async def scenario(spent, cap):
        async with calling(ok, spent=spent, api=ApiConfig(max_dollars=cap), **PRICED) as (
            client,
            _server,
        ):
            found = [await outcome(client.complete("judge", asked(n))) for n in range(4)]
            return (
                sum(isinstance(reply, Reply) for reply in found),
                found[-1],
                client.spent,
                client.take_usage()["judge"].dollars,
            )

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
        async with calling(reply, cache, api=ApiConfig(max_dollars=2.0), **PRICED) as (
            client,
            server,
        ):
            slow = asyncio.create_task(client.complete("judge", asked("slow")))
            await until(lambda: server.bodies)
            await client.complete("judge", asked("quick"))
            slow.cancel()  # as a run does that stops
            with pytest.raises(SpendingCapError, match=r"4\.0000|2\.0000"):
                await client.complete("judge", asked("too much"))
            usage = client.take_usage()["judge"]
            return (
                usage.calls,
                usage.dollars,
                client.spent,
                (await client.complete("judge", asked("slow"))).is_cached,
                len(server.bodies),
            )

    assert run(scenario()) == (2, 4.0, 4.0, True, 2)


def test_who_hears_of_the_cap_does_not_wait_for_what_is_to_be_asked_again():
    def reply(body, number):
        return (
            dataclasses.replace(refusal(503, "later", "retry-after: 90"), delay=0.3)
            if number == 0
            else Said()
        )

    async def scenario():
        async with calling(reply, api=ApiConfig(max_dollars=1.0), **PRICED) as (client, server):
            slow = asyncio.create_task(outcome(client.complete("judge", asked("slow"))))
            await until(lambda: server.bodies)
            await client.complete("judge", asked("quick"))
            return await outcome(client.complete("judge", asked("too much"))), await slow

    assert [type(found) for found in run(scenario())] == [SpendingCapError] * 2


def test_offline_nobody_is_asked_and_no_key_is_needed(tmp_path, monkeypatch):
    cache = ReplyCache(tmp_path / "r.sqlite")
    monkeypatch.setenv("A_KEY", "sk-1")

    async def scenario(count, **endpoint):
        async with calling(ok, cache, api_key_env="A_KEY", **endpoint) as (client, server):
            found = [await outcome(client.complete("judge", asked(n))) for n in range(count)]
            return found, len(server.bodies), client.take_usage()["judge"]

    run(scenario(1))
    monkeypatch.delenv("A_KEY")
    (known, missing), requests, usage = run(scenario(2, concurrency=0))
    assert known == Reply("two", "stop", True, 10, 5)
    assert (requests, usage.calls, usage.cached) == (0, 0, 1)
    key = request_key(Endpoint("http://x", "model"), asked(1), None, 0)
    assert type(missing) is OfflineMissError
    assert "judge" in str(missing)
    assert key in str(missing)


def test_an_unknown_role_is_named():
    found = run(
        outcome(ApiClient({"a": Endpoint("http://x", "m")}, ApiConfig(), None).complete("b", ASKED))
    )
    assert type(found) is ValueError
    assert "no endpoint has the role b" in str(found)
    assert "set b.model" in str(found)


# Keys


@pytest.mark.parametrize("value", [None, "", "  \n"])
def test_a_key_that_is_not_set(value, monkeypatch):
    monkeypatch.delenv("A_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("A_KEY", value)
    with pytest.raises(
        MissingKeyError, match=r"api.api_key_env names A_KEY, which is not set; .* http://x"
    ):
        ApiClient({"judge": Endpoint("http://x", "m", api_key_env="A_KEY")}, ApiConfig(), None)


@pytest.mark.parametrize("value", [f"{KEY}\n{KEY}", f"{KEY}é", f"{KEY}\x01"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(value, monkeypatch):
    monkeypatch.setenv("A_KEY", value)
    with pytest.raises(MissingKeyError, match="A_KEY holds characters") as error:
        ApiClient({"judge": Endpoint("http://x", "m", api_key_env="A_KEY")}, ApiConfig(), None)
    assert KEY not in str(error.value)


@pytest.mark.parametrize("value", [KEY, f"{KEY}\r\n"])
def test_the_key_is_sent_and_stands_nowhere_else(value, monkeypatch, tmp_path, caplog, capfd):
    monkeypatch.setenv("A_KEY", value)
    caplog.set_level(logging.DEBUG)
    echo = f"bad key {KEY} or {KEY!r}"
    statuses = (400, 401, 403, 404, 422, 429, 500, 503)
    refused = [refusal(status, echo) for status in statuses] + [
        Said(500, echo.encode()),
        Said(200, echo.encode()),
        Said(cut="before"),
    ]
    cache = ReplyCache(tmp_path / "r.sqlite")

    async def scenario():
        limits = {"api": ApiConfig(max_retries=0), "breaker": (100, 30.0)}
        async with calling(first(Said(), *refused), cache, **limits, api_key_env="A_KEY") as (
            client,
            server,
        ):
            found = [
                await outcome(client.complete("judge", asked(n))) for n in range(1 + len(refused))
            ]
            assert all(
                f"authorization: bearer {KEY}\r\n".lower() in head.lower() for head in server.heads
            )
            shown = [
                repr(client),
                repr(vars(client)),
                *(repr(vars(role)) for role in client._roles.values()),
            ]
            return found, "".join(shown[:1])

    found, shown = run(scenario())
    assert [isinstance(reply, Exception) for reply in found] == [False] + [True] * len(refused)
    assert sum("***" in str(error) for error in found[1:]) == len(refused) - 1
    texts = [
        shown,
        caplog.text,
        *capfd.readouterr(),
        *(f"{error} {error!r} {error.__cause__!r}" for error in found[1:]),
    ]
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


# Replays


def test_a_second_run_asks_nobody_and_reads_the_same(tmp_path):
    replies = [
        completion("not JSON", usage=(3, 2)),
        completion("", usage=None),
        completion("cut", "length"),
        completion("é\u2028"),
    ]
    path = tmp_path / "r.sqlite"

    async def scenario(**endpoint):
        cache = ReplyCache(path)
        async with calling(
            lambda body, number: Said(content=replies[number]), cache, **endpoint
        ) as (client, server):
            found = [
                await client.complete("judge", asked(n), schema=SCHEMA, sample=n)
                for n in range(len(replies))
            ]
        cache.close()
        return found, len(server.bodies), client.spent

    once, requests, spent = run(scenario(**PRICED))
    assert requests == 4
    assert spent > 0
    again, requests, spent = run(
        scenario(
            timeout=1.0,
            concurrency=0,
            requests_per_minute=1,
            input_price=9.0,
        )
    )
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
    assert (one.calls, one.retries, one.input_tokens, one.output_tokens, one.dollars) == (
        1,
        0,
        10,
        5,
        2.0,
    )
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
