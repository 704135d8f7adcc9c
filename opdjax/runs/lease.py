"""Leases: who may write to a directory on gs://. No jax.

A holder creates an object `.lease/000001`, `.lease/000002` … and renews it; the lease expires when
the renewals stop. Objects are created exclusively and never removed, so one of all processes that
want the next number gets it, and the highest number holds the lease. Clocks of two machines are
never compared: a process that wants the lease watches, by its own clock, that the holder's object
has not changed for the duration of the lease, and a holder that has not renewed for that long stops
at once. So at most one of them ever works.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

from opdjax.runs.object_store import Folder, RemoteError
from opdjax.runs.workdir import NUMBER, WorkdirError, parse_row

LOST = 75  # exit status of a run that lost its lease
_SECONDS = 60.0
_INHERITED = "OPDJAX_LEASE"  # URL and owner of the lease that a child process holds too


class LeaseLostError(RuntimeError):
    """Another process has taken over the lease, or may have: nothing more may be written."""

    exit_status = LOST


class Holder(NamedTuple):
    """Content of the highest lease object."""

    number: int
    about: dict[str, Any]

    @property
    def is_released(self) -> bool:
        """Whether the holder released the lease."""
        return bool(self.about.get("released"))


def holder_of(folder: Folder) -> Holder | None:
    """The current or last holder of the lease of a folder; None if there never was one.
    WorkdirError if its object is damaged.
    """
    names = folder.subfolder(".lease").files()
    number = max(map(int, filter(str.isdecimal, names)), default=0)
    if not number:
        return None
    content, place = folder.read(_name(number)) or b"", f"{folder.url}/{_name(number)}"
    numbers = dict.fromkeys(("seconds", "time", "clock"), NUMBER)
    return Holder(number, parse_row(content, place, owner=str, host=str, **numbers))


class ExpiryWatch:
    """Finds out by this process's clock whether a lease has expired."""

    def __init__(self):
        self._seen: Holder | None = None
        self._since = 0.0

    def is_free(self, holder: Holder | None) -> bool:
        """Whether the lease may be taken, given the holder that was found now."""
        if holder is None or holder.is_released:
            return True
        if self._seen != holder:
            self._seen, self._since = holder, time.monotonic()
        return time.monotonic() - self._since > holder.about["seconds"]


def _exit_now(error: LeaseLostError) -> None:
    # Without cleanup: what this process is writing may not be finished in any orderly way.
    print(f"opdjax: {error}", file=sys.stderr, flush=True)
    os._exit(LOST)


class Lease(contextlib.AbstractContextManager):
    """A lease held by this process. `start` renews it in the background until `release`.

    A child process with `environment` takes it over: its `acquire` creates the next number for the
    same owner and renews it, while this process only looks on.
    """

    descriptors: tuple[int, ...] = ()  # files that a child needs to hold it too

    def __init__(self, folder: Folder, number: int, about: dict[str, Any], renewed: float):
        self.number, self.seconds = number, about["seconds"]
        self._folder, self._about, self._renewed = folder, about, renewed
        self._top = number  # higher while a child holds the lease
        self._is_lost, self._child = False, None
        self._stopped, self._lock = threading.Event(), threading.Lock()

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables with which a child process holds this lease too."""
        return {_INHERITED: f"{self._folder.url} {self._about['owner']}"}

    @property
    def is_lost(self) -> bool:
        """Whether another process has taken over the lease, or may have; sends no request."""
        if time.monotonic() - self._renewed > self.seconds:
            self._is_lost = True  # never back to False: several threads look here
        return self._is_lost

    def check(self) -> None:
        """LeaseLostError if the lease is lost; sends no request."""
        if self.is_lost:
            raise LeaseLostError(
                f"{self._folder.url} was taken over by another process, or could have been: this "
                "one stopped writing there"
            )

    def renew(self) -> None:
        """Renew the lease, or see that the child does; LeaseLostError if the lease is lost."""
        with self._lock:
            self.check()
            began = time.monotonic()  # no watcher can see the object before
            if self._top <= self.number:
                self._write()
            self._top, about = holder_of(self._folder) or (0, self._about)
            if self._top > self.number:
                self._is_lost |= about["owner"] != self._about["owner"]
                began = about["clock"]  # monotonic clock of this machine, the same for a child
            self.check()  # again: the requests may have taken longer than the lease lasts
            self._renewed = began

    def record_progress(self, **progress: Any) -> None:
        """Add values (step, num_steps) that other processes see after the next renewal."""
        self._about = {**self._about, **progress}

    def start(self, on_lost: Callable[[LeaseLostError], Any] = _exit_now) -> Lease:
        """Renew in the background. Once the lease is lost, kill the child and call `on_lost`; by
        default, end this process.
        """

        def renew():
            while not self._stopped.wait(self.seconds / 5):
                try:
                    self.renew()
                except LeaseLostError:
                    return
                except RemoteError as error:  # retried until `watch` finds the lease expired
                    print(f"note: a lease could not be renewed: {error}", file=sys.stderr)

        def watch():  # its own thread: a request may hang for longer than the lease lasts
            while not self._stopped.wait(min(self.seconds / 20, 1.0)):
                try:
                    self.check()
                except LeaseLostError as error:
                    self._kill_child()
                    on_lost(error)
                    return

        for target in (renew, watch):
            threading.Thread(target=target, daemon=True, name=f"lease-{target.__name__}").start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the lease back, to the next process at once, or to the parent process."""
        self._stopped.set()
        with self._lock:
            if self._about["owner"] != _inherited_owner(self._folder) and not self.is_lost:
                self.record_progress(released=True)
                self._write()

    def _write(self) -> None:
        self._folder.write(_name(self.number), _content(self._about))

    def child_started(self, pid: int) -> None:
        """From now on a lost lease kills this child and its process group."""
        self._child = pid
        if self.is_lost:
            self._kill_child()

    def child_ended(self) -> None:
        """Take the lease back, if it is not lost; see `is_lost`."""
        self._child = None
        with contextlib.suppress(LeaseLostError):
            self.renew()
            self.number = max(self.number, self._top)

    def _kill_child(self) -> None:
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child, signal.SIGKILL)


def try_acquire(folder: Folder, watch: ExpiryWatch) -> Lease | None:
    """The lease of a folder, else None: if it is free, `watch` saw it expire, or the parent process
    holds it and shares it with this one.
    """
    holder, owner = holder_of(folder), _inherited_owner(folder)
    if holder is None or holder.about["owner"] != owner:
        if not watch.is_free(holder):
            return None
        owner = uuid.uuid4().hex
    number, began = (holder.number if holder else 0) + 1, time.monotonic()
    about = {"owner": owner, "host": platform.node(), "seconds": lease_seconds()}
    is_first = folder.create(_name(number), _content(about))
    return Lease(folder, number, about, began) if is_first else None


def acquire(folder: Folder) -> Lease:
    """The lease of a folder, once it is free or expires; WorkdirError if its holder renews it."""
    watch, first = ExpiryWatch(), None
    while (lease := try_acquire(folder, watch)) is None:
        holder = holder_of(folder)
        if first is None and holder is not None:
            first, wait = holder, f"waiting up to {holder.about['seconds']:.0f} s"
            last = f"{folder.url} was last written by a run on {holder.about['host']}"
            print(f"{last}; {wait} to see whether it still runs")
        if holder not in (None, first) and not holder.is_released:
            raise WorkdirError(
                f"{folder.url} is being written by another run on {holder.about['host']}; wait for "
                "it or choose another --workdir"
            )
        time.sleep(min(1.0, lease_seconds() / 20))
    return lease


def lease_seconds() -> float:
    """Duration of new leases: $OPDJAX_LEASE_SECONDS, or a minute."""
    return float(os.environ.get("OPDJAX_LEASE_SECONDS", _SECONDS))


def _inherited_owner(folder: Folder) -> str | None:
    url, _, owner = os.environ.get(_INHERITED, "").rpartition(" ")
    return owner if url == folder.url else None


def _content(about: dict[str, Any]) -> bytes:
    return json.dumps({**about, "time": time.time(), "clock": time.monotonic()}).encode()


def _name(number: int) -> str:
    return f".lease/{number:06}"
