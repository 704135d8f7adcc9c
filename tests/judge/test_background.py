"""The line to judges where a run ends in the middle of a question, and where two runs share what
they are told.
"""

import asyncio
import threading
import time
import types

import pytest
from waiting import HANG

from opdjax.config.api import ApiConfig, Endpoint
from opdjax.config.rubrics import RubricsConfig
from opdjax.judge.background import SPENDING, WaitStoppedError, open_background_judge
from opdjax.judge.cache import ReplyCache
from opdjax.judge.client import ApiClient
from opdjax.judge.replies import ApiUnavailableError, Reply, SpendingCapError
from opdjax.runs.workdir import read_lines

ASKED = [{"role": "user", "content": "what is it worth?"}]


def test_what_was_answered_when_a_run_ends_is_kept_as_spent(judge_server, tmp_path):
    roles = {"verifier": Endpoint(judge_server, "rules", input_price=1.0, output_price=1.0)}
    with open_background_judge(roles, ApiConfig(), RubricsConfig(), tmp_path) as background:
        background.record_usage(3)
        background.results([background.submit(background.client.complete("verifier", ASKED))])
        spent = background.client.spent
    assert sum(row["dollars"] for row in read_lines(tmp_path / SPENDING)) == spent > 0
    assert {row["step"] for row in read_lines(tmp_path / SPENDING)} == {3}
    with open_background_judge(roles, ApiConfig(), RubricsConfig(), tmp_path) as background:
        assert background.client.spent == spent


def test_a_request_to_stop_ends_the_wait_for_a_judge(start_judge, tmp_path):
    began, asked_to_stop = time.monotonic(), []
    with start_judge("--latency", 60) as base_url:
        roles = {"verifier": Endpoint(base_url, "rules")}
        given = roles, ApiConfig(), RubricsConfig(), tmp_path, lambda: bool(asked_to_stop)
        with open_background_judge(*given) as background:
            threading.Timer(0.3, asked_to_stop.append, (1,)).start()
            with pytest.raises(WaitStoppedError):
                background.results(
                    [background.submit(background.client.complete("verifier", ASKED))]
                )
    assert time.monotonic() - began < 30


def test_two_runs_that_ask_the_same_at_once_go_on_with_one_reply(judge_server, tmp_path):
    cache = ReplyCache(tmp_path / "replies.sqlite")
    first_of = Reply("of the other run", "stop", False, 1, 2)

    class Overtaken(ReplyCache):
        def put(self, key, reply):
            cache.put(key, first_of)
            super().put(key, reply)

    async def asked():
        client = ApiClient(
            {"verifier": Endpoint(judge_server, "rules")},
            ApiConfig(),
            Overtaken(tmp_path / "replies.sqlite"),
        )
        try:
            return [(await client.complete("verifier", ASKED)).text for _ in range(2)]
        finally:
            await client.close()

    assert asyncio.run(asked()) == ["of the other run"] * 2


def test_nobody_waits_for_a_probe_that_the_spending_cap_gave_up(monkeypatch):
    endpoint = Endpoint("http://127.0.0.1:9/v1", "nobody", timeout=1.0)
    api = ApiConfig(max_retries=0, max_dollars=1.0)
    monkeypatch.setattr("opdjax.judge.client.BREAKER_FAILURES", 1)
    monkeypatch.setattr("opdjax.judge.client.BREAKER_SECONDS", 0.2)
    now = [time.monotonic()]
    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("opdjax.judge.limits.time", clock)

    async def asked():
        client = ApiClient({"verifier": endpoint}, api, None)
        question = lambda text: client.complete("verifier", [{"role": "user", "content": text}])
        try:
            first = await asyncio.gather(question("a"), return_exceptions=True)
            later = asyncio.gather(question("b"), question("c"), return_exceptions=True)
            await asyncio.sleep(0.05)
            client.spent = 2.0  # another role's, while the probe waits
            now[0] += 1.0
            return first + await asyncio.wait_for(later, HANG)
        finally:
            await client.close()

    assert [type(error) for error in asyncio.run(asked())] == [
        ApiUnavailableError,
        SpendingCapError,
        SpendingCapError,
    ]
