"""The newest checkpoint is damaged: the run stops by name, or goes on from the one before and ends
like an undisturbed one, with rollouts drawn ahead or anew, on a local disk and on gs://.
"""

import dataclasses
from types import SimpleNamespace

import pytest
from near_runs import assert_same_steps, shard_names
from test_resume import AGAIN, AHEAD, ANEW, SOURCE, THREAD, killed
from tiny_runs import TINY, vary

from opdjax.config import NearPolicyConfig
from opdjax.rollouts.near_policy.store import RolloutStore
from opdjax.runs.checkpoint import UnreadableCheckpointError
from opdjax.runs.mirror import read_only_workdir
from opdjax.train import train

RUNS = {"inline": (AHEAD, SOURCE), "thread": (THREAD, SOURCE), "refresh": (ANEW, AGAIN)}
URL = "gs://bucket/run"


def flipped(data):
    data = bytearray(data)
    for at in range(1000, len(data), 1000):
        data[at] ^= 4
    return bytes(data)


def damage_local(workdir):
    """Damage the arrays of checkpoint 4, which is the newest."""
    assert sorted(path.name for path in workdir.glob("checkpoints/*"))[1:] == ["4"]
    files = [file for file in workdir.glob("checkpoints/4/default/**/*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(flipped(largest.read_bytes()))


def damage_remote(store):
    objects = {name: thing for (_, name), thing in store.objects.items() if "/checkpoints/" in name}
    assert sorted({name.split("/")[2] for name in objects})[1:] == ["4"]
    arrays = [thing for name, thing in objects.items() if "/checkpoints/4/default/" in name]
    largest = max(arrays, key=lambda thing: len(thing["data"]))
    largest["data"] = flipped(largest["data"])


@pytest.mark.long
@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("is_remote", [False, True], ids=["local", "gs"])
def test_the_checkpoint_before_a_damaged_one_leads_to_the_same_end(
    kind, is_remote, request, tmp_path, monkeypatch, capsys
):
    config, source = RUNS[kind]
    workdir = URL if is_remote else tmp_path / "run"
    gcs = request.getfixturevalue("gcs") if is_remote else None
    killed(config, workdir, monkeypatch, source, "step_batch", 5)
    damage_remote(gcs.store) if is_remote else damage_local(workdir)
    with pytest.raises(UnreadableCheckpointError, match=f"checkpoint {workdir}/.*4 is damaged"):
        train(config, workdir)
    train(vary(config, checkpoint={"on_damage": "previous"}), workdir)
    assert "4.damaged; the one before it is used" in capsys.readouterr().out
    undisturbed = request.getfixturevalue("refreshed" if config is ANEW else "ahead")
    with read_only_workdir(workdir, lambda name: not name.startswith("checkpoints")) as mirror:
        assert_same_steps(undisturbed, mirror.directory)
        assert shard_names(undisturbed) == shard_names(mirror.directory)


def test_rollouts_that_were_trained_on_and_are_gone_are_said(tmp_path, capsys):
    near = NearPolicyConfig("continuous", max_staleness=1)
    config = dataclasses.replace(TINY, near_policy=near)
    store = RolloutStore(SimpleNamespace(config=config), tmp_path)
    for version, number in ((0, 0), (1, 2)):
        store.directory(version).mkdir(parents=True)
        (store.directory(version) / f"samples-{number:08}.{'0' * 16}.parquet").touch()
    store.report_lost(1)
    assert capsys.readouterr().out == ""
    store.report_lost(4)
    found = capsys.readouterr().out
    assert "note: 2 samples of rollouts before step 4 were lost in" in found
    assert "first 1; the run goes on without them" in found
