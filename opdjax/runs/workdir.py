"""A run's work directory: its config, its lock, and its append-only JSONL files."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, BinaryIO, TextIO

from opdjax.config import ApiConfig, Config
from opdjax.config.saved import lost_settings, upgrade
from opdjax.config.validation import differences, from_dict, to_dict
from opdjax.runs.bounds import parse_json

# A directory that holds one of these and no config.json is not empty: a run would overwrite it, or
# mix with the points of a sweep.
_RUN_FILES = (
    "checkpoints",
    "student",
    "metrics.jsonl",
    "samples.jsonl",
    "eval.jsonl",
    "divergence.jsonl",
    "result.json",
    "*/point.json",
)


# Fields that say how a run is computed: devices, rows at a time, kernels, connections. They may
# change when a run is resumed.
_EXECUTION_FIELDS = (
    *(f"mesh.{name}" for name in ("data", "fsdp", "tensor", "processes")),
    *("near_policy.generator", "sampling.slots"),
    *(f"train.{name}" for name in ("gradient_accumulation_steps", "remat", "attention")),
    *(f"{role}.base_url" for role in ("rubricator", "verifier", "teach")),
    *(f"api.{name.name}" for name in dataclasses.fields(ApiConfig) if name.name != "max_tokens"),
)


# Logs of whose rows a checkpoint records the number and a digest.
COUNTED = tuple(f"{name}.jsonl" for name in ("metrics", "samples", "rubrics", "eval", "divergence"))
SPENDING = "spending.jsonl"  # usage and cost by step and role; never cut: the money is spent
Kind = type | tuple[type, ...]
NUMBER: Kind = (int, float)  # a finite one; `float` may also be NaN
# What every row of a log has: its readers rely on it.
_FIELDS: dict[str, dict[str, Kind]] = {
    "metrics.jsonl": {"step": int},
    "samples.jsonl": {"step": int},
    "frozen_rubrics.jsonl": {"prompt_id": int, "rubric": (list, type(None))},
    "eval.jsonl": {"step": int, "temperature": NUMBER},
    "divergence.jsonl": {"step": int, "student": dict, "teacher": dict},
    SPENDING: {"step": int, "dollars": NUMBER},
}
_KINDS = {int: "a whole number", NUMBER: "a finite number", float: "a number", dict: "an object"}


class WorkdirError(ValueError):
    """The work directory belongs to another run, is in use, or has damaged files."""


def lock_file(file: pathlib.Path, is_exclusive: bool = True) -> TextIO | None:
    """Open a file and lock it until it is closed; None if another process has it locked. A shared
    lock needs no permission to write.
    """
    opened = file.open("w" if is_exclusive else "r")
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(opened, (fcntl.LOCK_EX if is_exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        # A lock that its last holder removed meanwhile excludes nobody.
        if os.path.samestat(os.fstat(opened.fileno()), file.stat()):
            return opened
    opened.close()
    return None


@contextlib.contextmanager
def locked(workdir: pathlib.Path, role: str = "") -> Iterator[None]:
    """Lock the directory for this process; WorkdirError if another process with this role (default:
    a run) holds it, or it cannot be written. Where nothing is written, no new directory is left.
    """
    made = [place for place in (workdir, *workdir.parents) if not place.exists()]
    lock = workdir / (f".lock-{role}" if role else ".lock")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = lock_file(lock)
    except OSError as error:
        raise WorkdirError(
            f"--workdir {workdir} cannot be written: {error.strerror}; expected a directory, or a "
            "path where one can be made"
        ) from error
    if file is None:
        raise WorkdirError(
            f"{workdir} is being written by another {role or 'run'}; wait for it or choose another "
            "--workdir"
        )
    with file:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # the directory is in use, or somebody removed it
                lock.unlink()
                for place in made:
                    place.rmdir()


def claim(
    workdir: pathlib.Path, config: Config, facts: dict[str, Any], *, is_learner: bool = True
) -> None:
    """Write `config.json`, or check that the existing one describes the same run on the same data;
    WorkdirError if not.

    Settings that change only how the run is computed (mesh, slots, micro-batches, environment) may
    differ: the difference is printed, and the run continues, but not bit for bit. Those of the
    evaluation may differ until the run is finished, for its learner: that is also recorded.
    """
    file = workdir / "config.json"
    new = {"config": to_dict(config), **facts}
    if not file.exists():
        found = sorted(path.name for name in _RUN_FILES for path in workdir.glob(name))
        if found:
            raise WorkdirError(
                f"{workdir} has no config.json, yet it holds {', '.join(found)}; expected a new "
                "directory or that of a run"
            )
        write_json(file, new)
        return
    old = read_run_config(workdir)
    described = [{"config": upgrade(run["config"]), "data": {**run["data"]}} for run in (old, new)]
    before, now = (run["config"]["data"] for run in described)
    before["date"] = before["date"] or now["date"]  # unrecorded earlier: the digests tell
    for run in described:
        _pop(run["config"], ("checkpoint.on_damage",))  # changes no result
    execution = [_pop(run["config"], _EXECUTION_FIELDS) for run in described]
    evaluation = [run["config"].pop("evaluation") for run in described]
    changes = differences(*evaluation, "evaluation.")
    if changes and is_learner and not (workdir / "result.json").exists():
        before = from_dict(Config, upgrade(old["config"]))
        graders = [
            {"grader": run.grader if run.grades_rollouts else ""} for run in (before, config)
        ]
        differs = differences(*graders, "evaluation.")
        for run in described:
            run["data"].pop("evaluation", None)  # the prompts
    else:
        differs = changes
    advice = f"choose another --workdir, with --from {workdir} to go on from this run, or undo"
    differs = differences(*described) + differs + lost_settings(old["config"])
    refuse_if(differs, f"{workdir} holds a run of another config; {advice} (there -> now)")
    environments = differences(old["environment"], new["environment"], "environment.")
    for line in differences(*execution) + environments:
        print(f"note: continuing under another {line}; results may differ in the last bits")
    if changes:
        _change_evaluation(workdir, old, new, changes)


def _change_evaluation(
    workdir: pathlib.Path, old: dict[str, Any], new: dict[str, Any], changes: list[str]
) -> None:
    """Record other settings of the evaluation in config.json. Scores that they change are moved to
    eval-N.jsonl and divergence-N.jsonl, and are made again.
    """
    earlier = old.get("evaluation_changes", [])
    if any(not line.startswith("evaluation.every:") for line in changes):
        for file in (workdir / "eval.jsonl", workdir / "divergence.jsonl"):
            if file.exists():
                append_lines(file.with_stem(f"{file.stem}-{len(earlier) + 1}"), read_lines(file))
                file.write_text("")  # not removed, so that a copy elsewhere is emptied too
    for line in changes:
        print(f"note: continuing under another {line}")
    data = old["data"] | {"evaluation": new["data"].get("evaluation")}
    settings = old["config"] | {"evaluation": new["config"]["evaluation"]}
    record = {"config": settings, "data": data, "evaluation_changes": [*earlier, changes]}
    write_json(workdir / "config.json", old | record)


def refuse_if(changed: list[str], message: str) -> None:
    """WorkdirError that lists the differences, if there are any."""
    if changed:
        raise WorkdirError("\n  ".join([f"{message}:", *changed]))


def first_day(workdir: pathlib.Path) -> str:
    """The day, YYYY-MM-DD, that is today for the chat templates of the run in a work directory: as
    recorded by the run or by the sweep that it belongs to, else that of the clock.
    """
    found, point = None, workdir / "point.json"
    if (file := workdir / "config.json").exists():
        found = read_run_config(workdir)["config"].get("data", {}).get("date")
    if found is None and (file := point).exists():
        found = read_json(point, "delete it, and the sweep writes it again").get("date")
    with contextlib.suppress(TypeError, ValueError):
        return str(datetime.date.fromisoformat(found)) if found else str(datetime.date.today())
    raise WorkdirError(f"{file} has the date {found!r}; expected YYYY-MM-DD: put it right")


def _pop(config: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Remove these `section.field` entries from the config and return them."""
    return {name: config[name.split(".")[0]].pop(name.split(".")[1]) for name in names}


def read_config(workdir: pathlib.Path) -> Config:
    """The config of the run in a work directory."""
    return from_dict(Config, upgrade(read_run_config(workdir)["config"]))


def read_run_config(workdir: pathlib.Path) -> dict[str, Any]:
    """`config`, `data` (digests), `environment` of a run; WorkdirError if missing or damaged."""
    file = workdir / "config.json"
    if not file.exists():
        raise WorkdirError(f"{workdir} has no config.json; expected the work directory of a run")
    what, advice = "the config of a run", "put its original back or start in a new work directory"
    return read_json(file, advice, what, config=dict, data=dict, environment=dict)


def environment(devices: list[str]) -> dict[str, Any]:
    """Everything that bit-identical resuming depends on: versions, machine, devices, flags."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    return {
        "opdjax": version("opdjax"),
        "commit": _git_commit(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": num_cores(),
        "devices": devices,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **{name: version(name) for name in packages},
    }


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _git_commit() -> str | None:
    here = pathlib.Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def read_json(
    file: pathlib.Path, advice: str, what: str = "", **types: type | tuple[type, ...]
) -> dict[str, Any]:
    """The JSON object in a file; WorkdirError with the advice if it is damaged, or is not `what`
    because fields named in `types` are missing or of another type.
    """
    try:
        found = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{file} cannot be read as JSON: {error}; {advice}") from error
    if not isinstance(found, dict):
        raise WorkdirError(f"{file} holds a {type(found).__name__}; expected an object; {advice}")
    wrong = [name for name, kind in types.items() if not isinstance(found.get(name), kind)]
    if wrong:
        fields = f"{', '.join(wrong)} missing or of a wrong type"
        raise WorkdirError(f"{file} is not {what}: {fields}; {advice}")
    return found


def write_json(file: pathlib.Path, value: Any) -> None:
    """Write a JSON file atomically."""
    # Two processes may write one file at once, so each has its own temporary name.
    partial = file.with_name(f"{file.name}.{platform.node()}.{os.getpid()}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(file)


def read_lines(file: pathlib.Path, **types: Kind) -> list[dict[str, Any]]:
    """The complete rows of a JSONL file; WorkdirError if one is damaged, or a field that is named
    in `types` or that every row of this log has is missing or of another type.
    """
    if not file.exists():
        return []
    *lines, _unfinished = file.read_bytes().split(b"\n")
    return [_row(line, file, number, **types) for number, line in enumerate(lines, 1) if line]


def _row(line: bytes, file: pathlib.Path, number: int, **types: Kind) -> dict[str, Any]:
    return parse_row(line, f"{file}, line {number}", **_FIELDS.get(file.name, {}) | types)


def parse_row(line: bytes, place: str, **types: Kind) -> dict[str, Any]:
    """The JSON object, as `require` demands; WorkdirError, which names the place, if it is none."""
    row = None
    with contextlib.suppress(ValueError):
        row = parse_json(line)
    if not isinstance(row, dict):
        raise damaged(place, repr(line[:60]), "a JSON object")
    return require(row, place, **types)


def require(row: dict[str, Any], place: str, **types: Kind) -> dict[str, Any]:
    """The row; WorkdirError, which names its place, if it lacks a field or has another type."""
    for name, kind in types.items():
        value = row.get(name, ...)
        is_finite = kind is not NUMBER or not isinstance(value, float) or math.isfinite(value)
        if not isinstance(value, kind) or isinstance(value, bool) or not is_finite:
            found = json.dumps(value)[:60] if name in row else "missing"
            raise damaged(place, f"`{name}` is {found}", f"{_KINDS.get(kind, 'a list')} there")
    return row


def damaged(place: str, found: str, expected: str) -> WorkdirError:
    """The error for a row of a log that holds something else than was expected."""
    advice = "Repair it or start in a new work directory"
    return WorkdirError(f"{place} is damaged: {found}; expected {expected}. {advice}")


def append_lines(file: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a JSONL file and flush them; a last line whose write was interrupted is
    replaced. OSError with advice if the disk is full.
    """
    try:
        with file.open("a+b") as out:
            _cut_unfinished_row(out)
            out.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    except OSError as error:  # Python's error for a full disk does not name the file
        is_missing = isinstance(error, FileNotFoundError)
        advice = "" if is_missing else "; make room and run the same command again"
        raise OSError(error.errno, f"{error.strerror}{advice}", str(file)) from error


def _cut_unfinished_row(file: BinaryIO) -> None:
    file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
    if file.read(1) not in (b"", b"\n"):
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def cut_lines(file: pathlib.Path, last_step: int) -> None:
    """Drop the rows after `last_step`, which the resumed run writes again."""
    if file.exists():
        rows = [row for row in read_lines(file, step=int) if row["step"] <= last_step]
        partial = file.with_name(file.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        partial.replace(file)


class RowCounter:
    """Counts the rows of a run's logs for its checkpoints; each row is read once."""

    def __init__(self, workdir: pathlib.Path):
        self._workdir = workdir
        self._read = dict.fromkeys((*COUNTED, SPENDING), 0)  # bytes
        self._num_rows = dict.fromkeys(self._read, 0)
        # (number, sum of hashes) of the rows that `until` has counted, and of later ones by step.
        self._counted = dict.fromkeys(self._read, (0, 0))
        self._later: dict[str, dict[int, tuple[int, int]]] = {name: {} for name in self._read}
        self._spent: dict[str, float] = {}

    def until(self, step: int, spending_rows: float = math.inf) -> dict[str, Any]:
        """What belongs before a step, which is none before that of the last call: of each log that
        has rows up to it, their number and a sum of hashes; of spending.jsonl, its first rows so
        far, and the totals of its columns.
        """
        found: dict[str, Any] = {}
        for name, later in self._later.items():
            self._add_new(self._workdir / name)
            last = spending_rows if name == SPENDING else step
            for at in [at for at in later if at <= last]:
                self._counted[name] = _sum(self._counted[name], later.pop(at))
            number, total = self._counted[name]
            if number:
                found[name] = {"rows": number, "hash": f"{total % 2**64:016x}"}
        return found | ({"spent": dict(self._spent)} if self._spent else {})

    def _add_new(self, file: pathlib.Path) -> None:
        if not file.exists():
            return
        with file.open("rb") as opened:
            opened.seek(self._read[file.name])
            lines = opened.read().splitlines(keepends=True)
        later, is_spending = self._later[file.name], file.name == SPENDING
        for line in lines:
            if not line.endswith(b"\n"):  # its write has not ended
                return
            self._read[file.name] += len(line)
            if not (text := line.strip()):
                continue
            self._num_rows[file.name] += 1
            number = self._num_rows[file.name]
            row = _row(text, file, number, step=int)
            hashed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
            at = number if is_spending else row["step"]
            later[at] = _sum(later.get(at, (0, 0)), (1, hashed))
            for column, value in row.items() if is_spending else ():
                if isinstance(value, (int, float)) and column != "step":
                    self._spent[column] = self._spent.get(column, 0) + value


def _sum(*pairs: tuple[int, int]) -> tuple[int, int]:
    first, second = (sum(column) for column in zip(*pairs))
    return first, second


def check_logs(workdir: pathlib.Path, step: int, before: dict[str, Any]) -> None:
    """Print which rows that belong before the checkpoint of a step are missing or changed, given
    what `RowCounter.until` returned then. WorkdirError if spending.jsonl has lost usage.
    """
    num_spending = before.get(SPENDING, {"rows": 0})["rows"]
    found = RowCounter(workdir).until(step, num_spending)
    known, spent = dict(before), found.get("spent", {})
    lost = {name: total - spent.get(name, 0) for name, total in known.pop("spent", {}).items()}
    lost = {name: round(max(value, 0), 9) for name, value in lost.items()}
    if any(value > 1e-6 for value in lost.values()):
        row = json.dumps({"step": step, "role": "lost"} | lost)
        raise WorkdirError(
            f"{workdir / SPENDING} has lost usage that checkpoint {step} counts, and the spending "
            f"cap would forget it. Put the file back, or append this row for it: {row}"
        )
    for name, rows in known.items():
        now = found.get(name, {"rows": 0})
        is_set_aside = (workdir / name.replace(".", "-1.")).exists()  # under another evaluation
        if now != rows and not is_set_aside:
            change = "some of them changed" if now["rows"] >= rows["rows"] else "others are lost"
            print(
                f"note: {workdir / name} has {now['rows']} of the {rows['rows']} rows up to step "
                f"{step}, {change}: sums and tables over them are not those of the whole run"
            )
