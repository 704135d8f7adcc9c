"""Where prompts are stored: the rows of JSON lines, Parquet files, Hugging Face and TensorFlow
datasets, as plain dictionaries.

    arithmetic:SPLIT                    the built-in task
    FILE.jsonl                          JSON lines
    parquet:PATH                        a file, a directory (every .parquet file in it, by name) or a glob pattern
    hf:NAME[@CONFIG]#SPLIT              a dataset of the hub, or a directory: of data files, or written by save_to_disk
    tfds:NAME[/CONFIG][:VERSION]#SPLIT  a TFDS builder, prepared on first use in its TFDS_DATA_DIR,
    or a builder's directory

A path or directory may lie on gs:// (a pattern may not): it is copied to this machine first. SPLIT
may be a slice in the notation of the library, such as `train[:10%]`, of the built-in task one of
rows, such as `train[:640]`. A text that begins with `/`, `.` or `~` is always a directory. The last
two read through `datasets` and through the random access of TFDS, which needs no TensorFlow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import glob
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from opdjax.config import DataConfig
from opdjax.config.validation import MissingExtraError
from opdjax.data.tasks import arithmetic
from opdjax.runs.object_store import is_remote, local_copy

Rows = Iterator[tuple[str, dict[str, Any]]]  # where a row stands, for messages, and the row
_EXPECTED = "arithmetic:SPLIT, a .jsonl file, parquet:PATH, hf:NAME[@CONFIG]#SPLIT or tfds:NAME[/CONFIG][:VERSION]#SPLIT"
_CHUNK = 1024  # rows turned into Python values at a time


class DataError(ValueError):
    """The prompts cannot be used as they are; the message says which and why."""


@dataclasses.dataclass(frozen=True)
class ColumnMap:
    """Which columns hold what; `a.b` is the field b of column a, `a.0` the first item of a list."""

    prompt: str = "prompt"
    answer: str | None = None  # None: `answer`, where there is one
    reference: str | None = None  # None: `references` or `reference`, where there is one
    rubric: str | None = None  # None: no criteria are read
    benchmark: str | None = None  # None: no benchmark is read

    @classmethod
    def from_config(cls, data: DataConfig) -> ColumnMap:
        """Those that a config names."""
        return cls(
            data.prompt_column, data.answer_column, data.reference_column, data.rubric_column
        )

    def needed(self, names: Sequence[str], place: str) -> list[str]:
        """Those of a table's columns that a row is asked for: others, such as long solutions, are
        never read.
        """
        for path in (self.prompt, self.answer, self.reference, self.rubric, self.benchmark):
            if path is not None and not any(_is_within(path, name) for name in names):
                raise _missing(path, dict.fromkeys(names), place)
        references = ("references", "reference") if self.reference is None else (self.reference,)
        paths = (
            self.prompt,
            self.answer or "answer",
            *references,
            *filter(None, (self.rubric, self.benchmark)),
        )
        return [name for name in names if any(_is_within(path, name) for path in paths)]


def _is_within(path: str, name: str) -> bool:
    return path == name or path.startswith(name + ".")


def value_at(row: dict[str, Any], path: str, place: str) -> Any:
    """The value of a column, or of a field inside one."""
    if path in row:
        return row[path]
    value = row
    for part in path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, (list, np.ndarray)) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise _missing(path, value, place)
    return value


def _missing(path: str, found: Any, place: str) -> DataError:
    names = sorted(found) if isinstance(found, dict) else []
    hint = next(filter(None, (_near(part, names) for part in (path, *path.split(".")))), "")
    return DataError(
        f"{place}: there is no column {path!r}; found {names or repr(found)}{hint or '.'} Name the right one in data.prompt_column, "
        "data.answer_column or data.reference_column (for an evaluation in evaluation.prompt_column or evaluation.answer_column)"
    )


def _near(name: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def read_rows(source: str, columns: ColumnMap) -> Rows:
    """The rows of a source in their stored order; a table's rows hold only the columns that are
    needed.
    """
    kind, colon, rest = source.partition(":")
    if colon and kind in _READERS:
        return _READERS[kind](rest, columns)
    path = _as_path(source)
    if path.suffix not in (".jsonl", ".json"):
        raise DataError(f"data source {source!r} is not known; expected {_EXPECTED}")
    if not path.is_file():
        found = "is a directory" if path.is_dir() else "does not exist"
        raise DataError(f"data source {source} {found}; expected a local file of JSON lines")
    return _json_lines(path)


def _json_lines(path: pathlib.Path) -> Rows:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path}, line {number}", _json_object(line, f"{path}, line {number}")


def _json_object(line: bytes, place: str) -> dict[str, Any]:
    expected = "expected lines of one whole JSON object each, not compressed"
    try:
        # Decoded here: left to json, a first line in UTF-16 would be read and the second blamed.
        row = json.loads(line.decode("utf-8-sig").rstrip())
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: not valid JSON ({error.msg} at column {error.colno}); {expected}"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text ({error.reason}); {expected}") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of thousands of digits, a list of thousands of levels
        raise DataError(f"{place}: cannot be read ({_first_line(error)}); {expected}") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{place}: expected an object with named values, found {type(row).__name__}; {expected}"
        )
    return row


def _arithmetic(text: str, columns: ColumnMap) -> Rows:
    split, start, end = re.fullmatch(r"(.*?)(?:\[(\d*):(\d*)\])?", text, re.DOTALL).groups()
    try:
        problems = arithmetic.problems(split)
    except ValueError as error:
        raise DataError(str(error)) from error
    for number, problem in list(enumerate(problems))[
        slice(int(start or 0), int(end or len(problems)))
    ]:
        row = {"prompt": problem.prompt, "answer": problem.answer, "reference": problem.reference}
        yield f"arithmetic:{split}, row {number}", row


def _parquet(text: str, columns: ColumnMap) -> Rows:
    with _extra("parquet"):
        import pyarrow
        import pyarrow.parquet
    files = _parquet_files(_as_path(text))
    if not files:
        raise DataError(
            f"parquet:{text} names no file; expected a .parquet file, a directory of them or a pattern such as data/train-*"
        )
    for file in files:
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                needed = columns.needed(table.schema_arrow.names, str(file))
                rows = (
                    row
                    for batch in table.iter_batches(_CHUNK, columns=needed)
                    for row in batch.to_pylist()
                )
                for number, row in enumerate(rows):
                    yield f"{file}, row {number}", row
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{file} cannot be read as Parquet: {error}") from error


def _parquet_files(path: pathlib.Path) -> list[pathlib.Path]:
    if path.is_file():
        return [path]
    # Not those in directories below, which are often the other splits. A pattern with ** reaches
    # them.
    return sorted(
        path.glob("*.parquet")
        if path.is_dir()
        else map(pathlib.Path, glob.glob(str(path), recursive=True))
    )


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
            dataset = datasets.load_dataset(
                str(path) if path.is_dir() else name, config, split=split
            )
    except (
        DatasetsError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ) as error:  # the last two: a damaged state.json
        reason = _first_line(error) + (
            f" ({_first_line(error.__cause__)})" if error.__cause__ else ""
        )
        advice = "expected a split or slice of a directory (./DIR) or of a dataset on the hub; the latter needs a network or its cache"
        raise DataError(f"{place}: {reason}; {advice}") from error
    dataset = dataset.select_columns(columns.needed(dataset.column_names, place))
    for number, row in enumerate(dataset):
        yield f"{place}, row {number}", row


def _saved_split(path: pathlib.Path, split: str) -> Any:
    """A split, or slice, of what `save_to_disk` wrote; a dataset that knows no name for itself is
    called train.
    """
    import datasets

    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.Dataset):
        # One that was itself loaded as a slice is called `train[:10%]`.
        found = {str(found.split or "train").partition("[")[0]: found}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(
        {name: len(part) for name, part in found.items()}
    )
    return datasets.concatenate_datasets(
        [found[part.splitname].select(range(part.from_, part.to)) for part in parts]
    )


def _tensorflow_datasets(text: str, columns: ColumnMap) -> Rows:
    name, split = _name_and_split("tfds", text)
    place = f"tfds:{text}"
    with _extra("tfds"):
        # By name: where a package that it needs is missing, TFDS itself imports, half empty.
        from google.protobuf.json_format import ParseError
        from tensorflow_datasets import builder_from_directory
    try:
        builder = (
            builder_from_directory(str(_as_path(name)))
            if _is_builder_directory(name)
            else _prepared_builder(name)
        )
    # TFDS asserts what users ask for, and raises a subclass of one of these for the rest.
    except (ValueError, AssertionError, OSError, RuntimeError, ParseError) as error:
        advice = "expected a builder that TFDS knows or that lies prepared in TFDS_DATA_DIR, or a builder's directory (with its version)"
        raise DataError(f"{place}: {_first_line(error)}; {advice}") from error
    splits = f"its splits are {sorted(builder.info.splits)}, a slice is written train[:10%]"
    file_format = _random_access_format(builder, place)
    if file_format == "parquet" and split not in builder.info.splits:
        # TFDS would return every row, silently.
        raise DataError(
            f"{place}: stored as parquet, of which TFDS reads only whole splits; {splits}. Prepare it as array_record"
        )
    try:
        with _extra("tfds"):
            stored = builder.as_data_source(split, file_format=file_format)
        for start in range(0, len(stored), _CHUNK):
            for number, row in enumerate(
                stored.__getitems__(range(start, min(start + _CHUNK, len(stored)))), start
            ):
                yield f"{place}, row {number}", row
    except (ValueError, OSError, RuntimeError, IndexError) as error:
        raise DataError(f"{place}: {_first_line(error)}; {splits}") from error


def _is_builder_directory(name: str) -> bool:
    return _is_path(name) or (_as_path(name) / "dataset_info.json").exists()


def _prepared_builder(name: str) -> Any:
    """The builder of that name, prepared if it was not: written beside its place and renamed, so
    that it is whole or absent.
    """
    import tensorflow_datasets as tfds

    if name.startswith("opdjax_arithmetic"):
        # TFDS knows a builder once its module is imported.
        import opdjax.data.tasks.arithmetic_tfds  # noqa: F401
    builder = tfds.builder(name)
    if builder.data_path.exists():
        return builder
    try:
        builder.download_and_prepare(file_format="array_record")
    except ImportError as error:
        raise RuntimeError(
            f"{name} could not be prepared here ({error}); prepare it elsewhere with file_format=array_record"
        ) from error
    except OSError:
        # Another process may have been first.
        if not builder.data_path.exists():
            raise
    return tfds.builder(name)


def _random_access_format(builder: Any, place: str) -> str:
    """array_record where the data has it, else parquet; DataError where it has neither."""
    found = sorted(file_format.value for file_format in builder.info.available_file_formats())
    for wanted in ("array_record", "parquet"):
        if wanted in found:
            return wanted
    raise DataError(
        f"{place}: {builder.data_dir} is stored as {', '.join(found)}, which only TensorFlow reads; expected array_record. Prepare it "
        "again in another TFDS_DATA_DIR with file_format=array_record, or convert it, where TensorFlow is installed, with "
        "python -m tensorflow_datasets.scripts.convert_format --dataset_version_dir=… --out_file_format=array_record --out_dir=…"
    )


def _name_and_split(kind: str, text: str) -> tuple[str, str]:
    name, _, split = text.rpartition("#")
    if not name or not split:
        raise DataError(
            f"data source '{kind}:{text}' names no split; expected {kind}:NAME#SPLIT, such as {kind}:{text.strip('#')}#train"
        )
    return name, split


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _as_path(name: str) -> pathlib.Path:
    if is_remote(name):
        return local_copy(name)
    # Unlike pathlib's, this leaves a ~ alone that is nobody's home.
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
    "arithmetic": _arithmetic,
    "parquet": _parquet,
    "hf": _huggingface,
    "tfds": _tensorflow_datasets,
}
