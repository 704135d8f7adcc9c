"""Shards on disk: what is written is read back, and what is not whole is told by name."""

import errno
import importlib
import os
import subprocess
import sys

import numpy as np
import pytest

from opdjax.rollouts.near_policy import shards as shards_module
from opdjax.rollouts.near_policy.shards import (
    ShardError,
    StorageError,
    read_shard,
    shard_paths,
    version_directory,
    versions,
    write_filter,
    write_shard,
)
from opdjax.runs.results import read_filter
from opdjax.runs.workdir import WorkdirError

LENGTHS = (3, 0, 5, 1)
TOP_K = 2
FACTS = {"config": "c0ffee", "seed": 7}


@pytest.fixture
def samples(rng):
    """Columns of a few samples, one of them empty, one without NLLs."""
    count = len(LENGTHS)
    return {
        "step": [4] * count,
        "prompt_id": [0, 0, 7, 2**31 - 1],
        "sample_id": [0, 1, 0, 0],
        "policy_version": [4] * count,
        "is_truncated": [False, True, False, False],
        "prompt_tokens": [[1, 2], [1, 2], [151_935], [5, 6, 7]],
        "tokens": [rng.integers(0, 151_936, n) for n in LENGTHS],
        "behavior_logprobs": [-rng.random(n, np.float32) for n in LENGTHS],
        "unfiltered_logprobs": [-rng.random(n, np.float32) for n in LENGTHS],
        "student_nll": [0.25, None, np.nan, 1e-300],
        "student_alone_nll": rng.random(count),
    }


@pytest.fixture
def annotations(rng):
    count = len(LENGTHS)
    return {
        "prompt_id": [0, 0, 7, 2**31 - 1],
        "sample_id": [0, 1, 0, 0],
        "policy_version": [4] * count,
        "teacher_logprobs": [-rng.random(n, np.float32) for n in LENGTHS],
        "teacher_ids": [rng.integers(0, 151_936, n * TOP_K) for n in LENGTHS],
        "teacher_top_logprobs": [-rng.random(n * TOP_K, np.float32) for n in LENGTHS],
        "teacher_nll": rng.random(count),
        "teacher_alone_nll": [None] * count,
    }


def assert_read(shard, columns, stage):
    assert list(shard.columns) == list(shards_module.SCHEMAS[stage])
    for name, column in shards_module.SCHEMAS[stage].items():
        read = shard.columns[name]
        if column.per == "sample":
            assert read.dtype == column.type
            expected = np.array(columns[name], column.type if column.type == "float64" else None)
            np.testing.assert_array_equal(read, expected, err_msg=name)
        else:
            assert isinstance(read, list)
            for row, expected in zip(read, columns[name], strict=True):
                assert row.dtype == column.type
                np.testing.assert_array_equal(row, np.asarray(expected, column.type), err_msg=name)


# What is written is read


def test_samples_come_back_as_they_were(tmp_path, samples):
    path = write_shard(tmp_path / "new" / "place", "samples", 12, samples, FACTS)
    assert path.name.startswith("samples-00000012.")
    shard = read_shard(path)
    assert_read(shard, samples, "samples")
    assert shard.facts == {
        **FACTS,
        "schema": shards_module.SCHEMA_VERSION,
        "stage": "samples",
        "number": 12,
    }
    assert len(shard) == 4


def test_annotations_come_back_with_their_top_k(tmp_path, annotations):
    shard = read_shard(write_shard(tmp_path, "annotations", 0, annotations, {"top_k": TOP_K}))
    assert_read(shard, annotations, "annotations")
    assert shard.facts["top_k"] == TOP_K
    assert shard.columns["teacher_ids"][2].reshape(-1, TOP_K).shape == (5, 2)


def test_rows_of_tokens_are_views_of_one_buffer(tmp_path, samples):
    rows = read_shard(write_shard(tmp_path, "samples", 0, samples, {})).columns["tokens"]
    addresses = [row.__array_interface__["data"][0] for row in rows]
    assert addresses[2] - addresses[0] == 4 * LENGTHS[0]
    assert not any(row.flags.owndata for row in rows)


def test_a_shard_may_be_empty_and_its_answers_unannotated(tmp_path, samples, annotations):
    none = {name: [] for name in samples}
    assert len(read_shard(write_shard(tmp_path, "samples", 0, none, {}))) == 0
    plain = annotations | {"teacher_ids": [[]] * 4, "teacher_top_logprobs": [[]] * 4}
    shard = read_shard(write_shard(tmp_path, "annotations", 0, plain, {"top_k": 0}))
    assert [len(row) for row in shard.columns["teacher_ids"]] == [0] * 4


def test_a_probability_below_half_precision_is_zero(tmp_path, annotations):
    annotations["teacher_top_logprobs"][3] = np.array([-1.0, -1e6], np.float32)
    shard = read_shard(write_shard(tmp_path, "annotations", 0, annotations, {"top_k": TOP_K}))
    np.testing.assert_array_equal(
        shard.columns["teacher_top_logprobs"][3], np.array([-1.0, -np.inf], np.float16)
    )


def test_the_same_content_is_the_same_file(tmp_path, samples):
    first = write_shard(tmp_path / "a", "samples", 3, samples, FACTS)
    as_lists = {
        name: [v.tolist() if isinstance(v, np.ndarray) else v for v in values]
        for name, values in samples.items()
    }
    again = write_shard(tmp_path / "b", "samples", 3, as_lists, dict(reversed(FACTS.items())))
    assert first.name == again.name
    assert first.read_bytes() == again.read_bytes()
    assert write_shard(tmp_path / "b", "samples", 4, samples, FACTS).name[17:] != first.name[17:]


def test_a_shard_takes_the_place_of_the_one_before(tmp_path, samples, annotations):
    old = write_shard(tmp_path, "samples", 3, samples, {})
    others = {
        write_shard(tmp_path, "samples", 30, samples, {}),
        write_shard(tmp_path, "annotations", 3, annotations, {"top_k": TOP_K}),
    }
    new = write_shard(tmp_path, "samples", 3, samples | {"sample_id": [5, 6, 7, 8]}, {})
    assert {*tmp_path.iterdir()} == {new, *others}
    assert old != new
    # Written once more, it stays.
    assert write_shard(tmp_path, "samples", 3, samples | {"sample_id": [5, 6, 7, 8]}, {}) == new
    assert {*tmp_path.iterdir()} == {new, *others}


def test_what_there_is_is_listed_by_number(tmp_path, samples):
    assert versions(tmp_path) == []
    assert shard_paths(version_directory(tmp_path, 40), "samples") == {}
    for version, number in ((40, 11), (40, 2), (0, 123_456_789)):
        write_shard(version_directory(tmp_path, version), "samples", number, samples, {})
    (tmp_path / "rollouts" / "notes").mkdir()
    directory = version_directory(tmp_path, 40)
    (directory / "samples-00000003.parquet").touch()
    assert versions(tmp_path) == [0, 40]
    assert list(shard_paths(directory, "samples")) == [2, 11]
    assert shard_paths(directory, "annotations") == {}
    assert list(shard_paths(version_directory(tmp_path, 0), "samples")) == [123_456_789]


def test_of_two_that_a_killed_writer_left_the_later_counts(tmp_path, samples):
    paths = []
    for sample_id in (0, 4):
        made = write_shard(
            tmp_path / f"{sample_id}",
            "samples",
            3,
            samples | {"sample_id": [sample_id + i for i in range(4)]},
            {},
        )
        paths.append(made.rename(tmp_path / made.name))
    for later in paths:
        os.utime(later, ns=(2 * 10**18, 2 * 10**18))
        assert shard_paths(tmp_path, "samples") == {3: later}
        os.utime(later, ns=(10**18, 10**18))


def test_columns_that_do_not_fit_are_refused(tmp_path, samples, annotations):
    def refused(stage, columns, facts, match):
        with pytest.raises(ValueError, match=match):
            write_shard(tmp_path, stage, 0, columns, facts)

    refused(
        "samples",
        {"tokens": []},
        {},
        r"columns of samples are \['tokens'\]; expected \['behavior_logprobs'",
    )
    refused(
        "samples",
        samples | {"step": [1]},
        {},
        "prompt_id expected length 1 but got length 4",
    )
    refused(
        "samples",
        samples | {"behavior_logprobs": [[0.0]] * 4},
        {},
        "behavior_logprobs of sample 0 has 1 values for 3 tokens",
    )
    refused(
        "samples",
        samples | {"prompt_id": [0, 0, 7, 2**31]},
        {},
        r"prompt_id holds values that are not int32: \[2147483648\]",
    )
    refused(
        "annotations",
        annotations,
        {"top_k": 3},
        "teacher_ids of sample 0 has 6 values for 3 tokens; expected 3 each",
    )
    refused("annotations", annotations, {}, "expected top_k")
    assert not [*tmp_path.iterdir()]


# Damage is told by name


@pytest.fixture
def shard(tmp_path, samples):
    return write_shard(tmp_path, "samples", 3, samples, FACTS)


def test_every_flipped_byte_is_found(shard, rng):
    whole = shard.read_bytes()
    for place in rng.choice(len(whole), 50, replace=False):
        shard.write_bytes(
            whole[:place] + bytes([whole[place] ^ (1 << rng.integers(8))]) + whole[place + 1 :]
        )
        with pytest.raises(
            ShardError,
            match=f"{shard} is truncated or corrupted: .* do not have the digest in its name; "
            "delete the file",
        ):
            read_shard(shard)


def test_every_truncation_is_found(shard, rng):
    whole = shard.read_bytes()
    for length in [0, len(whole) - 1, *rng.integers(0, len(whole), 20)]:
        shard.write_bytes(whole[:length])
        with pytest.raises(
            ShardError, match=f"{shard} is truncated or corrupted: its {length} bytes"
        ):
            read_shard(shard)


def rename_as_digest(path):
    """The file under the name that its bytes ask for, as a writer would give it."""
    return path.rename(
        path.with_name(
            f"samples-00000003.{shards_module.hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.parquet"
        )
    )


def test_a_foreign_file_is_no_shard(tmp_path, shard):
    renamed = shard.rename(tmp_path / shard.name.replace("00000003", "00000004"))
    with pytest.raises(ShardError, match="was written as samples 3 and renamed"):
        read_shard(renamed)
    with pytest.raises(
        ShardError, match="cannot be read: No such file or directory; it may be intact"
    ):
        read_shard(shard)
    foreign = tmp_path / "foreign"
    for content in (b"PAR1, it says", b""):
        foreign.write_bytes(content)
        with pytest.raises(ShardError, match="is no shard that opdjax wrote: Arrow"):
            read_shard(rename_as_digest(foreign))


def test_another_schema_is_named(tmp_path, samples, monkeypatch):
    monkeypatch.setattr(shards_module, "SCHEMA_VERSION", 9)
    path = write_shard(tmp_path, "samples", 3, samples, {})
    monkeypatch.undo()
    with pytest.raises(ShardError, match=r"is of schema 9; this version of opdjax reads schema 1"):
        read_shard(path)
    monkeypatch.setitem(
        shards_module.SCHEMAS,
        "samples",
        shards_module.SCHEMAS["samples"] | {"more": shards_module.ShardColumn("int32")},
    )
    path = write_shard(tmp_path, "samples", 3, samples | {"more": [1] * 4}, {})
    monkeypatch.undo()
    with pytest.raises(ShardError, match="has other columns or types than schema 1 of samples"):
        read_shard(path)


def test_a_column_with_too_many_values_is_not_written(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "_MAX_VALUES", 8)
    with pytest.raises(ValueError, match="tokens holds 9 values; expected at most 8"):
        write_shard(tmp_path / "other", "samples", 3, samples, {})
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [[1, 2, -3], [], [0] * 5, [4]]}, "tokens holds -3; expected 0 or more"),
        ({"prompt_id": [0, -1, 2, 3]}, "prompt_id holds -1; expected 0 or more"),
        ({"unfiltered_logprobs": [[0.0]] * 4}, "unfiltered_logprobs of sample 0 has 1 values"),
    ],
)
def test_content_that_does_not_fit_is_refused_when_read_as_when_written(
    change, message, samples, tmp_path, monkeypatch
):
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path, "samples", 3, samples | change, {})
    with monkeypatch.context() as patched:
        patched.setattr(shards_module, "_checked", lambda *_: None)
        path = write_shard(tmp_path, "samples", 3, samples | change, {})
    with pytest.raises(ShardError, match=f"{path}: {message}.*; delete the file"):
        read_shard(path)


# A writer that does not come to its end

WRITER = """
import os, pathlib, resource, signal, sys
from opdjax.rollouts.near_policy import shards
directory, how = pathlib.Path(sys.argv[1]), sys.argv[2]
def columns(count):
    lengths = {"sample": 0, "prompt": [1], "token": list(range(256))}
    schema = shards.SCHEMAS["samples"]
    return {name: [lengths[column.per]] * count for name, column in schema.items()}
sync = os.fsync
def stop(descriptor):
    print("written", flush=True)
    signal.pause()
if how == "killed":
    os.fsync = stop  # all bytes are in the draft, and it has not yet its name
if how == "limited":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
try:
    shards.write_shard(directory, "samples", 3, columns(100), {})
except shards.StorageError as error:
    print(type(error.__cause__).__name__, error.__cause__.errno, error)
"""


def start_writer(directory, how):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, directory, how], stdout=subprocess.PIPE, text=True
    )


def test_a_killed_writer_leaves_nothing_that_reads_and_the_next_cleans_up(tmp_path, samples):
    with start_writer(tmp_path, "killed") as writer:
        assert writer.stdout.readline() == "written\n"
        (draft,) = tmp_path.iterdir()
        assert draft.name.startswith("samples-00000003.")
        assert draft.name.endswith(".parquet.partial")
        assert shard_paths(tmp_path, "samples") == {}
        writer.kill()
    other = write_shard(tmp_path, "samples", 4, samples, {})
    assert {*tmp_path.iterdir()} == {draft, other}, "a draft of another number is not its to judge"
    path = write_shard(tmp_path, "samples", 3, samples, {})
    assert {*tmp_path.iterdir()} == {path, other}


def failure_of(directory, how):
    with start_writer(directory, how) as writer:
        return writer.communicate()[0]


def test_a_file_over_the_systems_limit_leaves_what_was_there(tmp_path, samples):
    before = write_shard(
        tmp_path, "samples", 3, {name: values[:1] for name, values in samples.items()}, {}
    )
    said = failure_of(tmp_path, "limited")
    assert said.startswith(f"OSError {errno.EFBIG} samples-00000003.")
    assert "could not be stored" in said
    expected = "everything stored before it is intact: make room there or repair that"
    assert f"File too large; {expected}" in said
    assert [*tmp_path.iterdir()] == [before]
    read_shard(before)


@pytest.fixture
def tiny_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16k", "none", place],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("this machine has no mount command")
    if done.returncode:
        pytest.skip(f"this machine does not let tests mount a disk: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_leaves_what_was_there(tiny_disk, samples):
    one = {name: values[:1] for name, values in samples.items()}
    before = write_shard(tiny_disk, "samples", 3, one, {})
    fill = tiny_disk / "other"
    with pytest.raises(OSError, match="No space left"):
        fill.write_bytes(bytes(2**20))
    said = failure_of(tiny_disk, "plain")
    assert said.startswith(f"OSError {errno.ENOSPC} samples-00000003.")
    assert (
        "No space left on device; everything stored before it is intact: make room there or "
        "repair that, and run the same command again" in said
    )
    assert {*tiny_disk.iterdir()} == {before, fill}
    read_shard(before)
    fill.unlink()
    assert failure_of(tiny_disk, "plain") == ""
    assert len(read_shard(shard_paths(tiny_disk, "samples")[3])) == 100


def test_a_place_that_takes_no_files_is_named(tmp_path, samples):
    (tmp_path / "file").touch()
    with pytest.raises(
        StorageError,
        match="samples-00000003.* could not be stored in .*/file: .*: make room",
    ):
        write_shard(tmp_path / "file", "samples", 3, samples, {})


# The filter's document


def test_a_filter_comes_back_and_its_damage_is_named(tmp_path, monkeypatch):
    document = dict.fromkeys(("version", "number", "num_samples", "num_kept"), 2)
    document |= dict.fromkeys(("num_degenerate", "num_disconnected", "num_unscored"), 0)
    document |= {"filter": "ifd", "examples": {"kept": ["né"]}, "kept": [1, 1], "ifd_max": None}
    document["histogram"] = {"edges": [], "counts": []}
    path = write_filter(tmp_path, 12, document)
    assert path.name == "filter-00000012.json"
    assert read_filter(path) == document
    with monkeypatch.context() as patched:
        patched.setattr("opdjax.runs.results._MAX_FILTER_BYTES", 100)
        with pytest.raises(WorkdirError, match=f"{path} has more than 100 bytes; delete it"):
            read_filter(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(WorkdirError, match=f"{path} cannot be read as JSON.*; delete it"):
        read_filter(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_filter(tmp_path, 12, {"delta": float("nan")})
    assert [*tmp_path.iterdir()] == [path]


def test_without_pyarrow_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, shards_module.__name__)
    with pytest.raises(
        ImportError, match=r"stored rollouts need pyarrow: pip install 'opdjax\[data\]'"
    ):
        importlib.import_module(shards_module.__name__)
