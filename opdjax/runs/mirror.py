"""Local copies of work directories that are stored on gs://.

Object stores neither append nor lock, and most files of a run grow by rows. So everything but the
checkpoints is downloaded at the start and uploaded before each checkpoint is written; orbax writes
checkpoints straight to the bucket, each host its part. A machine that is lost takes with it only
rows after the last checkpoint, which a resumed run drops and writes again in any case.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from opdjax.runs.lease import LOST, Lease, LeaseLostError, acquire, inherit
from opdjax.runs.object_store import Folder, Wanted, is_remote, scratch_of, url_of
from opdjax.runs.workdir import WorkdirError, locked

_RESULT = "result.json"
# Files that readers of results never open. Of rollouts they read the decisions of the filter.
_HEAVY = (
    r"(.*/)?((checkpoints|student|student_adapter|published|\.lease|\.teach.*)/"
    r"|rollouts/.*/(?!filter-)|replies\.sqlite)"
)
# Written by the sweep that the run is a point of, by orbax, or by the lease.
_NOT_OF_THE_RUN = (
    "point.json",
    "attempts.jsonl",
    "log.txt",
    "failure.json",
    "checkpoints/",
    ".lease/",
)


class WorkdirMirror:
    """Local copy of a work directory, synced to its URL. A local work directory is used in
    place.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        folder: Folder | None = None,
        lease: Lease | None = None,
        known: Iterable[str] = (),
    ):
        self.directory = directory
        self._folder, self._lease, self._known = folder, lease, set(known)

    @property
    def name(self) -> str:
        """The path or URL of the work directory that the user gave."""
        return self._folder.url if self._folder else str(self.directory)

    @property
    def checkpoints(self) -> str:
        """Path or URL of the checkpoints, the same in every process of a run."""
        if self._folder:
            return f"{self.name}/checkpoints"
        return str((self.directory / "checkpoints").absolute())

    @property
    def is_remote(self) -> bool:
        """Whether the directory is a copy."""
        return self._folder is not None

    def record_progress(self, **progress: Any) -> None:
        """Store values such as the step with the lease, where other processes read them."""
        if self._lease:
            self._lease.record_progress(**progress)

    def upload(self) -> None:
        """Upload what has changed; LeaseLostError, before any upload, if another process holds the
        work directory.
        """
        if self._lease:
            self._lease.renew()
            self._known = self._folder.upload(
                self.directory, self._known, lambda name: _is_of_the_run(name) and name != _RESULT
            )
            self._lease.check()

    def finish(self) -> None:
        """Upload everything, the result last; LeaseLostError if there already is a result of
        another process.
        """
        if self._lease:
            self.upload()
            if not self._folder.create(_RESULT, (self.directory / _RESULT).read_bytes()):
                raise LeaseLostError(
                    f"{self.name} has the result of another process; this one's is not written"
                )

    def download_result(self) -> None:
        """Download the result that process zero wrote; for the other processes of a run."""
        if self._folder and not self._lease:
            self._folder.download(self.directory, lambda name: name == _RESULT)


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
    inherited = inherit(folder)
    lease = (inherited or acquire(folder)).start(lambda: _exit_now(folder.url))
    try:
        with _scratch(folder.url) as directory, _errors_name_url(folder.url, directory):
            mirror = WorkdirMirror(directory, folder, lease, _download(folder, directory))
            with contextlib.ExitStack() as on_failure:
                on_failure.callback(_try_upload, mirror)
                yield mirror
                on_failure.pop_all()
            if (directory / _RESULT).exists():
                shutil.rmtree(directory)  # all of it is uploaded
    finally:
        if inherited:
            lease.stop()
        else:
            lease.release()


@contextlib.contextmanager
def open_remote_file(url: str, role: str) -> Iterator[tuple[pathlib.Path, Callable[[], None]]]:
    """Lock a file on gs:// that grows by rows: yields its local copy and a function that uploads
    it. Files whose names begin with `NAME.` are copied with it.
    """
    parent, _, name = url_of(url).rpartition("/")
    folder = Folder(parent)
    lease = acquire(folder.subfolder(f".{role}-{name}")).start(lambda: _exit_now(url))
    with contextlib.ExitStack() as stack:
        stack.callback(lease.release)
        directory = stack.enter_context(_scratch(url))
        stack.enter_context(_errors_name_url(parent, directory))
        for stored, tag in folder.entries()[0].items():
            if stored == name or stored.startswith(f"{name}."):
                folder.download_file(stored, directory / stored, tag)

        def upload() -> None:
            lease.renew()
            for file in directory.glob(f"{name}*"):
                if not file.name.endswith(("-wal", "-shm")):
                    folder.upload_file(file, file.name)

        try:
            yield directory / name, upload
        finally:
            upload()


def scratch_workdir(workdir: str | os.PathLike, process: int) -> WorkdirMirror:
    """The work directory of a process other than process zero; its files are never uploaded."""
    if not is_remote(workdir):
        return WorkdirMirror(pathlib.Path(workdir))
    folder = Folder(workdir)
    of_process_zero = scratch_of(folder.url, "runs")
    directory = of_process_zero.with_name(f"{of_process_zero.name}.process{process}")
    directory.mkdir(parents=True, exist_ok=True)
    _download(folder, directory)
    return WorkdirMirror(directory, folder)


@contextlib.contextmanager
def read_only_workdir(
    workdir: str | os.PathLike, wanted: Wanted = lambda name: not re.match(_HEAVY, name)
) -> Iterator[WorkdirMirror]:
    """A work directory or a sweep to read from: a local one in place, one on gs:// as an updated
    copy of the wanted files. Errors raised inside name the URL.
    """
    if not is_remote(workdir):
        yield WorkdirMirror(pathlib.Path(workdir))
        return
    folder = Folder(workdir)
    directory = scratch_of(folder.url, "views") / folder.url.rpartition("/")[2]
    folder.download(directory, wanted)
    directory.mkdir(parents=True, exist_ok=True)
    with _errors_name_url(folder.url, directory):
        yield WorkdirMirror(directory, folder)


def _download(folder: Folder, directory: pathlib.Path) -> set[str]:
    is_finished = _RESULT in folder.entries()[0]
    return folder.download(
        directory, lambda name: _is_of_the_run(name) and not (is_finished and "/" in name)
    )


def _is_of_the_run(name: str) -> bool:
    return not name.startswith(_NOT_OF_THE_RUN)


@contextlib.contextmanager
def _scratch(url: str) -> Iterator[pathlib.Path]:
    """The local directory of a URL, locked; a numbered one while a process that has not yet noticed
    the loss of its lease holds the first.
    """
    first = scratch_of(url, "runs")
    for number in itertools.count(1):
        directory = first if number == 1 else first.with_name(f"{first.name}.{number}")
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(directory))
            except WorkdirError as error:
                if isinstance(error.__cause__, BlockingIOError):
                    continue
                raise
            yield directory
            return


@contextlib.contextmanager
def _errors_name_url(url: str, path: pathlib.Path) -> Iterator[None]:
    """Replace the path of a local copy by its URL in error messages."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        error.args = tuple(
            arg.replace(str(path), url) if isinstance(arg, str) else arg for arg in error.args
        )
        raise


def _try_upload(mirror: WorkdirMirror) -> None:
    with contextlib.suppress(OSError, LeaseLostError):  # the run's own error is the one to report
        mirror.upload()


def _exit_now(url: str) -> None:
    """End the process without cleanup: what it is writing may not be finished in any orderly way
    once the lease is lost.
    """
    print(
        f"opdjax: {url} was taken over by another process, or could have been; this one stops",
        file=sys.stderr,
        flush=True,
    )
    os._exit(LOST)
