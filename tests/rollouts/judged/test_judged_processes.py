"""Two processes of one judged run: what judges say reaches both, and what keeps the lead from
asking ends both.
"""

import dataclasses

import pytest
from mesh_pair import mesh_config
from tiny_runs import finish, start

from opdjax.config import (
    ROPD_CODE,
    ApiConfig,
    DataConfig,
    JudgeConfig,
    LogConfig,
    MeshConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.runs.workdir import read_lines
from opdjax.train import train


def judged(directory, mesh, api):
    judge = JudgeConfig("rules")
    return mesh_config(
        directory,
        mesh,
        estimator=ROPD_CODE,
        rubricator=judge,
        verifier=judge,
        api=api,
        data=DataConfig(source="arithmetic:train[:8]", max_prompt_length=32),
        sampling=SamplingConfig(num_generations=2, max_completion_length=12),
        train=TrainConfig(num_steps=1, prompts_per_step=8),
        log=LogConfig(samples_every=0, diagnostics_every=0),
    )


@pytest.mark.long
def test_two_processes_hear_the_same_and_a_missing_key_ends_both(judge_server, pair, tmp_path):
    two, api = MeshConfig(2, processes=2), ApiConfig(judge_server)
    locked = dataclasses.replace(api, api_key_env="NO_SUCH_KEY")
    statuses, printed = finish(
        start(judged(pair, two, locked), tmp_path / "locked", count=2),
        tmp_path / "locked",
    )
    assert 0 not in statuses
    assert "NO_SUCH_KEY, which is not set" in printed[0]
    assert "another process of this run stopped with an error" in printed[1]
    statuses, printed = finish(
        start(judged(pair, two, api), tmp_path / "two", count=2), tmp_path / "two"
    )
    assert statuses == [0, 0], printed
    train(judged(pair, MeshConfig(1), api), tmp_path / "one")
    rows = [
        [{**row, "problems": {}} for row in read_lines(tmp_path / name / "rubrics.jsonl")]
        for name in ("one", "two")
    ]
    assert rows[0] == rows[1]
    losses = [
        read_lines(tmp_path / name / "metrics.jsonl")[0]["grad/norm"] for name in ("one", "two")
    ]
    assert abs(losses[0] - losses[1]) <= 1e-4 * losses[0]
