"""The directory of a sweep, local or on gs://, and how a runner claims one of its points.

A claim is a lock on a local disk and a lease on gs://; the child process that runs the point holds
it too. The state of the points is read from `path`. On gs:// that is a private copy of each runner:
`refresh` downloads what other runners have written, `upload` uploads what this one has written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from opdjax.runs.lease import ExpiryWatch, Lease, holder_of, lease_seconds, try_acquire
from opdjax.runs.object_store import Folder, RemoteError, in_parallel, is_remote
from opdjax.runs.results import FAILURE, POINT, RESULT, status_of
from opdjax.runs.workdir import WorkdirError, read_lines

ATTEMPTS, LOG = "attempts.jsonl", "log.txt"
_SHARED = (POINT, FAILURE, RESULT, ATTEMPTS, LOG, "config.json")
_STALLED_AFTER = 600.0  # seconds without a new row in a local run
_LOG_INTERVAL = 30.0  # seconds between uploads of a log


@dataclasses.dataclass(frozen=True)
class Heartbeat:
    """The last sign of life of a running point."""

    host: str
    age: float  # seconds
    is_stalled: bool
    step: int | None


class Claim(Protocol):
    """A point that only this runner may run."""

    environment: dict[str, str]  # variables with which the child holds the claim too
    descriptors: tuple[int, ...]  # files to pass to the child, for the same purpose
    lease_number: int | None  # None: a local lock
    is_lost: bool  # another runner may have the point: nothing may be written about it

    def started(self, pid: int) -> None:
        """Call after the child has started. It is killed if the claim is lost."""

    def upload_log(self) -> None:
        """Call regularly while the child runs; uploads its log now and then."""

    def ended(self) -> None:
        """Call after the child has ended. From then on this runner alone holds the claim."""

    def release(self) -> None:
        """Give the point back."""


class SweepDirectory(Protocol):
    """The directory that holds the points of a sweep."""

    name: str  # path or URL that the user gave
    path: pathlib.Path  # local files of the points: `path / ID`

    def workdir(self, id: str) -> str:
        """Path or URL of the work directory of a point."""

    def refresh(self, ids: Iterable[str], is_urgent: bool = False) -> None:
        """Download the state of points; unless urgent, at most every few seconds."""

    def upload(self, *files: pathlib.Path) -> None:
        """Upload files of `path`, or remove the objects of files that are gone."""

    def claim(self, id: str) -> Claim | None:
        """The claim on a point; None if another runner holds it."""

    def heartbeats(self, ids: Iterable[str]) -> dict[str, Heartbeat]:
        """The heartbeats of those points that are running now, by id."""

    def step(self, id: str) -> int:
        """Steps that a point has completed, as far as is known."""


@contextlib.contextmanager
def open_sweep(workdir: str | os.PathLike) -> Iterator[SweepDirectory]:
    """The directory of a sweep; WorkdirError if it is a file or holds a single run."""
    if is_remote(workdir):
        with tempfile.TemporaryDirectory(prefix="opdjax-sweep-") as directory:
            sweep = _RemoteSweep(Folder(workdir), pathlib.Path(directory))
            _require_no_run("config.json" in sweep.folder.entries()[0], sweep.name)
            yield sweep
        return
    sweep = _LocalSweep(pathlib.Path(workdir))
    if any(path.exists() and not path.is_dir() for path in (sweep.path, *sweep.path.parents)):
        raise WorkdirError(
            f"--workdir {workdir} is a file or lies in one; expected a directory, or a path where "
            "one can be made"
        )
    _require_no_run((sweep.path / "config.json").exists(), sweep.name)
    yield sweep


def _require_no_run(is_run: bool, name: str) -> None:
    if is_run:
        raise WorkdirError(
            f"--workdir {name} holds a config.json, of a run or a model; expected a directory for "
            "the whole sweep"
        )


class _LocalClaim:
    """A lock that runner and child hold; it is released when both have ended."""

    environment: dict[str, str] = {}  # noqa: RUF012 (never written to)
    lease_number, is_lost = None, False

    def __init__(self, file: Any):
        self._file, self.descriptors = file, (file.fileno(),)

    def started(self, pid: int) -> None:
        pass

    def upload_log(self) -> None:
        pass

    def ended(self) -> None:
        pass

    def release(self) -> None:
        self._file.close()


class _LocalSweep:
    def __init__(self, path: pathlib.Path):
        self.name, self.path = str(path), path

    def workdir(self, id: str) -> str:
        return str(self.path / id)

    def refresh(self, ids: Iterable[str], is_urgent: bool = False) -> None:
        pass

    def upload(self, *files: pathlib.Path) -> None:
        pass

    def claim(self, id: str) -> Claim | None:
        file = (self.path / id / ".claim").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return _LocalClaim(file)

    def heartbeats(self, ids: Iterable[str]) -> dict[str, Heartbeat]:
        return {id: beat for id in ids if (beat := self._heartbeat(id)) is not None}

    def _heartbeat(self, id: str) -> Heartbeat | None:
        directory = self.path / id
        try:
            with (directory / ".claim").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None  # nobody holds the claim
        except FileNotFoundError:
            return None
        except BlockingIOError:
            pass
        files = [directory / name for name in ("metrics.jsonl", LOG, ATTEMPTS)]
        now = time.time()
        age = now - max((file.stat().st_mtime for file in files if file.exists()), default=now)
        return Heartbeat(_last_host(directory), age, age > _STALLED_AFTER, self.step(id))

    def step(self, id: str) -> int:
        file = self.path / id / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0


def _last_host(directory: pathlib.Path) -> str:
    hosts = [row["host"] for row in read_lines(directory / ATTEMPTS) if "host" in row]
    return hosts[-1] if hosts else ""


class _RemoteClaim:
    """A lease that the child renews while it runs, and the runner before and after."""

    descriptors: tuple[int, ...] = ()

    def __init__(self, sweep: _RemoteSweep, id: str, lease: Lease):
        self._sweep, self._id, self._lease, self._pid = sweep, id, lease, None
        self.lease_number, self.is_lost = lease.number, False
        self._log_uploaded = time.monotonic()
        self.environment = lease.child_environment()
        lease.start(self._lose, lambda: self._pid is not None)

    def _lose(self) -> None:
        self.is_lost = True
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)

    def started(self, pid: int) -> None:
        self._lease.add_process(pid)
        self._pid = pid
        if self.is_lost:
            self._lose()

    def upload_log(self) -> None:
        if time.monotonic() - self._log_uploaded > _LOG_INTERVAL and not self.is_lost:
            self._log_uploaded = time.monotonic()
            with contextlib.suppress(RemoteError):  # the log is uploaded again at the end
                self._sweep.upload(self._sweep.path / self._id / LOG)

    def ended(self) -> None:
        self._pid = None

    def release(self) -> None:
        self._sweep.held.discard(self._id)
        self._lease.release()


class _RemoteSweep:
    def __init__(self, folder: Folder, path: pathlib.Path):
        self.name, self.folder, self.path = folder.url, folder, path
        self.held: set[str] = set()  # ids of points that this runner has claimed
        self._watches: dict[str, ExpiryWatch] = {}
        self._tried: dict[str, float] = {}
        self._refreshed = -float("inf")
        self._interval = lease_seconds() / 6  # between two looks at one point

    def workdir(self, id: str) -> str:
        return f"{self.folder.url}/{id}"

    def refresh(self, ids: Iterable[str], is_urgent: bool = False) -> None:
        if not is_urgent and time.monotonic() - self._refreshed < self._interval:
            return
        open_ids = [id for id in ids if id not in self.held and status_of(self.path / id) != "done"]
        in_parallel(self._refresh, open_ids)
        self._refreshed = time.monotonic()

    def _refresh(self, id: str) -> None:
        folder, directory = self.folder.subfolder(id), self.path / id
        stored = {name: tag for name, tag in folder.entries()[0].items() if name in _SHARED}
        for name in set(_SHARED) - stored.keys():
            (directory / name).unlink(missing_ok=True)
        for name, tag in stored.items():
            # Another runner that retries a failed point has just removed the file.
            with contextlib.suppress(FileNotFoundError):
                folder.download_file(name, directory / name, tag)

    def upload(self, *files: pathlib.Path) -> None:
        def upload(file: pathlib.Path) -> None:
            name = str(file.relative_to(self.path))
            if file.exists():
                self.folder.upload_file(file, name)
            else:
                self.folder.remove(name)

        in_parallel(upload, files)

    def claim(self, id: str) -> Claim | None:
        if time.monotonic() - self._tried.get(id, -float("inf")) < self._interval:
            return None
        lease = try_acquire(self.folder.subfolder(id), self._watches.setdefault(id, ExpiryWatch()))
        self._tried[id] = time.monotonic()
        if lease is None:
            return None
        del self._watches[id], self._tried[id]
        claim = _RemoteClaim(self, id, lease)
        self._refresh(id)  # what its last holder wrote
        self.held.add(id)
        return claim

    def heartbeats(self, ids: Iterable[str]) -> dict[str, Heartbeat]:
        beats: dict[str, Heartbeat] = {}

        def read(id: str) -> None:
            holder = holder_of(self.folder.subfolder(id))
            if holder is not None and not holder.is_released and not holder.is_dead:
                about = holder.about
                age = time.time() - about["time"]
                is_stalled = age > about["seconds"]
                beats[id] = Heartbeat(about["host"], max(age, 0.0), is_stalled, about.get("step"))

        in_parallel(read, ids)
        return beats

    def step(self, id: str) -> int:
        holder = holder_of(self.folder.subfolder(id))
        return (holder.about.get("step") if holder else None) or 0
