"""Where the points of a sweep live, in a directory or on gs://, and how a runner claims one.

What is known of the points is read from `directory`. On gs:// that is a copy of a runner's own:
`refresh` brings what others have done, `publish` tells them what was done here. A claim is a lock
on a local disk and a lease elsewhere; the child that runs the point has it too.
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
from opdjax.runs.object_store import Folder, RemoteError, in_parallel, is_remote, scratch_root
from opdjax.runs.results import FAILURE, POINT, RESULT, status_of
from opdjax.runs.workdir import WorkdirError, read_lines

ATTEMPTS, LOG = "attempts.jsonl", "log.txt"
_TOLD = (POINT, FAILURE, RESULT, ATTEMPTS, LOG, "config.json")
_QUIET = 600.0  # seconds without a row after which a local run is called stalled
_LOG_EVERY = 30.0


@dataclasses.dataclass(frozen=True)
class Beat:
    """The last sign of life of who runs a point."""

    host: str
    age: float  # seconds
    is_stalled: bool
    step: int | None


class Claim(Protocol):
    """A point that nobody else may run."""

    environment: dict[str, str]  # for the child, which holds the claim as well
    descriptors: tuple[int, ...]  # likewise
    number: int | None  # of the lease

    def started(self, pid: int) -> None:
        """The child runs: where the claim is lost, it is killed."""

    def tend(self) -> None:
        """To be called now and then while the child runs."""

    def ended(self) -> None:
        """The child is over: what remains to be done is done under the claim of its runner alone."""

    @property
    def is_lost(self) -> bool:
        """Whether somebody else may have the point: nothing may be written about it."""

    def close(self) -> None:
        """Give the point back."""


class Place(Protocol):
    """A directory of points."""

    name: str
    directory: pathlib.Path
    compiled: pathlib.Path  # programs, kept for all points

    def workdir(self, id: str) -> str:
        """The work directory of a point's run."""

    def refresh(self, ids: Iterable[str], is_urgent: bool = False) -> None:
        """Bring `directory` up to date, as often as is worth it."""

    def publish(self, *files: pathlib.Path) -> None:
        """Let others see files of `directory`, or that they are gone."""

    def claim(self, id: str) -> Claim | None:
        """The claim on a point, None where somebody else has it."""

    def beats(self, ids: Iterable[str]) -> dict[str, Beat]:
        """Of the points that somebody runs now."""

    def step(self, id: str) -> int:
        """Steps that a point's run has done, as far as is known."""


@contextlib.contextmanager
def open_place(workdir: str | os.PathLike) -> Iterator[Place]:
    """The place of a sweep; WorkdirError where it cannot live there: in a file, in a single run."""
    if is_remote(workdir):
        with tempfile.TemporaryDirectory(prefix="opdjax-sweep-") as directory:
            place = _RemotePlace(Folder(workdir), pathlib.Path(directory))
            _require_no_run("config.json" in place.folder.entries()[0], place.name)
            yield place
        return
    place = _LocalPlace(pathlib.Path(workdir))
    if any(
        path.exists() and not path.is_dir() for path in (place.directory, *place.directory.parents)
    ):
        raise WorkdirError(
            f"--workdir {workdir} is a file or lies in one; expected a directory, or the place of a new one"
        )
    _require_no_run((place.directory / "config.json").exists(), place.name)
    yield place


def _require_no_run(is_run: bool, name: str) -> None:
    if is_run:
        raise WorkdirError(
            f"--workdir {name} holds a config.json, of a run or a model; expected a directory for the whole sweep"
        )


class _LocalClaim:
    environment: dict[str, str] = {}  # noqa: RUF012 (never written to)
    number, is_lost = None, False

    def __init__(self, file: Any):
        self._file, self.descriptors = file, (file.fileno(),)

    def started(self, pid: int) -> None:
        pass  # the lock goes when both are dead, however they died, and never earlier

    def tend(self) -> None:
        pass

    def ended(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()


class _LocalPlace:
    def __init__(self, directory: pathlib.Path):
        self.name, self.directory, self.compiled = (
            str(directory),
            directory,
            (directory / ".compiled").resolve(),
        )

    def workdir(self, id: str) -> str:
        return str(self.directory / id)

    def refresh(self, ids: Iterable[str], is_urgent: bool = False) -> None:
        pass

    def publish(self, *files: pathlib.Path) -> None:
        pass

    def claim(self, id: str) -> Claim | None:
        file = (self.directory / id / ".claim").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return _LocalClaim(file)

    def beats(self, ids: Iterable[str]) -> dict[str, Beat]:
        return {id: beat for id in ids if (beat := self._beat(id)) is not None}

    def _beat(self, id: str) -> Beat | None:
        try:
            with (self.directory / id / ".claim").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
        except FileNotFoundError:
            return None
        except BlockingIOError:
            pass
        written = [
            file.stat().st_mtime
            for name in ("metrics.jsonl", LOG, ATTEMPTS)
            if (file := self.directory / id / name).exists()
        ]
        age = time.time() - max(written, default=time.time())
        return Beat(_last_host(self.directory / id), age, age > _QUIET, self.step(id))

    def step(self, id: str) -> int:
        file = self.directory / id / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0


def _last_host(directory: pathlib.Path) -> str:
    hosts = [row["host"] for row in read_lines(directory / ATTEMPTS) if "host" in row]
    return hosts[-1] if hosts else ""


class _RemoteClaim:
    descriptors: tuple[int, ...] = ()

    def __init__(self, place: _RemotePlace, id: str, lease: Lease):
        self._place, self._id, self._lease, self._pid = place, id, lease, None
        self.number, self.is_lost, self._log_sent = lease.number, False, time.monotonic()
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

    def tend(self) -> None:
        if time.monotonic() - self._log_sent > _LOG_EVERY and not self.is_lost:
            self._log_sent = time.monotonic()
            with contextlib.suppress(RemoteError):  # it goes up again at the end
                self._place.publish(self._place.directory / self._id / LOG)

    def ended(self) -> None:
        self._pid = None

    def close(self) -> None:
        self._place.held.discard(self._id)
        self._lease.release()


class _RemotePlace:
    def __init__(self, folder: Folder, directory: pathlib.Path):
        self.name, self.folder, self.directory, self.compiled = (
            folder.url,
            folder,
            directory,
            scratch_root() / "compiled",
        )
        self.held: set[str] = set()
        self._watches: dict[str, ExpiryWatch] = {}
        self._looked: dict[str, float] = {}
        self._refreshed = -float("inf")
        self._pause = lease_seconds() / 6

    def workdir(self, id: str) -> str:
        return f"{self.folder.url}/{id}"

    def refresh(self, ids: Iterable[str], is_urgent: bool = False) -> None:
        if not is_urgent and time.monotonic() - self._refreshed < self._pause:
            return
        in_parallel(
            self._refresh,
            [id for id in ids if id not in self.held and status_of(self.directory / id) != "done"],
        )
        self._refreshed = time.monotonic()

    def _refresh(self, id: str) -> None:
        folder, directory = self.folder.subfolder(id), self.directory / id
        found = {name: tag for name, tag in folder.entries()[0].items() if name in _TOLD}
        for name in set(_TOLD) - found.keys():
            (directory / name).unlink(missing_ok=True)
        for name, tag in found.items():
            with contextlib.suppress(
                FileNotFoundError
            ):  # another runner has just begun to try a failure again
                folder.download_file(name, directory / name, tag)

    def publish(self, *files: pathlib.Path) -> None:
        def tell(file: pathlib.Path) -> None:
            name = str(file.relative_to(self.directory))
            if file.exists():
                self.folder.upload_file(file, name)
            else:
                self.folder.remove(name)

        in_parallel(tell, files)

    def claim(self, id: str) -> Claim | None:
        if time.monotonic() - self._looked.get(id, -float("inf")) < self._pause:
            return None
        lease = try_acquire(self.folder.subfolder(id), self._watches.setdefault(id, ExpiryWatch()))
        self._looked[id] = time.monotonic()
        if lease is None:
            return None
        del self._watches[id], self._looked[id]
        claim = _RemoteClaim(self, id, lease)
        self._refresh(id)  # what its last holder left
        self.held.add(id)
        return claim

    def beats(self, ids: Iterable[str]) -> dict[str, Beat]:
        found: dict[str, Beat] = {}

        def look(id: str) -> None:
            holder = holder_of(self.folder.subfolder(id))
            if holder is not None and not holder.is_released and not holder.is_dead:
                age = time.time() - holder.about["time"]
                found[id] = Beat(
                    holder.about["host"],
                    max(age, 0.0),
                    age > holder.about["seconds"],
                    holder.about.get("step"),
                )

        in_parallel(look, ids)
        return found

    def step(self, id: str) -> int:
        holder = holder_of(self.folder.subfolder(id))
        return (holder.about.get("step") if holder else None) or 0
