"""A sweep as jobs for an external scheduler: one command per shard, which may be rerun at any time.

The scheduler owns machines and recovery. A shard keeps no state of its own: it claims its points in
the bucket and resumes those that another machine left unfinished.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence

from opdjax.config import PACKAGE
from opdjax.config.fleet import FleetConfig
from opdjax.config.grid import SweepPoint
from opdjax.config.topology import Topology, topology
from opdjax.config.validation import ConfigError, require

_MAX_NAME = 40  # characters of a job name; Kubernetes appends to it


class FleetError(RuntimeError):
    """A job could not be submitted."""


@dataclasses.dataclass(frozen=True)
class SweepShard:
    """A job that runs one shard of the sweep."""

    name: str
    command: str  # for a shell in the root of the checkout, with `opdjax` on the PATH


@dataclasses.dataclass(frozen=True)
class Fleet:
    """The jobs of a sweep, and what each of their machines needs."""

    shards: tuple[SweepShard, ...]
    machine: Topology
    extras: tuple[str, ...]  # of the package, besides those for the kind of accelerator
    secrets: tuple[str, ...]  # environment variables that hold API keys
    config: FleetConfig


def make_fleet(
    file: str, url: str, points: Sequence[SweepPoint], config: FleetConfig, options: Sequence[str]
) -> Fleet:
    """The jobs of the sweep in `file` with the directory `url`; `options` are appended to the
    `opdjax sweep` command. ConfigError if they could not run.
    """
    expected = "gs://BUCKET/NAME: the machines of a fleet share nothing else"
    require(url.startswith("gs://"), "--workdir", url, expected)
    if pathlib.Path(file).is_absolute() or not (PACKAGE.parent / file).is_file():
        raise ConfigError(
            f"{file} is not in the checkout {PACKAGE.parent}, which is copied to every machine; "
            "expected a path relative to its root"
        )
    machine, count = topology(config.topology), config.shards
    expected = "TPUs or GPUs, such as v5e-8 or h100-8: on CPUs run opdjax sweep --shard I/N on each"
    require(machine.backend != "cpu", "fleet.topology", machine.name, expected)
    expected = f"a single host, not {machine.hosts}: a point of a sweep is one process. Start a run"
    expected += " on several hosts with tpu/run.sh or tpu/xpk.sh"
    require(machine.hosts == 1, "fleet.topology", machine.name, expected)
    expected = f"at most {len(points)}, the number of points"
    require(count <= len(points), "fleet.shards", count, expected)
    stem = re.sub(r"[^a-z0-9]+", "-", pathlib.Path(file).stem.lower()).strip("-")
    digest = hashlib.sha256(f"{file} {url} {shlex.join(options)}".encode()).hexdigest()[:6]
    ending = f"-{digest}-{count}of{count}"
    stem = f"opdjax-{stem}"[: _MAX_NAME - len(ending)].strip("-")
    shards = []
    for i in range(1, count + 1):
        words = ["opdjax", "sweep", file, "--workdir", url, *options, "--shard", f"{i}/{count}"]
        shards.append(SweepShard(f"{stem}-{digest}-{i}of{count}", shlex.join(words)))
    secrets = sorted({name for point in points for name in point.config.api_keys})
    return Fleet(tuple(shards), machine, _extras(points), tuple(secrets), config)


def _extras(points: Sequence[SweepPoint]) -> tuple[str, ...]:
    configs = [point.config for point in points]
    sources = {str(part.source) for config in configs for part in (config.data, config.evaluation)}
    has_rows = any(re.search(r"\b(hf|tfds|parquet|preset|suite):", source) for source in sources)
    is_judged = any(config.is_judged or config.teach.model for config in configs)
    return ("eval", *(("data",) if has_rows else ()), *(("judge",) if is_judged else ()))


def submit_all(
    commands: Iterable[tuple[str, Sequence[str]]], running: set[str], log: Callable[[str], None]
) -> int:
    """Run the command of each (name, command) whose job is not running yet, in order; returns their
    number. FleetError lists those submitted before a failure.
    """
    done: list[str] = []
    for name, command in commands:
        if name in running:
            log(f"{name} is running already; it is not submitted again")
            continue
        log(shlex.join(command))
        # The engine copies its current directory, the checkout, to the machines.
        status = subprocess.run(command, cwd=PACKAGE.parent).returncode
        if status:
            raise FleetError(
                f"{name} was not submitted ({command[0]} exited with {status}); submitted before: "
                f"{', '.join(done) or 'none'}. The same command submits the rest"
            )
        done.append(name)
    return len(done)


def require_program(name: str, package: str) -> None:
    """FleetError if the engine's command is not installed."""
    if shutil.which(name) is None:
        raise FleetError(
            f"there is no command {name}; pip install '{package}' in a separate environment, and "
            "put it on the PATH"
        )
