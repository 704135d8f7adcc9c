"""Runs in which rollouts are left out from the first step on, because judges could not be asked
about them or said nothing of use.
"""

import dataclasses

import pytest

from opdjax.config import (
    ROPD_CODE,
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
    RubricsConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.config.validation import ConfigError
from opdjax.judge.criteria import FROZEN
from opdjax.rollouts.setup import prepare
from opdjax.rollouts.source import SourceStoppedError
from opdjax.runs.workdir import read_lines
from opdjax.train import train


def config(base_url, **changes):
    judge = JudgeConfig("rules")
    base = Config(
        data=DataConfig(source="arithmetic:train[:64]", max_prompt_length=32),
        sampling=SamplingConfig(num_generations=4, max_completion_length=20),
        estimator=ROPD_CODE,
        rubricator=judge,
        verifier=judge,
        api=ApiConfig(base_url, max_retries=1),
        train=TrainConfig(num_steps=1, prompts_per_step=8),
        evaluation=EvaluationConfig(source=None),
        log=LogConfig(samples_every=1, diagnostics_every=1),
        checkpoint=CheckpointConfig(every=10),
        mesh=MeshConfig(1),
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Bad replies are not requested again, and neither failures nor missing rewards stop a run."""
    monkeypatch.setattr("opdjax.judge.structured_output.MAX_REASKS", 0)
    monkeypatch.setattr("opdjax.rollouts.judged.MAX_FAILED_SHARE", 0.9)
    monkeypatch.setattr("opdjax.judge.client.BREAKER_FAILURES", 50)
    monkeypatch.setattr("opdjax.judge.client.BREAKER_SECONDS", 0.1)


VERDICTS = {
    "teacher": ModelConfig("@student"),
    "estimator": EstimatorConfig("full_kl", divergence="jsd", beta=0.5),
    "data": DataConfig(
        source="arithmetic:train[:64]",
        max_prompt_length=32,
        teacher_prompt_format="{prompt} {verdicts}",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("changes", [{}, VERDICTS], ids=["rewards", "verdicts"])
def test_a_first_step_with_failed_groups_is_trained_on_the_others(start_judge, tmp_path, changes):
    with start_judge("--faults", 0.5) as base_url:
        train(config(base_url, **changes), tmp_path)
    (row,) = read_lines(tmp_path / "metrics.jsonl")
    assert 0 < row["rubric/failed_groups"] < 8
    assert 0 < row["perf/trained_tokens"] < row["rollout/length_mean"] * 32
    assert row["grad/norm"] > 0
    assert "NaN" not in (tmp_path / "samples.jsonl").read_text()


@pytest.mark.long
def test_rubrics_are_not_frozen_as_missing_while_nobody_answers(
    start_judge, judge_server, tmp_path, monkeypatch
):
    monkeypatch.setattr("opdjax.rollouts.judged.MAX_FAILED_SHARE", 0.4)
    rubrics = RubricsConfig(refresh="frozen")
    with (
        start_judge("--down-after", 2) as base_url,
        pytest.raises(SourceStoppedError, match="rubrics"),
    ):
        train(config(base_url, rubrics=rubrics), tmp_path)
    assert all(row["rubric"] for row in read_lines(tmp_path / FROZEN))
    train(config(judge_server, rubrics=rubrics), tmp_path)
    rows = read_lines(tmp_path / FROZEN)
    assert len({row["prompt_id"] for row in rows}) == len(rows) == 8
    assert all(row["rubric"] for row in rows)


def test_a_packed_row_has_room_for_what_judges_say():
    told = config("http://127.0.0.1:9/v1", **VERDICTS)
    packed = dataclasses.replace(told, train=dataclasses.replace(told.train, pack_length=200))
    with pytest.raises(ConfigError, match="pack_length is 200; expected at least 1588"):
        prepare(packed)
    prepare(dataclasses.replace(told, train=dataclasses.replace(told.train, pack_length=1588)))
