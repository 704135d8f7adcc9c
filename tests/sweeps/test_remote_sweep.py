"""Sweeps on gs://: several runners share one, killed and paused; tables and status of it."""

import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys

import fake_points
import pytest
from tiny_runs import vary as vary_tiny
from waiting import until

from opdjax.config.grid import chain, points, product, seeds, select, vary
from opdjax.config.validation import ConfigError
from opdjax.runs.lease import holder_of
from opdjax.runs.object_store import Folder
from opdjax.runs.workdir import WorkdirError
from opdjax.sweeps.runner import run_sweep
from opdjax.sweeps.status import describe, status_table

pytestmark = pytest.mark.long

URL = "gs://bucket/sweep"
TINY = vary_tiny(train={"num_steps": 2}, log={"samples_every": 0})


@pytest.fixture(autouse=True)
def _lease(gcs, monkeypatch):
    monkeypatch.setenv("OPDJAX_LEASE_SECONDS", "10")


def attempts(id):
    data = Folder(URL).read(f"{id}/attempts.jsonl") or b""
    return [json.loads(line) for line in data.splitlines()]


def completions(ids):
    return [sum(row.get("returncode") == 0 for row in attempts(id)) for id in ids]


def step_of(id):
    """The last step that the holder of a point's lease has recorded."""
    return holder_of(Folder(URL).subfolder(id)).get("step") or 0


def test_points_run_there_and_leave_everything_there(monkeypatch, tmp_path):
    fake_points.install(monkeypatch, tmp_path)
    made = points(TINY, chain(seeds(1), vary("student.path", {"nowhere": "no/such/model/here"})))
    logged = []
    assert "waiting seed=0" in describe(made, URL, 1)
    counts = run_sweep(made, URL, jobs=1, log=logged.append)
    assert counts == {"points": 2, "done": 1, "failed": 1, "stopped": 0}
    folder = Folder(URL)
    assert {"point.json", "config.json", "result.json", "attempts.jsonl", "log.txt"} <= set(
        folder.subfolder("seed=0").files()
    )
    failure = json.loads(folder.read("student.path=nowhere/failure.json"))
    assert failure["log_tail"][-1] == "told to fail"
    assert b"told to fail" in folder.read("student.path=nowhere/log.txt")
    assert [row["event"] for row in attempts("seed=0")] == ["start", "end"]
    assert any(line.startswith("done   seed=0  avg@2 ") for line in logged)
    assert run_sweep(made, URL, log=logged.append)["done"] == 1  # from what lies there alone
    assert len(attempts("seed=0")) == 2
    logged.clear()
    assert run_sweep(made[1:], URL, retry_failed=True, log=logged.append)["failed"] == 1
    assert [row["event"] for row in attempts("student.path=nowhere")] == ["start", "end"] * 2
    text = status_table(made, URL)
    assert [line.split()[:2] for line in text.splitlines()[1:3]] == [
        ["seed=0", "done"],
        ["student.path=nowhere", "failed"],
    ]
    assert text.splitlines()[-1] == "1 done, 1 failed of 2"
    changed = vary_tiny(TINY, optimizer={"learning_rate": 2e-4})
    message = f"{URL}/seed=0 belongs to a point with another config; choose another --workdir"
    with pytest.raises(WorkdirError, match=message):
        run_sweep(points(changed, seeds(1)), URL)
    with pytest.raises(
        WorkdirError, match="--workdir gs://bucket/sweep/seed=0 holds a config.json, of a run"
    ):
        run_sweep(made, f"{URL}/seed=0")


@pytest.fixture
def slow_points(monkeypatch, tmp_path):
    """Six points whose children work without models; and a function that starts a runner."""
    fake_points.install(monkeypatch, tmp_path)
    made = points(TINY, product(vary("estimator.discount", (0.0, 1.0)), seeds(3)))
    file = tmp_path / "runner.py"
    file.write_text(
        "import pickle, sys\nfrom opdjax.sweeps.runner import run_sweep\n"
        f"made = pickle.load(open({str(tmp_path / 'points')!r}, 'rb'))\n"
        f"print(run_sweep(made, {URL!r}, log=lambda line: print(line, flush=True)))\n"
    )
    (tmp_path / "points").write_bytes(pickle.dumps(made))
    started = []

    def start():
        started.append(
            subprocess.Popen(
                [sys.executable, str(file)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return started[-1]

    yield made, start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_three_runners_share_the_points_and_none_is_run_twice(slow_points, monkeypatch):
    monkeypatch.setenv("OPDJAX_LEASE_SECONDS", "300")  # no lease expires on a busy machine
    made, start = slow_points
    for runner in [start() for _ in range(3)]:
        out, _ = runner.communicate()
        assert "'done': 6, 'failed': 0, 'stopped': 0" in out, out
    assert completions(p.id for p in made) == [1] * 6
    assert [len(attempts(p.id)) for p in made] == [2] * 6


@pytest.mark.long
def test_a_killed_runner_loses_nothing_and_its_orphan_is_let_finish(slow_points, monkeypatch):
    made, start = slow_points
    monkeypatch.setenv("WORK", "150")  # longer than a lease lasts
    runner = start()
    until(lambda: attempts(made[0].id))
    orphan = attempts(made[0].id)[0]["pid"]
    runner.kill()
    monkeypatch.setenv("WORK", "3")
    out, _ = start().communicate()
    assert "'done': 6, 'failed': 0, 'stopped': 0" in out, out
    assert json.loads(Folder(URL).read(f"{made[0].id}/result.json"))["by"] == orphan
    assert [row["event"] for row in attempts(made[0].id)] == ["start"]


@pytest.mark.long
def test_a_child_that_sleeps_is_fenced_and_its_runner_goes_on(slow_points, monkeypatch):
    made, start = slow_points
    monkeypatch.setenv("WORK", "150")
    first = start()
    until(lambda: attempts(made[0].id))
    child = attempts(made[0].id)[0]["pid"]
    until(lambda: step_of(made[0].id) > 0)
    os.kill(child, signal.SIGSTOP)
    monkeypatch.setenv("WORK", "3")
    second = start()
    out, _ = second.communicate()
    assert "'done': 6" in out, out
    monkeypatch.setenv("WORK", "150")
    printed, _ = first.communicate()
    assert f"lost   {made[0].id}: its lease expired" in printed, printed
    assert "'done': 6" in printed
    assert not pathlib.Path(f"/proc/{child}").exists()  # killed in its sleep, by its runner
    assert json.loads(Folder(URL).read(f"{made[0].id}/result.json"))["by"] != child
    assert max(completions(p.id for p in made)) == 1


@pytest.mark.long
def test_the_storage_fails_now_and_then_and_the_sweep_does_not(slow_points, gcs):
    made, start = slow_points
    gcs.store.fault_rate = 0.03
    runners = [start(), start()]
    printed = [runner.communicate()[0] for runner in runners]
    gcs.store.fault_rate = 0.0
    assert all("'done': 6" in out for out in printed), printed
    assert completions(p.id for p in made) == [1] * 6


@pytest.mark.long
def test_who_works_where_is_seen_from_elsewhere(slow_points, monkeypatch):
    made, start = slow_points
    monkeypatch.setenv("WORK", "200")
    runner = start()
    until(
        lambda: (
            (holder_of(Folder(URL).subfolder(made[0].id)) or runner) is not runner
            and attempts(made[0].id)
        )
    )
    until(lambda: step_of(made[0].id) > 0)

    def line():
        return status_table(made, URL).splitlines()[1].split()

    name, state, host, step, *_ = line()
    assert (name, state, host, step.partition("/")[2]) == (
        made[0].id,
        "running",
        os.uname().nodename[:16],
        "2",
    )
    child = attempts(made[0].id)[0]["pid"]
    os.kill(child, signal.SIGSTOP)
    until(lambda: line()[1] == "stalled")
    until(
        lambda: not pathlib.Path(f"/proc/{child}").exists()
    )  # its runner stops it: somebody else may have the point
    runner.terminate()
    runner.wait()
    assert line()[1] == "stalled"  # until a runner claims the point


def test_a_failed_point_is_tried_again_in_the_same_call(slow_points, monkeypatch):
    monkeypatch.setattr("opdjax.sweeps.runner._PAUSE", 0.5)
    monkeypatch.setenv("FAIL", "1")
    made, logged = slow_points[0][:1], []
    assert run_sweep(made, URL, retries=2, log=logged.append)["failed"] == 1
    assert [line.split()[0] for line in logged if line[0].isalpha()] == [
        "start",
        "FAILED",
        "retry",
    ] * 2 + ["start", "FAILED"]
    assert [row["event"] for row in attempts(made[0].id)] == ["start", "end"] * 3
    assert (
        json.loads(Folder(URL).read(f"{made[0].id}/failure.json"))["log_tail"]
        == ["told to fail"] * 3
    )


def test_points_are_chosen_by_id_and_by_parts():
    made = points(TINY, product(vary("estimator.discount", (0.0, 1.0)), seeds(11)))
    ids = lambda *patterns: [p.id for p in select(made, patterns)]
    assert ids("discount=1,seed=1") == ["discount=1,seed=1"]
    assert ids("seed=1") == ["discount=0,seed=1", "discount=1,seed=1"]
    assert ids("discount=0,seed=1*") == ["discount=0,seed=1", "discount=0,seed=10"]
    assert ids("seed=3", "discount=1,seed=2") == [
        "discount=0,seed=3",
        "discount=1,seed=2",
        "discount=1,seed=3",
    ]
    with pytest.raises(
        ConfigError,
        match=r"--only 'discount=2,seed=1' matches no point of the sweep; .* such as "
        r"discount=1,seed=1",
    ):
        ids("discount=2,seed=1")
