"""Whole runs that learn from a judge: through the real client, cache, parser and verifier, against
a judge served over HTTP.
"""

import dataclasses
import http.server
import json
import os
import threading

import jax
import numpy as np
import pytest
from tiny_runs import column

from opdjax.config import (
    ROPD_CODE,
    RULE_JUDGE,
    ApiConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    JudgeConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RubricsConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.data.tasks.arithmetic import problems
from opdjax.diagnose.doctor import CHECKS, run_checks
from opdjax.engine.update import loss_and_grad
from opdjax.estimators.losses import AGGREGATIONS
from opdjax.rollouts.rows import token_stages, with_advantages
from opdjax.rollouts.setup import prepare, update_spec
from opdjax.rollouts.source import SourceStoppedError
from opdjax.rollouts.weights import load_student
from opdjax.runs.workdir import read_lines
from opdjax.train import train
from opdjax.types import Rollouts, TrainBatch

pytestmark = pytest.mark.usefixtures("shared_programs")

STAGES = RubricsConfig(stages=("first step", "second step=;", "answer=#"))
NOWHERE = "http://127.0.0.1:9/v1"  # no server listens
KEY = "sk-planted-7f3a9c51"


def config(base_url, **changes):
    judge = JudgeConfig("rules")
    base = Config(
        teacher=ModelConfig(
            "nobody/knows"
        ),  # its text is all there is of it: no weights, no tokenizer
        data=DataConfig(source="arithmetic:train[:64]", max_prompt_length=32),
        sampling=SamplingConfig(num_generations=4, max_completion_length=20),
        estimator=ROPD_CODE,
        rubrics=RubricsConfig(),
        rubricator=judge,
        verifier=judge,
        api=ApiConfig(base_url, max_retries=1, prices=("rules=1/2",)),
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule="constant"),
        train=TrainConfig(num_steps=4, prompts_per_step=4),
        evaluation=EvaluationConfig(source=None),
        log=LogConfig(samples_every=2, diagnostics_every=0),
        checkpoint=CheckpointConfig(every=10),
        mesh=MeshConfig(1),
    )
    return dataclasses.replace(base, **changes)


def asked_at(base, base_url, **api):
    """The same run at another address."""
    return dataclasses.replace(base, api=dataclasses.replace(base.api, base_url=base_url, **api))


@pytest.fixture(autouse=True)
def breaker(monkeypatch):
    """A server counts as down after three failures and is tested soon."""
    monkeypatch.setattr("opdjax.judge.client.BREAKER_FAILURES", 3)
    monkeypatch.setattr("opdjax.judge.client.BREAKER_SECONDS", 0.1)


def weights(workdir):
    return (workdir / "student" / "model.safetensors").read_bytes()


def with_key(base, **changes):
    """The same run; both roles send the key in $JUDGE_KEY."""
    api = dataclasses.replace(base.api, api_key_env="JUDGE_KEY", **changes)
    return dataclasses.replace(base, api=api)


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)


@pytest.fixture(scope="module")
def straight(judge_server, tmp_path_factory):
    """A run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUDGE_KEY", KEY)
        train(with_key(config(judge_server)), workdir)
    return workdir


def test_a_run_writes_what_was_said_and_what_it_cost(straight):
    rows = read_lines(straight / "rubrics.jsonl")
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert all(row["status"] == "scored" for row in rows)
    assert all(("answers" in row) == (row["step"] in (1, 2, 4)) for row in rows)
    for row in rows:
        total = sum(criterion["weight"] for criterion in row["rubric"])
        for score, verdicts in zip(row["scores"], row["verdicts"]):
            expected = sum(v * c["weight"] for v, c in zip(verdicts, row["rubric"])) / total
            assert score == pytest.approx(expected, abs=1e-6)
    assert (
        column(straight, "api/rubricator/calls")
        == column(straight, "api/verifier/calls")
        == [4.0] * 4
    )
    spent = sum(row["dollars"] for row in read_lines(straight / "spending.jsonl"))
    tokens = {
        name: sum(row[name] for row in read_lines(straight / "spending.jsonl"))
        for name in ("input_tokens", "output_tokens")
    }
    assert spent == pytest.approx((tokens["input_tokens"] + 2 * tokens["output_tokens"]) / 1e6)


def test_from_the_cache_nobody_is_asked_and_the_weights_are_the_same(
    straight, judge_server, tmp_path, monkeypatch
):
    monkeypatch.setattr("opdjax.rollouts.judged._DRAW_PARTS", 4)
    cache = str(straight / "replies.sqlite")
    train(asked_at(config(judge_server), NOWHERE, cache=cache, concurrency=0), tmp_path)
    assert weights(tmp_path) == weights(straight)
    assert (
        sum(column(tmp_path, "api/rubricator/calls") + column(tmp_path, "api/verifier/calls")) == 0
    )


def test_the_judge_in_the_run_s_own_process_says_what_it_says_over_http(straight, tmp_path):
    judge = JudgeConfig(RULE_JUDGE)
    train(config(NOWHERE, rubricator=judge, verifier=judge), tmp_path)
    assert weights(tmp_path) == weights(straight)
    # Dollars are summed up in the order of the replies.
    counted = [
        [row | {"seconds": 0.0, "dollars": 0.0} for row in read_lines(run / "spending.jsonl")]
        for run in (straight, tmp_path)
    ]
    assert counted[0] == counted[1]


@pytest.mark.long
def test_a_judge_that_goes_down_stops_the_run_which_goes_on_when_it_is_back(
    straight, judge_server, start_judge, tmp_path
):
    with (
        start_judge("--down-after", 20) as base_url,
        pytest.raises(SourceStoppedError, match="continues .* once the judge answers"),
    ):
        train(config(base_url), tmp_path)
    assert [
        path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal()
    ] == ["2"]
    assert not (tmp_path / "result.json").exists()
    train(config(judge_server), tmp_path)
    assert weights(tmp_path) == weights(straight)
    assert [row["step"] for row in read_lines(tmp_path / "rubrics.jsonl")] == [1] * 4 + [2] * 4 + [
        3
    ] * 4 + [4] * 4


@pytest.mark.long
def test_a_spending_cap_stops_the_run_which_goes_on_when_it_is_raised(
    straight, judge_server, tmp_path
):
    spent = [
        sum(
            row["dollars"] for row in read_lines(straight / "spending.jsonl") if row["step"] <= step
        )
        for step in range(5)
    ]
    capped = asked_at(config(judge_server), judge_server, max_dollars=(spent[2] + spent[3]) / 2)
    with pytest.raises(SourceStoppedError, match=r"spent .* dollars; api.max_dollars is"):
        train(capped, tmp_path)
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 2
    with pytest.raises(SourceStoppedError):  # what was spent before counts
        train(capped, tmp_path)
    train(asked_at(capped, judge_server, max_dollars=0.0), tmp_path)
    assert weights(tmp_path) == weights(straight)


@pytest.fixture
def refusing_server():
    """The address of a server that, as those of reasoning models do, refuses max_tokens."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = "max_tokens is not supported, use max_completion_tokens"
            text = text if "max_tokens" in body else "The prompt is too long"
            content = json.dumps({"error": {"message": text}}).encode()
            self.send_response(400)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        log_message = lambda *_: None

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


@pytest.mark.parametrize(
    ("field", "quoted"),
    [
        (
            "auto",
            "max_tokens is not supported, use max_completion_tokens; set api.max_tokens_field to "
            "max_completion_tokens",
        ),
        pytest.param("max_completion_tokens", "The prompt is too long", marks=pytest.mark.long),
    ],
)
def test_a_server_that_refuses_is_quoted_in_train_and_doctor_alike(
    refusing_server, tmp_path, field, quoted
):
    refused = asked_at(config(NOWHERE), refusing_server, max_tokens_field=field)
    with pytest.raises(SourceStoppedError) as stopped:
        train(refused, tmp_path)
    (finding,) = run_checks(refused, only=["judge"])
    assert finding.status == "fault"
    for text in (str(stopped.value), finding.message):
        assert f"status 400: {quoted}" in text


def test_a_reply_that_is_missing_offline_is_named(judge_server, tmp_path):
    with pytest.raises(
        SourceStoppedError,
        match=r"api.concurrency is 0 and the rubricator's reply [0-9a-f]{64} is not in the cache",
    ):
        train(asked_at(config(judge_server), judge_server, concurrency=0), tmp_path)


@pytest.mark.long
def test_through_faults_of_every_kind_failed_groups_are_masked(start_judge, tmp_path, monkeypatch):
    monkeypatch.setattr("opdjax.judge.client.BREAKER_FAILURES", 50)
    base = config(NOWHERE, train=TrainConfig(num_steps=4, prompts_per_step=8))
    with start_judge("--faults", 0.3, "--hang", 0.2) as base_url:
        base = asked_at(base, base_url, max_retries=3)
        train(base, tmp_path)
    problems = {
        name: sum(column(tmp_path, f"rubric/problems/{name}"))
        for name in ("parse_error", "truncated", "empty", "missing_answer")
    }
    assert sum(problems.values()) > 3
    assert sum(column(tmp_path, "rubric/reasks")) > 3
    assert sum(column(tmp_path, "api/rubricator/retries")) > 0
    for row in read_lines(tmp_path / "rubrics.jsonl"):
        assert row["status"] == (
            "scored" if any(score is not None for score in row["scores"]) else "failed"
        )
        assert all(score is None or 0 <= score <= 1 for score in row["scores"])


def test_no_key_is_in_any_file(straight, judge_server, tmp_path, monkeypatch, capfd):
    elsewhere = judge_server.replace("/v1", "/nothing")
    with pytest.raises(SourceStoppedError) as stopped:
        train(with_key(config(judge_server), base_url=elsewhere), tmp_path / "refused")
    files = [path for run in (straight, tmp_path) for path in run.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in str(stopped.value) + "".join(capfd.readouterr())
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(RuntimeError, match="JUDGE_KEY, which is not set"):
        train(with_key(config(judge_server)), tmp_path / "third")


@pytest.mark.long
@pytest.mark.parametrize(
    ("estimator", "rubrics"),
    [
        (EstimatorConfig("tjudge"), RubricsConfig()),
        (EstimatorConfig("ropd_stages", "stage_token_mean"), STAGES),
        (ROPD_CODE, RubricsConfig(rubric_of="student", num_references=0)),
        (
            ROPD_CODE,
            RubricsConfig(refresh="frozen", grades="graded", polarity="signed"),
        ),
        (EstimatorConfig("ropd_stages"), dataclasses.replace(STAGES, refresh="evolving")),
    ],
    ids=["tjudge", "stages", "per_student", "frozen", "evolving"],
)
def test_a_run_that_is_stopped_and_continued_ends_as_one_that_is_not(
    judge_server, start_judge, tmp_path, estimator, rubrics
):
    # Twelve prompts and four steps of four: the last step meets again what the first has met.
    data = DataConfig(source="arithmetic:train[:12]", max_prompt_length=32)
    base = config(
        judge_server,
        estimator=estimator,
        rubrics=rubrics,
        data=data,
        checkpoint=CheckpointConfig(every=1),
    )
    train(base, tmp_path / "straight")
    few = sum(column(tmp_path / "straight", "api/verifier/calls")[:2]) + sum(
        column(tmp_path / "straight", "api/rubricator/calls")[:2]
    )
    frozen = 12 if rubrics.refresh == "frozen" else 0
    with (
        start_judge("--down-after", int(few) + frozen + 1) as base_url,
        pytest.raises(SourceStoppedError),
    ):
        train(asked_at(base, base_url), tmp_path / "stopped")
    train(base, tmp_path / "stopped")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "straight")
    kept = [row.get("kept") for row in read_lines(tmp_path / "straight" / "rubrics.jsonl")]
    assert all(kept) == (rubrics.refresh == "evolving")


@pytest.mark.long
@pytest.mark.parametrize("refresh", ["given", "evolving"])
def test_a_teacher_that_is_told_the_verdicts_on_a_prompt_s_own_criteria(
    judge_server, tmp_path, refresh
):
    """The criteria are in every rubric of the prompt."""
    rows = [
        {
            "prompt": problem.prompt,
            "reference": problem.reference,
            "rubric": [f"The value after # is {problem.answer}.", {"text": "Ends.", "weight": 3}],
        }
        for problem in problems("train")[:4]
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(
        source=str(tmp_path / "rows.jsonl"),
        max_prompt_length=32,
        columns=("rubric=rubric",),
        teacher_prompt_format="{prompt} {verdicts}\n{reflection}",
    )
    base = config(
        judge_server,
        teacher=ModelConfig("@student"),
        estimator=EstimatorConfig("full_kl", divergence="jsd", beta=0.5),
        data=data,
        rubrics=RubricsConfig(refresh=refresh, num_criteria=(1, 5)),
        train=TrainConfig(num_steps=2, prompts_per_step=4),
    )
    if refresh == "given":  # without reflections nobody is needed who writes rubrics
        data = dataclasses.replace(data, teacher_prompt_format="{prompt} {verdicts}")
        prepare(dataclasses.replace(base, data=data, rubricator=JudgeConfig()))
    train(base, tmp_path / "run")
    assert all(row > 0 for row in column(tmp_path / "run", "kl/student_teacher"))
    for row in read_lines(tmp_path / "run" / "rubrics.jsonl"):
        assert row["reflections"]
        own = [criterion for criterion in row["rubric"] if criterion["is_given"]]
        assert [criterion["weight"] for criterion in own] == [1, 3]
        assert (len(row["rubric"]) == 2) == (refresh == "given")
        assert row.get("kept") is None or {"c1", "c2"} <= set(row["kept"])


def test_own_criteria_that_cannot_be(tmp_path):
    def refused(criterion, match, **rubrics):
        (tmp_path / "rows.jsonl").write_text(
            json.dumps({"prompt": "1+1=", "reference": "2", "rubric": [criterion]}) + "\n"
        )
        data = DataConfig(
            source=str(tmp_path / "rows.jsonl"), max_prompt_length=32, columns=("rubric=rubric",)
        )
        with pytest.raises(ValueError, match=match):
            prepare(
                config(
                    NOWHERE,
                    data=data,
                    rubrics=RubricsConfig(**rubrics),
                    mesh=MeshConfig(1),
                )
            )

    refused({"text": ""}, "expected a text, or a record with text")
    refused({"text": "a", "weight": 9}, "weight 9; expected a whole number from 1 to 5")
    refused({"description": "a", "points": -2}, "negative weight; set rubrics.polarity to signed")
    refused({"text": "a", "stage": "end"}, "stage 'end'; expected none")


def test_the_doctor_asks_the_judge_and_says_what_a_run_would_cost(judge_server):
    names = [check.name for check in CHECKS if check.name.startswith("judge")]
    found = {each.name: each for each in run_checks(config(judge_server), only=names)}
    assert {name: finding.status for name, finding in found.items()} == dict.fromkeys(
        ("judge", "judge_spread", "judge_references", "judge_cost"), "ok"
    )
    # four steps of four prompts, two calls each
    assert "about 32 requests" in found["judge_cost"].message
    (down,) = run_checks(config(NOWHERE), only=names)
    assert down.status == "fault"
    assert "4 of 4 groups have no score; unusable replies: unavailable 4" in down.message


# What masking comes to


def rollouts_of(setup, count):
    ids = [
        setup.tokenizer.encode(text, add_special_tokens=False)
        for text in ("1+2=3;3+4=7#7", "1+2=4;4+4=8#8", "1+2=3#3", "9")
    ]
    length = max(map(len, ids))
    tokens, mask = np.zeros((count, length + 2), np.int32), np.zeros((count, length + 2), bool)
    for row in range(count):
        found = ids[row % len(ids)]
        tokens[row, 2 : 2 + len(found)], mask[row, 2 : 2 + len(found)] = found, True
    tokens[:, :2] = setup.tokenizer.encode("1", add_special_tokens=False)[0]
    segments = (mask | (np.arange(length + 2) < 2)).astype(np.int32)
    zero, flat = np.zeros(tokens.shape, np.float32), np.zeros(count, np.int32)
    return Rollouts(tokens, mask, segments, zero - 1, zero - 1, flat, flat, flat, flat.astype(bool))


@pytest.mark.parametrize(
    "aggregation",
    ["token_mean", *(pytest.param(kind, marks=pytest.mark.long) for kind in AGGREGATIONS[1:])],
)
def test_a_group_without_scores_has_no_gradient_and_is_in_no_denominator(aggregation):
    made = config(
        NOWHERE,
        estimator=dataclasses.replace(ROPD_CODE, aggregation=aggregation),
        mesh=MeshConfig(1),
    )
    setup = prepare(made)
    rollouts, spec = rollouts_of(setup, 8), update_spec(setup)
    batch = TrainBatch(
        rollouts.tokens, rollouts.mask, rollouts.segment_ids, rollouts.behavior_logprobs
    )
    scores = np.array([1.0, 0.25, 0.5, 0.0, *[np.nan] * 4], np.float32)
    params = load_student(setup)[0]
    loss_and_gradient = jax.jit(lambda batch: loss_and_grad(params, batch, None, spec)[:2])

    def measured(rows, scores):
        some, taken = (jax.tree.map(lambda x: x[rows], value) for value in (batch, rollouts))
        credit = with_advantages(some, taken, scores[rows, None], made, setup.tokenizer)
        loss, grads = loss_and_gradient(credit)
        return float(loss), grads

    alone, with_failed, failed = (
        measured(np.arange(*span), scores) for span in ((0, 4), (0, 8), (4, 8))
    )
    assert alone[0] == pytest.approx(with_failed[0], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), alone[1], with_failed[1])
    assert failed[0] == 0
    assert all(not np.any(x) for x in jax.tree.leaves(failed[1]))
    assert any(np.any(x) for x in jax.tree.leaves(alone[1]))


def test_the_stage_of_each_token_and_its_advantage():
    made = config(
        NOWHERE, estimator=EstimatorConfig("ropd_stages", stage_credit="identity"), rubrics=STAGES
    )
    setup = prepare(made)
    rollouts = rollouts_of(setup, 4)
    ids = token_stages(rollouts, setup.tokenizer, STAGES.stage_markers)
    assert [sorted(set(row[keep].tolist())) for row, keep in zip(ids, rollouts.mask)] == [
        [0, 1, 2],
        [0, 1, 2],
        [0, 2],
        [0],
    ]
    assert np.all(ids[~rollouts.mask] == -1)
    batch = TrainBatch(
        rollouts.tokens, rollouts.mask, rollouts.segment_ids, rollouts.behavior_logprobs
    )
    by_stage = np.array([[1, 1, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]], np.float32)
    scores = np.column_stack([by_stage.mean(axis=1), by_stage])
    found = with_advantages(batch, rollouts, scores, made, setup.tokenizer)
    expected = np.array(
        [[0.5, 0, 2 / 3], [-0.5, 0, -1 / 3], [0.5, 0, -1 / 3], [-0.5, 0, 0]]
    )  # over those that have the stage
    for row, keep in enumerate(rollouts.mask):
        np.testing.assert_allclose(
            found.advantages[row, keep], expected[row][ids[row, keep]], atol=1e-6
        )
    assert not np.any(found.advantages[~rollouts.mask])


def test_texts_are_plain_json(straight):
    for line in (straight / "rubrics.jsonl").read_text().splitlines():
        assert "NaN" not in line
        json.loads(line)
    assert os.path.getsize(straight / "replies.sqlite")
