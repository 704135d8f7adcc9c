"""Leases: who may write to a directory in shared storage. No jax.

A holder creates an object `.lease/000001`, `.lease/000002` … and renews it; the lease expires when
the renewals stop. Objects are created exclusively, so one of all processes that want the next
number gets it, and the highest number holds the lease. Clocks of two machines are never compared:
a process that wants the lease watches, by its own clock, that the holder's object has not changed
for the duration of the lease, and a holder that has not renewed for that long stops at once. So at
most one of them ever works.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import platform
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
_INHERITED = "OPDJAX_LEASE"


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
    def is_dead(self) -> bool:
        """Whether all processes of the holder, on this very machine, have ended; False for another
        machine.
        """
        is_here = _machine() is not None and self.about.get("machine") == _machine()
        return is_here and not any(
            _started(pid) == started for pid, started in self.about.get("processes", ())
        )

    def __str__(self) -> str:
        pids = ", ".join(str(pid) for pid, _ in self.about.get("processes", ()))
        return f"{self.about.get('host', 'another machine')} (process {pids})"


def holder_of(folder: Folder) -> Holder | None:
    """The current or last holder of the lease of a folder; None if there never was one."""
    while numbers := _numbers(folder):
        data = folder.read(_name(max(numbers)))
        if data is not None:  # None: removed since the listing
            return Holder(max(numbers), json.loads(data))
    return None


class ExpiryWatch:
    """Finds out by this process's clock whether a lease has expired."""

    def __init__(self):
        self._seen: tuple[int, dict[str, Any]] | None = None
        self._since = 0.0

    def is_free(self, holder: Holder | None) -> bool:
        """Whether the lease may be taken, given the holder that was found now."""
        if holder is None or holder.is_released or holder.is_dead:
            return True
        if self._seen != (holder.number, holder.about):
            self._seen, self._since = (holder.number, holder.about), time.monotonic()
        return time.monotonic() - self._since > holder.about["seconds"]


class Lease:
    """A lease held by this process. `start` renews it in the background until `release`, and calls
    `on_lost` once it is lost.
    """

    def __init__(
        self, folder: Folder, number: int, owner: str, processes: list[list[int]], seconds: float
    ):
        self.number, self.seconds = number, seconds
        self._folder, self._owner, self._processes = folder, owner, processes
        self._renewed, self._count, self._progress = time.monotonic(), 0, {}
        self._stopped, self._lock, self._is_lost = threading.Event(), threading.Lock(), False

    def create(self) -> bool:
        """Create the lease object; False if another process already created this number."""
        self._renewed, self._count = time.monotonic(), 1
        return self._folder.create(_name(self.number), self._content(self._renewed))

    def resume(self) -> None:
        """Continue the renewals of the parent process; LeaseLostError if the lease may have expired
        in between.
        """
        data = self._folder.read(_name(self.number))
        self._renewed = json.loads(data)["clock"] if data else -math.inf
        self.renew()

    def record_progress(self, **progress: Any) -> None:
        """Add values (step, num_steps) that other processes see after the next renewal."""
        self._progress |= progress

    def renew(self) -> None:
        """Renew the lease; LeaseLostError if another process holds it."""
        with self._lock:
            began = time.monotonic()
            if self._is_lost or began - self._renewed > self.seconds:
                raise self._lost()
            self._write(began)
            self._check_number()
            # The start of the request: no watcher can have seen the object before it was sent.
            self._renewed = began

    def check(self) -> None:
        """LeaseLostError if the lease may have expired by now; sends no request."""
        if self._is_lost or time.monotonic() - self._renewed > self.seconds:
            raise self._lost()

    def start(
        self, on_lost: Callable[[], None], is_renewed_by_child: Callable[[], bool] = lambda: False
    ) -> Lease:
        """Renew in the background. While a child process renews, only check that no other process
        holds the lease.
        """

        def renew():
            while not self._stopped.wait(self.seconds / 5):
                try:
                    if not (is_renewed_by_child() and self._is_renewed_elsewhere()):
                        self.renew()
                except LeaseLostError:
                    return
                except RemoteError as error:  # retried until `watch` finds the lease expired
                    print(
                        f"note: the lease of {self._folder.url} could not be renewed: {error}",
                        file=sys.stderr,
                    )

        def watch():  # its own thread: a request may hang for longer than the lease lasts
            while not self._stopped.wait(min(self.seconds / 20, 1.0)):
                try:
                    self.check()
                except LeaseLostError:
                    if not self._stopped.is_set():
                        on_lost()
                    return

        for target in (renew, watch):
            threading.Thread(target=target, daemon=True, name=f"lease-{target.__name__}").start()
        return self

    def stop(self) -> None:
        """Stop renewing."""
        self._stopped.set()

    def release(self) -> None:
        """Give the lease back, so that the next process need not wait for it to expire."""
        self._stopped.set()
        with self._lock:
            if not self._is_lost and time.monotonic() - self._renewed <= self.seconds:
                self._progress["released"] = True
                self._write(time.monotonic())

    def child_environment(self) -> dict[str, str]:
        """The environment variables with which a child process holds this lease too."""
        inherited = {
            "url": self._folder.url,
            "number": self.number,
            "owner": self._owner,
            "processes": self._processes,
            "seconds": self.seconds,
        }
        return {_INHERITED: json.dumps(inherited)}

    def add_process(self, pid: int) -> None:
        """Count a child as a holder: the lease is not free before it has ended."""
        self._processes.append(_process(pid))

    def _is_renewed_elsewhere(self) -> bool:
        """Whether the child was the last to renew; LeaseLostError if another process holds the
        lease.
        """
        data = self._folder.read(_name(self.number))
        about = json.loads(data) if data else {}
        if about.get("by", os.getpid()) == os.getpid():
            return False
        self._check_number()
        self._renewed = about["clock"]  # monotonic clock of this machine, the same for the child
        return True

    def _write(self, began: float) -> None:
        self._count += 1
        self._folder.write(_name(self.number), self._content(began))

    def _content(self, began: float) -> bytes:
        about = {
            "owner": self._owner,
            "host": platform.node(),
            "machine": _machine(),
            "processes": self._processes,
            "by": os.getpid(),
            "seconds": self.seconds,
            "count": self._count,
            "time": time.time(),
            "clock": began,
            **self._progress,
        }
        return json.dumps(about).encode()

    def _check_number(self) -> None:
        if max(_numbers(self._folder), default=self.number) > self.number:
            raise self._lost()

    def _lost(self) -> LeaseLostError:
        self._is_lost = True
        return LeaseLostError(
            f"{self._folder.url} was taken over by another process, or could have been: this one "
            "stopped writing there"
        )


def try_acquire(folder: Folder, watch: ExpiryWatch) -> Lease | None:
    """The lease of a folder if it is free or `watch` saw it expire, else None."""
    holder = holder_of(folder)
    if not watch.is_free(holder):
        return None
    number, owner = (holder.number if holder else 0) + 1, uuid.uuid4().hex
    lease = Lease(folder, number, owner, [_process(os.getpid())], lease_seconds())
    if not lease.create():
        return None
    numbers = _numbers(folder)
    if max(numbers, default=0) > number:  # the number had been taken before, and removed since
        folder.remove(_name(number))
        return None
    for old in numbers:
        if old < number:
            folder.remove(_name(old))
    return lease


def lease_seconds() -> float:
    """Duration of new leases: $OPDJAX_LEASE_SECONDS, or a minute."""
    return float(os.environ.get("OPDJAX_LEASE_SECONDS", _SECONDS))


def acquire(folder: Folder) -> Lease:
    """Wait for the lease of a folder until it is free or expires; WorkdirError if its holder renews
    it.
    """
    watch, is_announced = ExpiryWatch(), False
    first = holder_of(folder)
    began = time.monotonic()
    while (lease := try_acquire(folder, watch)) is None:
        holder = holder_of(folder)
        if holder not in (None, first) and not holder.is_released:
            raise WorkdirError(
                f"{folder.url} is being written by another run on {holder}; wait for it or choose "
                "another --workdir"
            )
        if not is_announced and time.monotonic() - began > 2 and holder is not None:
            is_announced = True
            print(
                f"{folder.url} was last written by {holder}; waiting up to "
                f"{holder.about['seconds']:.0f} s to see whether it is still running"
            )
        time.sleep(min(1.0, (holder.about["seconds"] if holder else _SECONDS) / 20))
    return lease


def inherit(folder: Folder) -> Lease | None:
    """The lease of this folder that the parent process holds, renewed here from now on; None if it
    holds none.
    """
    about = json.loads(os.environ.get(_INHERITED, "{}"))
    if about.get("url") != folder.url:
        return None
    processes = [*about["processes"], _process(os.getpid())]
    lease = Lease(folder, about["number"], about["owner"], processes, about["seconds"])
    lease.resume()
    return lease


def _name(number: int) -> str:
    return f".lease/{number:06}"


def _numbers(folder: Folder) -> list[int]:
    names = folder.subfolder(".lease").entries()[0]
    return [int(name) for name in names if name.isdecimal()]


def _machine() -> str | None:
    """This boot of this machine and its process namespace, in which a pid has a meaning; None if
    unknown.
    """
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process(pid: int) -> list[int]:
    """[pid, start time]: a later process with the same pid has another start time."""
    return [pid, _started(pid) or 0]


def _started(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None if it has ended."""
    try:
        after_name = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] in "ZX" else int(after_name[19])
