"""Rollouts on disk: Parquet shards that are whole or not there, and that tell damage by their name.
No jax.

`WORKDIR/rollouts/VERSION/` (VERSION: updates of the weights that drew) holds
`STAGE-NUMBER.DIGEST.parquet` and `filter-NUMBER.json`. DIGEST is the head of the file's sha256, so
no shard is read that is not the one that was written.
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
    """A column of a shard: one value a sample, or a list of them."""

    type: Literal["int32", "bool", "float16", "float32", "float64"]
    meaning: str
    # samples: one value each. Any other name: a list each, of one length in all columns of that
    # name; `top`: top_k to a token
    per: Literal["sample", "prompt", "token", "top"] = "sample"
    is_nullable: bool = False  # null, which is read as NaN: not computed


_WHICH = {
    "prompt_id": ShardColumn("int32", "index into the prompts"),
    "sample_id": ShardColumn("int32", "which of the prompt's samples"),
    "policy_version": ShardColumn("int32", "updates of the weights that drew it"),
}
# Log-probabilities are in nats; a mean NLL is in nats a token, at temperature 1 and without
# filters, over the whole completion.
SCHEMAS: dict[str, dict[str, ShardColumn]] = {
    "samples": {
        "step": ShardColumn(
            "int32", "the update it was drawn for; in schedule refresh the version"
        ),
        **_WHICH,
        "is_truncated": ShardColumn("bool", "the length ran out before a stop token"),
        "prompt_tokens": ShardColumn("int32", "the prompt as the student reads it", "prompt"),
        "tokens": ShardColumn("int32", "the completion, its stop token included", "token"),
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
SCHEMA_VERSION = 1  # rises with every change of SCHEMAS that changes what is stored
_NAME = re.compile(rf"({'|'.join(SCHEMAS)})-(\d{{8,}})\.([0-9a-f]{{16}})\.parquet")
# of the file's key-value metadata; holds the facts as one JSON object, so that they keep their
# types
_KEY = b"opdjax"
_MAGIC = b"PAR1"  # opens and ends every Parquet file
_REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room within your quota there",
    errno.EFBIG: "let files grow larger (ulimit -f) or store fewer rollouts in one (near_policy.shard_size)",
}
# seconds; another machine's processes cannot be asked whether they live, and no write takes as long
_ABANDONED_AFTER = 3600.0


class ShardError(ValueError):
    """A shard is not what was written: missing, cut off, corrupted, renamed, or of another schema."""


class DamagedShardError(ShardError):
    """The bytes of a shard are not those that were written: what its inputs make again may take its
    place.
    """


class MissingShardError(ShardError):
    """A shard that had been stored is not there."""


class StorageError(OSError):
    """The system does not take what is to be stored: a full disk, a quota, a limit, a read-only
    place.
    """


@dataclasses.dataclass(frozen=True)
class Shard:
    """What one file holds. A column of one value a sample is an array, one of lists a list of
    arrays, in SCHEMAS' types.
    """

    columns: dict[str, np.ndarray | list[np.ndarray]]
    facts: dict[str, str | int]  # what the writer noted, and `schema`, `stage` and `number`
    path: pathlib.Path

    def __len__(self) -> int:
        return len(self.columns["sample_id"])


def version_directory(workdir: pathlib.Path, version: int) -> pathlib.Path:
    """Where the rollouts of one version of the weights lie; it need not exist."""
    return workdir / "rollouts" / f"{version:08}"


def versions(workdir: pathlib.Path) -> list[int]:
    """The versions that have a directory, rising."""
    return sorted(
        int(path.name)
        for path in (workdir / "rollouts").glob("[0-9]*")
        if re.fullmatch(r"\d{8,}", path.name)
    )


def shard_paths(directory: pathlib.Path, stage: str) -> dict[int, pathlib.Path]:
    """number -> file of one stage, numbers rising; unread, so any of them may be damaged."""
    found: dict[int, pathlib.Path] = {}
    for path in directory.glob(f"{stage}-*.parquet"):
        if match := _NAME.fullmatch(path.name):
            other = found.setdefault(int(match[2]), path)
            # A writer that was killed before it removed the shard that it replaced leaves two: the
            # later one counts.
            found[int(match[2])] = max(other, path, key=_written)
    return dict(sorted(found.items()))


def _written(path: pathlib.Path) -> tuple[int, str]:
    try:
        return path.stat().st_mtime_ns, path.name
    except FileNotFoundError:  # just replaced
        return 0, path.name


def write_shard(
    directory: pathlib.Path,
    stage: str,
    number: int,
    columns: Mapping[str, Sequence],
    facts: Mapping[str, str | int],
) -> pathlib.Path:
    """Write a shard whole or not at all, in the place of an earlier one of that stage and number;
    the same content gives the same bytes.

    `columns` are those of SCHEMAS[stage]; of a nullable one None and NaN are null. `facts` of
    annotations hold `top_k`. ValueError where columns do not fit the schema or each other;
    StorageError where the system does not take the file.
    """
    data = _serialised(stage, number, columns, facts)
    name = f"{stage}-{number:08}.{hashlib.sha256(data).hexdigest()[:16]}.parquet"
    path = write_whole(directory / name, data)
    for other in directory.glob(f"{stage}-{number:08}.*.parquet"):
        if other != path:
            other.unlink(missing_ok=True)
    return path


def read_shard(path: pathlib.Path) -> Shard:
    """A shard as it was written; its arrays are views of one buffer where Arrow allows it, and may
    be read-only.

    ShardError where the file is not what was written, with what it is and what to do.
    """
    match = _NAME.fullmatch(path.name)
    if not match:
        raise ShardError(
            f"{path} has not the name of a shard; expected {' or '.join(SCHEMAS)}-NUMBER.DIGEST.parquet"
        )
    stage, number, digest = match[1], int(match[2]), match[3]
    advice = "remove the file, and the command that wrote it writes it again"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardError(
            f"{path} cannot be read: {error.strerror}; it may be whole: see to its storage and run the command again"
        ) from error
    if hashlib.sha256(data).hexdigest()[:16] != digest:
        found = "corrupted" if data.endswith(_MAGIC) else "truncated, or corrupted at its end"
        raise DamagedShardError(
            f"{path} is {found}: its {len(data)} bytes have another digest than its name says; {advice}"
        )
    table, facts = _parsed(path, data)
    if facts.get("schema") != SCHEMA_VERSION:
        expected = f"this version of opdjax reads schema {SCHEMA_VERSION}; read it with the one that wrote it, or {advice}"
        raise ShardError(f"{path} is of schema {facts.get('schema')}; {expected}")
    if (facts.get("stage"), facts.get("number")) != (stage, number):
        raise ShardError(
            f"{path} was written as {facts.get('stage')} {facts.get('number')} and renamed; give it its name back"
        )
    if not table.schema.equals(_arrow_schema(stage)):
        raise ShardError(
            f"{path} has other columns or types than schema {SCHEMA_VERSION} of {stage}; {advice}"
        )
    read = {name: _values(table[name], column) for name, column in SCHEMAS[stage].items()}
    return Shard(read, facts, path)


def write_filter(directory: pathlib.Path, number: int, document: Mapping[str, Any]) -> pathlib.Path:
    """Write which samples are kept, whole or not at all; StorageError where the system does not
    take the file.
    """
    return write_whole(
        directory / _filter_name(number), (json.dumps(document, allow_nan=False) + "\n").encode()
    )


def read_filter(directory: pathlib.Path, number: int) -> dict[str, Any]:
    """What `write_filter` wrote; WorkdirError where it is missing or damaged."""
    return read_json(
        directory / _filter_name(number), "remove it: it follows from the shards beside it"
    )


def filters(directory: pathlib.Path) -> list[int]:
    """The numbers of the filter documents of a version, rising."""
    found = (
        re.fullmatch(r"filter-(\d{8,})\.json", path.name)
        for path in directory.glob("filter-*.json")
    )
    return sorted(int(match[1]) for match in found if match)


def _filter_name(number: int) -> str:
    return f"filter-{number:08}.json"


# Whole files


def write_whole(path: pathlib.Path, data: bytes) -> pathlib.Path:
    """The file appears under its name once all of its bytes are on the disk, and never before;
    StorageError where it cannot.
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
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "put that right")
        raise StorageError(
            f"{path.name} ({len(data)} bytes) could not be stored in {path.parent}: {error.strerror}; everything stored before it is "
            f"intact: {remedy} and run the same command again"
        ) from error
    return path


def _sync_directory(directory: pathlib.Path) -> None:
    """A rename lasts over a loss of power once the directory is on the disk too."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(path: pathlib.Path) -> None:
    """Drafts of the same stage and number whose writers were killed."""
    for partial in path.parent.glob(f"{path.name.split('.')[0]}.*.partial-*"):
        _, _, writer = partial.name.rpartition(".partial-")
        node, _, process = writer.rpartition("-")
        try:
            age = time.time() - partial.stat().st_mtime
        except FileNotFoundError:  # its writer has just finished
            continue
        if age > _ABANDONED_AFTER or (node == platform.node() and not _is_another_alive(process)):
            partial.unlink(missing_ok=True)


def _is_another_alive(process: str) -> bool:
    """This process itself writes one draft at a time: one of its number is of an earlier process."""
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
    """The library that shards are written with; ImportError that says how to get it. To be asked
    before anything is drawn.
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
    # Log-probs hardly repeat: their bytes compress once those of equal weight stand together, and a
    # dictionary only adds to them.
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
    """The columns are those of the schema, of one length, and lists of one kind agree sample by
    sample.
    """
    expected = SCHEMAS[stage]
    if columns.keys() != expected.keys():
        raise ValueError(f"columns of {stage} are {sorted(columns)}; expected {sorted(expected)}")
    counts = {name: len(values) for name, values in columns.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"columns of {stage} hold {counts} samples; expected one number")
    if stage == "annotations" and not isinstance(facts.get("top_k"), int):
        raise ValueError(
            f"facts of annotations are {dict(facts)}; expected top_k among them, the ids a token"
        )
    per_token = {"token": 1, "top": facts.get("top_k")}
    lengths = [
        len(row)
        for row in columns[next(name for name, column in expected.items() if column.per == "token")]
    ]
    for name, column in expected.items():
        found = [len(row) for row in columns[name]] if column.per in per_token else []
        for i, (length, tokens) in enumerate(zip(found, lengths)):
            if length != per_token[column.per] * tokens:
                raise ValueError(
                    f"{name} of sample {i} has {length} values for {tokens} tokens; expected {per_token[column.per]} each"
                )


def _array(values: Sequence, column: ShardColumn, name: str) -> Any:
    """The column for Arrow; ValueError where a value does not fit its type."""
    pa = require_pyarrow()
    if column.per == "sample":
        cast = _cast(values, column.type, name)
        return pa.array(cast, mask=np.isnan(cast) if column.is_nullable else None)
    rows = [_cast(row, column.type, name) for row in values]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    flat = np.concatenate([*rows, np.zeros(0, column.type)])
    if offsets[-1] >= 2**31:
        raise ValueError(
            f"{name} holds {offsets[-1]} values; a shard takes less than 2**31: store fewer samples in one"
        )
    of = pa.field("element", pa.type_for_alias(column.type))
    return pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32)), pa.array(flat), type=pa.list_(of)
    )


def _cast(values: Any, type: str, name: str) -> np.ndarray:
    given = np.asarray(values)
    with np.errstate(over="ignore"):  # a log-prob below float16's range becomes -inf: probability 0
        cast = given.astype(type)
    if type in ("int32", "bool") and not np.array_equal(cast, given):
        raise ValueError(
            f"{name} holds values that are not {type}: {given[cast != given][:3].tolist()}"
        )
    return cast


def _parsed(path: pathlib.Path, data: bytes) -> tuple[Any, dict[str, Any]]:
    pa = require_pyarrow()
    try:
        # Not read_table, whose scanner starts threads that an interpreter may still be starting
        # when it ends: it then aborts.
        table = pa.parquet.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        facts = json.loads((table.schema.metadata or {})[_KEY])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DamagedShardError(
            f"{path} is no shard that opdjax wrote: {type(error).__name__}: {error}; remove it"
        ) from error
    return table, facts


def _values(values: Any, column: ShardColumn) -> np.ndarray | list[np.ndarray]:
    """Rows of lists are views of one buffer."""
    array = values.combine_chunks()
    if column.per == "sample":
        return array.to_numpy(zero_copy_only=False)
    flat = array.values.to_numpy()
    return [flat[start:end] for start, end in itertools.pairwise(array.offsets.to_pylist())]
