"""Objects on gs://, by fsspec: read, written whole, created exclusively, copied from and to local
files. No jax.

A downloaded file carries the generation of its object as its modification time. So a listing and a
stat show whether the two are still the same, without an index that could become wrong.
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

_CONCURRENCY = 8  # objects transferred at a time
_SQLITE = (".sqlite", ".sqlite3", ".db")
# Locks, partial files and the logs of a database.
_INCOMPLETE = re.compile(r"(^|/)\.lock|\.partial(-[^/]*)?$|-(wal|shm|journal)$")
Wanted = Callable[[str], bool]
# Of an object: (generation, size), which differs in each version, and the generation grows. Of a
# file: (modification time in nanoseconds, size).
Tag = tuple[int, int]


class RemoteError(OSError):
    """The storage behind a URL could not be reached, or lacks what was expected there."""


def is_remote(path: str | os.PathLike) -> bool:
    """Whether it is a URL, also in pathlib's spelling (gs:/bucket)."""
    return re.match(r"[a-z][a-z0-9]+:/", str(path)) is not None


def url_of(path: str | os.PathLike) -> str:
    """The URL in its proper spelling; RemoteError unless it names a bucket of gs://."""
    scheme, rest = re.fullmatch(r"([a-z][a-z0-9]+):/+(.*)", str(path), re.DOTALL).groups()
    url = f"{scheme}://{rest.strip('/')}"
    if scheme != "gs" or url == "gs://":
        expected = "expected a local path or gs://BUCKET/NAME"
        raise RemoteError(f"{url} cannot be read or written; {expected}")
    return url


def scratch_root() -> pathlib.Path:
    """Directory of all local copies: $OPDJAX_SCRATCH, or opdjax in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get("OPDJAX_SCRATCH") or pathlib.Path(cache) / "opdjax")


def scratch_of(url: str, kind: str) -> pathlib.Path:
    """Local path for a URL, the same in every process of this machine."""
    readable = re.sub(r"[^A-Za-z0-9._=,-]+", "-", url.partition("://")[2])[-60:].strip("-")
    return scratch_root() / kind / f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


class Folder:
    """The objects below a URL, or with `is_flat` those that lie directly there; names are relative
    to it. Every method raises RemoteError if the storage cannot be reached.
    """

    def __init__(self, url: str | os.PathLike, is_flat: bool = False):
        self.url, self._is_flat = url_of(url), is_flat
        self._files = _file_systems()(path=self.url)
        self._synced: dict[str, Tag] = {}  # files when they were last downloaded or uploaded

    def subfolder(self, name: str, is_flat: bool = False) -> Folder:
        """The folder of that name in this one."""
        return Folder(f"{self.url}/{name}", is_flat)

    def read(self, name: str) -> bytes | None:
        """Content of an object; None if there is none."""
        return self._found(self._files.cat_file, name)

    def write(self, name: str, data: bytes) -> None:
        """Create or replace an object; readers see the old content or the new one."""
        with self._errors(is_write=True):
            self._files.pipe_file(name, data)

    def create(self, name: str, data: bytes) -> bool:
        """Create an object; False if it exists. Of several concurrent calls one succeeds.

        `data` must differ from what any other process would write: it shows that a request whose
        response was lost was our own.
        """
        with contextlib.suppress(FileExistsError), self._errors(is_write=True):
            self._files.pipe_file(name, data, mode="create")
            return True
        return self.read(name) == data

    def remove(self, name: str) -> None:
        """Remove an object if it exists."""
        self._found(self._files.rm_file, name)

    def tag(self, name: str = "") -> Tag | None:
        """The version of an object; None if there is no object."""
        info = self._found(self._files.info, name)
        return _tag(info) if info and info["type"] == "file" else None

    def files(self) -> dict[str, Tag]:
        """The objects in this folder: name -> version."""
        if self._is_flat:
            listed = {info["name"]: info for info in self._found(self._files.ls, "") or ()}
        else:
            listed = self._found(self._files.find, "", detail=True) or {}
        is_object = lambda name: listed[name]["type"] == "file" and not name.endswith("/")
        return {name: _tag(listed[name]) for name in filter(is_object, listed)}

    def download_file(self, name: str, file: pathlib.Path, tag: Tag) -> None:
        """Copy an object, if it exists and has changed, to a file, whole or not at all."""
        if file.suffix not in _SQLITE and _file_tag(file) == tag:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}.partial")
        with contextlib.ExitStack() as cleanup, contextlib.suppress(FileNotFoundError):
            cleanup.callback(partial.unlink, missing_ok=True)
            with self._errors():
                self._files.get_file(name, str(partial))
            os.utime(partial, ns=(tag[0], tag[0]))
            partial.replace(file)
            for log in ("-wal", "-shm"):  # of a replaced database
                file.with_name(file.name + log).unlink(missing_ok=True)

    def upload_file(self, file: pathlib.Path, name: str) -> None:
        """Copy a file to an object, or remove the object if the file is gone."""
        try:
            with tempfile.TemporaryDirectory() as scratch, self._errors(is_write=True):
                source = _snapshot(file, scratch) if file.suffix in _SQLITE else file
                self._files.put_file(str(source), name)
        except FileNotFoundError:
            if file.exists():
                raise
            self.remove(name)

    def download(self, directory: pathlib.Path, wanted: Wanted = lambda name: True) -> set[str]:
        """Make the wanted files of a directory equal to the objects here; returns their names."""
        directory.mkdir(parents=True, exist_ok=True)
        stored = {name: tag for name, tag in self.files().items() if wanted(name)}
        if foreign := [name for name in stored if ".." in name.split("/")]:
            raise RemoteError(f"{self.url} holds {foreign[0]!r}, which leads out of it; remove it")
        for name in _local_files(directory, wanted).keys() - stored.keys():
            (directory / name).unlink(missing_ok=True)
        in_parallel(lambda name: self.download_file(name, directory / name, stored[name]), stored)
        self._synced = _local_files(directory, wanted)
        return set(stored)

    def upload(self, directory: pathlib.Path, wanted: Wanted = lambda name: True) -> None:
        """Upload the wanted files of a directory that have changed since the last `download` or
        `upload`, and remove objects whose file is gone since.
        """
        local = _local_files(directory, wanted)
        # The last rows of a database may be in the log beside it.
        is_new = lambda name: name.endswith(_SQLITE) or self._synced.get(name) != local[name]
        groups = {name: [name] for name in self._synced.keys() - local.keys()}
        # Files of one directory are uploaded in the order in which they were written, and their
        # generations keep it: if a killed writer left two versions of one thing, the later counts.
        for name in sorted(filter(is_new, local), key=local.get):
            groups.setdefault(name.rpartition("/")[0] + "/", []).append(name)
        upload = lambda names: [self.upload_file(directory / name, name) for name in names]
        in_parallel(upload, groups.values())
        self._synced = local

    def _found(self, request: Callable[..., Any], name: str, **options: Any) -> Any:
        """The response to a request; None if there is no such object or folder."""
        with self._errors(), contextlib.suppress(FileNotFoundError):
            return request(name, **options)

    @contextlib.contextmanager
    def _errors(self, is_write: bool = False) -> Iterator[None]:
        """Turn the errors of the storage libraries into a RemoteError that names the URL."""
        try:
            yield
        except FileNotFoundError as error:
            # The service's response to a write names its address, a missing local file does not.
            if is_write and str(error).startswith("http"):
                raise RemoteError(
                    f"{self.url} cannot be written: there is no such bucket; create it first"
                ) from error
            raise
        except FileExistsError:
            raise
        except _library_errors() as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise RemoteError(
                f"{self.url} could not be reached: {reason}; check the bucket's name, the network "
                "and the credentials"
            ) from error


def local_copy(
    path: str | os.PathLike, wanted: Wanted = lambda name: True, is_required: bool = True
) -> pathlib.Path:
    """A local path unchanged, or the updated local copy of a URL: a file, or a directory with its
    wanted files. RemoteError if there is nothing at the URL and something is required.
    """
    if not is_remote(path):
        return pathlib.Path(path)
    folder = Folder(path)
    copy, tag = scratch_of(folder.url, "copies") / folder.url.rpartition("/")[2], folder.tag()
    if tag is not None:
        folder.download_file("", copy, tag)
    elif not folder.download(copy, wanted) and is_required:
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
        Folder(parent).upload(scratch)


@functools.cache
def _file_systems() -> Callable[..., Any]:
    """Makes the file system of a folder, in which paths are relative to its `path`."""
    try:
        import fsspec

        # No cache of listings: writes of other processes must be seen.
        files = fsspec.filesystem("gs", use_listings_cache=False)
    except ImportError as error:
        raise MissingExtraError("gs:// needs gcsfs: pip install 'opdjax[gcs]'") from error
    return functools.partial(fsspec.filesystem, "dir", fs=files, skip_instance_cache=True)


def _library_errors() -> tuple[type[BaseException], ...]:
    """What gcsfs and its libraries raise."""
    from gcsfs.retry import RETRIABLE_EXCEPTIONS, HttpError
    from google.auth.exceptions import GoogleAuthError

    return (OSError, ValueError, RuntimeError, HttpError, GoogleAuthError, *RETRIABLE_EXCEPTIONS)


def _tag(info: dict[str, Any]) -> Tag:
    return int(info["generation"]), int(info["size"])


def _file_tag(file: pathlib.Path) -> Tag:
    """(0, 0) if there is no file."""
    with contextlib.suppress(FileNotFoundError):
        found = file.stat()
        return found.st_mtime_ns, found.st_size
    return 0, 0


def _local_files(directory: pathlib.Path, wanted: Wanted) -> dict[str, Tag]:
    """The complete files of a directory."""
    files = (pathlib.Path(path, name) for path, _, names in os.walk(directory) for name in names)
    found = {str(file.relative_to(directory)): _file_tag(file) for file in files}
    return {n: tag for n, tag in found.items() if wanted(n) and not _INCOMPLETE.search(n)}


def _snapshot(database: pathlib.Path, directory: str) -> pathlib.Path:
    """A copy of a database in use, made between two transactions."""
    copy = pathlib.Path(directory) / database.name
    with contextlib.closing(sqlite3.connect(database)) as source:
        source.execute("VACUUM INTO ?", [str(copy)])
    return copy


def in_parallel(action: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Results of `action` for all items, several at a time: requests to the storage are slow."""
    with concurrent.futures.ThreadPoolExecutor(_CONCURRENCY) as pool:
        return list(pool.map(action, items))
