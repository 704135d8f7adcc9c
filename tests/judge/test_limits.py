"""Limits and the breaker, alone and over real sockets."""

import asyncio
import dataclasses
import time
import types

import pytest
from chat_server import ASKED, Said, asked, calling, first, ok, outcome, refusal, run, until
from waiting import HANG

from opdjax.config.api import ApiConfig
from opdjax.judge import limits
from opdjax.judge.cache import ReplyCache
from opdjax.judge.limits import RateLimiter
from opdjax.judge.replies import ApiUnavailableError, Reply, SpendingCapError

# Limits


def test_a_budget_serves_by_turns_and_lends_what_is_more_than_a_second(monkeypatch):
    monkeypatch.setattr(limits, "_POLL_SECONDS", 0)  # looks again as soon as others had their turn

    async def scenario():
        clock, served = [0.0], []
        budget = RateLimiter(600, lambda: clock[0])  # 10 a second

        async def one(name, units):
            await budget.acquire(units)
            served.append((name, round(clock[0], 1)))

        takers = [
            asyncio.create_task(one(name, units))
            for name, units in (("a", 4), ("b", 6), ("c", 30), ("d", 1), ("e", 1))
        ]
        while not all(taker.done() for taker in takers):
            for _ in range(50):  # whoever waits has looked
                await asyncio.sleep(0)
            clock[0] += 0.1
        return served

    served = run(scenario())
    assert [name for name, _ in served] == ["a", "b", "c", "d", "e"]
    assert [time for _, time in served] == pytest.approx([0.0, 0.0, 1.0, 3.1, 3.2], abs=0.101)


def test_what_is_given_back_is_there_for_whoever_waits():
    async def scenario():
        budget = RateLimiter(60)  # one a second
        await budget.acquire(600)
        waiting = asyncio.create_task(budget.acquire(1))
        await asyncio.sleep(0.01)
        budget.give_back(600)
        await waiting  # and not for ten minutes

    run(scenario())


def test_no_more_than_so_many_at_once():
    async def scenario():
        async with calling(lambda *_: Said(delay=0.03), concurrency=5) as (client, server):
            await asyncio.gather(*(client.complete("judge", asked(n)) for n in range(40)))
            return server.most_open, len(server.bodies)

    assert run(scenario()) == (5, 40)


def test_more_connections_than_the_package_keeps_by_itself():
    async def scenario():
        all_are_open = asyncio.Event()

        def reply(body, number):
            if number == 149:
                all_are_open.set()
            return Said(gate=all_are_open)

        async with calling(reply, concurrency=150) as (client, server):
            await asyncio.gather(*(client.complete("judge", asked(n)) for n in range(150)))
            return server.most_open

    assert run(scenario()) == 150


def test_requests_and_tokens_a_minute():
    async def seconds(count, **endpoint):
        async with calling(ok, **endpoint) as (client, server):
            began = asyncio.get_running_loop().time()
            await asyncio.gather(*(client.complete("judge", asked(n)) for n in range(count)))
            return server.times[-1] - began

    # A second's worth is there at the start: 10 of 14 at once, the rest at 10 a second.
    assert run(seconds(14, requests_per_minute=600)) > 0.3
    # Of the 6,000 tokens that a request may use, its 15 are counted once it was answered: eight
    # requests take a second. With all 6,000 counted, seven of them would wait 50 seconds each.
    for concurrency in (8, 1):
        endpoint = {"tokens_per_minute": 7_200, "max_tokens": 6_000, "concurrency": concurrency}
        assert run(seconds(8, **endpoint)) < 100


def test_failed_requests_use_no_tokens():
    async def scenario():
        async with calling(
            first(*[refusal(500)] * 4), tokens_per_minute=60_000, max_tokens=30_000
        ) as (client, server):
            await client.complete("judge", ASKED)
            return server.times[-1] - server.times[0]

    assert run(scenario()) < 30  # and not 30 seconds for each of four failures


# The breaker


def test_the_breaker_opens_and_a_probe_closes_it():
    breaker = {"api": ApiConfig(max_retries=1), "breaker": (4, 0.4)}

    async def scenario():
        async with calling(first(*[refusal(500)] * 4), **breaker) as (client, server):
            failed = [await outcome(client.complete("judge", asked(n))) for n in range(2)]
            assert [type(error) for error in failed] == [ApiUnavailableError] * 2
            assert len(server.bodies) == 4
            replies = await asyncio.gather(
                *(client.complete("judge", asked(n)) for n in range(2, 8))
            )
            assert [reply.text for reply in replies] == ["two"] * 6
            return server.times

    times = run(scenario())
    assert len(times) == 10
    assert times[4] - times[3] >= 0.39  # the probe, alone
    assert times[5] > times[4]


def test_all_who_wait_hear_of_a_failed_probe():
    breaker = {"api": ApiConfig(max_retries=4), "breaker": (3, 0.2)}

    async def scenario():
        async with calling(lambda *_: refusal(503, "away"), **breaker) as (client, server):
            found = await asyncio.gather(
                *(outcome(client.complete("judge", asked(n))) for n in range(3))
            )
            assert [type(error) for error in found] == [ApiUnavailableError] * 3
            assert all("503" in str(error) for error in found)
            return (
                len(server.bodies),
                await outcome(client.complete("judge", asked(9))),
                len(server.bodies),
            )

    before, found, after = run(scenario())
    # The three and one probe, and on a slow machine a second attempt before the third failed: not
    # the fifteen attempts that they had.
    assert 4 <= before <= 6
    assert type(found) is ApiUnavailableError
    assert after == before + 1


def test_a_rate_limit_and_a_refusal_are_answers():
    breaker = {"api": ApiConfig(max_retries=0), "breaker": (2, 60.0)}
    answers = (refusal(500), refusal(429), refusal(500), refusal(400), refusal(500))

    async def scenario():
        async with calling(first(*answers), **breaker) as (client, _server):
            for n in range(5):
                await outcome(client.complete("judge", asked(n)))
            return await client.complete("judge", asked(9))

    assert run(scenario()).text == "two"


def open_breaker(seconds):
    """Settings with which two failures open it."""
    return {"api": ApiConfig(max_retries=0), "breaker": (2, seconds)}


async def opened(client):
    await asyncio.gather(
        *(outcome(client.complete("judge", asked(f"opens {n}"))) for n in range(2))
    )
    assert client._roles["judge"].breaker.is_open


def test_a_probe_that_is_called_off_leaves_nobody_waiting():
    async def scenario():
        async with calling(
            first(refusal(500), refusal(500)), **open_breaker(0.1), requests_per_minute=60_000
        ) as (client, server):
            await opened(client)
            role = client._roles["judge"]
            role.requests.pause(HANG)  # the probe waits for its turn
            probe = asyncio.create_task(client.complete("judge", asked("probe")))
            await until(lambda: role.breaker._is_probing)
            waiting = asyncio.create_task(client.complete("judge", asked("waits")))
            await asyncio.sleep(0.01)
            probe.cancel()
            role.requests._blocked_until = 0.0
            return (await waiting).text, [body["messages"][0]["content"] for body in server.bodies]

    text, contents = run(scenario())
    assert text == "two"
    assert contents[2:] == ["waits"]


def test_a_probe_that_meets_the_cap_leaves_nobody_waiting(monkeypatch):
    breaker = open_breaker(0.2) | {"api": ApiConfig(max_retries=0, max_dollars=1.0)}
    now = [time.monotonic()]
    monkeypatch.setattr(limits, "time", types.SimpleNamespace(monotonic=lambda: now[0]))

    async def scenario():
        async with calling(lambda *_: refusal(500), **breaker) as (client, _):
            await opened(client)
            calls = [
                asyncio.create_task(outcome(client.complete("judge", asked(n)))) for n in range(3)
            ]
            await until(lambda: client._roles["judge"].breaker._wakeup is not None)
            client.spent = 1.0
            now[0] += 1.0  # time for the probe
            return await asyncio.gather(*calls)

    assert {type(found) for found in run(scenario())} == {SpendingCapError}


def test_what_was_sent_before_does_not_end_the_wait_by_failing():
    async def scenario():
        is_open = asyncio.Event()

        def reply(body, number):
            if body["messages"][0]["content"] == "slow":
                return dataclasses.replace(refusal(500), gate=is_open)
            return refusal(500) if number < 3 else Said()

        async with calling(reply, **open_breaker(0.8)) as (client, server):
            slow = asyncio.create_task(outcome(client.complete("judge", asked("slow"))))
            await until(lambda: server.bodies)
            await opened(client)
            waiting = asyncio.create_task(client.complete("judge", asked("waits")))
            is_open.set()
            assert type(await slow) is ApiUnavailableError
            return await waiting, server.times

    waited, times = run(scenario())
    assert waited.text == "two"
    assert times[-1] - times[-2] > 0.7


def test_what_was_sent_before_ends_the_wait_by_succeeding():
    async def scenario():
        is_open = asyncio.Event()

        def reply(body, number):
            if body["messages"][0]["content"] == "slow":
                return Said(gate=is_open)
            return refusal(500) if number < 3 else Said()

        async with calling(reply, **open_breaker(600.0)) as (client, server):
            slow = asyncio.create_task(client.complete("judge", asked("slow")))
            await until(lambda: server.bodies)
            await opened(client)
            waiting = asyncio.create_task(client.complete("judge", asked("waits")))
            is_open.set()
            return await waiting, await slow

    assert [reply.text for reply in run(scenario())] == ["two", "two"]


def test_who_queues_asks_nobody_who_is_taken_for_down():
    breaker = {"api": ApiConfig(max_retries=0), "breaker": (2, 0.3)}

    async def scenario():
        async with calling(lambda *_: refusal(500), **breaker, concurrency=1) as (client, server):
            found = await asyncio.gather(
                *(outcome(client.complete("judge", asked(n))) for n in range(20))
            )
            return {type(error) for error in found}, len(server.bodies)

    assert run(scenario()) == ({ApiUnavailableError}, 3)  # two that opened it, one probe


def test_cached_replies_are_answered_whatever_the_breaker_says(tmp_path):
    cache = ReplyCache(tmp_path / "r.sqlite")

    async def scenario():
        async with calling(
            first(Said(), refusal(500), refusal(500)), cache, **open_breaker(600.0)
        ) as (client, _):
            await client.complete("judge", ASKED)
            await opened(client)
            return await client.complete("judge", ASKED)

    assert run(scenario()) == Reply("two", "stop", True, 10, 5)
