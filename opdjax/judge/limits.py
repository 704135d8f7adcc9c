"""How often a server may be asked: a budget a minute, and a breaker that notices that nobody
answers. For one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Literal

_POLL_SECONDS = 0.1  # seconds after which whoever waits looks whether units were given back


class RateLimiter:
    """So many units a minute, none of them saved up for longer than a second; 0: no limit. Whoever
    comes first is served first.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic):
        self._rate, self._clock = per_minute / 60, clock
        self._capacity = max(self._rate, 1.0)
        self._level, self._at, self._blocked_until = self._capacity, clock(), 0.0
        self._turn = asyncio.Lock()

    async def take(self, units: float) -> None:
        """Wait until the units may be spent. More than a second's worth is lent, and those who come
        later wait for it.
        """
        async with self._turn:
            while (wait := self._wait(units)) > 0:
                # What was foreseen is many times what most replies come to, and is given back
                # meanwhile.
                await asyncio.sleep(min(wait, _POLL_SECONDS))
            self._level -= units if self._rate else 0

    def give_back(self, units: float) -> None:
        """Correct what was foreseen by what it came to; fewer than none where it was more."""
        self._level = min(self._level + units, self._capacity) if self._rate else self._level

    def pause(self, seconds: float) -> None:
        """Nobody is served for so long: the server asked for it."""
        self._blocked_until = max(self._blocked_until, self._clock() + seconds)

    def _wait(self, units: float) -> float:
        now = self._clock()
        blocked = self._blocked_until - now
        if not self._rate:
            return blocked
        self._level, self._at = (
            min(self._capacity, self._level + (now - self._at) * self._rate),
            now,
        )
        return max(blocked, (min(units, self._capacity) - self._level) / self._rate)


Admission = Literal["free", "probe", "down"]


class CircuitBreaker:
    """Open after so many failures in a row: everybody then waits until, after a while, one request,
    the probe, has tried.

    They wait, and do not fail at once, so that a server which is away for a moment costs that
    moment and not the questions of many steps; if the probe fails as well, all who waited are told
    so.
    """

    def __init__(
        self, most_failures: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ):
        self._most, self._seconds, self._clock = most_failures, seconds, clock
        self._failures, self._opened, self._is_probing = 0, 0.0, False
        self._news: asyncio.Future[bool] | None = (
            None  # whether to look again; False: the probe failed
        )

    @property
    def is_open(self) -> bool:
        """Whether the server is taken for down."""
        return self._failures >= self._most

    async def enter(self) -> Admission:
        """Wait until a request may be sent: as any other, or as the probe; `down` where a probe
        failed meanwhile.

        Whoever is let in must `leave`, whatever comes of it: all others wait for the probe.
        """
        while self.is_open:
            wait = max(self._opened + self._seconds - self._clock(), 0.0)
            if not wait and not self._is_probing:
                self._is_probing = True
                return "probe"
            news = self._news = self._news or asyncio.get_running_loop().create_future()
            await asyncio.wait([news], timeout=None if self._is_probing else wait)
            if news.done() and not news.result():
                return "down"
        return "free"

    def leave(self, admission: Admission, is_answered: bool | None) -> None:
        """What came of a request that was let in; None: it was never sent, or nobody waited for
        what came of it.
        """
        if is_answered:
            self._failures = 0
        elif is_answered is not None:
            self._failures, self._opened = self._failures + 1, self._clock()
        if admission == "probe":
            self._is_probing = False
        # What others still hear who were sent before the breaker opened must not end the wait for
        # the probe, unless it is good.
        if is_answered or admission == "probe":
            news, self._news = self._news, None
            if news is not None:
                news.set_result(is_answered is not False)
