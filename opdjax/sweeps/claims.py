"""The directory of a sweep, local or on gs://, and how a runner claims one of its points.

A claim is a lock on a local disk and a lease on gs://; the child process that runs the point holds
it too. The state of the points is read from `path`. On gs:// that is a private copy of each runner:
`refresh` downloads what other runners have written, `upload` uploads what this one has written.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import pathlib
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TextIO

from opdjax.runs.lease import ExpiryWatch, Lease, holder_of, lease_seconds, try_acquire
from opdjax.runs.object_store import Folder, in_parallel, is_remote
from opdjax.runs.results import FAILURE, POINT, RESULT, status_of
from opdjax.runs.workdir import WorkdirError, lock_file, read_lines

ATTEMPTS, LOG = "attempts.jsonl", "log.txt"
_SHARED = (POINT, FAILURE, RESULT, ATTEMPTS, LOG, "config.json")
_STALLED_AFTER = 600.0  # seconds without a new row in a local run


@dataclasses.dataclass(frozen=True)
class Heartbeat:
    """The last sign of life of a running point."""

    host: str
    age: float  # seconds
    is_stalled: bool
    step: int


class FileLock:
    """A claim on a local disk, as a `Lease` is one on gs://. The lock ends when this process and
    its child, which inherits the file, have ended: neither can lose it.
    """

    environment: Mapping[str, str] = MappingProxyType({})
    is_lost, child = False, None

    def __init__(self, file: TextIO):
        self.descriptors, self.release = (file.fileno(),), file.close

    def child_ended(self) -> None:
        """Nothing to do: the lock is still held."""


Claim = FileLock | Lease


class SweepDirectory:
    """The directory that holds the points of a sweep: `path` itself, or a folder on gs:// with its
    copy in `path`. On a local disk there is nothing to download or upload.
    """

    def __init__(self, path: pathlib.Path, folder: Folder | None = None):
        self.path = path  # local files of the points: `path / ID`
        self.name = folder.url if folder else str(path)  # of the work directories: `name/ID`
        self.interval = lease_seconds() / 6 if folder else 0.0  # seconds between looks at points
        self._folder, self._watches = folder, collections.defaultdict(ExpiryWatch)

    def refresh(self, ids: Iterable[str]) -> None:
        """Download the state of these points, unless they are done."""
        if self._folder:
            in_parallel(self._download, [id for id in ids if status_of(self.path / id) != "done"])

    def _download(self, id: str) -> None:
        shared = self._folder.subfolder(id, is_flat=True)
        shared.download(self.path / id, _SHARED.__contains__)

    def upload(self, *files: pathlib.Path) -> None:
        """Upload files of `path`, or remove the objects of files that are gone."""
        if self._folder:
            names = {file: str(file.relative_to(self.path)) for file in files}
            in_parallel(lambda file: self._folder.upload_file(file, names[file]), files)

    def claim(self, id: str) -> Claim | None:
        """The claim on a point; None if another runner holds it."""
        if self._folder is None:
            file = lock_file(self.path / id / ".claim")
            return file and FileLock(file)
        lease = try_acquire(self._folder.subfolder(id), self._watches[id])
        if lease is not None:
            lease.start(ends_process=False)  # the runner reads `is_lost`
            self._download(id)  # what its last holder wrote
        return lease

    def heartbeat(self, id: str) -> Heartbeat | None:
        """The last sign of life of a point; None if it is not running now."""
        if self._folder is None:
            return self._local_heartbeat(self.path / id)
        holder = holder_of(self._folder.subfolder(id))
        if not holder or holder.get("released"):
            return None
        age = max(time.time() - holder["time"], 0.0)
        return Heartbeat(holder["host"], age, age > holder["seconds"], holder.get("step", 0))

    def _local_heartbeat(self, directory: pathlib.Path) -> Heartbeat | None:
        if not (claim := directory / ".claim").exists():
            return None
        if file := lock_file(claim, is_exclusive=False):
            file.close()
            return None  # nobody holds it
        files = [directory / name for name in ("metrics.jsonl", LOG, ATTEMPTS)]
        times = [file.stat().st_mtime for file in files if file.exists()]
        age = time.time() - max(times) if times else 0.0
        hosts = [row["host"] for row in read_lines(files[-1]) if "host" in row]
        step = files[0].read_bytes().count(b"\n") if files[0].exists() else 0
        return Heartbeat(hosts[-1] if hosts else "", age, age > _STALLED_AFTER, step)


@contextlib.contextmanager
def open_sweep(workdir: str | os.PathLike) -> Iterator[SweepDirectory]:
    """The directory of a sweep; WorkdirError if it is a file or holds a single run."""
    path, folder = pathlib.Path(workdir), Folder(workdir) if is_remote(workdir) else None
    if not folder and any(place.exists() and not place.is_dir() for place in (path, *path.parents)):
        raise WorkdirError(
            f"--workdir {workdir} is a file or lies in one; expected a directory, or a path where "
            "one can be made"
        )
    if folder.tag("config.json") if folder else (path / "config.json").exists():
        raise WorkdirError(
            f"--workdir {folder.url if folder else path} holds a config.json, of a run or a model; "
            "expected a directory for the whole sweep"
        )
    with tempfile.TemporaryDirectory(prefix="opdjax-sweep-") as copy:
        yield SweepDirectory(pathlib.Path(copy) if folder else path, folder)
