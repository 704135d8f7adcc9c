"""The life of a slice, from asking for it to deleting it, on a cloud that is a directory: taken
away, failing, and watched over.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from waiting import HANG, until

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
TRAIN = ["train", "experiments/vopd_math.py", "--workdir", "gs://bucket/run"]
# A run of 30 steps that goes on from what is in the bucket. What it does at a step may be said in a
# file beside it.
OPDJAX = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$BUCKET/commands"
touch "$BUCKET/steps"
while step=$(wc -l < "$BUCKET/steps"); [ "$step" -lt 30 ]; do
    if [ -e "$BUCKET/at-$step" ]; then
        status=$(cat "$BUCKET/at-$step"); rm "$BUCKET/at-$step"; exit "$status"
    fi
    [ ! -e "$BUCKET/always" ] || exit "$(cat "$BUCKET/always")"
    sleep 0.05
    echo "$HOSTNAME" >> "$BUCKET/steps"
done
echo done > "$BUCKET/result.json"
"""


class Cloud:
    """A cloud in a directory, and the scripts that are run against it."""

    def __init__(self, directory, **plan):
        self.directory, self.bucket = directory, directory / "bucket"
        for folder in (directory / "bin", self.bucket):
            folder.mkdir()
        (directory / "plan.json").write_text(
            json.dumps({"waits": 2, "taken_away_at": [], "failures": 0.0, "seed": 0} | plan)
        )
        gcloud, opdjax = directory / "bin" / "gcloud", directory / "opdjax"
        gcloud.write_text(
            f'#!/usr/bin/env bash\nexec {sys.executable} -I -S {HERE / "fake_gcloud.py"} "$@"\n'
        )
        opdjax.write_text(OPDJAX)
        for file in (gcloud, opdjax):
            file.chmod(0o755)

    def variables(self, **more):
        given = {
            "NAME": "opd",
            "ZONE": "z",
            "TOPOLOGY": "v5e-8",
            "POLL": "0.05",
            "TMPDIR": str(self.directory),
            "HOSTNAME": "worker",
        }
        given |= {
            "FAKE_CLOUD": str(self.directory),
            "FAKE_OPDJAX": str(self.directory / "opdjax"),
            "BUCKET": str(self.bucket),
        }
        given |= {
            "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}",
            "REAL_PYTHON": sys.executable,
        }
        return given | more

    def call(self, script, *arguments, **variables):
        command, given = [ROOT / "tpu" / script, *arguments], self.variables(**variables)
        return subprocess.run(
            command, env=given, capture_output=True, text=True, cwd=self.directory, timeout=HANG
        )

    def start(self, script, *arguments):
        return subprocess.Popen(
            [ROOT / "tpu" / script, *arguments],
            env=self.variables(),
            cwd=self.directory,
            start_new_session=True,
            # A shell cannot trap what was ignored when it began, as it is in a background job.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def babysit(self, **variables):
        return self.call("babysit.sh", *TRAIN, **variables)

    @property
    def steps(self):
        return len((self.bucket / "steps").read_text().splitlines())

    @property
    def state(self):
        return json.loads((self.directory / "state.json").read_text())

    def calls(self, verb):
        return [
            line
            for line in (self.directory / "calls").read_text().splitlines()
            if line.startswith(verb) and "fails" not in line
        ]


def test_create_set_up_run_lose_and_babysit_until_it_is_deleted(tmp_path):
    cloud = Cloud(tmp_path, taken_away_at=[6])
    assert cloud.call("create.sh").returncode == 0
    assert "PROVISIONING" in cloud.call("status.sh").stdout
    for _ in range(2):
        cloud.call("status.sh")
    assert cloud.call("setup_vm.sh").returncode == 0
    assert cloud.call("run.sh", *TRAIN).returncode == 0
    until(lambda: (cloud.bucket / "steps").exists() and cloud.steps > 0)
    told = cloud.call("status.sh")
    assert told.returncode == 0, told.stderr
    assert "ACTIVE" in told.stdout
    assert "READY" in told.stdout
    assert "running" in told.stdout
    before = cloud.steps
    assert 0 < before < 30
    finished = cloud.babysit(DELETE="1")  # its first look or two find it running, then it is gone
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "queued resource: SUSPENDED" in finished.stdout
    assert cloud.steps == 30
    assert (cloud.bucket / "result.json").exists()
    assert set((cloud.bucket / "commands").read_text().splitlines()) == {" ".join(TRAIN)}
    assert cloud.state["name"] is None
    assert not (tmp_path / "disk").exists()


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_lives_through_lost_slices_and_a_gcloud_that_fails(tmp_path, seed):
    cloud = Cloud(tmp_path, taken_away_at=[12, 9, 14], failures=0.3, seed=seed)
    (cloud.bucket / "at-12").write_text("1")  # and one crash of the run's own
    finished = cloud.babysit(DELETE="1", SPOT="1")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert cloud.steps == 30
    assert cloud.state["name"] is None
    assert not (tmp_path / "disk").exists()
    assert "failed (1 in a row); retrying" in finished.stdout


@pytest.mark.long
def test_a_run_that_crashes_is_started_again_on_the_same_slice(tmp_path):
    cloud = Cloud(tmp_path)
    (cloud.bucket / "at-5").write_text("137")
    (cloud.bucket / "at-9").write_text("2")  # once may be chance
    finished = cloud.babysit()
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert cloud.state["slices"] == 1
    assert len(cloud.calls("queued-resources create")) == 1
    assert "the run has stopped (exit status 137)" in finished.stdout
    assert "the slice still costs: tpu/delete.sh" in finished.stdout
    assert cloud.state["name"] == "opd"


@pytest.mark.long
def test_a_crash_counts_once_though_the_next_start_fails(tmp_path):
    cloud = Cloud(tmp_path)
    (cloud.bucket / "at-5").write_text("1")
    gcloud = tmp_path / "bin" / "gcloud"
    second = '[ $(wc -l < starts) != 2 ] || { echo "ERROR: UNAVAILABLE" >&2; exit 1; }'
    fails = f'case "$*" in *new-session*) echo >> starts; {second} ;; esac\nexec'
    gcloud.write_text(gcloud.read_text().replace("exec", fails))
    finished = cloud.babysit()
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "failed (1 in a row); retrying" in finished.stdout
    assert cloud.steps == 30


@pytest.mark.long
# A bug, and a mistake of the user.
@pytest.mark.parametrize("status", ["1", pytest.param("2", marks=pytest.mark.long)])
def test_it_gives_up_on_a_run_that_is_wrong(tmp_path, status):
    cloud = Cloud(tmp_path)
    (cloud.bucket / "always").write_text(status)
    told = cloud.babysit()
    assert told.returncode == 1
    assert f"failed twice with an error of its own (exit status {status})" in told.stdout


@pytest.mark.long
def test_it_gives_up_on_slices_that_do_not_last(tmp_path):
    short = Cloud(tmp_path, taken_away_at=[4] * 9)
    told = short.babysit(MAX_SLICES="2")
    assert told.returncode == 1
    assert "2 slices were preempted or failed (MAX_SLICES)" in told.stdout
    assert short.state["slices"] == 2
    assert short.state["name"] is None


def test_it_gives_up_where_gcloud_always_fails(tmp_path):
    told = Cloud(tmp_path, failures=1.0).babysit(MAX_FAILURES="4")
    assert told.returncode == 1
    assert "4 failures in a row" in told.stdout
    assert "UNAVAILABLE" in told.stderr


@pytest.mark.long
def test_started_anew_it_leaves_running_what_runs(tmp_path):
    cloud = Cloud(tmp_path)
    for script, *arguments in (
        ["create.sh"],
        ["status.sh"],
        ["status.sh"],
        ["status.sh"],
        ["setup_vm.sh"],
        ["run.sh", *TRAIN],
    ):
        cloud.call(script, *arguments)
    finished = cloud.babysit()
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert len((cloud.bucket / "commands").read_text().splitlines()) == 1


def test_a_work_directory_that_goes_with_the_slice_is_refused(tmp_path):
    told = Cloud(tmp_path).call(
        "babysit.sh", "train", "experiments/vopd_math.py", "--workdir", "runs/a"
    )
    assert told.returncode == 2
    assert "no --workdir gs://BUCKET/RUN among the arguments" in told.stderr
    (tmp_path / "data").mkdir()
    told = Cloud(tmp_path / "data").call(
        "babysit.sh", "train", "e.py", "--data.source", "gs://b/rows.jsonl", "--workdir", "runs/a"
    )
    assert told.returncode == 2  # what is read from a bucket makes no work directory there


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (TRAIN, {"TOPOLOGY": "v5e-9"}, "there is no topology 'v5e-9'"),
        (TRAIN, {"FILES": "absent.jsonl"}, "there is no file absent.jsonl"),
        (
            ["sweep", "s.py", "--workdir", "gs://b/s"],
            {"TOPOLOGY": "v5e-16"},
            "where only train can run",
        ),
    ],
)
def test_what_no_look_would_mend_is_told_before_a_slice_is_asked_for(
    tmp_path, arguments, variables, message
):
    cloud = Cloud(tmp_path)
    told = cloud.call("babysit.sh", *arguments, **variables)
    assert told.returncode == 2
    assert message in told.stderr
    assert not (tmp_path / "calls").exists()


@pytest.mark.long
def test_failures_are_in_a_row_only_while_nothing_is_well_between_them(tmp_path):
    cloud = Cloud(tmp_path)
    (tmp_path / "opdjax").write_text(OPDJAX.replace("sleep 0.05", "sleep 0.2"))
    gcloud = tmp_path / "bin" / "gcloud"
    every_second = (
        'echo >> looks; [ $(($(wc -l < looks) % 2)) = 0 ] || { echo "ERROR: UNAVAILABLE" >&2; exit '
        "1; }"
    )
    gcloud.write_text(
        gcloud.read_text().replace(
            "exec", f'[ "$3 $4" != "tpu-vm describe" ] || {{ {every_second}; }}\nexec'
        )
    )
    finished = cloud.babysit(MAX_FAILURES="3")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("failed (1 in a row)") > 3


@pytest.mark.long
def test_a_disk_that_was_lost_is_set_up_again(tmp_path):
    cloud = Cloud(tmp_path)
    # A slice that was made anew under its name: what was on it is gone, and nobody says so.
    (cloud.directory / "opdjax").write_text(
        OPDJAX.replace(
            "sleep 0.05",
            '[ "$step" != 9 ] || { echo x >> "$BUCKET/steps"; rm -rf "$HOME/opdjax"; exit 1; }',
        )
    )
    finished = cloud.babysit()
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("setting up the slice") == 2
    assert cloud.steps == 30


@pytest.mark.long
def test_control_c_stops_it_though_gcloud_takes_it_for_a_failure(tmp_path):
    cloud = Cloud(tmp_path)
    slow = (
        "import signal, sys, time\nsignal.signal(2, lambda *_: sys.exit(1))\nopen('asked', "
        "'w').close()\ntime.sleep(60)\n"
    )
    (tmp_path / "slow.py").write_text(slow)
    (tmp_path / "bin" / "gcloud").write_text(f"#!/bin/sh\nexec {sys.executable} slow.py\n")
    babysitter = cloud.start("babysit.sh", *TRAIN)
    until((tmp_path / "asked").exists)
    os.killpg(babysitter.pid, signal.SIGINT)
    assert babysitter.wait(timeout=HANG) == 130


@pytest.mark.long
def test_a_slice_that_is_gone_though_its_request_is_active_is_asked_for_again(tmp_path):
    cloud = Cloud(tmp_path, node_gone_at=5)
    finished = cloud.babysit(DELETE="1")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "the slice is GONE: deleting it" in finished.stdout
    assert cloud.state["slices"] == 2
    assert cloud.steps == 30
