"""Data sources: where rows are stored, read as plain dictionaries.

    arithmetic:SPLIT                    the built-in task
    stories:SPLIT                       built-in word problems
    instructions:SPLIT                  built-in instructions without answers
    tasks:NAME#SPLIT                    a task of the package reasoning-gym
    FILE.jsonl, FILE.json               JSON lines, or one list of objects
    FILE.csv, FILE.parquet              a table; the first line of a CSV file has its columns
    parquet:PATH                        a file, a directory (its .parquet files, by name) or a glob
    hf:NAME[@CONFIG]#SPLIT              a dataset of the hub, or a directory: of data files, or
                                        written by save_to_disk
    tfds:NAME[/CONFIG][:VERSION]#SPLIT  a TFDS builder, prepared on first use in its TFDS_DATA_DIR,
                                        or a builder's directory

A path or directory on gs:// is first copied to this machine (a glob must be local). SPLIT may be a
slice in the library's notation, such as `train[:10%]`; of what is built in, a slice of rows, such
as `train[:640]`. A name that begins with `/`, `.` or `~` is always a directory. The last two use
`datasets` and the random access of TFDS, which needs no TensorFlow.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import dataclasses
import difflib
import glob
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from opdjax.config.validation import MissingExtraError
from opdjax.data.tasks import arithmetic, instructions, reasoning, stories
from opdjax.runs.bounds import (
    CONFIG_BYTES,
    EXPANDED_BYTES,
    EXPANSION,
    LIST_BYTES,
    ROW_BYTES,
    BoundedError,
    lines_of,
    parse_json,
    read_bytes,
)
from opdjax.runs.object_store import is_remote, local_copy

Rows = Iterator[tuple[str, dict[str, Any]]]  # (place for error messages, row)
Reader = Callable[..., Rows]
_EXPECTED = (
    "arithmetic:SPLIT, stories:SPLIT, instructions:SPLIT, tasks:NAME#SPLIT, a .jsonl, .json, .csv "
    "or .parquet file, parquet:PATH, hf:NAME[@CONFIG]#SPLIT, tfds:NAME[/CONFIG][:VERSION]#SPLIT, "
    "preset:NAME, suite:NAME or mix:WEIGHT*SOURCE+WEIGHT*SOURCE"
)
SKIP_ADVICE = "repair the row, or leave out such rows with --data.skip-bad-rows"
_CHUNK = 1024  # rows converted to Python values at a time
_ROW_OVERHEAD = 256  # bytes of a row in memory, whatever it holds


class DataError(BoundedError):
    """The data cannot be used; the message names the row and the reason."""


@dataclasses.dataclass(frozen=True)
class ColumnMap:
    """Column names; `a.b` is the field b of column a, `a.0` the first item of a list."""

    prompt: str = "prompt"
    answer: str | None = None  # None: `answer`, if it exists
    reference: str | None = None  # None: `references` or `reference`, if one exists
    rubric: str | None = None  # None: not read
    benchmark: str | None = None  # None: not read
    others: tuple[str, ...] = ()  # whole columns that are read, too

    def needed(self, names: Sequence[str], place: str) -> list[str]:
        """The columns of a table to read; others, such as long solutions, are skipped."""
        named = [path for path in dataclasses.astuple(self)[:-1] if path is not None]
        named += self.others
        for path in named:
            if not any(_is_within(path, name) for name in names):
                raise DataError(f"{place}: {_missing(path, dict.fromkeys(names))}")
        named += ["tools", "prompt_format"] + ([] if self.answer else ["answer"])
        named += [] if self.reference else ["references", "reference"]
        return [name for name in names if any(_is_within(path, name) for path in named)]


def _is_within(path: str, name: str) -> bool:
    return path == name or path.startswith(name + ".")


def value_at(row: dict[str, Any], path: str) -> Any:
    """The value of a column, or of a field inside one; DataError if it is missing."""
    if path in row:
        return row[path]
    value = row
    for part in path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, (list, np.ndarray)) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise DataError(_missing(path, value))
    return value


def _missing(path: str, found: Any) -> str:
    names = sorted(found) if isinstance(found, dict) else []
    parts = (path, *path.split("."))
    close = [name for part in parts for name in difflib.get_close_matches(part, names, n=1)]
    hint = f", did you mean {close[0]!r}?" if close else "."
    return (
        f"there is no column {path!r}; found {names or repr(found)}{hint} Name the right one in "
        "data.columns, such as prompt=COLUMN, answer=COLUMN or reference=COLUMN (for an evaluation "
        "in evaluation.columns)"
    )


def read_rows(source: str, columns: ColumnMap, skipped: list[str] | None = None) -> Rows:
    """The rows of a data source in their stored order; of a table, only the columns needed.

    With `skipped`, lines that are no row are left out, and their errors are added to it.
    """
    kind, colon, rest = source.partition(":")
    if colon and kind in _READERS:
        return _READERS[kind](rest, columns)
    path = _as_path(source)
    if path.suffix == ".parquet":
        return _parquet(source, columns)
    if path.suffix not in (".jsonl", ".json", ".csv"):
        raise DataError(f"data source {source!r} is not known; expected {_EXPECTED}")
    if not path.is_file():
        found = "is a directory" if path.is_dir() else "does not exist"
        raise DataError(f"data source {source} {found}; expected a local file of rows")
    rows = _csv_rows(path) if path.suffix == ".csv" else _json_rows(path)
    return _readable(rows, skipped)


def _readable(rows: Iterator[tuple[str, bytes]], skipped: list[str] | None) -> Rows:
    for place, line in rows:
        try:
            row = _json_object(line, place)
        except DataError as error:
            if skipped is None:
                raise DataError(f"{error}; {SKIP_ADVICE}") from error
            skipped.append(str(error))
        else:
            yield place, row


def _json_rows(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Lines of JSON, or, in a .json file that begins with [, the items of one list."""
    with path.open("rb") as lines:
        first = lines.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if path.suffix == ".json" and first == b"[":
            try:
                items = parse_json(read_bytes(path, LIST_BYTES))
            except ValueError as error:
                raise DataError(f"{path}: not a list in JSON ({_first_line(error)})") from error
            for number, item in enumerate(items, 1):
                yield f"{path}, item {number}", json.dumps(item).encode()
            return
        lines.seek(0)
        for number, line in enumerate(lines_of(lines, path, DataError), 1):
            if line.strip():
                yield f"{path}, line {number}", line


def _csv_rows(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """A table as lines of JSON; a row with too many or too few cells becomes a list."""
    csv.field_size_limit(ROW_BYTES)
    try:
        with path.open("rb") as file:
            lines = lines_of(file, path, DataError)
            reader = csv.reader(codecs.iterdecode(lines, "utf-8-sig"))
            names = next(reader, [])
            for cells in filter(None, reader):
                row = dict(zip(names, cells)) if len(cells) == len(names) else cells
                yield f"{path}, line {reader.line_num}", json.dumps(row).encode()
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as CSV in UTF-8: {error}") from error


def _json_object(line: bytes, place: str) -> dict[str, Any]:
    expected = "expected lines of one whole JSON object each, not compressed (in a CSV file: lines "
    expected += "with a cell for each column)"
    try:
        # json would also accept a first line in UTF-16, and then report the second one.
        row = parse_json(line.decode("utf-8-sig").rstrip())
    except json.JSONDecodeError as error:
        found = f"{error.msg} at column {error.colno}"
        raise DataError(f"{place}: not valid JSON ({found}); {expected}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text ({error.reason}); {expected}") from error
    except ValueError as error:  # thousands of digits, hundreds of levels, megabytes
        raise DataError(f"{place}: cannot be read ({_first_line(error)}); {expected}") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{place}: expected an object with named values, found {type(row).__name__}; {expected}"
        )
    return row


def _built_in(name: str, make: Callable[[str], Iterable[dict[str, Any]]]) -> Reader:
    def read(text: str, columns: ColumnMap) -> Rows:
        split, start, end = re.fullmatch(r"(.*?)(?:\[(\d*):(\d*)\])?", text, re.DOTALL).groups()
        try:
            rows = enumerate(make(split))
            for number, row in itertools.islice(rows, int(start or 0), int(end) if end else None):
                yield f"{name}:{split}, row {number}", row
        except ValueError as error:
            raise DataError(str(error)) from error

    return read


def _arithmetic(split: str) -> list[dict[str, Any]]:
    return [
        {"prompt": each.prompt, "answer": each.answer, "reference": each.reference}
        for each in arithmetic.problems(split)
    ]


def _stories(split: str) -> list[dict[str, Any]]:
    return [
        {"prompt": each.prompt, "answer": each.answer, "reference": stories.solution(each, 0)}
        for each in stories.problems(split)
    ]


def _instructions(split: str) -> list[dict[str, Any]]:
    return [{"prompt": text} for text in instructions.instructions(split)]


def _parquet(text: str, columns: ColumnMap) -> Rows:
    with _extra("parquet"):
        import pyarrow
        import pyarrow.parquet
    files = _parquet_files(_as_path(text))
    if not files:
        raise DataError(
            f"parquet:{text} names no file; expected a .parquet file, a directory of them or a "
            "pattern such as data/train-*"
        )
    for file in files:
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                needed = columns.needed(table.schema_arrow.names, str(file))
                for number, row in enumerate(_table_rows(table, needed, file)):
                    yield f"{file}, row {number}", row
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{file} cannot be read as Parquet: {error}") from error


def _table_rows(table: Any, columns: list[str], file: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The rows, as long as they are in proportion to the file: a kilobyte may hold gigabytes."""
    size, metadata = file.stat().st_size, table.metadata
    limit, groups = max(EXPANSION * size, EXPANDED_BYTES), range(metadata.num_row_groups)
    # Before anything is read: what the file says of itself.
    largest = max((metadata.row_group(number).total_byte_size for number in groups), default=0)
    is_too_large = max(largest, metadata.num_rows * _ROW_OVERHEAD) > limit
    # No value is larger than its group: so a batch, too, is within the limit.
    num_rows = max(1, min(_CHUNK, limit // max(largest, 1)))
    for batch in () if is_too_large else table.iter_batches(num_rows, columns=columns):
        rows = batch.to_pylist()
        # Not batch.nbytes: of a dictionary it counts each value once.
        limit -= len(repr(rows)) + len(rows) * _ROW_OVERHEAD
        if is_too_large := limit < 0:
            break
        yield from rows
    if is_too_large:
        raise DataError(
            f"{file} expands to more than {EXPANSION} times its {size} bytes; expected rows that "
            "differ: write those that are needed as JSON lines"
        )


def _parquet_files(path: pathlib.Path) -> list[pathlib.Path]:
    if path.is_file():
        return [path]
    # Without subdirectories, which are often the other splits; a pattern with ** reaches them.
    if path.is_dir():
        return sorted(path.glob("*.parquet"))
    return sorted(map(pathlib.Path, glob.glob(str(path), recursive=True)))


def _huggingface(text: str, columns: ColumnMap) -> Rows:
    name, split = _name_and_split("hf", text)
    with _extra("hf"):
        import datasets
        from datasets.exceptions import DatasetsError
    place, config = f"hf:{text}", None
    if "@" in name and not _as_path(name).exists():
        name, _, config = name.rpartition("@")
    path = _as_path(name)
    if _is_path(name) and not path.is_dir():
        raise DataError(f"{place}: there is no directory {path}")
    try:
        if any((path / file).exists() for file in ("state.json", "dataset_dict.json")):
            dataset = _saved_split(path, split)
        else:
            name = str(path) if path.is_dir() else name
            dataset = datasets.load_dataset(name, config, split=split)
    # KeyError and TypeError: a damaged state.json.
    except (DatasetsError, OSError, ValueError, KeyError, TypeError) as error:
        cause = f" ({_first_line(error.__cause__)})" if error.__cause__ else ""
        raise DataError(
            f"{place}: {_first_line(error)}{cause}; expected a split or slice of a directory "
            "(./DIR) or of a dataset on the hub; the latter needs a network or its cache"
        ) from error
    dataset = dataset.select_columns(columns.needed(dataset.column_names, place))
    for number, row in enumerate(dataset):
        yield f"{place}, row {number}", row


def _saved_split(path: pathlib.Path, split: str) -> Any:
    """A split, or slice, written by `save_to_disk`; a dataset without a split name is `train`."""
    import datasets

    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.Dataset):
        # A dataset loaded as a slice has a split name such as `train[:10%]`.
        found = {str(found.split or "train").partition("[")[0]: found}
    lengths = {name: len(part) for name, part in found.items()}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    return datasets.concatenate_datasets(
        [found[part.splitname].select(range(part.from_, part.to)) for part in parts]
    )


def _tensorflow_datasets(text: str, columns: ColumnMap) -> Rows:
    name, split = _name_and_split("tfds", text)
    place = f"tfds:{text}"
    with _extra("tfds"):
        # By name: without a package it needs, TFDS itself still imports, half empty.
        from google.protobuf.json_format import ParseError
        from tensorflow_datasets import builder_from_directory
    try:
        if _is_path(name) or (_as_path(name) / "dataset_info.json").exists():
            if (file := _as_path(name) / "features.json").exists():
                parse_json(read_bytes(file, CONFIG_BYTES), object_hook=_require_own_class)
            builder = builder_from_directory(str(_as_path(name)))
        else:
            builder = _prepared_builder(name)
    # TFDS checks its input by assert, and otherwise raises subclasses of these.
    except (ValueError, AssertionError, OSError, RuntimeError, ParseError) as error:
        raise DataError(
            f"{place}: {_first_line(error)}; expected a builder that TFDS knows or that is "
            "prepared in TFDS_DATA_DIR, or a builder's directory (with its version)"
        ) from error
    splits = f"its splits are {sorted(builder.info.splits)}, a slice is written train[:10%]"
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if not formats & {"array_record", "parquet"}:
        raise DataError(
            f"{place}: {builder.data_dir} is stored as {', '.join(sorted(formats))}, which only "
            "TensorFlow reads; expected array_record. Prepare it again in another TFDS_DATA_DIR "
            "with file_format=array_record, or convert it, on a machine with TensorFlow, with "
            "python -m tensorflow_datasets.scripts.convert_format --dataset_version_dir=… "
            "--out_file_format=array_record --out_dir=…"
        )
    file_format = "array_record" if "array_record" in formats else "parquet"
    if file_format == "parquet" and split not in builder.info.splits:
        # TFDS would return every row, without an error.
        raise DataError(
            f"{place}: stored as parquet, of which TFDS reads only whole splits; {splits}. Prepare "
            "it as array_record"
        )
    try:
        with _extra("tfds"):
            stored = builder.as_data_source(split, file_format=file_format)
        for start in range(0, len(stored), _CHUNK):
            chunk = stored.__getitems__(range(start, min(start + _CHUNK, len(stored))))
            for number, row in enumerate(chunk, start):
                yield f"{place}, row {number}", row
    except (ValueError, OSError, RuntimeError, IndexError) as error:
        raise DataError(f"{place}: {_first_line(error)}; {splits}") from error


def _prepared_builder(name: str) -> Any:
    """The builder of that name, prepared if needed.

    TFDS prepares in a temporary directory and renames it, so a prepared builder is complete.
    """
    import tensorflow_datasets as tfds

    if name.startswith("opdjax_arithmetic"):
        # The import registers the builder.
        import opdjax.data.tasks.arithmetic_tfds  # noqa: F401
    builder = tfds.builder(name)
    if builder.data_path.exists():
        return builder
    try:
        builder.download_and_prepare(file_format="array_record")
    except ImportError as error:
        raise RuntimeError(
            f"{name} could not be prepared here ({error}); prepare it elsewhere with "
            "file_format=array_record"
        ) from error
    except OSError:
        # Another process may have been first.
        if not builder.data_path.exists():
            raise
    return tfds.builder(name)


def _require_own_class(fields: dict[str, Any]) -> dict[str, Any]:
    """ValueError for an object of features.json that names a class outside of TFDS, which would
    import its module.
    """
    for name in map(fields.get, ("type", "pythonClassName", "python_class_name")):
        if isinstance(name, str) and not name.startswith("tensorflow_datasets."):
            raise ValueError(f"features.json names the class {name!r}, which is none of TFDS")
    return fields


def _name_and_split(kind: str, text: str) -> tuple[str, str]:
    name, _, split = text.rpartition("#")
    if not name or not split:
        raise DataError(
            f"data source '{kind}:{text}' names no split; expected {kind}:NAME#SPLIT, such as "
            f"{kind}:{text.strip('#')}#train"
        )
    return name, split


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _as_path(name: str) -> pathlib.Path:
    if is_remote(name):
        return local_copy(name)
    # Unlike pathlib's expanduser, this keeps a ~name that is no user.
    return pathlib.Path(os.path.expanduser(name))


def _is_path(name: str) -> bool:
    return name[0] in "/.~"


@contextlib.contextmanager
def _extra(kind: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(
            f"a data source {kind}:… needs another package ({error}): pip install 'opdjax[data]'"
        ) from error


_READERS = {
    "arithmetic": _built_in("arithmetic", _arithmetic),
    "stories": _built_in("stories", _stories),
    "instructions": _built_in("instructions", _instructions),
    "tasks": _built_in("tasks", reasoning.rows),
    "parquet": _parquet,
    "hf": _huggingface,
    "tfds": _tensorflow_datasets,
}
