"""Damage to any file of a checkpoint is named, or changes nothing."""

import collections
import resource
import shutil
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from waiting import HANG

from opdjax.engine.update import TrainState
from opdjax.runs import checkpoint
from opdjax.runs.checkpoint import (
    Checkpointer,
    CheckpointShapeError,
    CheckpointWriteError,
    UnreadableCheckpointError,
    digests,
    set_aside,
)

LOGS = {"metrics.jsonl": {"rows": 7}}


def make_state(seed=0):
    draw = np.random.default_rng(seed).standard_normal
    params = {"embed": draw((60, 40)), "layers": {"kernel": draw((2, 40, 30)), "norm": draw(40)}}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    moments = jax.tree.map(jnp.square, params), jnp.int32(7)
    return TrainState(jnp.int32(7), params, moments, jnp.int32(0), jnp.int32(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with the checkpoints 3 and 7, and the state of the newer one."""
    directory, state = tmp_path_factory.mktemp("saved") / "checkpoints", make_state()
    checkpointer = Checkpointer(directory, keep=2)
    checkpointer.save(3, make_state(1), {"avg@k": 0.25})
    checkpointer.save(7, state, {"avg@k": 0.5}, LOGS)
    checkpointer.close()
    return directory, state


def damage(file, kind, random):
    """Change a file: a flipped bit, a span of zeros, a cut, or its deletion."""
    data = bytearray(file.read_bytes())
    at = random.integers(max(len(data), 1))
    if kind == "delete":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(data[:at])
    elif kind == "zeros":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
        file.write_bytes(data)
    elif data:
        data[at] ^= 1 << random.integers(8)
        file.write_bytes(data)


def outcome(directory, state):
    """What a reader of the newest checkpoint sees: named, harmless, skipped or WRONG."""
    checkpointer = None
    try:
        checkpointer = Checkpointer(directory, keep=2, is_read_only=True)
        if checkpointer.latest_step != 7:
            return "skipped"
        _, logs = checkpointer.best_step, checkpointer.logs(7)
        found = checkpointer.restore(7, state)
    except (UnreadableCheckpointError, CheckpointShapeError) as error:
        return "named" if str(directory) in str(error) and "\n" not in str(error) else str(error)
    finally:
        if checkpointer is not None:
            checkpointer.close()
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), found, state)
    is_same = all(jax.tree.leaves(same)) and logs in ({}, LOGS)
    return "harmless" if is_same else "WRONG"


def outcomes(saved, tmp_path, number, seed):
    """Counts of outcomes, and whatever is not one of the good ones."""
    (directory, state), random = saved, np.random.default_rng(seed)
    files = [file for file in sorted(directory.glob("7/**/*")) if file.is_file()]
    counts, others = collections.Counter(), []
    for trial in range(number):
        file = files[trial % len(files)].relative_to(directory)
        kind = random.choice(("flip", "flip", "flip", "zeros", "cut", "delete"))
        copy = tmp_path / str(trial)
        shutil.copytree(directory, copy)
        damage(copy / file, kind, random)
        found = outcome(copy, state)
        counts[found] += 1
        if found not in ("named", "harmless"):
            others.append((trial, str(file), str(kind), found))
        shutil.rmtree(copy)
    return counts, others


def test_damage_of_a_file_is_named_or_harmless(saved, tmp_path):
    counts, others = outcomes(saved, tmp_path, 14, seed=0)
    assert not others
    assert counts["named"] > 2


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_a_thousand_damages_are_named_or_harmless(saved, tmp_path, seed):
    counts, others = outcomes(saved, tmp_path, 100, seed=seed + 1)
    print(dict(counts))
    assert not others


def test_damage_of_an_array_is_named_with_what_to_do(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep=2)
    other = saved[1].replace(params=saved[1].params | {"embed": saved[1].params["embed"] + 1e-6})
    checkpointer.save(9, saved[1])
    checkpointer.wait()
    record = tmp_path / "checkpoints/9/_CHECKPOINT_METADATA"
    known = str(digests(saved[1])["params.embed"])
    assert digests(other)["params.embed"] != int(known)
    pattern = "checkpoint .*/9 is damaged: .*record.*move it away .*on-damage previous"
    record.write_text(record.read_text().replace(known, str(digests(other)["params.embed"])))
    with pytest.raises(UnreadableCheckpointError, match=pattern) as found:
        checkpointer.restore(9, saved[1])
    checkpointer.close()
    assert set_aside(found.value.path).name == "9.damaged"
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep=2)
    assert checkpointer.steps == [7]
    checkpointer.restore(7, saved[1])
    checkpointer.close()


def test_a_save_does_not_wait_for_its_digests_and_is_complete_with_them(tmp_path, monkeypatch):
    known, numbers = threading.Event(), checkpoint._numbers
    monkeypatch.setattr(
        checkpoint, "_numbers", lambda started: known.wait(HANG) and numbers(started)
    )
    checkpointer, state = Checkpointer(tmp_path, keep=1), make_state()
    checkpointer.save(7, state)
    assert not (tmp_path / "7").exists()
    known.set()
    checkpointer.wait()
    assert '"params.embed"' in (tmp_path / "7/_CHECKPOINT_METADATA").read_text()
    checkpointer.restore(7, state)
    checkpointer.close()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_checkpoint_that_cannot_be_written_is_named_without_a_traceback(tmp_path, capsys):
    checkpointer, limit = Checkpointer(tmp_path, keep=1), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
    try:
        checkpointer.save(7, make_state())
        with pytest.raises(CheckpointWriteError, match="could not be written: .*; make room there"):
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "7").exists()


def test_digests_of_earlier_checkpoints_hold():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    state = {"f32": x, "bf16": x.astype(jnp.bfloat16), "bool": x > 7, "step": jnp.int32(7)}
    assert digests(state) == {
        "bf16": 2439290240,
        "bool": 550240448,
        "f32": 2690138461,
        "step": 415870660,
    }


def test_digests_do_not_depend_on_the_mesh():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"))
    values = np.random.default_rng(0).standard_normal((8, 6, 4)).astype(np.float32)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int32, bool):
        array = jnp.asarray(values, dtype)
        expected = digests({"x": array})
        for axes in (("data", "fsdp"), (None, "fsdp", "data")):
            spec = PartitionSpec(*axes)
            sharded = jax.device_put(array, NamedSharding(mesh, spec))
            assert digests({"x": sharded}) == expected


@pytest.mark.long
def test_digests_on_many_devices_do_not_wait_for_each_other():
    """Without the wait between them this ended the process within a thousand rounds."""
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"))
    place = NamedSharding(mesh, PartitionSpec(("a", "b"), "c"))
    state = {f"w{size}": jax.device_put(jnp.ones((64, 8 * size)), place) for size in range(1, 9)}
    first = digests(state)
    assert all(digests(state) == first for _ in range(1000))


def test_changes_that_cancel_in_a_plain_sum_change_the_digest():
    array = jnp.asarray(np.random.default_rng(0).standard_normal((64, 32)), jnp.float32)
    known = digests(array)
    signs = jnp.ones_like(array).at[3:5, 7:9].set(-1)  # 2^31 each, modulo 2^32
    for other in (array[::-1], array * signs, array.at[2, 2].set(array[1, 1]), array.at[8:].set(0)):
        assert digests(other) != known
    assert digests(array.reshape(32, 64)) == known
