"""Between who draws and who learns: which weights a step's rollouts may be drawn with, and which
steps' rollouts are there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

_SECONDS_BETWEEN_LOOKS = 0.02  # at a file system that another process writes


class BufferClosedError(RuntimeError):
    """The run is over: nobody waits for rollouts any more."""


class RolloutBuffer:
    """The rollouts of steps to come, at most `max_staleness + 1` of them, in the order of the
    steps.

    A step is admitted before it is drawn, when weights are there that will be no more than
    `max_staleness` updates old once the step is trained on. That is known, since steps are trained
    on in their order, one update each: so nothing that was drawn is ever dropped, however slow it
    was, and who draws waits when it is that far ahead. `lag` fixed: exactly the weights of
    `max_staleness` updates before the step (those before the first update, for the first steps);
    free: the newest, but none from after the step, which a learner that was killed leaves behind.

    `look()` -> (versions published, steps that are stored) is asked while waiting, where another
    process is at the other end.
    """

    def __init__(
        self,
        max_staleness: int,
        lag: Literal["fixed", "free"],
        look: Callable[[], tuple[list[int], list[int]]] | None = None,
    ):
        self._max_staleness, self._lag, self._look = max_staleness, lag, look
        self._changed = threading.Condition()
        self._versions, self._stored = set(), set()
        self._is_closed, self._error = False, None

    def wanted(self, step: int) -> int:
        """The oldest weights that a step may be drawn with; under a fixed lag the only ones."""
        return max(step - self._max_staleness, 0)

    def publish(self, version: int) -> None:
        """Weights of that many updates are there."""
        with self._changed:
            self._versions.add(version)
            self._changed.notify_all()

    def admit(self, step: int) -> int:
        """Wait until `step` may be drawn; the version to draw it with."""
        return self._wait_for(lambda: self._version_for(step))

    def put(self, step: int) -> None:
        """The rollouts of a step are stored."""
        with self._changed:
            self._stored.add(step)
            self._changed.notify_all()

    def wait_for(self, step: int) -> None:
        """Wait until the rollouts of a step are stored."""
        self._wait_for(lambda: step if step in self._stored else None)

    def forget(self, step: int) -> None:
        """A step was trained on."""
        with self._changed:
            self._stored.discard(step)

    def __contains__(self, step: int) -> bool:
        with self._changed:
            return step in self._stored

    def __len__(self) -> int:
        with self._changed:
            return len(self._stored)

    def close(self, error: BaseException | None = None) -> None:
        """Nothing more is admitted, and what is not stored does not come: a BufferClosedError, from
        `error` where one end failed.
        """
        with self._changed:
            self._is_closed, self._error = True, self._error or error
            self._changed.notify_all()

    def _version_for(self, step: int) -> int | None:
        if self._is_closed:  # what could still be drawn is not
            return None
        wanted = self.wanted(step)
        if self._lag == "fixed":
            return wanted if max(self._versions, default=-1) >= wanted else None
        return next(
            (version for version in range(step, wanted - 1, -1) if version in self._versions), None
        )

    def _wait_for(self, find: Callable[[], int | None]) -> int:
        """What `find` finds, as soon as it finds something."""
        with self._changed:
            while (found := find()) is None:
                if self._is_closed:
                    raise BufferClosedError(
                        "the other end of the rollout buffer has stopped"
                    ) from self._error
                if self._look is not None:
                    versions, steps = self._look()
                    self._versions |= set(versions)
                    self._stored |= set(steps)
                if find() is None:
                    self._changed.wait(_SECONDS_BETWEEN_LOOKS if self._look else None)
            return found
