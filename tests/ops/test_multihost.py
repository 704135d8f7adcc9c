"""Two processes on one machine (gloo) act as one run: same loss and weights; they stop and continue
together.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest
from mesh_pair import assert_same_run, finish, make_pair, mesh_config, start

from opdjax.config import EvaluationConfig, LogConfig, MeshConfig, TrainConfig
from opdjax.config.validation import to_dict
from opdjax.ops.multihost import join
from opdjax.runs.workdir import read_lines
from opdjax.train import train


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pair")
    make_pair(directory)
    return directory


def test_two_processes_are_one_run_and_stop_together(pair, tmp_path):
    """Two steps each; the second follows a SIGTERM to only one process. One process samples and
    evaluates.
    """
    sections = {
        "train": TrainConfig(num_steps=2, prompts_per_step=16, gradient_accumulation_steps=2),
        "evaluation": EvaluationConfig(
            num_prompts=16, num_samples=2, max_completion_length=12, batch_size=32
        ),
        "log": LogConfig(samples_every=1, num_samples=2, diagnostics_every=1),
    }
    mesh = MeshConfig(2, 2, 1, processes=2)
    workdir = tmp_path / "two"
    processes = start(mesh_config(pair, mesh, **sections), workdir)
    while not (workdir / "eval.jsonl").exists() and all(
        process.poll() is None for process in processes
    ):
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    statuses, printed = finish(processes, workdir)
    assert statuses == [143, 143], printed
    assert all("stopped after step 1" in text for text in printed)
    statuses, printed = finish(start(mesh_config(pair, mesh, **sections), workdir), workdir)
    assert statuses == [0, 0], printed
    assert "continuing from step 1" in printed[0]
    assert "continuing" not in printed[1]

    train(mesh_config(pair, MeshConfig(1), **sections), tmp_path / "one")
    assert_same_run(workdir, tmp_path / "one")
    for name in ("eval.jsonl", "samples.jsonl"):
        two, one = (read_lines(path / name) for path in (workdir, tmp_path / "one"))
        assert [row["step"] for row in two] == [row["step"] for row in one]
    assert [row["tokens"] for row in two] == [row["tokens"] for row in one]


def test_an_error_on_process_zero_stops_all(pair, tmp_path):
    workdir = tmp_path / "used"
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text("{}\n")
    statuses, printed = finish(
        start(mesh_config(pair, MeshConfig(-1, processes=2)), workdir, devices=1), workdir
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


def test_sigterm_ends_a_run_after_its_step_with_everything_kept(pair, tmp_path):
    """One process: the same command continues where it stopped."""
    config = mesh_config(pair, MeshConfig(1), train=TrainConfig(num_steps=400, prompts_per_step=4))
    workdir = tmp_path / "run"
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps({"config": to_dict(config)}))
    command = [
        sys.executable,
        "-m",
        "opdjax",
        "train",
        str(saved),
        "--workdir",
        str(workdir),
        "--checkpoint.every",
        "1000",
    ]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
    }
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not (workdir / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=120)
    done = read_lines(pathlib.Path(workdir / "metrics.jsonl"))[-1]["step"]
    assert process.returncode == 143
    assert f"stopped after step {done}" in printed
    assert [
        int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()
    ] == [done]
