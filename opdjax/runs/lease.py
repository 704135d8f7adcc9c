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
import subprocess
import sys
import threading
import time
import uuid
from typing import Any

from opdjax.runs.object_store import Folder, RemoteError
from opdjax.runs.workdir import NUMBER, WorkdirError, parse_row

LOST = 75  # exit status of a run that lost its lease
_SECONDS = 60.0
_INHERITED = "OPDJAX_LEASE"  # URL and owner of the lease that a child process holds too


class LeaseLostError(RuntimeError):
    """Another process has taken over the lease, or may have: nothing more may be written."""

    exit_status = LOST


def holder_of(folder: Folder) -> dict[str, Any]:
    """What the current or last holder of the lease of a folder wrote into its object, and the
    `number` of that; empty if there never was one. WorkdirError if the object is damaged.

    `released` is true if the lease is free, `time` and `clock` are those of the last renewal.
    """
    names = folder.subfolder(".lease").files()
    number = max(map(int, filter(str.isdecimal, names)), default=0)
    if not number:
        return {}
    content, place = folder.read(_name(number)) or b"", f"{folder.url}/{_name(number)}"
    numbers = dict.fromkeys(("seconds", "time", "clock"), NUMBER)
    return parse_row(content, place, owner=str, host=str, **numbers) | {"number": number}


class ExpiryWatch:
    """Finds out by this process's clock whether a lease has expired."""

    def __init__(self):
        self.seen: dict[str, Any] = {}  # the last holder, at its last renewal
        self._since = 0.0

    def is_free(self, holder: dict[str, Any]) -> bool:
        """Whether the lease may be taken, given the holder that was found now."""
        if not holder or holder.get("released"):
            return True
        if self.seen != holder:
            self.seen, self._since = holder, time.monotonic()
        return time.monotonic() - self._since > holder["seconds"]


class Lease:
    """A lease held by this process. `start` renews it in the background until `release`.

    A `child` process with `environment` takes it over: its `acquire` creates the next number for
    the same owner and renews it, while this process only looks on.
    """

    descriptors: tuple[int, ...] = ()  # files that a child needs to hold it too

    def __init__(self, folder: Folder, number: int, about: dict[str, Any], renewed: float):
        self.number, self.seconds = number, about["seconds"]
        # The variables with which a child process holds this lease too.
        self.environment = {_INHERITED: f"{folder.url} {about['owner']}"}
        self.child: subprocess.Popen | None = None  # the leader of a process group
        self._folder, self._about, self._renewed = folder, about, renewed
        self._top = number  # higher while a child holds the lease
        self._is_lost = False
        self._stopped, self._lock = threading.Event(), threading.Lock()

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
            holder = holder_of(self._folder)
            self._top = holder.get("number", 0)
            if self._top > self.number:
                self._is_lost |= holder["owner"] != self._about["owner"]
                began = holder["clock"]  # monotonic clock of this machine, the same for a child
            self.check()  # again: the requests may have taken longer than the lease lasts
            self._renewed = began

    def record_progress(self, **progress: Any) -> None:
        """Add values (step, num_steps) that other processes see after the next renewal."""
        self._about = {**self._about, **progress}

    def start(self, ends_process: bool = True) -> Lease:
        """Renew in the background. Once the lease is lost, kill the child's process group, and by
        default end this process.
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
                    if self.child is not None and self.child.poll() is None:
                        with contextlib.suppress(ProcessLookupError):
                            os.killpg(self.child.pid, signal.SIGKILL)
                    if ends_process:
                        # Without cleanup: nothing that is being written may be finished.
                        print(f"opdjax: {error}", file=sys.stderr, flush=True)
                        os._exit(LOST)

        for target in (renew, watch):
            threading.Thread(target=target, daemon=True, name=f"lease-{target.__name__}").start()
        return self

    def release(self) -> None:
        """Give the lease back, to the next process at once, or to the parent process."""
        self._stopped.set()
        with self._lock:
            is_inherited = self.environment.items() <= os.environ.items()
            if not is_inherited and not self.is_lost:
                self.record_progress(released=True)
                self._write()

    def _write(self) -> None:
        self._folder.write(_name(self.number), _content(self._about))

    def child_ended(self) -> None:
        """Hold the lease again once the child has ended, if it is not lost; see `is_lost`."""
        with contextlib.suppress(LeaseLostError):
            self.renew()
            self.number = max(self.number, self._top)


def try_acquire(folder: Folder, watch: ExpiryWatch) -> Lease | None:
    """The lease of a folder, else None: if it is free, `watch` saw it expire, or the parent process
    holds it and shares it with this one.
    """
    holder = holder_of(folder)
    owner, number = holder.get("owner", ""), holder.get("number", 0) + 1
    if os.environ.get(_INHERITED) != f"{folder.url} {owner}":
        if not watch.is_free(holder):
            return None
        owner = uuid.uuid4().hex
    began = time.monotonic()
    about = {"owner": owner, "host": platform.node(), "seconds": lease_seconds()}
    is_first = folder.create(_name(number), _content(about))
    return Lease(folder, number, about, began) if is_first else None


def acquire(folder: Folder) -> Lease:
    """The lease of a folder, once it is free or expires; WorkdirError if its holder renews it."""
    watch, first = ExpiryWatch(), {}
    while (lease := try_acquire(folder, watch)) is None:
        if watch.seen and not first:
            first, wait = watch.seen, f"waiting up to {watch.seen['seconds']:.0f} s"
            last = f"{folder.url} was last written by a run on {first['host']}"
            print(f"{last}; {wait} to see whether it still runs")
        if watch.seen != first:
            raise WorkdirError(
                f"{folder.url} is being written by another run on {watch.seen['host']}; wait for "
                "it or choose another --workdir"
            )
        time.sleep(min(1.0, lease_seconds() / 20))
    return lease


def lease_seconds() -> float:
    """Duration of new leases: $OPDJAX_LEASE_SECONDS, or a minute."""
    return float(os.environ.get("OPDJAX_LEASE_SECONDS", _SECONDS))


def _content(about: dict[str, Any]) -> bytes:
    return json.dumps({**about, "time": time.time(), "clock": time.monotonic()}).encode()


def _name(number: int) -> str:
    return f".lease/{number:06}"
