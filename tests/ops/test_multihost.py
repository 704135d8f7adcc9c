"""Two processes on one machine (gloo) act as one run: same loss and weights; they stop and continue
together.
"""

import re
import signal

import pytest
from mesh_pair import mesh_config
from tiny_runs import assert_close_run, column, finish, samples, start, vary
from waiting import until

from opdjax.config import EvaluationConfig, LogConfig, MeshConfig, TrainConfig
from opdjax.ops.multihost import join
from opdjax.runs.workdir import read_lines
from opdjax.train import train

pytestmark = pytest.mark.long


def wait_for(file, processes):
    """Until the file exists or a process ends."""
    until(lambda: file.exists() or any(process.poll() is not None for process in processes))


GROUP = {"count": 2, "devices": 2}


def test_two_processes_are_one_run(pair, tmp_path):
    workdir, mesh = tmp_path / "two", MeshConfig(2, 2, 1, processes=2)
    statuses, printed = finish(start(mesh_config(pair, mesh), workdir, **GROUP), workdir)
    assert statuses == [0, 0], printed
    train(mesh_config(pair, MeshConfig(1)), tmp_path / "one")
    assert_close_run(workdir, tmp_path / "one")


@pytest.mark.long
def test_two_processes_stop_together_and_continue(pair, tmp_path):
    """A SIGTERM to one process stops both after the same step; the same command then continues.
    Only process zero writes samples and evaluations.
    """
    sections = {
        "train": TrainConfig(num_steps=3, prompts_per_step=16, gradient_accumulation_steps=2),
        "evaluation": EvaluationConfig(num_prompts=16, num_samples=2, max_completion_length=12),
        "log": LogConfig(samples_every=1, diagnostics_every=1),
    }
    mesh = MeshConfig(2, 2, 1, processes=2)
    workdir = tmp_path / "two"
    processes = start(mesh_config(pair, mesh, **sections), workdir, **GROUP)
    wait_for(workdir / "eval.jsonl", processes)
    processes[1].send_signal(signal.SIGTERM)
    statuses, printed = finish(processes, workdir)
    assert statuses == [143, 143], printed
    (done,) = {re.search(r"stopped after step (\d)", text)[1] for text in printed}
    statuses, printed = finish(
        start(mesh_config(pair, mesh, **sections), workdir, **GROUP), workdir
    )
    assert statuses == [0, 0], printed
    assert f"continuing from step {done}" in printed[0]
    assert "continuing" not in printed[1]

    train(mesh_config(pair, MeshConfig(1), **sections), tmp_path / "one")
    assert_close_run(workdir, tmp_path / "one")
    for read in (samples, lambda run: read_lines(run / "eval.jsonl")):
        assert [row["step"] for row in read(workdir)] == [
            row["step"] for row in read(tmp_path / "one")
        ]
    tokens = [[row["tokens"] for row in samples(run)] for run in (workdir, tmp_path / "one")]
    assert tokens[0] == tokens[1]


@pytest.mark.long
def test_an_error_on_process_zero_stops_all(pair, tmp_path):
    workdir = tmp_path / "used"
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text("{}\n")
    statuses, printed = finish(
        start(mesh_config(pair, MeshConfig(-1, processes=2)), workdir, count=2), workdir
    )
    assert statuses == [2, 2]
    assert "it holds metrics.jsonl" in printed[0]
    assert "another process of this run stopped with an error" in printed[1]


def test_processes_without_a_coordinator_are_refused(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    with pytest.raises(ValueError, match="set JAX_COORDINATOR_ADDRESS"):
        join(2)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    with pytest.raises(ValueError, match="set JAX_PROCESS_ID"):
        join(2)


@pytest.mark.long
def test_sigterm_ends_a_run_after_its_step_with_everything_kept(tmp_path):
    """One process: the same command continues where it stopped."""
    config = vary(
        train={"num_steps": 100_000}, evaluation={"source": None}, checkpoint={"every": 100_000}
    )
    workdir = tmp_path / "run"
    processes = start(config, workdir)
    wait_for(workdir / "metrics.jsonl", processes)
    processes[0].send_signal(signal.SIGTERM)
    statuses, printed = finish(processes, workdir)
    done = column(workdir, "step")[-1]
    assert statuses == [143]
    assert f"stopped after step {done}" in printed[0]
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    assert [int(name) for name in names if name.isdigit()] == [done]
