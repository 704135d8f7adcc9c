"""Runs the points of a sweep, each as a subprocess in a directory of its own, by as many runners as
one likes.

A point is an ordinary run in `DIR/ID`, so a half-done one continues and a finished one is skipped.
A runner claims a point by a lock, on gs:// by a lease, that its child holds too: it goes when both
are dead, however they died, and never earlier, so no point is ever run twice at a time and none is
lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from opdjax.config.grid import SweepPoint
from opdjax.config.saved import upgrade
from opdjax.config.validation import differences, to_dict
from opdjax.runs.lease import LOST
from opdjax.runs.object_store import Folder, RemoteError, is_remote, url_of
from opdjax.runs.results import FAILURE, POINT, RESULT, read_point, status_of
from opdjax.runs.workdir import WorkdirError, append_lines, read_json, write_json
from opdjax.sweeps.claims import ATTEMPTS, LOG, Claim, Place, open_place
from opdjax.sweeps.status import status_line

_POLL, _REPORT = 0.2, 20.0  # seconds
_PAUSE = 10.0  # seconds before a failed point is tried again, times the failures so far
_LOG_TAIL = 25  # lines of a failed run that are kept with its failure
_FROM_OUTSIDE = (
    signal.SIGKILL,
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
)  # other signals are crashes
Say = Callable[[str], None]


class SweepInterruptedError(RuntimeError):
    """The sweep was asked to stop; the same command goes on."""


class SweepTeachError(RuntimeError):
    """No point that reads a teacher's answers can run: there are none."""


@dataclasses.dataclass(frozen=True)
class _Job:
    """A child at work."""

    point: SweepPoint
    process: subprocess.Popen
    claim: Claim
    slot: int
    started: float


@dataclasses.dataclass
class _Tries:
    """What a runner has tried of a point, and whether it will again."""

    outcome: str | None = None  # None: it is open
    failures: int = 0
    not_before: float = 0.0  # monotonic
    after: float = 0.0  # seconds since the epoch: a failure from before then is tried again


def run_sweep(
    points: Sequence[SweepPoint],
    workdir: str | os.PathLike,
    *,
    jobs: int = 1,
    shard: tuple[int, int] = (1, 1),
    retry_failed: bool = False,
    retries: int = 0,
    say: Say = print,
) -> dict[str, int]:
    """Run what is not done yet, `jobs` at a time, and return how many points are `done`, `failed`
    and `stopped`.

    `shard` (i, n) takes every n-th point from the i-th on. Points that another runner holds are
    waited for, and taken over if it dies. A point that fails is tried up to `retries` times more.
    With several jobs the cores of this machine are shared out evenly between them; an accelerator
    is not, so there one job at a time is right.
    """
    with open_place(workdir) as place:
        place.refresh([p.id for p in points])
        _write_points(points, place)
        _teach_first(points, place, say)
        mine = list(points[shard[0] - 1 :: shard[1]])
        # A failure is tried again once: not those of this runner, nor those that another one has
        # just met.
        tries = {p.id: _Tries(after=time.time() if retry_failed else 0.0) for p in mine}
        _run(mine, place, tries, jobs, retries, say)
        place.refresh(tries, is_urgent=True)
        states = [status_of(place.directory / id) for id in tries]
    done, failed = states.count("done"), states.count("failed")
    return {
        "points": len(mine),
        "done": done,
        "failed": failed,
        "stopped": len(mine) - done - failed,
    }


def _run(
    mine: Sequence[SweepPoint],
    place: Place,
    tries: dict[str, _Tries],
    jobs: int,
    retries: int,
    say: Say,
) -> None:
    """The loop: reap, claim, start, until nothing of `mine` is open."""
    running: list[_Job] = []
    last_report = time.monotonic()
    with _stop_signals() as asked_to_stop, _ending(running, place):
        while True:
            if asked_to_stop:
                raise SweepInterruptedError(
                    f"{asked_to_stop[0]}: the points at work were stopped; the same command continues them"
                )
            for job in running:
                job.claim.tend()
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                _settle(tries[job.point.id], _finish(job, place, say), retries, job.point.id, say)
            place.refresh(tries)
            open_points = [
                p
                for p in mine
                if tries[p.id].outcome is None
                and not _is_settled(place.directory / p.id, tries[p.id].after)
            ]
            waiting = [p for p in open_points if p.id not in {job.point.id for job in running}]
            due = [p for p in waiting if time.monotonic() >= tries[p.id].not_before]
            while (
                len(running) < jobs
                and (job := _start_next(due, place, running, jobs, tries)) is not None
            ):
                due.remove(job.point)
                running.append(job)
                say(f"start  {job.point.id}")
            if not open_points and not running:
                return
            if time.monotonic() - last_report > _REPORT:
                last_report = time.monotonic()
                held = (
                    len(due) if len(running) < jobs else 0
                )  # there was room, and none of them could be had
                say(
                    status_line(mine, place, [job.point for job in running], jobs)
                    + (f", {held} held by others" if held else "")
                )
            time.sleep(_POLL)


def _settle(tried: _Tries, outcome: str, retries: int, id: str, say: Say) -> None:
    """Note what became of a point; one that failed stays open while it may be tried again, one that
    was lost until somebody ends it.
    """
    if outcome == "lost":
        return
    tried.failures += outcome == "failed"
    if outcome != "failed" or tried.failures > retries:
        tried.outcome = outcome
        return
    pause = _PAUSE * tried.failures
    tried.not_before, tried.after = time.monotonic() + pause, time.time()
    say(f"again  {id} in {pause:.0f} s, the {tried.failures}. of {retries} times")


def _is_settled(directory: pathlib.Path, after: float) -> bool:
    """Whether nothing is left to do: done, or failed and not to be tried again (`after`: failures
    before then are).
    """
    status = status_of(directory)
    if status != "failed":
        return status == "done"
    try:
        failure = read_json(directory / FAILURE, "delete it to have the point run again")
        return failure.get("time", (directory / FAILURE).stat().st_mtime) >= after
    except (FileNotFoundError, WorkdirError):
        if (directory / FAILURE).exists():
            raise
        return False  # another runner has just begun to try it again


def _write_points(points: Sequence[SweepPoint], place: Place) -> None:
    """Say in each point's directory what is asked for, so that a table knows what is missing;
    refuse to change what was asked.
    """
    new = []
    for point in points:
        directory = place.directory / point.id
        if not (directory / POINT).exists():
            new.append(point)
            continue
        changed = differences(
            upgrade(read_point(directory / POINT)["config"]), upgrade(to_dict(point.config))
        )
        if changed:
            listed = "\n  ".join(changed)
            raise WorkdirError(
                f"{place.workdir(point.id)} was asked for with another config; choose another --workdir (there -> now):\n  {listed}"
            )
    for point in new:
        directory = place.directory / point.id
        directory.mkdir(parents=True, exist_ok=True)
        write_json(
            directory / POINT,
            {"id": point.id, "overrides": point.overrides, "config": to_dict(point.config)},
        )
    place.publish(*(place.directory / point.id / POINT for point in new))


def _teach_first(points: Sequence[SweepPoint], place: Place, say: Say) -> None:
    """Have a teacher fill the indexes of answers that points will read; one point stands for all of
    an index.

    A checkpoint is asked for whatever is missing, as where it was stopped half-way; a model that is
    paid for only where nothing is there.
    """
    wanting = {
        p.config.data.references: p
        for p in points
        if p.config.is_judged and status_of(place.directory / p.id) != "done"
    }
    for index, point in wanting.items():
        is_there = index is not None and _is_there(index)
        if index is None or (is_there and point.config.teacher_api.is_given):
            continue
        say(f"teach  {index}")
        command = [
            sys.executable,
            "-P",
            "-m",
            "opdjax",
            "teach",
            str(place.directory / point.id / POINT),
        ]
        # Who loses a race for the index waits for the winner.
        while (run := _run_to_its_end(command)).returncode and "another opdjax teach" in run.stderr:
            time.sleep(_REPORT)
        if run.returncode and not is_there:
            raise SweepTeachError(
                f"the answers that points read as data.references could not be had: {run.stderr.strip()[-500:]}"
            )
        if (
            run.returncode
        ):  # of another teacher, perhaps: the points will tell whether they can use it
            say(f"note: going on with {index} as it is: {run.stderr.strip()[-500:]}")


def _run_to_its_end(command: Sequence[str]) -> subprocess.CompletedProcess:
    """As subprocess.run, but a runner that is asked to stop takes the child with it."""
    with (
        _stop_signals() as asked_to_stop,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as child,
    ):
        while True:
            try:
                out, error = child.communicate(timeout=_POLL)
                break
            except subprocess.TimeoutExpired:
                if asked_to_stop:
                    child.terminate()
    if asked_to_stop:
        raise SweepInterruptedError(
            f"{asked_to_stop[0]}: the teacher was stopped; the same command goes on with its answers"
        )
    return subprocess.CompletedProcess(command, child.returncode, out, error)


def _is_there(file: str) -> bool:
    return (
        Folder(url_of(file)).tag() is not None if is_remote(file) else pathlib.Path(file).exists()
    )


def _start_next(
    due: Sequence[SweepPoint],
    place: Place,
    running: Sequence[_Job],
    jobs: int,
    tries: dict[str, _Tries],
) -> _Job | None:
    """Claim and start the first point that nobody else holds."""
    for point in due:
        directory = place.directory / point.id
        if not directory.exists():  # somebody has deleted it since
            _write_points([point], place)
        claim = place.claim(point.id)
        if claim is None:
            continue
        if _is_settled(
            directory, tries[point.id].after
        ):  # by another runner, between our look and our claim
            claim.close()
            continue
        (directory / FAILURE).unlink(missing_ok=True)
        slot = min(set(range(jobs)) - {job.slot for job in running})
        return _Job(
            point, _spawn(point.id, claim, slot, jobs, place), claim, slot, time.monotonic()
        )
    return None


def _spawn(id: str, claim: Claim, slot: int, jobs: int, place: Place) -> subprocess.Popen:
    directory = place.directory / id
    command = [
        sys.executable,
        "-P",
        "-m",
        "opdjax",
        "train",
        str(directory / POINT),
        "--workdir",
        place.workdir(id),
    ]
    # The points of a sweep are often the same program on other numbers: compiled once, it serves
    # them all.
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(place.compiled),
        **os.environ,
        **claim.environment,
    }
    with (directory / LOG).open("a") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=claim.descriptors,
            start_new_session=True,
        )
    claim.started(child.pid)
    if jobs > 1 and sys.platform == "linux":
        cores = sorted(os.sched_getaffinity(0))
        share = max(len(cores) // jobs, 1)
        first = slot * share % len(cores)
        with contextlib.suppress(ProcessLookupError):  # it may be over already
            os.sched_setaffinity(child.pid, cores[first : first + share])
    lease = {} if claim.number is None else {"lease": claim.number}
    start = {
        "event": "start",
        "host": platform.node(),
        "pid": child.pid,
        "time": time.time(),
        **lease,
    }
    append_lines(directory / ATTEMPTS, [start])
    place.publish(directory / ATTEMPTS, directory / FAILURE)
    return child


def _record_end(job: _Job, place: Place) -> float:
    """Write down how a child ended; returns its seconds."""
    job.claim.ended()
    seconds = round(time.monotonic() - job.started, 3)
    if not job.claim.is_lost:
        directory = place.directory / job.point.id
        end = {
            "event": "end",
            "returncode": job.process.returncode,
            "seconds": seconds,
            "time": time.time(),
        }
        append_lines(directory / ATTEMPTS, [end])
        place.publish(directory / LOG, directory / ATTEMPTS)
    return seconds


def _finish(job: _Job, place: Place, say: Say) -> str:
    """Record what became of a child, before its claim is given up."""
    id, directory, code = job.point.id, place.directory / job.point.id, job.process.returncode
    if not directory.exists():
        say(f"killed {id}: its directory was deleted; run the same command again to begin it anew")
        job.claim.close()
        return "stopped"
    seconds = _record_end(job, place)
    if job.claim.is_lost or code == LOST:
        outcome = "lost"
        say(f"lost   {id}: its lease lapsed; whoever takes it next goes on with it")
    elif code == 0:
        outcome = "done"
    elif (number := -code if code < 0 else code - 128) in _FROM_OUTSIDE:
        # A preemption, the memory killer, a person: nothing is wrong with the point, it will be
        # continued. A run that had the time to keep its step ends with a status of its own, 128 and
        # the signal's number.
        outcome = "stopped"
        say(
            f"killed {id} by {signal.Signals(number).name}; run the same command again to continue it"
        )
    else:
        outcome = "failed"
        tail = (directory / LOG).read_text(errors="replace").splitlines()[-_LOG_TAIL:]
        write_json(
            directory / FAILURE,
            {"returncode": code, "seconds": seconds, "time": time.time(), "log_tail": tail},
        )
        place.publish(directory / FAILURE)
        say(f"FAILED {id}: {tail[-1] if tail else 'no output'} ({place.workdir(id)}/{LOG})")
    job.claim.close()
    if outcome == "done":
        place.refresh([id], is_urgent=True)
        say(f"done   {id}  {_scores(directory)}  {seconds:.0f} s")
    return outcome


def _scores(directory: pathlib.Path) -> str:
    after = read_json(directory / RESULT, "delete it, and the run writes it again").get(
        "eval_after", {}
    )
    return "  ".join(f"{name} {after[name]:.3f}" for name in ("avg@k", "greedy") if name in after)


@contextlib.contextmanager
def _stop_signals():
    """The names of the stop signals that have come; the loop looks when no child is half started."""
    asked: list[str] = []
    wanted = (signal.SIGTERM, signal.SIGINT)
    before = [
        signal.signal(number, lambda got, _: asked.append(signal.Signals(got).name))
        for number in wanted
    ]
    try:
        yield asked
    finally:
        for number, handler in zip(wanted, before):
            signal.signal(number, handler)


@contextlib.contextmanager
def _ending(running: list[_Job], place: Place):
    """Leave no child behind when the runner itself is stopped in an orderly way."""
    try:
        yield
    finally:
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()
            with contextlib.suppress(RemoteError):  # whatever ended the runner is to be told
                _record_end(job, place)
                job.claim.close()
