"""The runner of sweeps: real runs of two steps in real subprocesses; killed, failed, shared between
runners.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import fake_points
import pytest
from tiny_runs import vary as vary_tiny
from tiny_runs import without_times
from waiting import HANG, until

from opdjax.config import (
    ROPD_CODE,
    RULE_JUDGE,
    DataConfig,
    JudgeConfig,
    OptimizerConfig,
    RubricsConfig,
    SamplingConfig,
    TeachConfig,
)
from opdjax.config.grid import chain, points, seeds, vary
from opdjax.report.table import table
from opdjax.runs.results import read_points
from opdjax.runs.workdir import WorkdirError, read_lines
from opdjax.sweeps.claims import open_sweep
from opdjax.sweeps.runner import SweepReferencesError, run_sweep
from opdjax.sweeps.status import describe, seconds_per_point, status_line, status_table

pytestmark = pytest.mark.long

TINY = vary_tiny(train={"num_steps": 2}, log={"samples_every": 0})


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two points done, one failed, and everything the runner logged."""
    directory, logged = tmp_path_factory.mktemp("sweep"), []
    broken = vary("student.path", {"nowhere": "no/such/model/here"})
    made = points(TINY, chain(seeds(2), broken))
    counts = run_sweep(made, directory, jobs=2, log=logged.append)
    return made, directory, counts, logged


@pytest.fixture
def fake_children(monkeypatch, tmp_path):
    fake_points.install(monkeypatch, tmp_path)


def starts(directory, point_id):
    return [
        row
        for row in read_lines(directory / point_id / "attempts.jsonl")
        if row["event"] == "start"
    ]


def test_points_run_and_a_failure_is_kept_with_its_reason(swept):
    _, directory, counts, logged = swept
    assert counts == {"points": 3, "done": 2, "failed": 1, "stopped": 0}
    failure = json.loads((directory / "student.path=nowhere" / "failure.json").read_text())
    assert failure["returncode"] == 2
    assert "'no/such/model/here' is neither a directory nor a hub id" in failure["log_tail"][-1]
    reason = "FAILED student.path=nowhere: opdjax: 'no/such/model/here'"
    assert any(line.startswith(reason) for line in logged)
    assert any(line.startswith("done   seed=0  avg@2 ") for line in logged)
    assert {p.id: p.status for p in read_points(directory)} == {
        "seed=0": "done",
        "seed=1": "done",
        "student.path=nowhere": "failed",
    }


def test_a_second_call_runs_nothing_and_a_retry_only_what_failed(
    swept, fake_children, tmp_path, monkeypatch
):
    made, directory, _, _ = swept
    directory, logged = shutil.copytree(directory, tmp_path / "sweep"), []
    assert run_sweep(made, directory, log=logged.append)["done"] == 2
    assert logged == []
    monkeypatch.setenv("FAIL", "1")
    assert run_sweep(made, directory, retry_failed=True, log=logged.append)["failed"] == 1
    assert [line.split()[:2] for line in logged] == [
        ["start", "student.path=nowhere"],
        ["FAILED", "student.path=nowhere:"],
    ]
    assert len(starts(directory, "seed=0")) == 1


def test_what_is_printed_before_and_during(swept):
    made, directory, _, _ = swept
    text = describe(made, directory, jobs=2)
    assert text.splitlines()[0] == "done    seed=0"
    assert "failed  student.path=nowhere" in text
    assert "3 points, 1 not done: 2 steps, 16 completions" in text
    assert "s per point, the mean of the finished ones" in text
    assert "no point has finished here yet" in describe(made, directory / "elsewhere", jobs=2)
    with open_sweep(directory) as sweep:
        assert seconds_per_point(made, sweep) > 0
        line = status_line(made, sweep, [made[2]], jobs=1)
    assert line.startswith("2/3 done, 1 failed, 1 running (student.path=nowhere), about ")


def test_the_status_tells_of_runners_elsewhere(swept):
    made, directory, _, _ = swept
    state = lambda: [line.split()[1] for line in status_table(made, directory).splitlines()[1:4]]
    with open_sweep(directory) as sweep:
        assert state() == ["done", "done", "failed"]
        claim = sweep.claim(made[2].id)
        assert sweep.claim(made[2].id) is None
        assert state() == ["done", "done", "running"]
        for file in (directory / made[2].id).iterdir():
            os.utime(file, (0, 0))
        assert state() == ["done", "done", "stalled"]
        claim.release()
        assert state() == ["done", "done", "failed"]
    lines = status_table(made, directory).splitlines()
    assert lines[0].split() == ["point", "state", "host", "step", "last", "seen", "avg@2"]
    assert lines[1].split()[:2] == ["seed=0", "done"]
    assert lines[-1] == "2 done, 1 failed of 3"


def test_the_table_says_what_is_missing_and_averages_over_seeds_only(swept):
    _, directory, _, _ = swept
    text = table(directory)
    assert "| student.path |" in text.splitlines()[0]
    rows = {line.split("|")[1].strip(): line for line in text.splitlines()[2:4]}
    assert rows[""].rstrip("| ").split("|")[-1].strip() == "2"
    assert rows["nowhere"].split("|")[-2].strip() == "student.path=nowhere"
    assert "commit" in text
    assert [row["n"] for row in json.loads(table(directory, "json"))].count(2) == 1


def judged(directory, **data):
    """Two points that read a teacher's answers, which are not there yet."""
    judge = JudgeConfig(RULE_JUDGE)
    base = dataclasses.replace(
        TINY,
        data=DataConfig(
            source="arithmetic:train[:4]",
            max_prompt_length=32,
            references=str(directory / "answers.jsonl"),
            **data,
        ),
        sampling=SamplingConfig(num_generations=2, max_completion_length=4),
        estimator=ROPD_CODE,
        rubrics=RubricsConfig(num_references=2),
        rubricator=judge,
        verifier=judge,
        teach=TeachConfig(num_answers=2, max_completion_length=24),
    )
    return points(base, seeds(2))


def test_references_are_written_before_the_points_that_read_them(fake_children, tmp_path):
    logged, file = [], tmp_path / "answers.jsonl"
    assert run_sweep(judged(tmp_path), tmp_path / "sweep", log=logged.append)["done"] == 2
    assert logged[0] == f"write  {file}"
    assert sum(line.startswith("write") for line in logged) == 1
    # The file may be incomplete: the command is run again before a point is.
    (tmp_path / "sweep" / "seed=1" / "result.json").unlink()
    logged.clear()
    assert run_sweep(judged(tmp_path), tmp_path / "sweep", log=logged.append)["done"] == 2
    assert [line.split()[0] for line in logged] == ["write", "start", "done"]
    assert file.read_text().count("answer") == 2


@pytest.mark.long
def test_a_teacher_completes_its_answers_before_the_points_that_read_them(tmp_path):
    assert run_sweep(judged(tmp_path), tmp_path / "sweep", log=print)["done"] == 2
    file = tmp_path / "answers.jsonl"
    answers = file.read_bytes()
    file.write_bytes(answers[: len(answers) // 2])  # as if it had been killed there
    (tmp_path / "sweep" / "seed=1" / "result.json").unlink()
    assert run_sweep(judged(tmp_path), tmp_path / "sweep", log=print)["done"] == 2
    assert sorted(file.read_bytes().splitlines()) == sorted(answers.splitlines())


def test_no_point_starts_if_the_references_cannot_be_written(fake_children, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(SweepReferencesError, match="told to fail"):
        run_sweep(judged(tmp_path), tmp_path / "sweep", log=lambda line: None)
    assert not list((tmp_path / "sweep").glob("*/attempts.jsonl"))


def test_a_changed_sweep_file_is_refused_before_anything_runs(swept):
    _, directory, _, _ = swept
    changed = points(
        dataclasses.replace(TINY, optimizer=OptimizerConfig(learning_rate=2e-4)), seeds(1)
    )
    with pytest.raises(
        WorkdirError,
        match=r"seed=0 belongs to a point with another config.*\n  optimizer.learning_rate: 0.0005 "
        r"-> 0.0002",
    ):
        run_sweep(changed, directory)


def test_a_row_never_mixes_data(swept, tmp_path):
    _, directory, _, _ = swept
    for name in ("seed=0", "seed=1"):
        (tmp_path / name).mkdir()
        for file in ("point.json", "config.json", "result.json", "metrics.jsonl"):
            (tmp_path / name / file).write_text((directory / name / file).read_text())
    saved = json.loads((tmp_path / "seed=1" / "config.json").read_text())
    saved["data"]["prompts"] = "another"
    (tmp_path / "seed=1" / "config.json").write_text(json.dumps(saved))
    with pytest.raises(
        WorkdirError,
        match=r"seed=1 holds another run than its point asks for, or one with other data.*\n  "
        r"prompts: ",
    ):
        table(tmp_path)


SWEEP_FILE = """
from opdjax.config import *
from opdjax.config.grid import points, product, seeds, vary

def get_sweep():
    base = Config(
        data=DataConfig("arithmetic:train[:64]", max_prompt_length=32),
        sampling=SamplingConfig(max_completion_length=4),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        train=TrainConfig(num_steps=6, prompts_per_step=2),
        evaluation=EvaluationConfig(num_prompts=2, num_samples=2, max_completion_length=4),
        checkpoint=CheckpointConfig(every=2),
        log=LogConfig(samples_every=0),
        mesh=MeshConfig(data=1),
    )
    return points(base, product(vary("estimator.discount", (0.0, 1.0)), seeds(2)))
"""


def launch(file, directory, *arguments):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "opdjax",
            "sweep",
            str(file),
            "--workdir",
            str(directory),
            *arguments,
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_all(runner, directory):
    """SIGKILL to the runner and, half of the time, to its children too; a child that survives is an
    orphan at work.
    """
    runner.kill()
    runner.wait()
    if random.random() < 0.5:
        for file in directory.glob("*/attempts.jsonl"):
            for row in read_lines(file):
                with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                    if (
                        row["event"] == "start"
                        and b"opdjax" in pathlib.Path(f"/proc/{row['pid']}/cmdline").read_bytes()
                    ):
                        os.kill(row["pid"], signal.SIGKILL)


def outcome(directory):
    """Everything a run computed, times aside."""
    found = {}
    for point in sorted(directory.glob("*/point.json")):
        weights = (point.parent / "student" / "model.safetensors").read_bytes()
        found[point.parent.name] = (
            without_times(point.parent),
            (point.parent / "eval.jsonl").read_text(),
            weights,
        )
    return found


def completions_of(directory):
    return [
        sum(row.get("returncode") == 0 for row in read_lines(file))
        for file in sorted(directory.glob("*/attempts.jsonl"))
    ]


@pytest.mark.long
def test_killed_ten_times_and_three_shards_at_once_end_alike(tmp_path):
    file = tmp_path / "sweep.py"
    file.write_text(SWEEP_FILE)
    straight, killed, shared = tmp_path / "straight", tmp_path / "killed", tmp_path / "shared"
    assert launch(file, straight).wait() == 0
    random.seed(0)
    for _ in range(10):
        runner = launch(file, killed)
        time.sleep(random.uniform(2, 14))
        kill_all(runner, killed)
    assert launch(file, killed).wait() == 0
    runners = [launch(file, shared, "--shard", f"{i}/3") for i in (1, 2, 3)] + [
        launch(file, shared)
    ]
    assert [runner.wait() for runner in runners] == [0, 0, 0, 0]
    expected = outcome(straight)
    assert len(expected) == 4
    assert outcome(killed) == expected
    assert outcome(shared) == expected
    assert completions_of(shared) == [1] * 4
    assert max(completions_of(killed)) <= 1  # an orphan's end has no witness


def test_a_child_that_stops_on_a_signal_has_not_failed(fake_children, tmp_path, monkeypatch):
    """A run that is told to stop keeps its step and exits with 143."""
    monkeypatch.setenv("WORK", "10000")
    logged, directory = [], tmp_path / "sweep"

    def stop():
        until((directory / "seed=0" / "config.json").exists)
        os.kill(starts(directory, "seed=0")[-1]["pid"], signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(stop)
        counts = run_sweep(points(TINY, seeds(1)), directory, log=logged.append)
    stopped.result()
    assert counts == {"points": 1, "done": 0, "failed": 0, "stopped": 1}
    assert logged[-1] == "killed seed=0 by SIGTERM; run the same command again to resume it"
    assert read_lines(directory / "seed=0" / "attempts.jsonl")[-1]["returncode"] == 143
    assert not (directory / "seed=0" / "failure.json").exists()


def test_a_point_whose_directory_is_deleted_costs_no_other_point(fake_children, tmp_path):
    made, logged, directory = points(TINY, seeds(2)), [], tmp_path / "sweep"

    def log(line):
        logged.append(line)
        if line == "start  seed=0":
            shutil.rmtree(directory / "seed=0")
            shutil.rmtree(directory / "seed=1")

    assert run_sweep(made, directory, log=log) == {
        "points": 2,
        "done": 1,
        "failed": 0,
        "stopped": 1,
    }
    assert (
        "killed seed=0: its directory was deleted; run the same command again to start it anew"
        in logged
    )
    assert run_sweep(made, directory, log=logged.append)["done"] == 2


def test_a_damaged_result_is_named(swept, tmp_path):
    made, directory, _, _ = swept
    shutil.copytree(directory, tmp_path / "sweep")
    result = tmp_path / "sweep" / "seed=0" / "result.json"
    result.write_text(result.read_text()[:20])
    with pytest.raises(WorkdirError, match=r"seed=0/result.json cannot be read as JSON.*delete it"):
        status_table(made, tmp_path / "sweep")


def test_a_teacher_does_not_outlive_a_runner_that_is_asked_to_stop(tmp_path):
    sleeper = (
        f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()) + '.'); "
        f"time.sleep(600)"
    )
    program = (
        f"import sys; from opdjax.sweeps.runner import _run_to_its_end; "
        f"_run_to_its_end([sys.executable, '-c', {sleeper!r}])"
    )
    runner = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    pid = tmp_path / "pid"
    until(lambda: pid.exists() and pid.read_text().endswith("."))
    runner.terminate()
    assert "SIGTERM: the teacher was stopped" in runner.communicate(timeout=HANG)[1]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()[:-1]), 0)
