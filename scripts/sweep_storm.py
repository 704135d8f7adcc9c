"""A sweep by several runners at once that are killed at random, and what has become of it.

    python scripts/sweep_storm.py experiments/sweeps/mini_vopd.py --workdir DIR --only 'seed=0'
    --kills 10 --runners 3 python scripts/sweep_storm.py FILE --workdir gs://bucket/storm --against
    DIR2

SIGKILL goes to a runner, to a child, or to both, at moments drawn from the seed; a killed runner is
started again until as many kills as asked for are spent, and then all are left to finish. At the
end every point must be done, none by two attempts that were completed, and nothing may be lost;
with `--against`, an undisturbed sweep, every point's scores and its student's bytes must be the
same as there. The exit status is 1 where that is not so. Processes of this script alone are killed:
those it started, and their children.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

from opdjax.config.experiments import load_sweep
from opdjax.config.grid import SweepPoint, select
from opdjax.runs.object_store import Folder, is_remote, url_of


@dataclasses.dataclass
class Runner:
    process: subprocess.Popen
    log: pathlib.Path


class Where:
    """Files of a sweep, on a disk or behind a URL."""

    def __init__(self, workdir: str):
        self._folder = Folder(workdir) if is_remote(workdir) else None
        self.name = url_of(workdir) if is_remote(workdir) else workdir

    def read(self, name: str) -> bytes | None:
        if self._folder is not None:
            return self._folder.read(name)
        file = pathlib.Path(self.name) / name
        return file.read_bytes() if file.exists() else None

    def rows(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.read(name) or b"").splitlines()]


def start(asked: argparse.Namespace, number: int, logs: pathlib.Path) -> Runner:
    command = [
        sys.executable,
        "-m",
        "opdjax",
        "sweep",
        asked.file,
        "--workdir",
        asked.workdir,
        "--jobs",
        str(asked.jobs),
    ]
    log = logs / f"runner-{number}.txt"
    with log.open("a") as out:
        process = subprocess.Popen(
            [*command, *(f"--only={glob}" for glob in asked.only)],
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    return Runner(process, log)


def children(pid: int) -> list[int]:
    """Of a process that this script started."""
    with contextlib.suppress(OSError):
        tasks = pathlib.Path(f"/proc/{pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return []


def storm(asked: argparse.Namespace, logs: pathlib.Path) -> list[str]:
    """Run and kill; one line for every kill."""
    draw, began, told = random.Random(asked.seed), time.monotonic(), []
    runners = [start(asked, number, logs) for number in range(asked.runners)]
    while len(told) < asked.kills:
        time.sleep(draw.uniform(*asked.seconds))
        number, what = draw.randrange(len(runners)), draw.choice(["runner", "child", "both"])
        runner = runners[number]
        if runner.process.poll() is None:
            hit = kill(runner.process.pid, what)
            if hit:
                told.append(
                    f"{time.monotonic() - began:7.1f} s  {' and '.join(hit)} of runner {number}"
                )
                print(told[-1], flush=True)
        elif all(runner.process.poll() is not None for runner in runners):
            print(f"the sweep was over after {len(told)} of {asked.kills} kills", flush=True)
            break
        runners = [restarted(asked, number, logs, runner) for number, runner in enumerate(runners)]
    for runner in runners:
        runner.process.wait()
    # Points whose child was killed were given up by their runner until the command is run again.
    if (code := start(asked, asked.runners, logs).process.wait()) != 0:
        print(f"the last runner ended with status {code}: see {logs}")
    print(f"{time.monotonic() - began:.0f} s in all")
    return told


def kill(pid: int, what: str) -> list[str]:
    """SIGKILL; what was there to be hit."""
    targets = children(pid) if what in ("child", "both") else []
    hit = ["a child"] * bool(targets) + ["the runner"] * (what in ("runner", "both"))
    for target in [*targets, *([pid] if what in ("runner", "both") else [])]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, signal.SIGKILL)
    return hit


def restarted(asked: argparse.Namespace, number: int, logs: pathlib.Path, runner: Runner) -> Runner:
    """The runner, or one in its place where it was killed."""
    return start(asked, number, logs) if runner.process.poll() == -signal.SIGKILL else runner


def verdict(points: list[SweepPoint], where: Where, straight: Where | None) -> bool:
    """Print a line for every point; whether all is as it should be."""
    width, is_well = max(len(p.id) for p in points), True
    print(f"{'point':{width}}  begun  completed  orphaned  state")
    for point in points:
        rows = where.rows(f"{point.id}/attempts.jsonl")
        starts = sum(row["event"] == "start" for row in rows)
        ends = [row for row in rows if row["event"] == "end"]
        completed = sum(row["returncode"] == 0 for row in ends)
        faults = faults_of(point.id, completed, where, straight)
        is_well &= not faults
        print(
            f"{point.id:{width}}  {starts:5}  {completed:9}  {starts - len(ends):8}  {', '.join(faults) or 'as it should be'}"
        )
    return is_well


def faults_of(id: str, completed: int, where: Where, straight: Where | None) -> list[str]:
    found = where.read(f"{id}/result.json")
    if found is None:
        return ["has no result"]
    faults = [f"was completed {completed} times"] * (
        completed > 1
    )  # none: an orphan's end has no witness
    steps = [row["step"] for row in where.rows(f"{id}/metrics.jsonl")]
    faults += ["steps are lost or doubled"] * (
        steps != list(range(1, json.loads(found)["num_steps"] + 1))
    )
    if straight is not None:
        there = straight.read(f"{id}/result.json")
        if there is None:
            return [*faults, f"has no result in {straight.name}"]
        one, other = (json.loads(result) for result in (found, there))
        faults += ["scores differ"] * any(
            one.get(name) != other.get(name)
            for name in ("eval_before", "eval_after", "paired_difference")
        )
        name = f"{id}/student/model.safetensors"
        faults += ["the student's bytes differ"] * (
            where.read(name) is None or where.read(name) != straight.read(name)
        )
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="sweep file")
    parser.add_argument("--workdir", required=True, help="a new directory, or gs://…")
    parser.add_argument("--only", action="append", default=[], help="as of opdjax sweep")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--runners", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="of each runner")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds",
        type=float,
        nargs=2,
        default=(5.0, 30.0),
        help="between two kills, at least and at most",
    )
    parser.add_argument("--against", help="directory of an undisturbed sweep")
    asked = parser.parse_args()
    points = load_sweep(asked.file)
    points = select(points, asked.only) if asked.only else points
    logs = pathlib.Path(tempfile.mkdtemp(prefix="sweep-storm-"))
    print(f"{len(points)} points, {asked.runners} runners; what they say is in {logs}", flush=True)
    told = storm(asked, logs)
    print(f"{len(told)} kills", flush=True)
    is_well = verdict(points, Where(asked.workdir), Where(asked.against) if asked.against else None)
    sys.exit(0 if is_well else 1)


if __name__ == "__main__":
    main()
