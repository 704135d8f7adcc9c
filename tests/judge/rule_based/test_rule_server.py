"""The served judge over real sockets: what it answers, each fault as what it says it is, and
commands that run beside it.
"""

import asyncio
import collections
import concurrent.futures
import http.client
import json
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import openai
import pytest
from judge_server import SCRIPT
from waiting import HANG, until

from opdjax.config.api import ApiConfig, Endpoint
from opdjax.config.rubrics import RubricsConfig
from opdjax.judge.background import open_background_judge
from opdjax.judge.judgement import group_of, judge_group
from opdjax.judge.replies import Reply
from opdjax.judge.reply_object import ReplyError
from opdjax.judge.rule_based.rules import reply_to
from opdjax.judge.schema import parse_rubric, parse_verdicts
from opdjax.judge.structured_output import Judge

QUESTION, RIGHT, WRONG = "34-17+25=", "34-17=17;17+25=42#42", "34-17=18;18+25=43#43"
CONTENT_FAULTS = (
    "truncated",
    "prose",
    "empty",
    "fence",
    "missing_verdict",
    "missing_answer",
    "bad_weight",
    "lying_total",
    "reordered",
)


def prompts():
    """The requests that the package makes of a group: a rubricator's and a verifier's, each with
    its schema.
    """
    asked = []

    async def kept(role, messages, *, schema=None, schema_name="reply", sample=0):
        asked.append(
            {
                "messages": messages,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": schema},
                },
            }
        )
        return Reply(json.dumps(reply_to(messages)), "stop", False, 0, 0)

    judge = Judge(kept, RubricsConfig())
    asyncio.run(
        judge_group(
            judge, group_of(judge, 0, QUESTION, [RIGHT], [RIGHT, WRONG, ""], [False] * 3), "rubric"
        )
    )
    return asked


RUBRICATOR, VERIFIER = prompts()


def asked_of(url, request, timeout=HANG, **more):
    """(status, document, headers) of a request in a connection of its own."""
    body = json.dumps({"model": "any", **request, **more}).encode()
    call = urllib.request.Request(
        f"{url}/chat/completions", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(call, timeout=timeout) as response:
            return response.status, json.load(response), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error), error.headers


def text_of(document):
    return document["choices"][0]["message"]["content"]


def models_of(connection):
    connection.request("GET", "/v1/models")
    return connection.getresponse().read()


def stats(url):
    with urllib.request.urlopen(f"{url.removesuffix('/v1')}/stats") as response:
        return json.load(response)


def test_it_judges_what_the_rules_judge(judge_server):
    for request in (RUBRICATOR, VERIFIER):
        status, document, _ = asked_of(judge_server, request)
        assert status == 200
        assert json.loads(text_of(document)) == reply_to(request["messages"])
        assert document["choices"][0]["finish_reason"] == "stop"
        usage = document["usage"]
        assert usage["prompt_tokens"] == -(-len(request["messages"][0]["content"]) // 4)
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_openai_client_reads_it(judge_server):
    with openai.OpenAI(base_url=judge_server, api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["rule-judge"]
        for form in ({"type": "json_object"}, VERIFIER["response_format"], {"type": "text"}):
            reply = client.chat.completions.create(
                model="any", messages=VERIFIER["messages"], response_format=form
            )
            assert json.loads(reply.choices[0].message.content) == reply_to(VERIFIER["messages"])


def test_the_schema_and_the_length_that_are_asked_for_are_kept(judge_server):
    schema = {
        "type": "object",
        "properties": {
            "answers": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"answer_index": {"type": "integer"}},
                    "additionalProperties": False,
                },
            }
        },
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    _, document, _ = asked_of(judge_server, VERIFIER, response_format=form)
    assert json.loads(text_of(document)) == {"answers": [{"answer_index": n} for n in (1, 2, 3)]}
    _, document, _ = asked_of(judge_server, VERIFIER, max_tokens=5)
    assert len(text_of(document)) == 20
    assert document["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"messages": []}, "messages"),
        ({"stream": True}, "stream"),
        ({"n": 2}, "n:"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format",
        ),
    ],
)
def test_what_is_not_offered_is_refused_by_name(judge_server, more, word):
    status, document, _ = asked_of(judge_server, VERIFIER, **more)
    assert status == 400
    assert word in document["error"]["message"]


def test_one_connection_serves_many_requests_and_bad_ones_end_it(judge_server):
    connection = http.client.HTTPConnection(
        urllib.parse.urlsplit(judge_server).netloc, timeout=HANG
    )
    begun = stats(judge_server)["connections"]
    for _ in range(20):
        connection.request("POST", "/v1/chat/completions", json.dumps({"model": "any", **VERIFIER}))
        assert connection.getresponse().read()
    assert stats(judge_server)["connections"] == begun + 2  # this one, and that which asks
    for body, headers, status in (
        ("{", {}, 400),
        ("[1]", {}, 400),
        ("x", {"Content-Length": "-1"}, 400),
        ("", {"Content-Length": "9" * 12}, 413),
    ):
        connection.request("POST", "/v1/chat/completions", body, headers)
        response = connection.getresponse()
        assert "error" in json.load(response)
        assert response.status == status
        connection.close()
    connection.request("GET", "/v2")
    assert connection.getresponse().status == 404
    connection.close()


def test_many_requests_at_once_each_wait_just_the_latency(start_judge):
    with start_judge("--latency", 0.3) as url, concurrent.futures.ThreadPoolExecutor(40) as pool:
        begun = time.monotonic()
        statuses = list(pool.map(lambda _: asked_of(url, VERIFIER)[0], range(40)))
        seconds = time.monotonic() - begun
        assert statuses == [200] * 40
        assert seconds >= 0.3
        told = stats(url)
        assert told["requests"] == told["roles"]["verifier"] == 40
        assert told["max_in_flight"] > 1
        # A thread counts itself out after its reply was read.
        until(lambda: not stats(url)["in_flight"])


def outcome(url, request):
    """The kind of fault, by how the reply differs from the right one."""
    try:
        status, document, headers = asked_of(url, request)
    except http.client.RemoteDisconnected:
        return "timeout"
    if status == 429:
        assert 0.05 <= float(headers["Retry-After"]) <= 0.2
        return "rate_limit"
    if status == 500:
        return "server_error"
    return kind_of(
        text_of(document), reply_to(request["messages"]), document["choices"][0]["finish_reason"]
    )


def kind_of(text, right, finish_reason):
    whole = json.dumps(right)
    if finish_reason == "length":
        assert 0 < len(text) < len(whole)
        assert whole.startswith(text)
        return "truncated"
    if not text:
        return "empty"
    if text != whole and whole in text:
        return "fence" if text.startswith("```") else "prose"
    found = json.loads(text)
    if found == right:
        return None
    if "total" in found:
        assert all(answer["final_score"] >= 1000 for answer in found.get("answers", ()))
        return "lying_total"
    if "criteria" in found:
        assert sum(not 1 <= criterion["weight"] <= 5 for criterion in found["criteria"]) == 1
        return "bad_weight"
    if len(found["answers"]) < len(right["answers"]):
        return "missing_answer"
    by_index = sorted(found["answers"], key=lambda answer: answer["answer_index"])
    return "reordered" if by_index == right["answers"] else "missing_verdict"


def test_every_fault_appears_and_is_what_it_is_called(start_judge):
    with start_judge("--faults", 0.5, "--hang", 0.05, "--seed", 3) as url:
        outcomes = collections.Counter(
            outcome(url, request) for _ in range(150) for request in (RUBRICATOR, VERIFIER)
        )
        told = stats(url)
    assert 110 < outcomes.pop(None) < 190
    assert set(outcomes) == {"rate_limit", "server_error", "timeout", *CONTENT_FAULTS}
    assert told["faults"] == outcomes
    assert told["roles"] == {"rubricator": 150, "verifier": 150}


def test_faults_follow_from_the_request_and_not_from_its_turn(start_judge):
    requests = [{**VERIFIER, "seed": number} for number in range(30)]
    options = ("--faults", 0.5, "--fault-kinds", "rate_limit,server_error,empty", "--seed", 7)
    with start_judge(*options) as url:
        first = [outcome(url, request) for request in requests]
        again = [outcome(url, request) for request in requests]
    with start_judge(*options) as url:
        backwards = [outcome(url, request) for request in reversed(requests)][::-1]
    assert first == backwards
    assert first != again  # what failed may succeed when it is sent again
    assert set(first) == {None, "rate_limit", "server_error", "empty"}


def test_readers_put_right_what_can_be_put_right(start_judge):
    """What each fault comes to in the package's own reading of replies."""
    config, read = RubricsConfig(), {}
    for fault in CONTENT_FAULTS:
        request = RUBRICATOR if fault == "bad_weight" else VERIFIER
        with start_judge("--faults", 1, "--fault-kinds", fault) as url:
            text = text_of(asked_of(url, request)[1])
        try:
            found = (
                parse_rubric(text, config)[1]
                if fault == "bad_weight"
                else parse_verdicts(text, 3, 5, False)
            )
            read[fault] = found.repairs, len(found.problems)
        except ReplyError as error:
            read[fault] = error.kind
    assert read == {
        "truncated": "parse_error",
        "empty": "empty",
        "bad_weight": "schema_error",
        "prose": (("prose",), 0),
        "fence": (("fence",), 0),
        "lying_total": (("unknown_keys",), 0),
        "reordered": ((), 0),
        "missing_verdict": ((), 1),
        "missing_answer": "answer_index",
    }


def test_a_cut_off_reply_is_told_from_a_malformed_one(start_judge):
    """Of a reply that was cut off, an object inside it can often be read: what helps is room, and
    the judge is told so.
    """
    heard = []

    async def complete(role, messages, *, schema=None, schema_name="reply", sample=0):
        heard.append(messages)
        choice = asked_of(url, {"messages": messages})[1]["choices"][0]
        return Reply(choice["message"]["content"], choice["finish_reason"], False, 0, 0)

    judge = Judge(complete, RubricsConfig())
    with start_judge("--faults", 1, "--fault-kinds", "truncated") as url:
        (found,) = asyncio.run(
            judge_group(
                judge, group_of(judge, 0, QUESTION, [RIGHT], [RIGHT, WRONG], [False] * 2), "rubric"
            )
        )
    assert not found.is_scored
    assert found.tally.problems == {"truncated": 3}
    assert "be brief" in heard[1][-1]["content"]


def test_faults_do_not_change_what_answers_are_worth(start_judge, tmp_path, monkeypatch):
    """Through the package's own client, of a third of the requests every kind: the groups come to
    the scores that the rules give.
    """
    answers = [RIGHT, WRONG, "34-17=17;17+25=41#41", ""]
    monkeypatch.setattr("opdjax.judge.client.BREAKER_FAILURES", 100)
    monkeypatch.setattr("opdjax.judge.structured_output.MAX_REASKS", 9)
    with (
        start_judge("--faults", 0.35, "--hang", 0.01, "--seed", 3) as url,
        open_background_judge(
            dict.fromkeys(("rubricator", "verifier"), Endpoint(base_url=url, model="any")),
            ApiConfig(max_retries=9),
            RubricsConfig(),
            tmp_path,
        ) as background,
    ):
        groups = [
            group_of(background.judge, n, f"({n}) {QUESTION}", [RIGHT], answers, [False] * 4)
            for n in range(40)
        ]
        found = [
            one
            for (one,) in background.results(
                [
                    background.submit(judge_group(background.judge, group, "rubric"))
                    for group in groups
                ]
            )
        ]
        told, usage = stats(url), background.record_usage(1)
    # 5 the value, 2 and 4 the steps, 2 that the value follows, 1 the form.
    assert {one.scores for one in found} == {(1.0, 3 / 14, 5 / 14, 0.0)}
    problems = sum((one.tally.problems for one in found), collections.Counter())
    assert problems.keys() == {
        "truncated",
        "empty",
        "schema_error",
        "answer_index",
        "missing_answer",
    }
    assert set(told["faults"]) == {"rate_limit", "server_error", "timeout", *CONTENT_FAULTS}
    assert usage["api/verifier/retries"] > 0


def test_a_judge_goes_down(start_judge):
    with start_judge("--down-after", 3) as url:
        idle = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=HANG)
        assert models_of(idle)
        assert [asked_of(url, VERIFIER)[0] for _ in range(3)] == [200] * 3
        with pytest.raises(urllib.error.URLError, match="refused"):
            asked_of(url, VERIFIER)
        with pytest.raises(ConnectionError):
            models_of(idle)


def run(*words):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=HANG
    )


def test_it_serves_beside_a_command_and_passes_its_status_on():
    asks = (
        "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1] + "
        "'/models').status); sys.exit(7)"
    )
    done = run("--port", "0", "--", sys.executable, "-c", asks, "{url}")
    assert done.returncode == 7
    assert done.stdout == "200\n"
    assert '"requests": 0' in done.stderr
    assert (
        run(
            "--port", "0", "--", sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"
        ).returncode
        == 137
    )
    assert run("--port", "0", "--", "/no/such/program").returncode == 127


def test_options_are_refused_by_name(judge_server):
    taken = run("--port", judge_server.rpartition(":")[2].partition("/")[0])
    assert taken.returncode == 2
    assert "is not available" in taken.stderr
    assert (
        "--fault-kinds is typo; expected some of rate_limit"
        in run("--fault-kinds", "empty,typo").stderr
    )
    assert "expected a share from 0 to 1" in run("--faults", "30").stderr
