"""Where a run works. A local work directory is its own home; for one on gs:// that is a scratch
directory, a copy that is kept up.

Object stores neither append nor lock, and most of what a run writes grows by rows. So everything
but the checkpoints is brought down at the start and up again before each checkpoint is written,
which orbax does straight to the bucket, every host its part. What a machine takes with it when it
is lost are rows after the last checkpoint: those are cut away and written anew on continuation in
any case.
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

from opdjax.runs.lease import LOST, Lease, LeaseLostError, acquire, inherited
from opdjax.runs.object_store import Folder, Wanted, is_remote, scratch_of, url_of
from opdjax.runs.workdir import WorkdirError, locked

_RESULT = "result.json"
# Written by the runner of a sweep, whose point the run is, or by orbax, or part of the lease.
# What readers of results never look at; of rollouts they read what the filter decided.
_HEAVY = r"(.*/)?((checkpoints|student|student_adapter|published|\.lease|\.teach.*)/|rollouts/.*/(?!filter-)|replies\.sqlite)"
_OF_OTHERS = ("point.json", "attempts.jsonl", "log.txt", "failure.json", "checkpoints/", ".lease/")


class WorkdirMirror:
    """The directory that a run works in, and how what it holds is kept."""

    def __init__(
        self,
        directory: pathlib.Path,
        folder: Folder | None = None,
        lease: Lease | None = None,
        known: Iterable[str] = (),
    ):
        self.directory, self._folder, self._lease, self._known = (
            directory,
            folder,
            lease,
            set(known),
        )

    @property
    def name(self) -> str:
        """The work directory as the user knows it."""
        return self._folder.url if self._folder else str(self.directory)

    @property
    def checkpoints(self) -> str:
        """Where checkpoints go, the same for every process of a run."""
        return (
            f"{self.name}/checkpoints"
            if self._folder
            else str((self.directory / "checkpoints").absolute())
        )

    @property
    def is_remote(self) -> bool:
        """Whether the directory is a copy."""
        return self._folder is not None

    def record_progress(self, **notes: Any) -> None:
        """What of the work others shall see who look at the lease."""
        if self._lease:
            self._lease.record_progress(**notes)

    def upload(self) -> None:
        """Bring up what has changed; LeaseLostError, and nothing is written, where somebody else
        has the work directory.
        """
        if self._lease:
            self._lease.renew()
            self._known = self._folder.upload(
                self.directory, self._known, lambda name: _is_of_the_run(name) and name != _RESULT
            )
            self._lease.check()

    def finish(self) -> None:
        """Bring up everything, and the result last of all, where there is none yet."""
        if self._lease:
            self.upload()
            if not self._folder.create(_RESULT, (self.directory / _RESULT).read_bytes()):
                raise LeaseLostError(
                    f"{self.name} has the result of another process; this one's is not written"
                )

    def download_result(self) -> None:
        """Have the result that the lead wrote; for the other processes of a run."""
        if self._folder and not self._lease:
            self._folder.download(self.directory, lambda name: name == _RESULT)


@contextlib.contextmanager
def open_workdir(workdir: str | os.PathLike) -> Iterator[WorkdirMirror]:
    """Hold a work directory, and keep what the run leaves there, however it ends; WorkdirError
    where another process has it.
    """
    if not is_remote(workdir):
        with locked(pathlib.Path(workdir)):
            yield WorkdirMirror(pathlib.Path(workdir))
        return
    folder = Folder(workdir)
    handed_on = inherited(folder)
    lease = (handed_on or acquire(folder)).start(lambda: _stop_at_once(folder.url))
    try:
        with _scratch(folder.url) as directory, named_as(folder.url, directory):
            home = WorkdirMirror(directory, folder, lease, _bring(folder, directory))
            is_over = False
            try:
                yield home
                is_over = True
            finally:
                if not is_over:
                    with contextlib.suppress(
                        OSError, LeaseLostError
                    ):  # what stopped the run is what is to be told
                        home.upload()
            if (directory / _RESULT).exists():
                shutil.rmtree(directory)  # all of it is up
    finally:
        if handed_on:
            lease.stop()
        else:
            lease.release()


@contextlib.contextmanager
def open_remote_file(url: str, role: str) -> Iterator[tuple[pathlib.Path, Callable[[], None]]]:
    """Hold a file on gs:// that grows by rows: where it is written here, with what lies
    scratch_workdir it under its name, and how it is kept.
    """
    parent, _, name = url_of(url).rpartition("/")
    folder = Folder(parent)
    lease = acquire(folder.subfolder(f".{role}-{name}")).start(lambda: _stop_at_once(url))
    with contextlib.ExitStack() as held:
        held.callback(lease.release)
        directory = held.enter_context(_scratch(url))
        held.enter_context(named_as(parent, directory))
        for found, tag in folder.entries()[0].items():
            if found == name or found.startswith(f"{name}."):
                folder.download_file(found, directory / found, tag)

        def keep() -> None:
            lease.renew()
            for file in directory.glob(f"{name}*"):
                if not file.name.endswith(("-wal", "-shm")):
                    folder.upload_file(file, file.name)

        try:
            yield directory / name, keep
        finally:
            keep()


def scratch_workdir(workdir: str | os.PathLike, process: int) -> WorkdirMirror:
    """The home of a process of a run that is not its lead: nothing is brought up from there."""
    if not is_remote(workdir):
        return WorkdirMirror(pathlib.Path(workdir))
    folder = Folder(workdir)
    lead = scratch_of(folder.url, "runs")
    directory = lead.with_name(f"{lead.name}.process{process}")
    directory.mkdir(parents=True, exist_ok=True)
    _bring(folder, directory)
    return WorkdirMirror(directory, folder)


def read_only_workdir(
    workdir: str | os.PathLike, wanted: Wanted = lambda name: not re.match(_HEAVY, name)
) -> WorkdirMirror:
    """Somewhere to read what a work directory or a sweep holds: itself, or of a URL a copy that is
    brought up to date.
    """
    if not is_remote(workdir):
        return WorkdirMirror(pathlib.Path(workdir))
    folder = Folder(workdir)
    directory = scratch_of(folder.url, "views") / folder.url.rpartition("/")[2]
    folder.download(directory, wanted)
    directory.mkdir(parents=True, exist_ok=True)
    return WorkdirMirror(directory, folder)


def _bring(folder: Folder, directory: pathlib.Path) -> set[str]:
    is_finished = _RESULT in folder.entries()[0]
    return folder.download(
        directory, lambda name: _is_of_the_run(name) and not (is_finished and "/" in name)
    )


def _is_of_the_run(name: str) -> bool:
    return not name.startswith(_OF_OTHERS)


@contextlib.contextmanager
def _scratch(url: str) -> Iterator[pathlib.Path]:
    """The scratch of a URL; another one where a process that lost its lease and does not know it
    yet still has the first.
    """
    first = scratch_of(url, "runs")
    for number in itertools.count(1):
        place = first if number == 1 else first.with_name(f"{first.name}.{number}")
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(place))
            except WorkdirError as error:
                if isinstance(error.__cause__, BlockingIOError):
                    continue
                raise
            yield place
            return


@contextlib.contextmanager
def named_as(url: str, path: pathlib.Path) -> Iterator[None]:
    """Errors speak of what lies at a URL as the user knows it, and not of its copy here."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        error.args = tuple(
            arg.replace(str(path), url) if isinstance(arg, str) else arg for arg in error.args
        )
        raise


@contextlib.contextmanager
def visiting(
    workdir: str | os.PathLike, wanted: Wanted = lambda name: not re.match(_HEAVY, name)
) -> Iterator[pathlib.Path]:
    """As `read_only_workdir`, for as long as errors may arise of what is there."""
    home = read_only_workdir(workdir, wanted)
    with named_as(home.name, home.directory):
        yield home.directory


def _stop_at_once(url: str) -> None:
    """What is being written by the time that the lease is found lost may not be finished in any
    orderly way.
    """
    print(
        f"opdjax: {url} was taken over by another process, or could have been; this one stops",
        file=sys.stderr,
        flush=True,
    )
    os._exit(LOST)
