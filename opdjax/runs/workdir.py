"""The work directory of a run: its config, its lock, and its append-only JSONL files."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, BinaryIO

from opdjax.config import Config
from opdjax.config.api import TRANSPORT, ApiConfig
from opdjax.config.saved import upgrade
from opdjax.config.validation import differences, from_dict, to_dict

# What a run would overwrite, or, in a directory of a sweep, stand among.
_OF_A_RUN = (
    "checkpoints",
    "student",
    "metrics.jsonl",
    "samples.jsonl",
    "eval.jsonl",
    "result.json",
    "*/point.json",
)


# Fields that say how a run is computed: on which devices, how many rows at a time, by which
# kernels, over which line.
_HOW = (
    *(f"mesh.{name}" for name in ("data", "fsdp", "tensor", "processes")),
    *(
        f"{model}.{name}"
        for model in ("student", "teacher")
        for name in ("split_over", "attention")
    ),
    *("near_policy.generator", "near_policy.generator_devices"),
    *("sampling.split_over", "sampling.slots", "train.gradient_accumulation_steps", "train.remat"),
    *(f"{role}.{name}" for role in ("rubricator", "verifier", "teacher_api") for name in TRANSPORT),
    *(f"api.{field.name}" for field in dataclasses.fields(ApiConfig)),
    "rubrics.draw_parts",
)


class WorkdirError(ValueError):
    """The directory belongs to another run or to one that is still going on, or what it holds is
    damaged.
    """


@contextlib.contextmanager
def locked(workdir: pathlib.Path, role: str = "") -> Iterator[None]:
    """Hold the directory for this process; two runs never write one directory, nor two processes
    with the same other role.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / (f".lock-{role}" if role else ".lock")).open("w")
    except OSError as error:
        raise WorkdirError(
            f"--workdir {workdir} cannot be written: {error.strerror}; expected a directory, or the place of a new one"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            writer = role or "run"
            raise WorkdirError(
                f"{workdir} is being written by another {writer}; wait for it or choose another --workdir"
            ) from error
        yield


def claim(workdir: pathlib.Path, config: Config, facts: dict[str, Any]) -> None:
    """Write `config.json`, or check that the one that is there describes the same run on the same
    data.

    What says how the run is computed and not what (mesh, slots, micro-batches, environment) may
    change: it is printed, and the run continues, but not bit for bit.
    """
    file = workdir / "config.json"
    new = {"config": to_dict(config), **facts}
    if not file.exists():
        found = sorted(path.name for name in _OF_A_RUN for path in workdir.glob(name))
        if found:
            raise WorkdirError(
                f"{workdir} has no config.json, yet it holds {', '.join(found)}; expected a new directory or that of a run"
            )
        write_json(file, new)
        return
    old = read_run_config(workdir)
    described = [{"config": upgrade(run["config"]), "data": run["data"]} for run in (old, new)]
    computed = [_take(run["config"], _HOW) for run in described]
    changed = differences(*described)
    if changed:
        listed = "\n  ".join(changed)
        raise WorkdirError(
            f"{workdir} holds a run of another config; choose another --workdir or undo (there -> now):\n  {listed}"
        )
    for line in differences(*computed) + differences(
        old["environment"], new["environment"], "environment."
    ):
        print(f"note: continuing under another {line}; results may differ in the last bits")


def _take(config: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Those fields, taken out of the config."""
    return {name: config[name.split(".")[0]].pop(name.split(".")[1]) for name in names}


def read_config(workdir: pathlib.Path) -> Config:
    """The config that a work directory was made with."""
    return from_dict(Config, upgrade(read_run_config(workdir)["config"]))


def read_run_config(workdir: pathlib.Path) -> dict[str, Any]:
    """`config.json` as it stands: the config, the data digests and the environment."""
    file = workdir / "config.json"
    if not file.exists():
        raise WorkdirError(f"{workdir} has no config.json; expected the work directory of a run")
    found = read_json(file, "put its original back or start in a new work directory")
    if not all(isinstance(found.get(name), dict) for name in ("config", "data", "environment")):
        raise WorkdirError(
            f"{file} is not the config of a run (a model's, perhaps); expected a work directory made by opdjax train"
        )
    return found


def environment(devices: list[str]) -> dict[str, Any]:
    """What bit-identical continuation depends on."""
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
    """Cores that this process may run on."""
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


def read_json(file: pathlib.Path, advice: str) -> dict[str, Any]:
    """The object that a file holds; WorkdirError with the advice where it is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WorkdirError(f"{file} cannot be read as JSON: {error}; {advice}") from error
    if not isinstance(found, dict):
        raise WorkdirError(f"{file} holds a {type(found).__name__}; expected an object; {advice}")
    return found


def write_json(file: pathlib.Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    # Two runners may write one file at once: each has a draft of its own.
    partial = file.with_name(f"{file.name}.{platform.node()}.{os.getpid()}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(file)


def read_lines(file: pathlib.Path) -> list[dict[str, Any]]:
    """The complete rows of a JSONL file; a last line that was cut off in mid-write is ignored."""
    if not file.exists():
        return []
    *lines, _unfinished = file.read_bytes().split(b"\n")
    return [_row(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line]


def _row(line: bytes, place: str) -> dict[str, Any]:
    with contextlib.suppress(UnicodeDecodeError, json.JSONDecodeError):
        if isinstance(row := json.loads(line), dict):
            return row
    raise WorkdirError(
        f"{place} is damaged: {line[:60]!r}; expected a JSON object. Put it right or start in a new work directory"
    )


def append_lines(file: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a JSONL file and hand them to the system, in the place of a last line that was
    cut off in mid-write.
    """
    try:
        with file.open("a+b") as out:
            end = _end_of_rows(out)
            if end < out.seek(0, os.SEEK_END):
                out.truncate(end)
            out.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    except OSError as error:  # of a full disk python would not say where
        advice = (
            "; make room and run the same command again"
            if not isinstance(error, FileNotFoundError)
            else ""
        )
        raise OSError(error.errno, f"{error.strerror}{advice}", str(file)) from error


def _end_of_rows(file: BinaryIO) -> int:
    """Where the last complete line ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(end - 4096, 0)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def cut_lines(file: pathlib.Path, last_step: int) -> None:
    """Drop the rows after `last_step`: the run continues from that step's checkpoint and will write
    them again.
    """
    if file.exists():
        rows = [row for row in read_lines(file) if row["step"] <= last_step]
        partial = file.with_name(file.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        partial.replace(file)
