"""Runs the points of a sweep, each as a subprocess in its own directory; any number of runners may
share the points.

A point is an ordinary run in `DIR/ID`: an interrupted one is resumed and a finished one is skipped.
A runner claims a point by a lock, on gs:// by a lease, which its child process holds too. The claim
ends when both have ended, however they ended, and never earlier: no point is run twice at a time,
and none is lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from opdjax.config.grid import SweepPoint
from opdjax.config.saved import lost_settings, upgrade
from opdjax.config.validation import differences, to_dict
from opdjax.runs.lease import LOST
from opdjax.runs.object_store import Folder, RemoteError, is_remote
from opdjax.runs.results import FAILURE, POINT, read_point, status_of
from opdjax.runs.statistics import score_label
from opdjax.runs.workdir import WorkdirError, append_lines, read_json, refuse_if, write_json
from opdjax.sweeps.claims import ATTEMPTS, LOG, Claim, SweepDirectory, open_sweep
from opdjax.sweeps.status import scores_after, status_line

_POLL, _REPORT = 0.2, 20.0  # seconds
_PAUSE = 10.0  # seconds before a failed point is run again, times its failures so far
_LOG_TAIL = 25  # lines of a failed run's log that are kept in failure.json
# Signals from outside, which interrupt a run. Other signals are crashes of the run.
_INTERRUPTS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_OPDJAX = (sys.executable, "-P", "-m", "opdjax")
_BUSY = "is being written by another opdjax references"  # on stderr of the command
Log = Callable[[str], None]


class SweepInterruptedError(RuntimeError):
    """The sweep received a stop signal; the same command resumes it."""


class SweepReferencesError(RuntimeError):
    """The reference answers that points need could not be written."""


class SweepIncompleteError(RuntimeError):
    """Points of the sweep failed or were interrupted."""


@dataclasses.dataclass(frozen=True)
class _Job:
    """A running child process."""

    point: SweepPoint
    process: subprocess.Popen
    claim: Claim
    slot: int
    started: float  # monotonic


@dataclasses.dataclass
class _Attempts:
    """What this runner has tried of a point."""

    outcome: str | None = None  # None: the point is open
    failures: int = 0
    not_before: float = 0.0  # monotonic time of the next attempt
    since: float = 0.0  # seconds since the epoch: an earlier failure does not count


@dataclasses.dataclass(frozen=True)
class _Runner:
    """The settings of this runner, and the state of its points."""

    sweep: SweepDirectory
    jobs: int
    retries: int
    log: Log
    attempts: dict[str, _Attempts]
    running: list[_Job] = dataclasses.field(default_factory=list)


def run_sweep(
    points: Sequence[SweepPoint],
    workdir: str | os.PathLike,
    *,
    jobs: int = 1,
    shard: tuple[int, int] = (1, 1),
    retry_failed: bool = False,
    retries: int = 0,
    log: Log = print,
) -> dict[str, int]:
    """Run the unfinished points, `jobs` at a time, and return the numbers of `points`, `done`,
    `failed` and `stopped`.

    `shard` (i, n) takes every n-th point from the i-th on. Points that another runner holds are
    waited for, and taken over if it dies. A point that fails is run again up to `retries` times.
    Several jobs share the CPU cores of this machine evenly; they cannot share an accelerator, so
    use one job there.
    """
    with open_sweep(workdir) as sweep:
        sweep.refresh([p.id for p in points])
        _write_points(points, sweep)
        _write_references(points, sweep, log)
        mine = list(points[shard[0] - 1 :: shard[1]])
        # With retry_failed, only failures from before this call are run again.
        since = time.time() if retry_failed else 0.0
        attempts = {p.id: _Attempts(since=since) for p in mine}
        _run(_Runner(sweep, jobs, retries, log, attempts), mine)
        sweep.refresh(attempts)
        states = [status_of(sweep.path / id) for id in attempts]
    done, failed = states.count("done"), states.count("failed")
    stopped = len(mine) - done - failed
    return {"points": len(mine), "done": done, "failed": failed, "stopped": stopped}


def require_complete(counts: dict[str, int]) -> None:
    """SweepIncompleteError unless all points in a result of `run_sweep` are done."""
    if counts["failed"]:
        raise SweepIncompleteError(
            f"{counts['failed']} points failed: see failure.json in their directories; "
            "--retry-failed runs them again"
        )
    if counts["stopped"]:
        raise SweepIncompleteError(
            f"{counts['stopped']} points were stopped; the same command resumes them"
        )


def _run(runner: _Runner, mine: Sequence[SweepPoint]) -> None:
    """Collect ended children and start new ones until no point of `mine` is open."""
    sweep, running, attempts = runner.sweep, runner.running, runner.attempts
    next_look, last_report = 0.0, time.monotonic()
    with _stop_signals() as received, contextlib.ExitStack() as at_end:
        at_end.callback(_terminate, runner)
        while True:
            if received:
                raise SweepInterruptedError(
                    f"{received[0]}: the running points were stopped; the same command resumes them"
                )
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                _finish(runner, job)
                next_look = 0.0  # a point may be claimed
            at_work = {job.point.id for job in running}
            if is_looking := time.monotonic() >= next_look:
                sweep.refresh(attempts.keys() - at_work)
                next_look = time.monotonic() + sweep.interval
            open_points = [p for p in mine if _is_open(sweep.path / p.id, attempts[p.id])]
            waiting = [p for p in open_points if p.id not in at_work]
            due = [p for p in waiting if time.monotonic() >= attempts[p.id].not_before]
            for point in due.copy() if is_looking else ():
                if len(running) < runner.jobs and (claim := _claim(runner, point)):
                    due.remove(point)
                    running.append(_start(runner, point, claim))
                    runner.log(f"start  {point.id}")
            if not open_points and not running:
                return
            if time.monotonic() - last_report > _REPORT:
                last_report = time.monotonic()
                line = status_line(mine, sweep, [job.point for job in running], runner.jobs)
                if due and len(running) < runner.jobs:  # none of them could be claimed
                    line += f", {len(due)} held by other runners"
                runner.log(line)
            time.sleep(_POLL)


def _is_open(directory: pathlib.Path, attempts: _Attempts) -> bool:
    """Whether a point must still be run: neither done nor failed since `attempts.since`."""
    if attempts.outcome is not None:
        return False
    status, file = status_of(directory), directory / FAILURE
    if status != "failed":
        return status != "done"
    try:
        failure = read_json(file, "delete it, and the point runs again")
        return failure.get("time", file.stat().st_mtime) < attempts.since
    except (FileNotFoundError, WorkdirError):
        if file.exists():
            raise
        return True  # another runner has just started to retry it


def _write_points(points: Sequence[SweepPoint], sweep: SweepDirectory) -> None:
    """Write point.json of every point, missing ones too, with the day on which the sweep began;
    WorkdirError at another config.
    """
    new = {}
    for point in points:
        file = sweep.path / point.id / POINT
        if not file.exists():
            new[file] = point
            continue
        stored = read_point(file)["config"]
        changed = differences(upgrade(stored), upgrade(to_dict(point.config)))
        other = f"{sweep.name}/{point.id} belongs to a point with another config"
        advice = "choose another --workdir, where train.start_from goes on from a run of this one "
        advice += "(there -> now)"
        refuse_if(changed + lost_settings(stored), f"{other}; {advice}")
    known = (read_point(file).get("date") for file in sorted(sweep.path.glob(f"*/{POINT}")))
    date = min(filter(None, known), default=datetime.date.today().isoformat()) if new else None
    for file, point in new.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        asked = {"overrides": point.overrides, "config": to_dict(point.config)}
        write_json(file, {"id": point.id, "date": date, **asked})
    sweep.upload(*new)


def _write_references(points: Sequence[SweepPoint], sweep: SweepDirectory, log: Log) -> None:
    """Have a teacher write the answers that points read as data.references, once per file.

    A checkpoint writes any missing answers, so an interrupted file is completed. A model behind an
    API, which costs money, is called only if there is no file at all.
    """
    readers = {
        p.config.data.references: p
        for p in points
        if p.config.is_judged and status_of(sweep.path / p.id) != "done"
    }
    readers.pop(None, None)
    for file, point in readers.items():
        exists = Folder(file).tag() if is_remote(file) else pathlib.Path(file).exists()
        if exists and point.config.teach.model:
            continue
        log(f"write  {file}")
        command = (*_OPDJAX, "references", str(sweep.path / point.id / POINT))
        # Another process may be writing the same file: wait for it.
        while (run := _run_to_its_end(command)).returncode and _BUSY in run.stderr:
            time.sleep(_REPORT)
        if not run.returncode:
            continue
        reason = run.stderr.strip()[-500:]
        if not exists:
            raise SweepReferencesError(
                f"the answers that points read as data.references could not be written: {reason}"
            )
        # They may be another teacher's; the points check whether they can use them.
        log(f"note: using {file} as it is: {reason}")


def _run_to_its_end(command: Sequence[str]) -> subprocess.CompletedProcess:
    """Like subprocess.run, but a stop signal ends the child too."""
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with _stop_signals() as received, subprocess.Popen(command, **output) as child:
        while True:
            try:
                _, error = child.communicate(timeout=_POLL)
                break
            except subprocess.TimeoutExpired:
                if received:
                    child.terminate()
    if received:
        raise SweepInterruptedError(
            f"{received[0]}: the teacher was stopped; the same command resumes its answers"
        )
    return subprocess.CompletedProcess(command, child.returncode, stderr=error)


def _claim(runner: _Runner, point: SweepPoint) -> Claim | None:
    """The claim on a point; None if another runner holds it, or has finished it."""
    directory = runner.sweep.path / point.id
    if not directory.exists():  # deleted since
        _write_points([point], runner.sweep)
    claim = runner.sweep.claim(point.id)
    if claim and not _is_open(directory, runner.attempts[point.id]):  # finished before the claim
        claim.release()
        return None
    return claim


def _start(runner: _Runner, point: SweepPoint, claim: Claim) -> _Job:
    sweep, jobs, directory = runner.sweep, runner.jobs, runner.sweep.path / point.id
    (directory / FAILURE).unlink(missing_ok=True)
    slot = min(set(range(jobs)) - {job.slot for job in runner.running})
    with (directory / LOG).open("a") as output:
        child = subprocess.Popen(
            [*_OPDJAX, "train", str(directory / POINT), "--workdir", f"{sweep.name}/{point.id}"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **claim.environment},
            pass_fds=claim.descriptors,
            start_new_session=True,
        )
    claim.child = child
    if jobs > 1 and sys.platform == "linux":
        cores = sorted(os.sched_getaffinity(0))
        share = max(len(cores) // jobs, 1)
        first = slot * share % len(cores)
        with contextlib.suppress(ProcessLookupError):  # it may have ended already
            os.sched_setaffinity(child.pid, cores[first : first + share])
    start = {"event": "start", "host": platform.node(), "pid": child.pid, "time": time.time()}
    append_lines(directory / ATTEMPTS, [start])
    sweep.upload(directory / ATTEMPTS, directory / FAILURE)
    return _Job(point, child, claim, slot, time.monotonic())


def _record_end(job: _Job, sweep: SweepDirectory) -> float:
    """Record the end of a child in its attempts; returns its duration in seconds."""
    job.claim.child_ended()
    seconds = round(time.monotonic() - job.started, 3)
    if not job.claim.is_lost:
        directory, code = sweep.path / job.point.id, job.process.returncode
        end = {"event": "end", "returncode": code, "seconds": seconds, "time": time.time()}
        append_lines(directory / ATTEMPTS, [end])
        sweep.upload(directory / LOG, directory / ATTEMPTS)
    return seconds


def _finish(runner: _Runner, job: _Job) -> None:
    """Record the outcome of an ended child, log it, and release its claim. A failed point stays
    open for its retries, and one whose claim was lost until some runner finishes it.
    """
    sweep, log, id, code = runner.sweep, runner.log, job.point.id, job.process.returncode
    directory, attempts = sweep.path / id, runner.attempts[id]
    if not directory.exists():
        log(f"killed {id}: its directory was deleted; run the same command again to start it anew")
        attempts.outcome = "stopped"
        job.claim.release()
        return
    seconds = _record_end(job, sweep)
    # A run that saves its step before it stops exits with 128 plus the signal's number.
    number = -code if code < 0 else code - 128
    if job.claim.is_lost or code == LOST:
        log(f"lost   {id}: its lease expired; the next runner that claims it resumes it")
    elif code == 0:
        attempts.outcome = "done"
    elif number in _INTERRUPTS:
        # By a preemption, the out-of-memory killer or a person: the point is sound and is resumed.
        attempts.outcome = "stopped"
        name = signal.Signals(number).name
        log(f"killed {id} by {name}; run the same command again to resume it")
    else:
        _record_failure(runner, job, seconds)
    job.claim.release()
    if attempts.outcome == "done":
        sweep.refresh([id])
        after = scores_after(sweep, id)
        found = [name for name in ("avg@k", "greedy") if name in after]
        scores = [f"{score_label(name, after.get('k'))} {after[name]:.3f}" for name in found]
        log(f"done   {id}  {'  '.join(scores)}  {seconds:.0f} s")


def _record_failure(runner: _Runner, job: _Job, seconds: float) -> None:
    sweep, log, id, attempts = runner.sweep, runner.log, job.point.id, runner.attempts[job.point.id]
    lines = (sweep.path / id / LOG).read_text(errors="replace").splitlines()
    failure = {"returncode": job.process.returncode, "seconds": seconds, "time": time.time()}
    write_json(sweep.path / id / FAILURE, failure | {"log_tail": lines[-_LOG_TAIL:]})
    sweep.upload(sweep.path / id / FAILURE)
    log(f"FAILED {id}: {lines[-1] if lines else 'no output'} ({sweep.name}/{id}/{LOG})")
    attempts.failures += 1
    if attempts.failures > runner.retries:
        attempts.outcome = "failed"
        return
    pause = _PAUSE * attempts.failures
    attempts.not_before, attempts.since = time.monotonic() + pause, time.time()
    log(f"retry  {id} in {pause:.0f} s ({attempts.failures} of {runner.retries} retries)")


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """The names of the stop signals so far: checked between steps, so none is half done."""
    received: list[str] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    record = lambda number, _: received.append(signal.Signals(number).name)
    before = [signal.signal(number, record) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def _terminate(runner: _Runner) -> None:
    """End the running children, however this runner ends."""
    for job in runner.running:
        job.process.terminate()
    for job in runner.running:
        job.process.wait()
        with contextlib.suppress(RemoteError):  # what ended the runner is reported
            _record_end(job, runner.sweep)
            job.claim.release()
