"""How often a server may be asked: a budget a minute, and a breaker that notices that nobody answers. For one event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class Budget:
    """So many units a minute, none of them saved up for longer than a second; 0: no limit. Whoever comes first is served first."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic):
        self._rate, self._clock = per_minute / 60, clock
        self._capacity = max(self._rate, 1.0)
        self._level, self._at, self._blocked_until = self._capacity, clock(), 0.0
        self._turn = asyncio.Lock()

    async def take(self, units: float) -> None:
        """Wait until the units may be spent. More than a second's worth is lent, and those who come later wait for it."""
        async with self._turn:
            while (wait := self._wait(units)) > 0:
                await asyncio.sleep(wait)
            self._level -= units if self._rate else 0

    def give_back(self, units: float) -> None:
        """Correct what was foreseen by what it came to; fewer than none where it was more."""
        self._level = min(self._level + units, self._capacity)

    def pause(self, seconds: float) -> None:
        """Nobody is served for so long: the server asked for it."""
        self._blocked_until = max(self._blocked_until, self._clock() + seconds)

    def _wait(self, units: float) -> float:
        now = self._clock()
        blocked = self._blocked_until - now
        if not self._rate:
            return blocked
        self._level, self._at = min(self._capacity, self._level + (now - self._at) * self._rate), now
        return max(blocked, (min(units, self._capacity) - self._level) / self._rate)


class Breaker:
    """Open after so many failures in a row: everybody then waits until, after a while, one request has tried."""

    def __init__(self, most_failures: int, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._most, self._seconds, self._clock = most_failures, seconds, clock
        self._failures, self._opened, self._probe = 0, 0.0, None

    async def enter(self) -> bool:
        """Whether this request may be sent: at once, as the probe, or once a probe went through; False where a probe failed."""
        while self._failures >= self._most:
            if self._probe is not None:
                if not await asyncio.shield(self._probe):
                    return False
                continue
            wait = self._opened + self._seconds - self._clock()
            self._probe = asyncio.get_running_loop().create_future()
            if wait > 0:
                try:
                    await asyncio.sleep(wait)
                except asyncio.CancelledError:
                    self._settle(False)
                    raise
            return True
        return True

    def succeeded(self) -> None:
        """A request was answered."""
        self._failures = 0
        self._settle(True)

    def failed(self) -> None:
        """A request was not answered, and might have been."""
        self._failures, self._opened = self._failures + 1, self._clock()
        self._settle(False)

    def abandoned(self) -> None:
        """A request was given up; whether it would have been answered nobody knows."""
        self._settle(False)

    def _settle(self, is_answered: bool) -> None:
        if self._probe is not None and not self._probe.done():
            self._probe.set_result(is_answered)
        self._probe = None
