"""Local copies of work directories that are stored on gs://.

Object stores neither append nor lock, and most files of a run grow by rows. So everything but the
checkpoints is downloaded at the start and uploaded before each checkpoint is written; orbax writes
checkpoints straight to the bucket, each host its part. A machine that is lost takes with it only
rows after the last checkpoint, which a resumed run drops and writes again in any case.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from opdjax.runs.lease import Lease, LeaseLostError, acquire
from opdjax.runs.object_store import Folder, Wanted, is_remote, local_copy, scratch_of, url_of
from opdjax.runs.workdir import locked

_RESULT = "result.json"
# Files that readers of results never open. Of rollouts they read the decisions of the filter.
_HEAVY = (
    r"(.*/)?((checkpoints|student|student_adapter|published|\.lease|\.teach.*)/"
    r"|rollouts/.*/(?!filter-)|replies\.sqlite)"
)
# Written by the runner of a sweep, by orbax, or by the lease.
_NOT_OF_THE_RUN = r"(attempts\.jsonl|log\.txt|failure\.json|checkpoints/|\.lease/)"


@dataclasses.dataclass(frozen=True)
class WorkdirMirror:
    """Local copy of a work directory, synced to its URL; or a local work directory itself."""

    directory: pathlib.Path
    _folder: Folder | None = None
    _lease: Lease | None = None
    _wanted: Wanted | None = None

    @property
    def name(self) -> str:
        """The path or URL of the work directory that the user gave."""
        return self._folder.url if self._folder else str(self.directory)

    @property
    def checkpoints(self) -> str:
        """Path or URL of the checkpoints, the same in every process of a run."""
        return f"{self.name if self._folder else self.directory.absolute()}/checkpoints"

    def record_progress(self, **progress: Any) -> None:
        """Store values such as the step with the lease, where other processes read them."""
        if self._lease:
            self._lease.record_progress(**progress)

    def upload(self) -> None:
        """Upload what has changed; LeaseLostError, before any upload, if the lease is lost."""
        if self._lease:
            self._lease.renew()
            is_wanted = lambda name: name != _RESULT and self._wanted(name)
            self._folder.upload(self.directory, is_wanted)
            self._lease.check()

    def finish(self) -> None:
        """Upload everything, the result last; LeaseLostError if another process wrote one."""
        if self._lease:
            self.upload()
            if not self._folder.create(_RESULT, (self.directory / _RESULT).read_bytes()):
                raise LeaseLostError(
                    f"{self.name} has the result of another process; this one's is not written"
                )


@contextlib.contextmanager
def open_workdir(workdir: str | os.PathLike) -> Iterator[WorkdirMirror]:
    """Lock a work directory and upload what the run wrote, also when the run fails; WorkdirError if
    another process holds it.
    """
    if not is_remote(workdir):
        with locked(pathlib.Path(workdir)):
            yield WorkdirMirror(pathlib.Path(workdir))
        return
    folder = Folder(workdir)
    with _leased(folder, folder) as mirror:
        yield mirror
        if (mirror.directory / _RESULT).exists():
            shutil.rmtree(mirror.directory)  # all of it is uploaded


@contextlib.contextmanager
def open_remote_file(url: str, role: str) -> Iterator[tuple[pathlib.Path, Callable[[], None]]]:
    """Lock a file on gs:// that grows by rows: yields its local copy and a function that uploads
    it. Files whose names begin with `NAME.` are copied with it.
    """
    parent, _, name = url_of(url).rpartition("/")
    folder = Folder(parent, is_flat=True)
    wanted = lambda found: found == name or found.startswith(f"{name}.")
    with _leased(folder.subfolder(f".{role}-{name}"), folder, wanted) as mirror:
        yield mirror.directory / name, mirror.upload
        mirror.upload()


def scratch_workdir(workdir: str | os.PathLike, process: int) -> WorkdirMirror:
    """The work directory of a process other than process zero, which alone reads and writes its
    files; on gs:// it has none.
    """
    if not is_remote(workdir):
        return WorkdirMirror(pathlib.Path(workdir))
    folder = Folder(workdir)
    return WorkdirMirror(scratch_of(folder.url, f"process{process}"), folder)


@contextlib.contextmanager
def read_only_workdir(
    workdir: str | os.PathLike, wanted: Wanted = lambda name: not re.match(_HEAVY, name)
) -> Iterator[WorkdirMirror]:
    """A work directory or a sweep to read from: a local one in place, one on gs:// as an updated
    copy of the wanted files. Errors raised inside name the URL.
    """
    directory = local_copy(workdir, wanted, is_required=False)
    mirror = WorkdirMirror(directory, Folder(workdir) if is_remote(workdir) else None)
    with _errors_name_url(mirror.name, directory):
        yield mirror


@contextlib.contextmanager
def _leased(
    leased: Folder,
    folder: Folder,
    wanted: Wanted = lambda name: not re.match(_NOT_OF_THE_RUN, name),
) -> Iterator[WorkdirMirror]:
    """Hold the lease of a folder; yield the copy of `folder` that belongs to this holder alone, and
    upload it if the caller fails.
    """
    lease = acquire(leased).start()
    directory = scratch_of(leased.url, "workdirs") / str(lease.number)
    with contextlib.ExitStack() as at_end, _errors_name_url(folder.url, directory):
        at_end.callback(lease.release)
        for old in directory.parent.glob("*"):
            # The last holders may have been paused: they need their files until they see the loss.
            if int(old.name) < lease.number - 2:
                shutil.rmtree(old, ignore_errors=True)
        is_finished = folder.tag(_RESULT) is not None  # then only what lies directly there is read
        folder.download(directory, lambda name: wanted(name) and not (is_finished and "/" in name))
        mirror = WorkdirMirror(directory, folder, lease, wanted)
        try:
            yield mirror
        except BaseException:
            with contextlib.suppress(OSError, LeaseLostError):  # the caller's error is reported
                mirror.upload()
            raise


@contextlib.contextmanager
def _errors_name_url(url: str, directory: pathlib.Path) -> Iterator[None]:
    """Replace the path of a local copy by its URL in error messages."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        error.args = tuple(
            arg.replace(str(directory), url) if isinstance(arg, str) else arg for arg in error.args
        )
        raise
