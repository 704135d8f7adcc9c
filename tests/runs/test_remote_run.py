"""Runs whose work directory is on gs://: real processes, killed, paused and continued on another
machine's scratch.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import pytest
from tiny_runs import TINY, assert_same_run, environment, save, vary, without_times
from waiting import HANG, until

import opdjax.train
from opdjax.config import NearPolicyConfig
from opdjax.runs.lease import LOST, holder_of
from opdjax.runs.mirror import read_only_workdir
from opdjax.runs.object_store import Folder
from opdjax.runs.workdir import WorkdirError

pytestmark = pytest.mark.long

URL = "gs://bucket/run"
SMALL = vary(
    train={"prompts_per_step": 2},
    sampling={"max_completion_length": 4},
    evaluation={"num_prompts": 2, "max_completion_length": 4},
)


def train(config, workdir, files, **variables):
    command = [sys.executable, "-m", "opdjax", "train", str(save(config, files / "config.json"))]
    return subprocess.Popen(
        [*command, "--workdir", str(workdir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(OPDJAX_LEASE_SECONDS="10", **variables),
    )


@pytest.fixture
def machine(gcs, tmp_path):
    """Starts `opdjax train` of a config on a machine, which is a scratch directory of its own."""
    started = []

    def start(config=SMALL, scratch="a", **variables):
        variables["OPDJAX_SCRATCH"] = str(tmp_path / scratch)
        started.append(train(config, URL, tmp_path, **variables))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


FILES = ("eval.jsonl", "samples.jsonl", "student/model.safetensors")


def remote_outcome(tmp_path):
    """What the run computed, without times."""
    folder, copy = Folder(URL), tmp_path / "outcome"
    copy.mkdir(exist_ok=True)
    (copy / "metrics.jsonl").write_bytes(folder.read("metrics.jsonl"))
    return without_times(copy), [folder.read(name) for name in FILES]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The outcome of the run on a local disk, never disturbed."""
    local = tmp_path_factory.mktemp("straight") / "run"
    out, _ = train(SMALL, local, local.parent).communicate()
    assert "the trained student is in" in out, out
    return without_times(local), [(local / name).read_bytes() for name in FILES]


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
    assert remote_outcome(tmp_path) == straight
    assert json.loads(folder.read("result.json"))["num_steps"] == 6
    assert holder_of(folder).get("released")
    assert not list(
        (tmp_path / "b" / "workdirs").rglob("metrics.jsonl")
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
    assert first.wait(HANG) == LOST
    assert "was taken over by another process, or could have been" in first.stdout.read()
    assert gcs.store.names() == names
    assert remote_outcome(tmp_path) == straight


@pytest.mark.long
def test_a_stopped_run_gives_its_lease_back_and_another_is_refused_before(gcs, machine):
    folder = Folder(URL)
    first = machine(vary(SMALL, train={"num_steps": 100_000}))
    until(lambda: folder.read("checkpoints/2/commit_success.txt") is not None)
    out, _ = machine(scratch="b").communicate()
    assert "gs://bucket/run is being written by another run on" in out
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate()
    told = (
        r"as asked by a signal; step \d+ is saved, and the same command continues gs://bucket/run"
    )
    assert re.search(told, out), out
    assert first.returncode == 143
    assert holder_of(folder).get("released")
    steps = [row["step"] for row in map(json.loads, folder.read("metrics.jsonl").splitlines())]
    assert f"checkpoints/{steps[-1]}/commit_success.txt" in folder.files()


@pytest.mark.long
def test_faults_of_the_storage_change_nothing(gcs, machine, straight, tmp_path):
    gcs.store.fault_rate = 0.03
    out, _ = machine().communicate()
    gcs.store.fault_rate = 0
    assert remote_outcome(tmp_path) == straight, out


def test_a_run_leaves_there_what_it_leaves_on_a_local_disk(machine, tiny_run):
    # As many simulated devices as here: they share the threads that split a product.
    out, _ = machine(TINY, JAX_NUM_CPU_DEVICES=str(jax.device_count())).communicate()
    assert f"the trained student is in {URL}/student" in out, out
    with read_only_workdir(URL, lambda name: not name.startswith("checkpoints")) as mirror:
        assert_same_run(tiny_run, mirror.directory)
    stored = set(Folder(URL, is_flat=True).files())
    assert {path.name for path in tiny_run.iterdir() if path.is_file()} - {".lock"} <= stored


@pytest.mark.usefixtures("gcs")
def test_what_needs_a_file_system_is_refused():
    near = NearPolicyConfig(schedule="continuous", generator="process")
    message = (
        f"--workdir {URL}: processes that share rollouts or rubrics need a file system; expected "
        "one process"
    )
    with pytest.raises(WorkdirError, match=message):
        opdjax.train.train(dataclasses.replace(SMALL, near_policy=near), URL)
