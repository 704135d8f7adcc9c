"""A run whose rollouts are drawn ahead is killed, its files are damaged, the disk is full: it
continues, or says by name why not.
"""

import collections
import json
import pathlib
import shutil
import subprocess
import sys

import pytest
from near_runs import (
    FILTERED,
    LAG,
    ONE_THREAD,
    PACKED,
    REFRESH,
    assert_same_steps,
    near,
    shard_names,
)
from tiny_runs import environment, save

import opdjax.rollouts.near_policy.continuous
import opdjax.rollouts.near_policy.refresh
from opdjax.rollouts.near_policy import shards, stages
from opdjax.rollouts.near_policy.generator_process import annotate_all, generate_for
from opdjax.rollouts.near_policy.shards import ShardError
from opdjax.runs.workdir import append_lines, read_lines
from opdjax.train import train

AHEAD = near(LAG | FILTERED, **PACKED)
THREAD = near(LAG | FILTERED | ONE_THREAD, **PACKED)
ANEW = near(REFRESH)


def interrupt(monkeypatch, where, name, count):
    """Call number `count` (from 0) of a function, and every later one, raise KeyboardInterrupt."""
    real, seen = getattr(where, name), []

    def interrupting(*arguments, **named):
        seen.append(1)
        if len(seen) > count:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(where, name, interrupting)


def killed(config, workdir, monkeypatch, where, name, count):
    """A run that was interrupted there."""
    with monkeypatch.context() as patched:
        interrupt(patched, where, name, count)
        with pytest.raises(KeyboardInterrupt):
            train(config, workdir)
    return workdir


SOURCE, AGAIN = opdjax.rollouts.near_policy.continuous, opdjax.rollouts.near_policy.refresh
MOMENTS = {
    "thread, drawing": (THREAD, stages, "generate", 4),
    "refresh, annotating anew": (ANEW, stages, "annotate", 3),
    "inline": (AHEAD, SOURCE, "step_batch", 5),
    "refresh, first generation": (ANEW, stages, "generate", 1),
    "refresh, first annotation": (ANEW, stages, "annotate", 1),
    "refresh, generating anew": (ANEW, stages, "generate", 2),
    "refresh, first epoch": (ANEW, AGAIN, "step_batch", 1),
    "inline, annotating": (AHEAD, stages, "annotate", 4),
    "inline, first step": (AHEAD, SOURCE, "step_batch", 0),
    "thread, learning": (THREAD, SOURCE, "step_batch", 5),
    "thread, annotating": (THREAD, stages, "annotate", 5),
}


@pytest.mark.long
@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_run_ends_like_an_undisturbed_one(moment, request, tmp_path, monkeypatch):
    """A thread also generates what the learner itself would have."""
    config, where, name, count = MOMENTS[moment]
    workdir = killed(config, tmp_path / "run", monkeypatch, where, name, count)
    train(config, workdir)
    undisturbed = request.getfixturevalue("refreshed" if config is ANEW else "ahead")
    assert_same_steps(undisturbed, workdir)
    assert shard_names(undisturbed) == shard_names(workdir)


@pytest.mark.long
def test_what_was_drawn_and_annotated_ahead_of_a_run_is_what_it_would_have_stored(
    drawn, refreshed, tmp_path
):
    workdir = shutil.copytree(drawn, tmp_path / "run")
    wanted = [path for path in shard_names(refreshed) if "/00000000/" in path]
    assert shard_names(workdir) == wanted
    shard(workdir, "annotations", 0, 0).unlink()
    assert annotate_all(workdir) == 1
    assert annotate_all(workdir) == 0
    assert shard_names(workdir) == wanted


def test_a_refreshed_run_continues_within_its_epoch(halfway_refreshed, refreshed, tmp_path):
    """Its first epoch was drawn before it started."""
    workdir = shutil.copytree(halfway_refreshed, tmp_path / "run")
    train(ANEW, workdir)
    assert_same_steps(refreshed, workdir)
    assert shard_names(refreshed) == shard_names(workdir)


@pytest.mark.long
def test_who_draws_may_change_when_a_run_continues(ahead, tmp_path, monkeypatch):
    for first, then in ((AHEAD, THREAD), (THREAD, AHEAD)):
        workdir = tmp_path / first.near_policy.generator
        killed(first, workdir, monkeypatch, SOURCE, "step_batch", 4)
        train(then, workdir)
        assert_same_steps(ahead, workdir)


# Damage


@pytest.fixture(scope="module")
def halfway_ahead(tmp_path_factory):
    """A run that was killed after five of six steps; its checkpoint is step 4."""
    workdir = tmp_path_factory.mktemp("halfway") / "ahead"
    return killed(AHEAD, workdir, pytest.MonkeyPatch(), SOURCE, "step_batch", 5)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The rollouts of a first epoch, drawn and annotated without a run."""
    workdir = tmp_path_factory.mktemp("drawn") / "run"
    count = generate_for(workdir, ANEW)
    assert count == len(shards.shard_paths(shards.version_directory(workdir, 0), "samples"))
    return workdir


@pytest.fixture(scope="module")
def halfway_refreshed(drawn, tmp_path_factory):
    """A refreshed run that was killed after five of six steps; its checkpoint is step 4, and its
    first epoch was drawn before it started.
    """
    workdir = shutil.copytree(drawn, tmp_path_factory.mktemp("halfway") / "refresh")
    return killed(ANEW, workdir, pytest.MonkeyPatch(), AGAIN, "step_batch", 5)


def shard(workdir, stage, version, number):
    return shards.shard_paths(shards.version_directory(workdir, version), stage)[number]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def corrupt(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.long
def test_damaged_annotations_are_made_again(halfway_ahead, ahead, tmp_path):
    """The teacher can score the same samples again."""
    workdir = shutil.copytree(halfway_ahead, tmp_path / "run")
    truncate(shard(workdir, "annotations", 2, 4))
    train(AHEAD, workdir)
    assert_same_steps(ahead, workdir)


@pytest.mark.long
def test_damaged_annotations_of_an_epoch_are_made_again(halfway_refreshed, refreshed, tmp_path):
    workdir = shutil.copytree(halfway_refreshed, tmp_path / "run")
    corrupt(shard(workdir, "annotations", 3, 1))
    train(ANEW, workdir)
    assert_same_steps(refreshed, workdir)


@pytest.mark.parametrize(
    ("config", "version", "number", "damage", "message"),
    [
        pytest.param(
            AHEAD,
            2,
            4,
            truncate,
            "samples-00000004.* is truncated.*weights of 2 updates.* are gone",
            marks=pytest.mark.long,
        ),
        (ANEW, 3, 1, corrupt, "samples-00000001.* is truncated or corrupted"),
        pytest.param(
            AHEAD,
            3,
            5,
            pathlib.Path.unlink,
            "lacks samples 5, which was stored before; .*; the weights of 3 updates",
            marks=pytest.mark.long,
        ),
        pytest.param(
            ANEW,
            3,
            0,
            pathlib.Path.unlink,
            "lacks samples 0, which was stored before",
            marks=pytest.mark.long,
        ),
    ],
    ids=["truncated", "refresh, corrupted", "deleted", "refresh, deleted"],
)
def test_samples_that_cannot_be_made_again_are_named(
    config, version, number, damage, message, request, tmp_path
):
    name = "halfway_ahead" if config is AHEAD else "halfway_refreshed"
    halfway = request.getfixturevalue(name)
    workdir = shutil.copytree(halfway, tmp_path / "run")
    damage(shard(workdir, "samples", version, number))
    with pytest.raises(ShardError, match=message):
        train(config, workdir)
    assert len(read_lines(workdir / "metrics.jsonl")) == 4


@pytest.mark.long
@pytest.mark.parametrize(("version", "step"), [(0, 2), (2, 4)])
@pytest.mark.parametrize("damage", [truncate, corrupt, pathlib.Path.unlink])
def test_what_weights_that_can_be_had_drew_is_drawn_again(
    version, step, damage, ahead, tmp_path, monkeypatch
):
    """The run continues from step 2: those of its checkpoint and those before the first update are
    at hand.
    """
    workdir = killed(AHEAD, tmp_path / "run", monkeypatch, SOURCE, "step_batch", 3)
    damage(shard(workdir, "samples", version, step))
    train(AHEAD, workdir)
    assert_same_steps(ahead, workdir)
    assert shard_names(ahead) == shard_names(workdir)


@pytest.mark.long
def test_a_free_run_with_a_gap_draws_nothing_twice(tmp_path, monkeypatch):
    """It continues from step 2, whose rollouts are gone; those of step 3 are damaged."""
    config = near(LAG | ONE_THREAD | {"lag": "free"})
    workdir = killed(config, tmp_path / "run", monkeypatch, SOURCE, "step_batch", 3)
    shards_of(workdir)[2][0].unlink()
    truncate(shards_of(workdir)[3][0])
    train(config, workdir)
    assert {step: len(paths) for step, paths in shards_of(workdir).items()} == dict.fromkeys(
        range(6), 1
    )


def shards_of(workdir):
    """step -> files of its samples, by whatever version."""
    found = collections.defaultdict(list)
    for version in shards.versions(workdir):
        for number, path in shards.shard_paths(
            shards.version_directory(workdir, version), "samples"
        ).items():
            found[number].append(path)
    return found


# No room


SCRIPT = """
import resource, sys
from opdjax.cli import main
from opdjax.rollouts.near_policy import shards, store
store.SHARD_SIZE = 16  # as in this process
real, count = shards.write_whole, int(sys.argv.pop(1))

def full(path, data):
    global count
    count -= 1
    if count < 0:  # from now on the system refuses whatever grows beyond this
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    return real(path, data)

shards.write_whole = full
main.main()
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("config", "files"), [(THREAD, 9), (ANEW, 1), (AHEAD, 4)], ids=["thread", "refresh", "inline"]
)
def test_a_full_disk_ends_a_run_that_continues_when_there_is_room(
    config, files, ahead, refreshed, tmp_path
):
    """The limit is the system's own."""
    workdir = tmp_path / "run"
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        str(files),
        "train",
        str(save(config, tmp_path / "run.json")),
        "--workdir",
        str(workdir),
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("opdjax: ")]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(lines) == 1
    assert "make room" in lines[0] or "let files grow larger" in lines[0]
    assert str(workdir) in lines[0]
    for path in (workdir / "rollouts").glob("*/*.parquet"):
        shards.read_shard(path)
    assert not list((workdir / "rollouts").glob("*/*.partial*"))
    train(config, workdir)
    assert_same_steps(refreshed if config is ANEW else ahead, workdir)


def test_a_row_that_was_cut_off_is_written_over(tmp_path):
    file = tmp_path / "rows.jsonl"
    append_lines(file, [{"step": 1}])
    for torn in ('{"st', '{"step": 2, "long": "' + 9000 * "x"):
        with file.open("a") as out:
            out.write(torn)
        append_lines(file, [{"step": 2}])
    assert [row["step"] for row in read_lines(file)] == [1, 2, 2]
    assert json.loads(file.read_text().splitlines()[0]) == {"step": 1}
