"""Who may write a place in shared storage: a lease, an object that its holder renews and that
lapses when it no longer does. No jax.

The objects `.lease/000001`, `.lease/000002` … are each created exclusively, so of all who want the
next number one gets it; the highest number holds. The clocks of two machines are never compared: a
taker watches, by its own clock, that the holder's object has not changed for as long as the lease
lasts, and a holder that has not renewed for that long stops at once. So at most one of them ever
works.
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

LOST = 75  # the exit status of a run whose lease went to somebody else
_SECONDS = 60.0
_HANDED_ON = "OPDJAX_LEASE"


class LeaseLostError(RuntimeError):
    """Another process has taken over, or may have: nothing more may be written."""

    exit_status = LOST


@dataclasses.dataclass(frozen=True)
class Holder:
    """What the highest lease object says."""

    number: int
    about: dict[str, Any]

    @property
    def is_released(self) -> bool:
        """Whether it was given back in an orderly way."""
        return bool(self.about.get("released"))

    @property
    def is_dead(self) -> bool:
        """Whether it worked on this very machine and all its processes are gone; False where that
        cannot be known.
        """
        is_here = _machine() is not None and self.about.get("machine") == _machine()
        return is_here and not any(
            _started(pid) == started for pid, started in self.about.get("processes", ())
        )

    def __str__(self) -> str:
        return f"{self.about.get('host', 'another machine')} (process {', '.join(str(pid) for pid, _ in self.about.get('processes', ()))})"


def holder_of(folder: Folder) -> Holder | None:
    """Who holds the place, or held it last; None where nobody ever did."""
    while numbers := sorted(
        int(name) for name in folder.subfolder(".lease").entries()[0] if name.isdecimal()
    ):
        data = folder.read(_name(numbers[-1]))
        if data is not None:  # else it was cleared away between the two looks
            return Holder(numbers[-1], json.loads(data))
    return None


class ExpiryWatch:
    """What a taker has seen of a place, and since when by its own clock."""

    def __init__(self):
        self._seen: tuple[int, dict[str, Any]] | None = None
        self._since = 0.0

    def is_free(self, found: Holder | None) -> bool:
        """Whether the place may be taken, now that this was found there."""
        if found is None or found.is_released or found.is_dead:
            return True
        if self._seen != (found.number, found.about):
            self._seen, self._since = (found.number, found.about), time.monotonic()
        return time.monotonic() - self._since > found.about["seconds"]


class Lease:
    """A held lease; `start` renews it in the background until `release`, and calls `on_lost` as
    soon as it is no longer ours.
    """

    def __init__(
        self, folder: Folder, number: int, owner: str, processes: list[list[int]], seconds: float
    ):
        self._folder, self.number, self._owner, self._processes, self.seconds = (
            folder,
            number,
            owner,
            processes,
            seconds,
        )
        self._renewed, self._count, self._notes = time.monotonic(), 0, {}
        self._over, self._lock, self._is_lost = threading.Event(), threading.Lock(), False

    def create(self) -> bool:
        """Put its object where none is; False where another was faster."""
        self._renewed, self._count = time.monotonic(), 1
        return self._folder.create(_name(self.number), self._about(self._renewed))

    def go_on(self) -> None:
        """Take over the renewing from the process that handed it on; LeaseLostError where that
        could have come too late.
        """
        data = self._folder.read(_name(self.number))
        self._renewed = json.loads(data)["clock"] if data else -math.inf
        self.renew()

    def record_progress(self, **notes: Any) -> None:
        """What others shall see of the work (step, num_steps), from the next renewal on."""
        self._notes |= notes

    def renew(self) -> None:
        """Say that the holder lives; LeaseLostError where another one has the place."""
        with self._lock:
            began = time.monotonic()
            if self._is_lost or began - self._renewed > self.seconds:
                raise self._lost()
            self._write(began)
            self._check_number()
            self._renewed = began  # of the takers, none has seen it later than it was sent

    def check(self) -> None:
        """LeaseLostError where the lease may be another's by now; asks nobody."""
        if self._is_lost or time.monotonic() - self._renewed > self.seconds:
            raise self._lost()

    def start(
        self, on_lost: Callable[[], None], is_renewed_by_child: Callable[[], bool] = lambda: False
    ) -> Lease:
        """Renew from now on. A runner whose child has taken that over only watches that nobody else
        has the place.
        """

        def go_on():
            while not self._over.wait(self.seconds / 5):
                try:
                    if not (is_renewed_by_child() and self._is_in_other_hands()):
                        self.renew()
                except LeaseLostError:
                    return
                except (
                    RemoteError
                ) as error:  # tried again until the time is over, which the other thread sees
                    print(
                        f"note: the lease of {self._folder.url} could not be renewed: {error}",
                        file=sys.stderr,
                    )

        def look():  # a request may hang for longer than the lease lasts
            while not self._over.wait(min(self.seconds / 20, 1.0)):
                try:
                    self.check()
                except LeaseLostError:
                    if not self._over.is_set():
                        on_lost()
                    return

        for target in (go_on, look):
            threading.Thread(target=target, daemon=True, name=f"lease-{target.__name__}").start()
        return self

    def stop(self) -> None:
        """Renew no longer."""
        self._over.set()

    def release(self) -> None:
        """Give the place back: the next taker need not wait."""
        self._over.set()
        with self._lock:
            if not self._is_lost and time.monotonic() - self._renewed <= self.seconds:
                self._notes["released"] = True
                self._write(time.monotonic())

    def hand_on(self, pid: int | None = None) -> dict[str, str]:
        """The environment in which a child holds this lease too; with `pid`: it has been started,
        and its life counts.
        """
        if pid is not None:
            self._processes.append(_process(pid))
        told = {
            "url": self._folder.url,
            "number": self.number,
            "owner": self._owner,
            "processes": self._processes,
            "seconds": self.seconds,
        }
        return {_HANDED_ON: json.dumps(told)}

    def _is_in_other_hands(self) -> bool:
        """Whether a child has renewed it since this process did, which then only looks who has the
        place.
        """
        data = self._folder.read(_name(self.number))
        about = json.loads(data) if data else {}
        if about.get("by", os.getpid()) == os.getpid():
            return False
        self._check_number()
        self._renewed = about["clock"]  # of this machine, hence of all its processes
        return True

    def _write(self, began: float) -> None:
        self._count += 1
        self._folder.write(_name(self.number), self._about(began))

    def _about(self, began: float) -> bytes:
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
            **self._notes,
        }
        return json.dumps(about).encode()

    def _check_number(self) -> None:
        numbers = [
            int(name) for name in self._folder.subfolder(".lease").entries()[0] if name.isdecimal()
        ]
        if max(numbers, default=self.number) > self.number:
            raise self._lost()

    def _lost(self) -> LeaseLostError:
        self._is_lost = True
        return LeaseLostError(
            f"{self._folder.url} was taken over by another process, or could have been: this one stopped writing there"
        )


def try_acquire(folder: Folder, watch: ExpiryWatch) -> Lease | None:
    """The lease of a place that nobody holds, or whose holder the watch has seen lapse; None where
    it is not to be had now.
    """
    found = holder_of(folder)
    if not watch.is_free(found):
        return None
    number, owner = (found.number if found else 0) + 1, uuid.uuid4().hex
    lease = Lease(folder, number, owner, [_process(os.getpid())], seconds_of_leases())
    if not lease.create():
        return None
    names = [name for name in folder.subfolder(".lease").entries()[0] if name.isdecimal()]
    if any(
        int(name) > number for name in names
    ):  # we came late: ours had been made before, and cleared away
        folder.remove(_name(number))
        return None
    for name in names:
        if int(name) < number:
            folder.remove(f".lease/{name}")
    return lease


def seconds_of_leases() -> float:
    """How long the leases made here last: $OPDJAX_LEASE_SECONDS, or a minute."""
    return float(os.environ.get("OPDJAX_LEASE_SECONDS", _SECONDS))


def acquire(folder: Folder) -> Lease:
    """The lease of a place, waited for until it is clear whether its holder lives; WorkdirError
    where it does.
    """
    watch, told = ExpiryWatch(), False
    first = found = holder_of(folder)
    began = time.monotonic()
    while (lease := try_acquire(folder, watch)) is None:
        found = holder_of(folder)
        if (
            found is not None
            and (first is None or (found.number, found.about) != (first.number, first.about))
            and not found.is_released
        ):
            raise WorkdirError(
                f"{folder.url} is being written by another run on {found}; wait for it or choose another --workdir"
            )
        if not told and time.monotonic() - began > 2 and found is not None:
            told = True
            print(
                f"{folder.url} was last written by {found}; waiting up to {found.about['seconds']:.0f} s to see whether it still is"
            )
        time.sleep(min(1.0, (found.about["seconds"] if found else _SECONDS) / 20))
    return lease


def inherit(folder: Folder) -> Lease | None:
    """The lease of this place that the process which started this one holds, to be renewed here
    from now on.
    """
    told = json.loads(os.environ.get(_HANDED_ON, "{}"))
    if told.get("url") != folder.url:
        return None
    lease = Lease(
        folder,
        told["number"],
        told["owner"],
        [*told["processes"], _process(os.getpid())],
        told["seconds"],
    )
    lease.go_on()
    return lease


def _name(number: int) -> str:
    return f".lease/{number:06}"


def _machine() -> str | None:
    """This boot of this machine, and the processes that can be seen from here: elsewhere a pid
    means nothing. None where unknown.
    """
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process(pid: int) -> list[int]:
    """A process, told from a later one of the same number by when it began."""
    return [pid, _started(pid) or 0]


def _started(pid: int) -> int | None:
    try:
        after_name = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] in "ZX" else int(after_name[19])
