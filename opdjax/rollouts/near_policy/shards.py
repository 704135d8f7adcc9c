"""Rollouts on disk, written atomically. `WORKDIR/rollouts/VERSION/` (VERSION: updates of the
weights that sampled) holds `STAGE-NUMBER.DIGEST.parquet` and `filter-NUMBER.json`. DIGEST is the
start of the file's sha256, so a damaged shard is always noticed. No jax.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from opdjax.config.validation import MissingExtraError

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise MissingExtraError("stored rollouts need pyarrow: pip install 'opdjax[data]'") from error


@dataclasses.dataclass(frozen=True)
class ShardColumn:
    """A column of a shard: one value per sample, or a list of values."""

    type: Literal["int32", "bool", "float16", "float32", "float64"]
    # sample: one value per sample. Any other name: one list per sample; all columns of that name
    # have lists of the same length. top: top_k values per token.
    per: Literal["sample", "prompt", "token", "top"] = "sample"
    is_nullable: bool = False  # null means not computed, and is read as NaN


_ID, _NLL = ShardColumn("int32"), ShardColumn("float64", "sample", True)
_WHICH = {"prompt_id": _ID, "sample_id": _ID, "policy_version": _ID}
# Log-probs are in nats. A mean NLL is in nats per token, over the whole completion, at temperature
# 1 and without filters; `alone`: without the prompt.
SCHEMAS: dict[str, dict[str, ShardColumn]] = {
    "samples": {
        "step": _ID,  # the update it was sampled for; under refresh the version
        **_WHICH,
        "is_truncated": ShardColumn("bool"),
        "prompt_tokens": ShardColumn("int32", "prompt"),  # as the student reads it
        "tokens": ShardColumn("int32", "token"),  # the completion, including its stop token
        "behavior_logprobs": ShardColumn("float32", "token"),
        "unfiltered_logprobs": ShardColumn("float32", "token"),
        "student_nll": _NLL,
        "student_alone_nll": _NLL,
    },
    "annotations": {
        **_WHICH,
        # By the teacher's full softmax at the sampling temperature, as for its likeliest ids.
        "teacher_logprobs": ShardColumn("float32", "token"),
        "teacher_ids": ShardColumn("int32", "top"),  # the likeliest first
        "teacher_top_logprobs": ShardColumn("float16", "top"),
        "teacher_nll": _NLL,
        "teacher_alone_nll": _NLL,
    },
}
SCHEMA_VERSION = 1  # increases with every change of what is stored
_MAX_VALUES = 2**31 - 1  # of a column: Arrow's offsets are int32
_NAME = re.compile(rf"({'|'.join(SCHEMAS)})-(\d{{8,}})\.([0-9a-f]{{16}})\.parquet")
# Key of the file's metadata that holds the facts, as one JSON object that keeps their types.
_KEY = b"opdjax"
_ADVICE = "delete the file, and the command that wrote it writes it again"


class ShardError(ValueError):
    """A shard is missing, truncated, corrupted, renamed, or of another schema."""


class LostShardError(ShardError):
    """A stored shard is missing, or its bytes are not those that were written."""


class StorageError(OSError):
    """A file cannot be stored: full disk, quota, size limit, or read-only directory."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """The content of one file, in SCHEMAS' types; a column of lists is a list of arrays."""

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
    return sorted(int(path.name) for path in (workdir / "rollouts").glob("[0-9]" * 8))


def shard_paths(directory: pathlib.Path, stage: str) -> dict[int, pathlib.Path]:
    """number -> file of one stage, sorted by number. The files are not read or checked."""
    # A writer that is killed before it deletes the replaced shard leaves two: the later one counts.
    paths = sorted(directory.glob(f"{stage}-*.parquet"), key=_written)
    found = [(match, path) for path in paths if (match := _NAME.fullmatch(path.name))]
    return dict(sorted({int(match[2]): path for match, path in found}.items()))


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
    expected = SCHEMAS[stage]
    if columns.keys() != expected.keys():
        raise ValueError(f"columns of {stage} are {sorted(columns)}; expected {sorted(expected)}")
    note = {**facts, "schema": SCHEMA_VERSION, "stage": stage, "number": number}
    schema = _arrow_schema(stage).with_metadata({_KEY: json.dumps(note, sort_keys=True)})
    arrays = [_array(columns[name], column, name) for name, column in expected.items()]
    table = pa.Table.from_arrays(arrays, schema=schema)
    _checked(stage, table, facts)
    leaves = {
        name + (".list.element" if column.per != "sample" else ""): column.type
        for name, column in expected.items()
    }
    floats = [leaf for leaf, type in leaves.items() if type in ("float16", "float32")]
    file = io.BytesIO()
    # Log-probs hardly repeat: they compress well if bytes of equal significance are adjacent, and
    # a dictionary only adds bytes.
    pq.write_table(
        table,
        file,
        compression="zstd",
        use_byte_stream_split=floats,
        use_dictionary=[leaf for leaf in leaves if leaf not in floats],
        row_group_size=max(1, table.num_rows),
    )
    data = file.getvalue()
    name = f"{stage}-{number:08}.{hashlib.sha256(data).hexdigest()[:16]}.parquet"
    path = write_whole(directory / name, data)
    for other in directory.glob(f"{stage}-{number:08}.*.parquet"):
        if other != path:
            other.unlink(missing_ok=True)
    return path


def read_shard(path: pathlib.Path) -> Shard:
    """Read a shard and check its size, digest, schema, list lengths and ids. Its arrays are views
    of one buffer if Arrow allows it, and may be read-only.

    ShardError, with what is wrong and what to do, if the file is not the one that was written.
    """
    match = _NAME.fullmatch(path.name)
    stage, number, data = match[1], int(match[2]), _read_bytes(path, match[3])
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        facts = dict(json.loads(file.schema_arrow.metadata[_KEY]))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise LostShardError(
            f"{path} is no shard that opdjax wrote: {type(error).__name__}: {error}; delete it"
        ) from error
    if facts.get("schema") != SCHEMA_VERSION:
        raise ShardError(
            f"{path} is of schema {facts.get('schema')}; this version of opdjax reads schema "
            f"{SCHEMA_VERSION}; read it with the version that wrote it, or {_ADVICE}"
        )
    if (facts.get("stage"), facts.get("number")) != (stage, number):
        raise ShardError(
            f"{path} was written as {facts.get('stage')} {facts.get('number')} and renamed; "
            "restore its name"
        )
    try:
        # Not read_table: its scanner starts threads, and a python that exits meanwhile aborts.
        columns = _checked(stage, file.read(use_threads=False), facts)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ShardError(f"{path}: {error}; {_ADVICE}") from error
    return Shard(columns, facts, path)


def write_filter(directory: pathlib.Path, number: int, document: Mapping[str, Any]) -> pathlib.Path:
    """Write the decision of a filter atomically; StorageError if the file cannot be stored."""
    data = (json.dumps(document, allow_nan=False) + "\n").encode()
    return write_whole(directory / f"filter-{number:08}.json", data)


# Whole files


def write_whole(path: pathlib.Path, data: bytes) -> pathlib.Path:
    """Write a file atomically: it appears under its name only when all its bytes are on the disk.
    StorageError if it cannot be stored. The caller is the only writer of its stage and number.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for abandoned in path.parent.glob(f"{path.name.split('.')[0]}.*.partial*"):
            abandoned.unlink(missing_ok=True)  # of a writer that was killed
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)  # there is one only after an error
        # The new name survives a loss of power only when the directory is on the disk too.
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(
            f"{path.name} ({len(data)} bytes) could not be stored in {path.parent}: "
            f"{error.strerror}; everything stored before it is intact: make room there or repair "
            "that, and run the same command again"
        ) from error
    return path


# Columns and bytes


def _arrow_schema(stage: str) -> pa.Schema:
    fields = []
    for name, column in SCHEMAS[stage].items():
        of = pa.type_for_alias(column.type)
        fields.append((name, of if column.per == "sample" else pa.list_(pa.field("element", of))))
    return pa.schema(fields)


def _array(values: Sequence, column: ShardColumn, name: str) -> pa.Array:
    """The column for Arrow; ValueError if a value does not fit its type."""
    rows = [values] if column.per == "sample" else values
    flat = np.concatenate([np.zeros(0, column.type), *map(np.asarray, rows)])
    with np.errstate(over="ignore"):  # below float16's range a log-prob becomes -inf
        cast = flat.astype(column.type)
    if column.type in ("int32", "bool") and not np.array_equal(cast, flat):
        raise ValueError(
            f"{name} holds values that are not {column.type}: {flat[cast != flat][:3].tolist()}"
        )
    if len(flat) > _MAX_VALUES:
        raise ValueError(f"{name} holds {len(flat)} values; expected at most {_MAX_VALUES}")
    array = pa.array(cast, from_pandas=column.is_nullable)
    if column.per == "sample":
        return array
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    of = pa.list_(pa.field("element", array.type))
    return pa.ListArray.from_arrays(pa.array(offsets), array, type=of)


def _checked(
    stage: str, table: pa.Table, facts: Mapping[str, Any]
) -> dict[str, np.ndarray | list[np.ndarray]]:
    """The columns as arrays, lists as views of one buffer; ValueError if they do not fit."""
    if not table.schema.equals(_arrow_schema(stage)):
        raise ValueError(f"it has other columns or types than schema {SCHEMA_VERSION} of {stage}")
    if stage == "annotations" and not isinstance(facts.get("top_k"), int):
        raise ValueError(
            f"facts of annotations are {dict(facts)}; expected top_k, the ids per token"
        )
    per_token, num_tokens = {"token": 1, "top": facts.get("top_k")}, None
    found = {}
    for name, column in SCHEMAS[stage].items():
        array = table[name].combine_chunks()
        values = array if column.per == "sample" else array.values
        if array.null_count + values.null_count and not column.is_nullable:
            raise ValueError(f"{name} holds nulls; expected none")
        flat = found[name] = values.to_numpy(zero_copy_only=False)
        if column.type == "int32" and flat.min(initial=0) < 0:
            raise ValueError(f"{name} holds {flat.min()}; expected 0 or more")
        if column.per == "sample":
            continue
        offsets = array.offsets.to_pylist()
        found[name] = [flat[start:end] for start, end in itertools.pairwise(offsets)]
        if column.per not in per_token:
            continue
        lengths = np.diff(offsets)
        num_tokens = lengths if num_tokens is None else num_tokens
        each = per_token[column.per]
        for i in np.flatnonzero(lengths != each * num_tokens)[:1]:
            raise ValueError(
                f"{name} of sample {i} has {lengths[i]} values for {num_tokens[i]} tokens; "
                f"expected {each} each"
            )
    return found


def _read_bytes(path: pathlib.Path, digest: str) -> bytes:
    """The bytes of a file of this digest, read and hashed once."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardError(
            f"{path} cannot be read: {error.strerror}; it may be intact: repair its storage and "
            "run the command again"
        ) from error
    if hashlib.sha256(data).hexdigest()[:16] != digest:
        raise LostShardError(
            f"{path} is truncated or corrupted: its {len(data)} bytes do not have the digest in "
            f"its name; {_ADVICE}"
        )
    return data
