"""Objects behind a URL such as gs://bucket/run, by fsspec: read, written whole, created
exclusively, copied from and to local files. No jax.

A file that was downloaded or uploaded carries the tag of its object (the generation, where there is
one) as its modification time. So a listing and a stat show whether the two are still the same,
without an index that could become wrong.
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

from opdjax.config.validation import MissingExtraError

_SCHEMES = ("gs", "memory")  # memory: objects of one process, for tests
_CONCURRENCY = 8  # objects transferred at a time
_SQLITE = (".sqlite", ".sqlite3", ".db")
Wanted = Callable[[str], bool]


class RemoteError(OSError):
    """The storage behind a URL could not be reached, or lacks what was expected there."""


def is_remote(path: str | os.PathLike) -> bool:
    """Whether it is a URL, also in pathlib's spelling (gs:/bucket)."""
    return re.match(r"[a-z][a-z0-9]+:/", str(path)) is not None


def url_of(path: str | os.PathLike) -> str:
    """The URL in its proper spelling; RemoteError for a scheme other than gs://."""
    scheme, rest = re.fullmatch(r"([a-z][a-z0-9]+):/+(.*)", str(path), re.DOTALL).groups()
    if scheme not in _SCHEMES:
        raise RemoteError(
            f"{scheme}://{rest} cannot be read or written; expected a local path or "
            "gs://BUCKET/NAME"
        )
    if not rest.strip("/"):
        raise RemoteError(f"{scheme}:// names no bucket; expected gs://BUCKET/NAME")
    return f"{scheme}://{rest.strip('/')}"


def scratch_root() -> pathlib.Path:
    """Directory of all local copies: $OPDJAX_SCRATCH, or opdjax in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get("OPDJAX_SCRATCH") or pathlib.Path(cache) / "opdjax")


def scratch_of(url: str, kind: str) -> pathlib.Path:
    """Local path for a URL, the same in every process of this machine."""
    readable = re.sub(r"[^A-Za-z0-9._=,-]+", "-", url.partition("://")[2])[-60:].strip("-")
    return scratch_root() / kind / f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


class Folder:
    """The objects below a URL; names are relative to it. Every method raises RemoteError if the
    storage cannot be reached.
    """

    def __init__(self, url: str | os.PathLike):
        self.url = url_of(url)
        self._files = _file_system(self.url.partition("://")[0])
        self._root = self.url if self.url.startswith("gs:") else self.url.partition(":/")[2]

    def subfolder(self, name: str) -> Folder:
        """The folder of that name in this one."""
        return Folder(f"{self.url}/{name}")

    def read(self, name: str) -> bytes | None:
        """Content of an object; None if there is none."""
        with self._errors():
            try:
                return self._files.cat_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Create or replace an object; readers see the old content or the new one."""
        with self._errors(), self._missing_bucket():
            self._files.pipe_file(f"{self._root}/{name}", data)

    def create(self, name: str, data: bytes) -> bool:
        """Create an object; False if it exists. Of several concurrent calls one succeeds.

        `data` must differ from what any other process would write: it shows that a request whose
        response was lost was our own.
        """
        with self._errors(), self._missing_bucket():
            try:
                self._files.pipe_file(f"{self._root}/{name}", data, mode="create")
            except FileExistsError:
                return self.read(name) == data
            return True

    def remove(self, name: str) -> None:
        """Remove an object if it exists."""
        with self._errors(), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(f"{self._root}/{name}")

    def tag(self, name: str = "") -> str | None:
        """A text that identifies this version of an object; None if there is no object."""
        with self._errors():
            try:
                info = self._files.info(f"{self._root}/{name}".rstrip("/"))
            except FileNotFoundError:
                return None
            return _tag(info) if info["type"] == "file" else None

    def files(self) -> dict[str, str]:
        """All objects, at any depth: name -> tag."""
        with self._errors():
            listed = self._files.find(self._root, detail=True)
        return {
            self._name(path): _tag(info)
            for path, info in listed.items()
            if info["type"] == "file" and not path.endswith("/")
        }

    def entries(self) -> tuple[dict[str, str], list[str]]:
        """The objects directly in this folder, name -> tag, and the names of its subfolders."""
        with self._errors():
            try:
                listed = self._files.ls(self._root, detail=True)
            except FileNotFoundError:
                return {}, []
        here = {self._name(info["name"]): info for info in listed}
        here.pop("", None)
        files = {name: _tag(info) for name, info in here.items() if info["type"] == "file"}
        return files, sorted(name for name, info in here.items() if info["type"] == "directory")

    def download_file(self, name: str, file: pathlib.Path, tag: str) -> None:
        """Copy an object to a file, whole or not at all; does nothing if the file is up to date."""
        if _is_current(file, tag):
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}.partial")
        try:
            with self._errors():
                self._files.get_file(f"{self._root}/{name}".rstrip("/"), str(partial))
            os.utime(partial, ns=(_stamp(tag), _stamp(tag)))
            partial.replace(file)
            if file.suffix in _SQLITE:  # the logs of the replaced database
                for log in ("-wal", "-shm"):
                    file.with_name(file.name + log).unlink(missing_ok=True)
        finally:
            partial.unlink(missing_ok=True)

    def upload_file(self, file: pathlib.Path, name: str) -> None:
        """Copy a file to an object."""
        before = file.stat().st_mtime_ns
        with _snapshot(file) as snapshot, self._errors(), self._missing_bucket():
            self._files.put_file(str(snapshot), f"{self._root}/{name}")
        tag = self.tag(name)
        # A file that was written to during the upload keeps its time, so it is uploaded again.
        if tag is not None and file.stat().st_mtime_ns == before:
            os.utime(file, ns=(_stamp(tag), _stamp(tag)))

    def download(self, directory: pathlib.Path, wanted: Wanted = lambda name: True) -> set[str]:
        """Make the wanted files of a directory equal to the objects here; returns their names."""
        stored = {name: tag for name, tag in self.files().items() if wanted(name)}
        for name in _local_names(directory, wanted) - stored.keys():
            (directory / name).unlink(missing_ok=True)
        in_parallel(
            lambda item: self.download_file(item[0], directory / item[0], item[1]), stored.items()
        )
        return set(stored)

    def upload(
        self, directory: pathlib.Path, known: set[str], wanted: Wanted = lambda name: True
    ) -> set[str]:
        """Upload the wanted files of a directory and remove objects whose file is gone; returns the
        names of the files.

        `known`: the names that the last `download` or `upload` returned. Objects that other
        processes have written since are left alone.
        """
        stored = {name: tag for name, tag in self.files().items() if wanted(name)}
        local = _local_names(directory, wanted)
        # Files of one directory are uploaded in the order in which they were written, and their
        # generations keep it: if a killed writer left two versions of one thing, the later counts.
        changed: dict[str, list[str]] = {}
        for name in sorted(local, key=lambda name: _mtime(directory / name)):
            if name not in stored or not _is_current(directory / name, stored[name]):
                changed.setdefault(name.rpartition("/")[0], []).append(name)
        in_parallel(
            lambda names: [self._upload_if_present(directory / name, name) for name in names],
            changed.values(),
        )
        in_parallel(self.remove, sorted(known & stored.keys() - local))
        return local

    def _upload_if_present(self, file: pathlib.Path, name: str) -> None:
        try:
            self.upload_file(file, name)
        except FileNotFoundError:  # another thread of the run has just renamed or removed it
            if file.exists():
                raise

    def _name(self, path: str) -> str:
        return path.removeprefix(self._root.partition("://")[2] or self._root).strip("/")

    @contextlib.contextmanager
    def _missing_bucket(self) -> Iterator[None]:
        """Turn the service's 404 response to a write into a RemoteError."""
        try:
            yield
        except FileNotFoundError as error:
            if str(error).startswith("http"):  # the service's response, not a missing local file
                raise RemoteError(
                    f"{self.url} cannot be written: there is no such bucket; create it first"
                ) from error
            raise

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn the errors of the storage libraries into a RemoteError that names the URL."""
        try:
            yield
        except (FileNotFoundError, FileExistsError, RemoteError):
            raise
        except _library_errors() as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise RemoteError(
                f"{self.url} could not be reached: {reason}; check the bucket's name, the network "
                "and the credentials"
            ) from error


def local_copy(path: str | os.PathLike, wanted: Wanted = lambda name: True) -> pathlib.Path:
    """A local path unchanged, or the updated local copy of a URL: a file, or a directory with its
    wanted files. RemoteError if there is nothing at the URL.
    """
    if not is_remote(path):
        return pathlib.Path(path)
    folder = Folder(path)
    copy, tag = scratch_of(folder.url, "copies") / folder.url.rpartition("/")[2], folder.tag()
    if tag is not None:
        folder.download_file("", copy, tag)
        return copy
    folder.download(copy, wanted)
    if not any(file.is_file() for file in copy.rglob("*")):
        raise RemoteError(
            f"there is nothing at {folder.url}; expected an object, or a folder of objects"
        )
    return copy


@contextlib.contextmanager
def open_output(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Where to write a file or a directory: a local path itself, or for a URL a temporary path that
    is uploaded at the end, with all files beside it.
    """
    if not is_remote(path):
        yield pathlib.Path(path)
        return
    parent, _, name = url_of(path).rpartition("/")
    with tempfile.TemporaryDirectory() as temporary:
        scratch = pathlib.Path(temporary)
        yield scratch / name
        folder, names = Folder(parent), sorted(_local_names(scratch, lambda name: True))
        in_parallel(lambda name: folder.upload_file(scratch / name, name), names)


@functools.cache
def _file_system(scheme: str) -> Any:
    try:
        import fsspec

        # No cache of listings: writes of other processes must be seen.
        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        raise MissingExtraError(f"{scheme}:// needs gcsfs: pip install 'opdjax[gcs]'") from error


@functools.cache
def _library_errors() -> tuple[type[BaseException], ...]:
    """What gcsfs and its libraries raise."""
    errors: list[type[BaseException]] = [OSError, ValueError, TimeoutError, RuntimeError]
    with contextlib.suppress(ImportError):
        import aiohttp
        import google.auth.exceptions
        from gcsfs.retry import ChecksumError, HttpError

        errors += [aiohttp.ClientError, google.auth.exceptions.GoogleAuthError]
        errors += [ChecksumError, HttpError]
    return tuple(errors)


def _tag(info: dict[str, Any]) -> str:
    """`GENERATION-SIZE`; the generation grows with every write (of memory://: its time)."""
    generation, created = info.get("generation"), info.get("created")
    if not generation:
        generation = int(getattr(created, "timestamp", lambda: created)() * 1e6)
    return f"{generation}-{info['size']}"


def _stamp(tag: str) -> int:
    """Modification time of the local copy, in nanoseconds since the epoch. It lies in January 1970,
    when no file was written, and a later object has a later time.
    """
    return int(tag.partition("-")[0])


def _is_current(file: pathlib.Path, tag: str) -> bool:
    if file.suffix in _SQLITE:  # its last rows may be in the log beside it
        return False
    try:
        found = file.stat()
    except FileNotFoundError:
        return False
    return (found.st_mtime_ns, found.st_size) == (_stamp(tag), int(tag.partition("-")[2]))


def _mtime(file: pathlib.Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _local_names(directory: pathlib.Path, wanted: Wanted) -> set[str]:
    """Complete files of a directory: no locks, no partial files, no logs of a database."""
    found = (pathlib.Path(path, name) for path, _, files in os.walk(directory) for name in files)
    names = (str(file.relative_to(directory)) for file in found)
    incomplete = re.compile(r"(^|/)\.lock|\.partial(-[^/]*)?$|-(wal|shm|journal)$")
    return {name for name in names if wanted(name) and not incomplete.search(name)}


@contextlib.contextmanager
def _snapshot(file: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file to copy from; of a database in use, a copy made between two transactions."""
    if file.suffix not in _SQLITE:
        yield file
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = pathlib.Path(scratch) / file.name
        with (
            contextlib.closing(sqlite3.connect(file)) as database,
            contextlib.closing(sqlite3.connect(copy)) as target,
        ):
            database.backup(target)
        yield copy


def in_parallel(action: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Call `action` for every item, several at a time: each request to the storage is slow."""
    with concurrent.futures.ThreadPoolExecutor(_CONCURRENCY) as pool:
        list(pool.map(action, items))
