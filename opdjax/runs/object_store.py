"""What lies behind a URL such as gs://bucket/run, by fsspec: objects read, written whole, created
exclusively, copied to and fro. No jax.

A file that was fetched or sent carries the tag of its object (generation, where there is one) as
its time of modification: whether the two are still the same is seen from a listing and a stat,
without a register that could go wrong.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import os
import pathlib
import re
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_SCHEMES = ("gs", "memory")  # the latter lives and dies with a process
_AT_A_TIME = 8  # objects on their way
_SQLITE = (".sqlite", ".sqlite3", ".db")
Wanted = Callable[[str], bool]


class RemoteError(OSError):
    """The storage behind a URL could not be had, or does not hold what it should."""


def is_remote(path: str | os.PathLike) -> bool:
    """Whether it is a URL, also as pathlib spells one (gs:/bucket)."""
    return re.match(r"[a-z][a-z0-9]+:/", str(path)) is not None


def url_of(path: str | os.PathLike) -> str:
    """The URL as it should be spelled; RemoteError where no storage of its kind is known."""
    scheme, rest = re.fullmatch(r"([a-z][a-z0-9]+):/+(.*)", str(path), re.DOTALL).groups()
    if scheme not in _SCHEMES:
        raise RemoteError(
            f"{scheme}://{rest} is no place to read or write; expected a local path or gs://BUCKET/NAME"
        )
    if not rest.strip("/"):
        raise RemoteError(f"{scheme}:// names no bucket; expected gs://BUCKET/NAME")
    return f"{scheme}://{rest.strip('/')}"


def scratch_root() -> pathlib.Path:
    """Where local copies of what is remote live: $OPDJAX_SCRATCH, or in the user's cache."""
    default = (
        pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "opdjax"
    )
    return pathlib.Path(os.environ.get("OPDJAX_SCRATCH") or default)


def scratch_of(url: str, kind: str) -> pathlib.Path:
    """The local place of a URL, the same in every process of this machine."""
    readable = re.sub(r"[^A-Za-z0-9._=,-]+", "-", url.partition("://")[2])[-60:].strip("-")
    return scratch_root() / kind / f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


class Folder:
    """The objects below a URL; names are relative to it."""

    def __init__(self, url: str | os.PathLike):
        self.url = url_of(url)
        self._files = _file_system(self.url.partition("://")[0])
        self._root = self.url if self.url.startswith("gs:") else self.url.partition(":/")[2]

    def subfolder(self, name: str) -> Folder:
        """A folder in this one."""
        return Folder(f"{self.url}/{name}")

    def read(self, name: str) -> bytes | None:
        """What the object holds; None where there is none."""
        with self._told():
            try:
                return self._files.cat_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Put an object in the place of what is there; readers see the old one or the new one."""
        with self._told(), self._bucket_expected():
            self._files.pipe_file(f"{self._root}/{name}", data)

    def create(self, name: str, data: bytes) -> bool:
        """Put an object where none is; False where there is one. Of all who try at once, one
        succeeds.

        `data` must differ from what anybody else would write: a request whose answer was lost on
        the way is told by it.
        """
        with self._told(), self._bucket_expected():
            try:
                self._files.pipe_file(f"{self._root}/{name}", data, mode="create")
            except FileExistsError:
                return self.read(name) == data
            return True

    def remove(self, name: str) -> None:
        """Take an object away, if there is one."""
        with self._told(), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(f"{self._root}/{name}")

    def tag(self, name: str = "") -> str | None:
        """What tells this state of an object from every other one; None where there is no object."""
        with self._told():
            try:
                found = self._files.info(f"{self._root}/{name}".rstrip("/"))
            except FileNotFoundError:
                return None
            return _tag(found) if found["type"] == "file" else None

    def files(self) -> dict[str, str]:
        """Every object, however deep: name -> tag."""
        with self._told():
            found = self._files.find(self._root, detail=True)
        return {
            self._name(path): _tag(about)
            for path, about in found.items()
            if about["type"] == "file" and not path.endswith("/")
        }

    def entries(self) -> tuple[dict[str, str], list[str]]:
        """The objects that lie right here, name -> tag, and the folders."""
        with self._told():
            try:
                found = self._files.ls(self._root, detail=True)
            except FileNotFoundError:
                return {}, []
        here = {self._name(about["name"]): about for about in found}
        files = {
            name: _tag(about) for name, about in here.items() if name and about["type"] == "file"
        }
        return files, sorted(
            name for name, about in here.items() if name and about["type"] == "directory"
        )

    def download_file(self, name: str, file: pathlib.Path, tag: str) -> None:
        """Copy an object to a file, which is there whole or not at all; nothing to do where it is
        still the same.
        """
        if _stands_for(file, tag):
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}.partial")
        try:
            with self._told():
                self._files.get_file(f"{self._root}/{name}".rstrip("/"), str(partial))
            os.utime(partial, ns=(_stamp(tag), _stamp(tag)))
            partial.replace(file)
            for log in (
                ("-wal", "-shm") if file.suffix in _SQLITE else ()
            ):  # of what was there before
                file.with_name(file.name + log).unlink(missing_ok=True)
        finally:
            partial.unlink(missing_ok=True)

    def upload_file(self, file: pathlib.Path, name: str) -> None:
        """Copy a file to an object."""
        before = file.stat().st_mtime_ns
        with _still(file) as still, self._told(), self._bucket_expected():
            self._files.put_file(str(still), f"{self._root}/{name}")
        tag = self.tag(name)
        if (
            tag is not None and file.stat().st_mtime_ns == before
        ):  # else it was written to on the way, and is sent again next time
            os.utime(file, ns=(_stamp(tag), _stamp(tag)))

    def _send_if_there(self, file: pathlib.Path, name: str) -> None:
        try:
            self.upload_file(file, name)
        except (
            FileNotFoundError
        ):  # the run goes on: another thread has just put a file of another name in its place
            if file.exists():
                raise

    def download(self, directory: pathlib.Path, wanted: Wanted = lambda name: True) -> set[str]:
        """Make a directory hold just what is here, as far as it is wanted; returns the names."""
        found = {name: tag for name, tag in self.files().items() if wanted(name)}
        for name in _local_names(directory, wanted) - found.keys():
            (directory / name).unlink(missing_ok=True)
        each(lambda item: self.download_file(item[0], directory / item[0], item[1]), found.items())
        return set(found)

    def upload(
        self, directory: pathlib.Path, known: set[str], wanted: Wanted = lambda name: True
    ) -> set[str]:
        """Bring up what a directory holds, as far as it is wanted, and remove what it no longer
        does; returns the names.

        `known`: the names that the last `bring` or `keep` returned. What others have put here since
        is left alone.
        """
        there = {name: tag for name, tag in self.files().items() if wanted(name)}
        here = _local_names(directory, wanted)
        # Files of one directory go up in the order of their writing, which their generations then
        # keep: of two that stand for the same thing, as a writer leaves them that is killed, the
        # later one counts.
        written: dict[str, list[str]] = {}
        for name in sorted(here, key=lambda name: _written_at(directory / name)):
            if name not in there or not _stands_for(directory / name, there[name]):
                written.setdefault(name.rpartition("/")[0], []).append(name)
        each(
            lambda names: [self._send_if_there(directory / name, name) for name in names],
            written.values(),
        )
        each(self.remove, sorted(known & there.keys() - here))
        return here

    def _name(self, path: str) -> str:
        return path.removeprefix(self._root.partition("://")[2] or self._root).strip("/")

    @contextlib.contextmanager
    def _bucket_expected(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            if str(error).startswith("http"):  # the service's answer, and not a local file
                raise RemoteError(
                    f"{self.url} cannot be written: there is no such bucket; expected one that has been made"
                ) from error
            raise

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever the libraries raise for a service that fails, as one error that says where."""
        try:
            yield
        except (FileNotFoundError, FileExistsError, RemoteError):
            raise
        except _failures() as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise RemoteError(
                f"{self.url} could not be reached: {reason}; check the bucket's name, the network and the credentials"
            ) from error


def local_copy(path: str | os.PathLike, wanted: Wanted = lambda name: True) -> pathlib.Path:
    """The path itself, or of a URL its copy on this machine, brought up to date: a file, or a
    directory with what is wanted of it.
    """
    if not is_remote(path):
        return pathlib.Path(path)
    folder = Folder(path)
    place, tag = scratch_of(folder.url, "copies") / folder.url.rpartition("/")[2], folder.tag()
    if tag is not None:
        folder.download_file("", place, tag)
        return place
    folder.download(place, wanted)
    if not any(file.is_file() for file in place.rglob("*")):
        raise RemoteError(
            f"there is nothing at {folder.url}; expected an object, or a folder of objects"
        )
    return place


@contextlib.contextmanager
def open_output(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Where a file or a directory is to be written: the path itself, or of a URL a place here, sent
    with what lies beside it at the end.
    """
    if not is_remote(path):
        yield pathlib.Path(path)
        return
    parent, _, name = url_of(path).rpartition("/")
    with tempfile.TemporaryDirectory() as scratch:
        yield pathlib.Path(scratch) / name
        made = sorted(_local_names(pathlib.Path(scratch), lambda name: True))
        each(lambda name: Folder(parent).upload_file(pathlib.Path(scratch) / name, name), made)


@functools.cache
def _file_system(scheme: str) -> Any:
    try:
        import fsspec

        # What others write must be seen.
        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        raise ImportError(f"{scheme}:// needs gcsfs: pip install 'opdjax[gcs]'") from error


@functools.cache
def _failures() -> tuple[type[BaseException], ...]:
    """What gcsfs lets through of its own libraries."""
    found: list[type[BaseException]] = [OSError, ValueError, TimeoutError, RuntimeError]
    with contextlib.suppress(ImportError):
        import aiohttp
        import google.auth.exceptions
        from gcsfs.retry import ChecksumError, HttpError

        found += [
            aiohttp.ClientError,
            google.auth.exceptions.GoogleAuthError,
            ChecksumError,
            HttpError,
        ]
    return tuple(found)


def _tag(about: dict[str, Any]) -> str:
    """The generation, which grows with every object that is written (in memory, its time), and the
    size.
    """
    generation, created = about.get("generation"), about.get("created")
    return f"{generation or int(getattr(created, 'timestamp', lambda: created)() * 1e6)}-{about['size']}"


def _stamp(tag: str) -> int:
    """Nanoseconds since the epoch, in January 1970: no file is written then, and a later object has
    a later time.
    """
    return int(tag.partition("-")[0])


def _stands_for(file: pathlib.Path, tag: str) -> bool:
    if file.suffix in _SQLITE:  # its last rows may stand in the log beside it
        return False
    try:
        found = file.stat()
    except FileNotFoundError:
        return False
    return (found.st_mtime_ns, found.st_size) == (_stamp(tag), int(tag.partition("-")[2]))


def _written_at(file: pathlib.Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _local_names(directory: pathlib.Path, wanted: Wanted) -> set[str]:
    """Files of a directory that are whole: not locks, drafts and the side files of a database."""
    found = (pathlib.Path(place, name) for place, _, files in os.walk(directory) for name in files)
    names = (str(file.relative_to(directory)) for file in found)
    return {
        name
        for name in names
        if wanted(name)
        and not re.search(r"(^|/)\.lock|\.partial(-[^/]*)?$|-(wal|shm|journal)$", name)
    }


@contextlib.contextmanager
def _still(file: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file to copy from: of a database at work, a copy taken between two transactions."""
    if file.suffix not in _SQLITE:
        yield file
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = pathlib.Path(scratch) / file.name
        with (
            contextlib.closing(sqlite3.connect(file)) as source,
            contextlib.closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
        yield copy


def each(action: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Do it with all of them, several at a time; storage answers slowly, and to many at once."""
    with concurrent.futures.ThreadPoolExecutor(_AT_A_TIME) as pool:
        list(pool.map(action, items))
