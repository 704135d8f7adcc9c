"""Runs whose work directory is on gs://: real processes, killed, paused and continued on another
machine's scratch.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from opdjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LogConfig,
    MeshConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.config.validation import to_dict
from opdjax.runs.lease import LOST, holder_of
from opdjax.runs.object_store import Folder
from opdjax.runs.workdir import read_lines

ROOT = pathlib.Path(__file__).parents[2]
URL = "gs://bucket/run"
SMALL = Config(
    data=DataConfig("arithmetic:train[:64]", max_prompt_length=32),
    sampling=SamplingConfig(max_completion_length=4),
    optimizer=OptimizerConfig(learning_rate=1e-4),
    train=TrainConfig(num_steps=6, prompts_per_step=2),
    evaluation=EvaluationConfig(num_prompts=2, num_samples=2, max_completion_length=4),
    checkpoint=CheckpointConfig(every=2),
    log=LogConfig(samples_every=2),
    mesh=MeshConfig(data=1),
)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return _saved(SMALL, tmp_path_factory.mktemp("config"))


def _saved(config, directory):
    file = directory / "config.json"
    file.write_text(json.dumps({"config": to_dict(config), "data": {}, "environment": {}}))
    return file


def train(file, workdir, **environment):
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "PYTHONPATH": str(ROOT),
        "OPDJAX_LEASE_SECONDS": "4",
        **environment,
    }
    command = [sys.executable, "-m", "opdjax", "train", str(file), "--workdir", str(workdir)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


@pytest.fixture
def machine(gcs, config_file, tmp_path):
    """Starts `opdjax train` of a config on a machine, which is a scratch directory of its own."""
    started = []

    def start(config=None, scratch="a"):
        file = config_file if config is None else _saved(config, tmp_path)
        started.append(train(file, URL, OPDJAX_SCRATCH=str(tmp_path / scratch)))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def until(condition, seconds=90):
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def outcome(read, read_rows):
    """What a run computed, times aside."""
    rows = [
        {
            k: v
            for k, v in row.items()
            if not k.startswith("time/") and k != "perf/tokens_per_second"
        }
        for row in read_rows
    ]
    return rows, read("eval.jsonl"), read("samples.jsonl"), read("student/model.safetensors")


def remote_outcome(url, tmp_path):
    folder = Folder(url)
    (tmp_path / "rows").write_bytes(folder.read("metrics.jsonl"))
    return outcome(folder.read, read_lines(tmp_path / "rows"))


@pytest.fixture(scope="module")
def straight(config_file, tmp_path_factory):
    """The run on a local disk, never disturbed."""
    local = tmp_path_factory.mktemp("straight")
    out, _ = train(config_file, local).communicate()
    assert "the trained student is in" in out, out
    return outcome(lambda name: (local / name).read_bytes(), read_lines(local / "metrics.jsonl"))


@pytest.mark.long
def test_killed_and_continued_elsewhere_it_ends_as_on_a_local_disk(
    gcs, machine, straight, tmp_path
):
    folder = Folder(URL)
    first = machine()
    until(lambda: folder.read("checkpoints/2/commit_success.txt") is not None)
    first.kill()
    first.wait()
    shutil.rmtree(tmp_path / "a")
    assert folder.read("result.json") is None
    out, _ = machine(scratch="b").communicate()
    assert "continuing from step " in out, out
    assert "the trained student is in gs://bucket/run/student" in out
    assert remote_outcome(URL, tmp_path) == straight
    assert json.loads(folder.read("result.json"))["num_steps"] == 6
    assert holder_of(folder).is_released
    assert not list(
        (tmp_path / "b" / "runs").glob("*/metrics.jsonl")
    )  # a finished run leaves its scratch empty
    out, _ = machine(scratch="c").communicate()
    assert "gs://bucket/run holds a finished run" in out
    changed = dataclasses.replace(SMALL, seed=1)
    out, _ = machine(config=changed).communicate()
    assert "gs://bucket/run holds a run of another config; choose another --workdir" in out


@pytest.mark.long
def test_one_that_sleeps_beyond_its_lease_writes_nothing_more(gcs, machine, straight, tmp_path):
    folder = Folder(URL)
    first = machine()
    until(lambda: folder.read("checkpoints/2/commit_success.txt") is not None)
    os.kill(first.pid, signal.SIGSTOP)
    second = machine()  # of the same machine and scratch: it must take another one
    until(lambda: second.poll() is not None)
    assert second.returncode == 0, second.stdout.read()
    names = gcs.store.names()
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait(10) == LOST
    assert "was taken over by another process, or could have been" in first.stdout.read()
    assert gcs.store.names() == names
    assert remote_outcome(URL, tmp_path) == straight


@pytest.mark.long
def test_a_stopped_run_gives_its_lease_back_and_another_is_refused_before(gcs, machine):
    folder = Folder(URL)
    first = machine(
        dataclasses.replace(SMALL, train=dataclasses.replace(SMALL.train, num_steps=100_000))
    )
    until(lambda: folder.read("checkpoints/2/commit_success.txt") is not None)
    out, _ = machine(scratch="b").communicate()
    assert "gs://bucket/run is being written by another run on" in out
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate()
    assert "as asked by a signal; the same command continues gs://bucket/run" in out, out
    assert first.returncode == 143
    assert holder_of(folder).is_released
    steps = [row["step"] for row in map(json.loads, folder.read("metrics.jsonl").splitlines())]
    assert f"checkpoints/{steps[-1]}/commit_success.txt" in folder.files()


@pytest.mark.long
def test_faults_of_the_storage_change_nothing(gcs, machine, straight, tmp_path):
    gcs.store.fault_rate = 0.03
    out, _ = machine().communicate()
    gcs.store.fault_rate = 0
    assert remote_outcome(URL, tmp_path) == straight, out


def test_what_needs_a_file_system_is_refused(gcs, machine):
    from opdjax.config import NearPolicyConfig

    near = NearPolicyConfig(schedule="continuous", generator="process")
    out, _ = machine(config=dataclasses.replace(SMALL, near_policy=near)).communicate()
    assert (
        "--workdir gs://bucket/run: processes that share rollouts or rubrics need a file system; expected one process"
        in out
    ), out
