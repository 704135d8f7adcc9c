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
import dataclasses
import json
import os
import pathlib
import platform
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from opdjax.runs.object_store import Folder, RemoteError
from opdjax.runs.workdir import WorkdirError

LOST = 75  # exit status of a run that lost its lease
_SECONDS = 60.0
_INHERITED = "OPDJAX_LEASE"  # URL and owner of the lease that a child process holds too


class LeaseLostError(RuntimeError):
    """Another process has taken over the lease, or may have: nothing more may be written."""

    exit_status = LOST


@dataclasses.dataclass(frozen=True)
class Holder:
    """Content of the highest lease object."""

    number: int
    about: dict[str, Any]

    @property
    def is_released(self) -> bool:
        """Whether the holder released the lease."""
        return bool(self.about.get("released"))

    @property
    def is_gone(self) -> bool:
        """Whether the holder released the lease, or all its processes, on this very machine, have
        ended. Processes of another machine cannot be seen.
        """
        is_here = self.about["machine"] == _machine() is not None
        is_alive = any(_started(pid) == started != 0 for pid, started in self.about["processes"])
        return self.is_released or (is_here and not is_alive)

    def __str__(self) -> str:
        pids = ", ".join(str(pid) for pid, _ in self.about["processes"])
        return f"{self.about['host']} (process {pids})"


def holder_of(folder: Folder) -> Holder | None:
    """The current or last holder of the lease of a folder; None if there never was one."""
    number = _highest(folder)
    return Holder(number, json.loads(folder.read(_name(number)))) if number else None


class ExpiryWatch:
    """Finds out by this process's clock whether a lease has expired."""

    def __init__(self):
        self._seen: Holder | None = None
        self._since = 0.0

    def is_free(self, holder: Holder | None) -> bool:
        """Whether the lease may be taken, given the holder that was found now."""
        if holder is None or holder.is_gone:
            return True
        if self._seen != holder:
            self._seen, self._since = holder, time.monotonic()
        return time.monotonic() - self._since > holder.about["seconds"]


def _exit_now(error: LeaseLostError) -> None:
    # Without cleanup: what this process is writing may not be finished in any orderly way.
    print(f"opdjax: {error}", file=sys.stderr, flush=True)
    os._exit(LOST)


class Lease:
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
                self._folder.write(_name(self.number), _content(self._about))
            self._top = _highest(self._folder)
            if self._top > self.number:
                about = json.loads(self._folder.read(_name(self._top)))
                if about["owner"] != self._about["owner"]:
                    self._is_lost = True
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

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the lease back, to the next process at once, or to the parent process."""
        self._stopped.set()
        with self._lock:
            if self._about["owner"] != _inherited_owner(self._folder) and not self.is_lost:
                self.record_progress(released=True)
                self._folder.write(_name(self.number), _content(self._about))

    def child_started(self, pid: int) -> None:
        """Count a child as a holder too; a lost lease kills it and its process group."""
        self.record_progress(processes=[*self._about["processes"], (pid, _started(pid))])
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
    holder, pid, shared = holder_of(folder), os.getpid(), {}
    if holder is not None and holder.about["owner"] == _inherited_owner(folder):
        shared = holder.about
    elif not watch.is_free(holder):
        return None
    number, began = (holder.number if holder else 0) + 1, time.monotonic()
    about = {
        "owner": shared.get("owner", uuid.uuid4().hex),
        "host": platform.node(),
        "machine": _machine(),
        "processes": [*shared.get("processes", ()), (pid, _started(pid))],
        "seconds": lease_seconds(),
    }
    is_first = folder.create(_name(number), _content(about))
    return Lease(folder, number, about, began) if is_first else None


def acquire(folder: Folder) -> Lease:
    """The lease of a folder, once it is free or expires; WorkdirError if its holder renews it."""
    watch, first = ExpiryWatch(), None
    while (lease := try_acquire(folder, watch)) is None:
        holder = holder_of(folder)
        if first is None and holder is not None:
            first, wait = holder, f"waiting up to {holder.about['seconds']:.0f} s"
            print(f"{folder.url} was last written by {holder}; {wait} to see whether it still runs")
        if holder not in (None, first) and not holder.is_released:
            raise WorkdirError(
                f"{folder.url} is being written by another run on {holder}; wait for it or choose "
                "another --workdir"
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


def _highest(folder: Folder) -> int:
    names = folder.subfolder(".lease", is_flat=True).files()
    return max(map(int, filter(str.isdecimal, names)), default=0)


def _machine() -> str | None:
    """This boot and process namespace, in which a pid has a meaning; None if unknown."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> int:
    """When a process started, in clock ticks since boot: pids are reused; 0 if it has ended."""
    try:
        after_name = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if after_name[0] in "ZX" else int(after_name[19])
