"""The work directory of a run: its config, its lock, and its append-only JSONL files."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from opdjax.config import Config, differences, from_dict, to_dict


class WorkdirError(ValueError):
    """The directory belongs to another run, or to one that is still going on."""


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Hold the directory for this process; two runs never write one directory."""
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WorkdirError(f"{workdir} is being written by another run; wait for it or choose another --workdir") from error
        yield


def claim(workdir: pathlib.Path, config: Config, facts: dict[str, Any]) -> None:
    """Write `config.json`, or check that the one that is there describes the same run on the same data.

    A changed environment (library versions, cores) is printed only: the run then continues, but not bit for bit.
    """
    file = workdir / "config.json"
    new = {"config": to_dict(config), **facts}
    if not file.exists():
        write_json(file, new)
        return
    old = read_run_config(workdir)
    changed = differences({"config": old["config"], "data": old["data"]}, {"config": new["config"], "data": new["data"]})
    if changed:
        listed = "\n  ".join(changed)
        raise WorkdirError(f"{workdir} holds a run of another config; choose another --workdir or undo (there -> now):\n  {listed}")
    for line in differences(old["environment"], new["environment"], "environment."):
        print(f"note: continuing under another {line}; results may differ in the last bits")


def read_config(workdir: pathlib.Path) -> Config:
    """The config that a work directory was made with."""
    return from_dict(Config, read_run_config(workdir)["config"])


def read_run_config(workdir: pathlib.Path) -> dict[str, Any]:
    """`config.json` as it stands: the config, the data digests and the environment."""
    file = workdir / "config.json"
    if not file.exists():
        raise WorkdirError(f"{workdir} has no config.json; expected the work directory of a run")
    try:
        found = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise WorkdirError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(found, dict) or not {"config", "data", "environment"} <= found.keys():
        raise WorkdirError(f"{file} is not the config of a run (a model's, perhaps); expected a work directory made by opdjax train")
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
        run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def write_json(file: pathlib.Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(file)


def read_lines(file: pathlib.Path) -> list[dict[str, Any]]:
    """The complete rows of a JSONL file; a last line that was cut off in mid-write is ignored."""
    if not file.exists():
        return []
    *lines, _unfinished = file.read_text().split("\n")
    return [json.loads(line) for line in lines if line]


def append_lines(file: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a JSONL file and hand them to the system."""
    with file.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def cut_lines(file: pathlib.Path, last_step: int) -> None:
    """Drop the rows after `last_step`: the run continues from that step's checkpoint and will write them again."""
    if file.exists():
        rows = [row for row in read_lines(file) if row["step"] <= last_step]
        partial = file.with_name(file.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        partial.replace(file)
