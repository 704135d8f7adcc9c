"""Synchronises the generator and the learner: which weights may sample the rollouts of a step, and
which steps have stored rollouts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal

_POLL_SECONDS = 0.02  # between looks at files that another process writes


class BufferClosedError(RuntimeError):
    """The run is over: no rollouts come any more."""


class RolloutBuffer:
    """The rollouts of future steps, in order, for at most `max_staleness + 1` steps.

    A step is admitted before it is sampled, as soon as there are weights that will be at most
    `max_staleness` updates old when the step is trained on. This is known in advance, because steps
    are trained on in order, one update each. So no sampled rollout is ever dropped, however slow it
    was, and a generator that is that far ahead waits.

    `lag` fixed: exactly the weights of `max_staleness` updates before the step (the untrained ones
    for the first steps). free: the newest weights, but none from after the step, which a killed
    learner may have left.

    `look()` returns (published versions, stored steps). It is called while waiting, if the other
    end is another process.
    """

    def __init__(
        self,
        max_staleness: int,
        lag: Literal["fixed", "free"],
        look: Callable[[], tuple[list[int], list[int]]] | None = None,
    ):
        self._max_staleness, self._lag, self._look = max_staleness, lag, look
        self._changed = threading.Condition()
        self._versions: set[int] = set()
        self._stored: dict[int, Any] = {}
        self._is_closed, self._error = False, None

    def oldest_version(self, step: int) -> int:
        """The oldest weights that may sample a step; with a fixed lag the only ones."""
        return max(step - self._max_staleness, 0)

    def publish(self, version: int) -> None:
        """Weights of that many updates exist."""
        with self._changed:
            self._versions.add(version)
            self._changed.notify_all()

    def admit(self, step: int) -> int:
        """Wait until `step` may be sampled; return the version to sample it with."""
        return self._wait_for(lambda: self._version_for(step))

    def put(self, step: int, content: Any = None) -> None:
        """The rollouts of a step are stored; `content` is what was read of them, if anything."""
        with self._changed:
            self._stored[step] = content
            self._changed.notify_all()

    def wait_for(self, step: int) -> None:
        """Wait until the rollouts of a step are stored."""
        self._wait_for(lambda: step if step in self._stored else None)

    def content(self, step: int) -> Any:
        """What `put` received for a step; None if another process stored it."""
        with self._changed:
            return self._stored.get(step)

    def forget(self, step: int) -> None:
        """Remove a step that was trained on."""
        with self._changed:
            self._stored.pop(step, None)

    def __contains__(self, step: int) -> bool:
        with self._changed:
            return step in self._stored

    def __len__(self) -> int:
        with self._changed:
            return len(self._stored)

    def close(self, error: BaseException | None = None) -> None:
        """Admit nothing more; waiting for what is not stored raises BufferClosedError, from `error`
        if one end failed.
        """
        with self._changed:
            self._is_closed, self._error = True, self._error or error
            self._changed.notify_all()

    def _version_for(self, step: int) -> int | None:
        if self._is_closed:
            return None
        oldest = self.oldest_version(step)
        if self._lag == "fixed":
            return oldest if max(self._versions, default=-1) >= oldest else None
        possible = (v for v in range(step, oldest - 1, -1) if v in self._versions)
        return next(possible, None)

    def _wait_for(self, find: Callable[[], int | None]) -> int:
        """Wait until `find` returns something, and return it."""
        with self._changed:
            while (found := find()) is None:
                if self._is_closed:
                    raise BufferClosedError(
                        "the other end of the rollout buffer has stopped"
                    ) from self._error
                if self._look is not None:
                    versions, steps = self._look()
                    self._versions |= set(versions)
                    self._stored |= {step: None for step in steps if step not in self._stored}
                if find() is None:
                    self._changed.wait(_POLL_SECONDS if self._look else None)
            return found
