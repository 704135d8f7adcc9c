"""What a sweep is cut into for machines that others schedule: one command a shard, which may be run
again at any time.

The engines own scheduling, recovery and machines; a shard owns nothing: it claims its points in the
bucket, goes on with those that another machine left half-done, and ends with what is left of them.
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
from opdjax.config.validation import ConfigError

_LONGEST_NAME = 40  # of a job; Kubernetes makes longer names of it


class FleetError(RuntimeError):
    """A job could not be submitted."""


@dataclasses.dataclass(frozen=True)
class SweepShard:
    """One job."""

    name: str
    command: str  # for a shell in the root of the checkout, `opdjax` being on its path


@dataclasses.dataclass(frozen=True)
class Fleet:
    """A sweep as jobs, and what each machine needs."""

    shards: tuple[SweepShard, ...]
    machine: Topology
    extras: tuple[str, ...]  # of the package, beside those that the kind of machine asks for
    secrets: tuple[str, ...]  # names of environment variables that hold keys
    config: FleetConfig


def fleet_of(
    file: str, url: str, points: Sequence[SweepPoint], config: FleetConfig, options: Sequence[str]
) -> Fleet:
    """The jobs of a sweep whose directory is `url`; `options` of `opdjax sweep` are handed on.
    ConfigError where they could not run.
    """
    if not url.startswith("gs://"):
        raise ConfigError(
            f"--workdir is {url}; expected gs://BUCKET/NAME where a fleet is launched: its machines share nothing else"
        )
    if pathlib.Path(file).is_absolute() or not (PACKAGE.parent / file).is_file():
        raise ConfigError(
            f"{file} is no file of the checkout {PACKAGE.parent}, which every machine gets; expected one, named from its root"
        )
    machine = topology(config.topology)
    if machine.hosts > 1:
        raise ConfigError(
            f"fleet.topology is {machine.name}, which has {machine.hosts} hosts; expected one of a single host: a point of a sweep is one "
            "process. A run on several hosts is launched by tpu/run.sh or tpu/xpk.sh"
        )
    count = config.shards
    if count > len(points):
        raise ConfigError(
            f"fleet.shards is {count}; expected at most {len(points)}, the points of {file}"
        )
    stem = re.sub(r"[^a-z0-9]+", "-", pathlib.Path(file).stem.lower()).strip("-")
    digest = hashlib.sha256(f"{file} {url} {shlex.join(options)}".encode()).hexdigest()[:6]
    ending = f"-{digest}-{count}of{count}"
    stem = f"opdjax-{stem}"[: _LONGEST_NAME - len(ending)].strip("-")
    made = []
    for i in range(1, count + 1):
        words = ["opdjax", "sweep", file, "--workdir", url, *options, "--shard", f"{i}/{count}"]
        made.append(SweepShard(f"{stem}-{digest}-{i}of{count}", shlex.join(words)))
    return Fleet(tuple(made), machine, _extras(points), _secrets(points), config)


def _extras(points: Sequence[SweepPoint]) -> tuple[str, ...]:
    sources = [
        config.source for point in points for config in (point.config.data, point.config.evaluation)
    ]
    has_rows = any(str(source).startswith(("hf:", "tfds:", "parquet:")) for source in sources)
    is_judged = any(point.config.is_judged or point.config.teacher_api.is_given for point in points)
    return ("eval", *(("data",) if has_rows else ()), *(("judge",) if is_judged else ()))


def _secrets(points: Sequence[SweepPoint]) -> tuple[str, ...]:
    roles = ("rubricator", "verifier", "teacher_api")
    return tuple(
        sorted(
            {getattr(point.config, role).api_key_env for point in points for role in roles} - {""}
        )
    )


def submit_all(
    commands: Iterable[tuple[str, Sequence[str]]], running: set[str], say: Callable[[str], None]
) -> int:
    """Run (name, command) one after the other, but for those that run already; how many were
    submitted. FleetError says which were.
    """
    done: list[str] = []
    for name, command in commands:
        if name in running:
            say(f"{name} runs already; it is not submitted again")
            continue
        say(shlex.join(command))
        status = subprocess.run(
            command, cwd=PACKAGE.parent
        ).returncode  # whose files the machines get
        if status:
            before = (
                f"submitted before it: {', '.join(done)}"
                if done
                else "none was submitted before it"
            )
            raise FleetError(
                f"{name} was not submitted ({command[0]} ended with {status}); {before}. The same command goes on"
            )
        done.append(name)
    return len(done)


def require_program(name: str, package: str) -> None:
    """FleetError where the engine's command is not installed."""
    if shutil.which(name) is None:
        raise FleetError(
            f"there is no command {name}; pip install '{package}' in an environment of its own, and put it on the path"
        )
