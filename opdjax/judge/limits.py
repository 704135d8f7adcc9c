"""A rate limiter and a circuit breaker for requests to one server, within one event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Literal

_POLL_SECONDS = 0.1  # seconds between checks for returned units


class RateLimiter:
    """Token bucket: units per minute, at most one second's worth saved up; 0: no limit.

    Waiting callers are served in order.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic):
        self._rate, self._clock = per_minute / 60, clock
        self._capacity = max(self._rate, 1.0)
        self._level, self._updated, self._blocked_until = self._capacity, clock(), 0.0
        self._turn = asyncio.Lock()

    async def acquire(self, units: float) -> None:
        """Wait until the units may be spent.

        More units than the bucket holds are granted once it is full; later callers wait longer.
        """
        async with self._turn:
            while (wait := self._wait(units)) > 0:
                # Polls: replies use far fewer tokens than reserved, and the rest is returned.
                await asyncio.sleep(min(wait, _POLL_SECONDS))
            self._level -= units if self._rate else 0

    def give_back(self, units: float) -> None:
        """Return units that were reserved and not used; negative if more were used."""
        self._level = min(self._level + units, self._capacity) if self._rate else self._level

    def pause(self, seconds: float) -> None:
        """Serve no one for this long: the server asked for it."""
        self._blocked_until = max(self._blocked_until, self._clock() + seconds)

    def _wait(self, units: float) -> float:
        now = self._clock()
        blocked = self._blocked_until - now
        if not self._rate:
            return blocked
        gained = (now - self._updated) * self._rate
        self._level, self._updated = min(self._capacity, self._level + gained), now
        return max(blocked, (min(units, self._capacity) - self._level) / self._rate)


Admission = Literal["free", "probe", "down"]


class CircuitBreaker:
    """Opens after `max_failures` failures in a row: callers then wait for one probe request.

    Callers wait instead of failing at once, so that a short outage costs its own length and not
    the judgements of many steps. If the probe fails, every waiting caller is refused.
    """

    def __init__(self, max_failures: int, seconds: float):
        self._max_failures, self._seconds = max_failures, seconds
        self._failures, self._opened, self._is_probing = 0, 0.0, False
        # Wakes the waiting callers: True: check again, False: the probe failed.
        self._wakeup: asyncio.Future[bool] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the server counts as down."""
        return self._failures >= self._max_failures

    async def enter(self) -> Admission:
        """Wait for permission to send: "free", "probe", or "down" if a probe failed meanwhile.

        After "free" or "probe" the caller must call `leave`: everyone waits for the probe.
        """
        while self.is_open:
            wait = max(self._opened + self._seconds - time.monotonic(), 0.0)
            if not wait and not self._is_probing:
                self._is_probing = True
                return "probe"
            if self._wakeup is None:
                self._wakeup = asyncio.get_running_loop().create_future()
            wakeup = self._wakeup
            await asyncio.wait([wakeup], timeout=None if self._is_probing else wait)
            if wakeup.done() and not wakeup.result():
                return "down"
        return "free"

    def leave(self, admission: Admission, is_answered: bool | None) -> None:
        """Report the outcome of an admitted request; None: not sent, or cancelled."""
        if is_answered:
            self._failures = 0
        elif is_answered is not None:
            self._failures, self._opened = self._failures + 1, time.monotonic()
        if admission == "probe":
            self._is_probing = False
        # A request sent before the breaker opened ends the wait only if it succeeds.
        if is_answered or admission == "probe":
            wakeup, self._wakeup = self._wakeup, None
            if wakeup is not None:
                wakeup.set_result(is_answered is not False)
