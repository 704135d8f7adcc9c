"""Rollouts on disk: Parquet shards, written atomically, with a checksum in their name. No jax.

`WORKDIR/rollouts/VERSION/` (VERSION: updates of the weights that sampled) holds
`STAGE-NUMBER.DIGEST.parquet` and `filter-NUMBER.json`. DIGEST is the start of the file's sha256, so
a damaged shard is always noticed.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import itertools
import json
import os
import pathlib
import platform
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from opdjax.config.validation import MissingExtraError
from opdjax.runs.workdir import read_json


@dataclasses.dataclass(frozen=True)
class ShardColumn:
    """A column of a shard: one value per sample, or a list of values."""

    type: Literal["int32", "bool", "float16", "float32", "float64"]
    meaning: str
    # sample: one value per sample. Any other name: one list per sample; all columns of that name
    # have lists of the same length. top: top_k values per token.
    per: Literal["sample", "prompt", "token", "top"] = "sample"
    is_nullable: bool = False  # null means not computed, and is read as NaN


_WHICH = {
    "prompt_id": ShardColumn("int32", "index into the prompts"),
    "sample_id": ShardColumn("int32", "which of the prompt's samples"),
    "policy_version": ShardColumn("int32", "updates of the weights that sampled it"),
}
# Log-probabilities are in nats. A mean NLL is in nats per token, over the whole completion, at
# temperature 1 and without filters.
SCHEMAS: dict[str, dict[str, ShardColumn]] = {
    "samples": {
        "step": ShardColumn(
            "int32", "the update it was sampled for; in schedule refresh the version"
        ),
        **_WHICH,
        "is_truncated": ShardColumn("bool", "reached the maximum length without a stop token"),
        "prompt_tokens": ShardColumn("int32", "the prompt as the student reads it", "prompt"),
        "tokens": ShardColumn("int32", "the completion, including its stop token", "token"),
        "behavior_logprobs": ShardColumn(
            "float32", "of the distribution sampled from, temperature and filters included", "token"
        ),
        "unfiltered_logprobs": ShardColumn(
            "float32", "of the student at the sampling temperature, without filters", "token"
        ),
        "student_nll": ShardColumn(
            "float64", "the student's mean NLL of the completion given the prompt", is_nullable=True
        ),
        "student_alone_nll": ShardColumn(
            "float64",
            "the student's mean NLL of the completion without the prompt",
            is_nullable=True,
        ),
    },
    "annotations": {
        **_WHICH,
        "teacher_logprobs": ShardColumn(
            "float32",
            "of the completion's tokens, by the teacher's full softmax at the sampling temperature",
            "token",
        ),
        "teacher_ids": ShardColumn(
            "int32", "the teacher's top_k likeliest ids at each token, likeliest first", "top"
        ),
        "teacher_top_logprobs": ShardColumn(
            "float16", "of teacher_ids, by the same softmax", "top"
        ),
        "teacher_nll": ShardColumn(
            "float64", "the teacher's mean NLL of the completion given the prompt", is_nullable=True
        ),
        "teacher_alone_nll": ShardColumn(
            "float64",
            "the teacher's mean NLL of the completion without the prompt",
            is_nullable=True,
        ),
    },
}
SCHEMA_VERSION = 1  # increases with every change of what is stored
_NAME = re.compile(rf"({'|'.join(SCHEMAS)})-(\d{{8,}})\.([0-9a-f]{{16}})\.parquet")
# Key of the file's metadata that holds the facts, as one JSON object that keeps their types.
_KEY = b"opdjax"
_MAGIC = b"PAR1"  # first and last bytes of every Parquet file
_REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room within your quota there",
    errno.EFBIG: "let files grow larger (ulimit -f)",
}
# Seconds after which another machine's partial file counts as abandoned: whether its writer is
# alive cannot be checked, and no write takes that long.
_ABANDONED_AFTER = 3600.0


class ShardError(ValueError):
    """A shard is missing, truncated, corrupted, renamed, or of another schema."""


class DamagedShardError(ShardError):
    """The bytes of a shard are not those that were written; it can be replaced by a new one."""


class MissingShardError(ShardError):
    """A shard that was stored before is missing."""


class StorageError(OSError):
    """A file cannot be stored: full disk, quota, size limit, or read-only directory."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """The content of one file, in SCHEMAS' types. A column of one value per sample is an array, a
    column of lists is a list of arrays.
    """

    columns: dict[str, np.ndarray | list[np.ndarray]]
    facts: dict[str, str | int]  # those of the writer, and `schema`, `stage` and `number`
    path: pathlib.Path

    def __len__(self) -> int:
        return len(self.columns["sample_id"])


def version_directory(workdir: pathlib.Path, version: int) -> pathlib.Path:
    """The directory of the rollouts of one version; it need not exist."""
    return workdir / "rollouts" / f"{version:08}"


def versions(workdir: pathlib.Path) -> list[int]:
    """The versions that have a directory, in ascending order."""
    return sorted(
        int(path.name)
        for path in (workdir / "rollouts").glob("[0-9]*")
        if re.fullmatch(r"\d{8,}", path.name)
    )


def shard_paths(directory: pathlib.Path, stage: str) -> dict[int, pathlib.Path]:
    """number -> file of one stage, sorted by number. The files are not read or checked."""
    found: dict[int, pathlib.Path] = {}
    for path in directory.glob(f"{stage}-*.parquet"):
        if match := _NAME.fullmatch(path.name):
            other = found.setdefault(int(match[2]), path)
            # A writer that is killed before it deletes the replaced shard leaves two: the later one
            # counts.
            found[int(match[2])] = max(other, path, key=_written)
    return dict(sorted(found.items()))


def _written(path: pathlib.Path) -> tuple[int, str]:
    try:
        return path.stat().st_mtime_ns, path.name
    except FileNotFoundError:  # replaced meanwhile
        return 0, path.name


def write_shard(
    directory: pathlib.Path,
    stage: str,
    number: int,
    columns: Mapping[str, Sequence],
    facts: Mapping[str, str | int],
) -> pathlib.Path:
    """Write a shard atomically, in place of an earlier one of that stage and number. The same
    content gives the same bytes.

    `columns` are those of SCHEMAS[stage]; None and NaN in a nullable one become null. `facts` of
    annotations contain `top_k`. ValueError if columns do not fit the schema or each other;
    StorageError if the file cannot be stored.
    """
    data = _serialised(stage, number, columns, facts)
    name = f"{stage}-{number:08}.{hashlib.sha256(data).hexdigest()[:16]}.parquet"
    path = write_whole(directory / name, data)
    for other in directory.glob(f"{stage}-{number:08}.*.parquet"):
        if other != path:
            other.unlink(missing_ok=True)
    return path


def read_shard(path: pathlib.Path) -> Shard:
    """Read a shard and check its digest and schema. Its arrays are views of one buffer if Arrow
    allows it, and may be read-only.

    ShardError, with what is wrong and what to do, if the file is not the one that was written.
    """
    match = _NAME.fullmatch(path.name)
    if not match:
        raise ShardError(
            f"{path} does not have the name of a shard; expected {' or '.join(SCHEMAS)}"
            "-NUMBER.DIGEST.parquet"
        )
    stage, number, digest = match[1], int(match[2]), match[3]
    advice = "delete the file, and the command that wrote it writes it again"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardError(
            f"{path} cannot be read: {error.strerror}; it may be intact: repair its storage and "
            "run the command again"
        ) from error
    if hashlib.sha256(data).hexdigest()[:16] != digest:
        found = "corrupted" if data.endswith(_MAGIC) else "truncated, or corrupted at its end"
        raise DamagedShardError(
            f"{path} is {found}: its {len(data)} bytes do not have the digest in its name; {advice}"
        )
    table, facts = _parsed(path, data)
    if facts.get("schema") != SCHEMA_VERSION:
        raise ShardError(
            f"{path} is of schema {facts.get('schema')}; this version of opdjax reads schema "
            f"{SCHEMA_VERSION}; read it with the version that wrote it, or {advice}"
        )
    if (facts.get("stage"), facts.get("number")) != (stage, number):
        raise ShardError(
            f"{path} was written as {facts.get('stage')} {facts.get('number')} and renamed; "
            "restore its name"
        )
    if not table.schema.equals(_arrow_schema(stage)):
        raise ShardError(
            f"{path} has other columns or types than schema {SCHEMA_VERSION} of {stage}; {advice}"
        )
    read = {name: _values(table[name], column) for name, column in SCHEMAS[stage].items()}
    return Shard(read, facts, path)


def write_filter(directory: pathlib.Path, number: int, document: Mapping[str, Any]) -> pathlib.Path:
    """Write the decision of a filter atomically; StorageError if the file cannot be stored."""
    return write_whole(
        directory / _filter_name(number), (json.dumps(document, allow_nan=False) + "\n").encode()
    )


def read_filter(directory: pathlib.Path, number: int) -> dict[str, Any]:
    """The decision of a filter; WorkdirError if the file is missing or damaged."""
    return read_json(
        directory / _filter_name(number), "delete it: it is computed from the shards beside it"
    )


def filters(directory: pathlib.Path) -> list[int]:
    """The numbers of the filter documents in a directory, in ascending order."""
    found = (
        re.fullmatch(r"filter-(\d{8,})\.json", path.name)
        for path in directory.glob("filter-*.json")
    )
    return sorted(int(match[1]) for match in found if match)


def _filter_name(number: int) -> str:
    return f"filter-{number:08}.json"


# Whole files


def write_whole(path: pathlib.Path, data: bytes) -> pathlib.Path:
    """Write a file atomically: it appears under its name only when all its bytes are on the disk.
    StorageError if it cannot be stored.
    """
    partial = path.with_name(f"{path.name}.partial-{platform.node()}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)  # there is one only after an error
        _sync_directory(path.parent)
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "repair that")
        raise StorageError(
            f"{path.name} ({len(data)} bytes) could not be stored in {path.parent}: "
            f"{error.strerror}; everything stored before it is intact: {remedy} and run the same "
            "command again"
        ) from error
    return path


def _sync_directory(directory: pathlib.Path) -> None:
    """A rename survives a loss of power only when the directory is on the disk too."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(path: pathlib.Path) -> None:
    """Delete partial files of the same stage and number whose writers were killed."""
    for partial in path.parent.glob(f"{path.name.split('.')[0]}.*.partial-*"):
        _, _, writer = partial.name.rpartition(".partial-")
        node, _, process = writer.rpartition("-")
        try:
            age = time.time() - partial.stat().st_mtime
        except FileNotFoundError:  # finished meanwhile
            continue
        if age > _ABANDONED_AFTER or (node == platform.node() and not _is_another_alive(process)):
            partial.unlink(missing_ok=True)


def _is_another_alive(process: str) -> bool:
    """Whether another process with this id is alive. This process writes one file at a time, so a
    partial file with its own id is an earlier process's.
    """
    if not process.isdecimal() or int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# Columns and bytes


def require_pyarrow() -> Any:
    """Import pyarrow; MissingExtraError, with how to install it, if it is missing. Call it before
    anything is sampled.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(
            "stored rollouts need pyarrow: pip install 'opdjax[data]'"
        ) from error
    return pyarrow


def _arrow_schema(stage: str) -> Any:
    pa = require_pyarrow()
    types = {name: pa.type_for_alias(column.type) for name, column in SCHEMAS[stage].items()}
    is_list = {name: column.per != "sample" for name, column in SCHEMAS[stage].items()}
    return pa.schema(
        [
            (name, pa.list_(pa.field("element", of)) if is_list[name] else of)
            for name, of in types.items()
        ]
    )


def _serialised(
    stage: str, number: int, columns: Mapping[str, Sequence], facts: Mapping[str, str | int]
) -> bytes:
    pa = require_pyarrow()
    schema = _arrow_schema(stage)
    _require_fit(stage, columns, facts)
    arrays = [_array(columns[name], column, name) for name, column in SCHEMAS[stage].items()]
    note = {**facts, "schema": SCHEMA_VERSION, "stage": stage, "number": number}
    table = pa.Table.from_arrays(
        arrays, schema=schema.with_metadata({_KEY: json.dumps(note, sort_keys=True)})
    )
    floats = [
        f"{name}.list.element"
        for name, column in SCHEMAS[stage].items()
        if column.type in ("float16", "float32")
    ]
    others = [
        name + (".list.element" if column.per != "sample" else "")
        for name, column in SCHEMAS[stage].items()
    ]
    file = io.BytesIO()
    # Log-probs hardly repeat: they compress well if bytes of equal significance are adjacent, and
    # a dictionary only adds bytes.
    pa.parquet.write_table(
        table,
        file,
        compression="zstd",
        use_byte_stream_split=floats,
        use_dictionary=[name for name in others if name not in floats],
        row_group_size=max(1, table.num_rows),
    )
    return file.getvalue()


def _require_fit(
    stage: str, columns: Mapping[str, Sequence], facts: Mapping[str, str | int]
) -> None:
    """ValueError unless the columns are those of the schema, have the same number of samples, and
    their lists have matching lengths.
    """
    expected = SCHEMAS[stage]
    if columns.keys() != expected.keys():
        raise ValueError(f"columns of {stage} are {sorted(columns)}; expected {sorted(expected)}")
    counts = {name: len(values) for name, values in columns.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"columns of {stage} hold {counts} samples; expected equal numbers")
    if stage == "annotations" and not isinstance(facts.get("top_k"), int):
        raise ValueError(
            f"facts of annotations are {dict(facts)}; expected top_k, the ids per token"
        )
    per_token = {"token": 1, "top": facts.get("top_k")}
    of_token = next(name for name, column in expected.items() if column.per == "token")
    lengths = [len(row) for row in columns[of_token]]
    for name, column in expected.items():
        found = [len(row) for row in columns[name]] if column.per in per_token else []
        for i, (length, tokens) in enumerate(zip(found, lengths)):
            if length != per_token[column.per] * tokens:
                raise ValueError(
                    f"{name} of sample {i} has {length} values for {tokens} tokens; expected "
                    f"{per_token[column.per]} each"
                )


def _array(values: Sequence, column: ShardColumn, name: str) -> Any:
    """The column for Arrow; ValueError if a value does not fit its type."""
    pa = require_pyarrow()
    if column.per == "sample":
        cast = _cast(values, column.type, name)
        return pa.array(cast, mask=np.isnan(cast) if column.is_nullable else None)
    rows = [_cast(row, column.type, name) for row in values]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    flat = np.concatenate([*rows, np.zeros(0, column.type)])
    if offsets[-1] >= 2**31:
        raise ValueError(
            f"{name} holds {offsets[-1]} values, but a shard holds less than 2**31: store fewer "
            "samples in one"
        )
    of = pa.field("element", pa.type_for_alias(column.type))
    return pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32)), pa.array(flat), type=pa.list_(of)
    )


def _cast(values: Any, type: str, name: str) -> np.ndarray:
    given = np.asarray(values)
    with np.errstate(over="ignore"):  # below float16's range a log-prob becomes -inf
        cast = given.astype(type)
    if type in ("int32", "bool") and not np.array_equal(cast, given):
        raise ValueError(
            f"{name} holds values that are not {type}: {given[cast != given][:3].tolist()}"
        )
    return cast


def _parsed(path: pathlib.Path, data: bytes) -> tuple[Any, dict[str, Any]]:
    pa = require_pyarrow()
    try:
        # Not read_table: its scanner starts threads, and a python that exits meanwhile aborts.
        table = pa.parquet.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        facts = json.loads((table.schema.metadata or {})[_KEY])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DamagedShardError(
            f"{path} is no shard that opdjax wrote: {type(error).__name__}: {error}; delete it"
        ) from error
    return table, facts


def _values(values: Any, column: ShardColumn) -> np.ndarray | list[np.ndarray]:
    """A column as arrays; lists are views of one buffer."""
    array = values.combine_chunks()
    if column.per == "sample":
        return array.to_numpy(zero_copy_only=False)
    flat = array.values.to_numpy()
    return [flat[start:end] for start, end in itertools.pairwise(array.offsets.to_pylist())]
