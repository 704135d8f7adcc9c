"""A step may be sampled as soon as there are weights that will be at most `max_staleness` updates
old when it is trained on. This is known in advance, because steps are trained on in order, one
update each. So no sampled rollout is ever dropped, however slow it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Literal

Lag = Literal["fixed", "free"]


def oldest_version(step: int, max_staleness: int) -> int:
    """The oldest weights that may sample a step; with a fixed lag the only ones."""
    return max(step - max_staleness, 0)


def version_for(step: int, published: Collection[int], max_staleness: int, lag: Lag) -> int | None:
    """The weights to sample a step with; None: it has to wait for newer ones.

    fixed: those of `oldest_version`. free: the newest published ones, but none from after the step,
    which a killed learner may have left.
    """
    oldest = oldest_version(step, max_staleness)
    if lag == "fixed":
        return oldest if max(published, default=-1) >= oldest else None
    return max((version for version in published if oldest <= version <= step), default=None)


class RolloutBuffer:
    """The rollouts of future steps, of at most `max_staleness + 1` at a time.

    `sample(step, version, weights)` makes and returns the rollouts of one step. It runs in a thread
    of its own, or within `publish` if not `is_threaded`. `lag`: see `version_for`.
    """

    def __init__(
        self,
        steps: range,
        max_staleness: int,
        lag: Lag,
        sample: Callable[[int, int, Any], Any],
        *,
        is_threaded: bool,
    ):
        self._max_staleness, self._lag, self._sample = max_staleness, lag, sample
        self._thread = ThreadPoolExecutor(1, "generator") if is_threaded else None
        self._unsampled = list(steps)  # no weights may sample them yet
        self._rollouts: dict[int, Future] = {}
        self._newest: tuple[int, Any] | None = None  # version and weights, with a free lag

    def put(self, step: int, rollouts: Any) -> None:
        """Add rollouts that are made already."""
        self._unsampled.remove(step)
        self._rollouts[step] = Future()
        self._rollouts[step].set_result(rollouts)

    def is_needed(self, version: int) -> bool:
        """Whether weights of `version` updates will sample a step."""
        is_waiting = not all(future.done() for future in self._rollouts.values())
        return bool(self._due(version)) or (self._lag == "free" and is_waiting)

    def wait_for_room(self, version: int) -> None:
        """With a fixed lag, wait until the thread needs only one version before `version`."""
        if self._lag == "fixed":
            wait([f for step, f in self._rollouts.items() if self._oldest(step) < version - 1])

    def publish(self, version: int, weights: Any) -> None:
        """Sample the steps that weights of `version` updates are meant for. With a free lag, steps
        that wait for the thread are sampled with these weights too.
        """
        given = version, weights
        if self._lag == "free":
            self._newest, given = given, None
        for step in self._due(version):
            if self._thread is None:
                self.put(step, self._run(step, given))
            else:
                self._unsampled.remove(step)
                self._rollouts[step] = self._thread.submit(self._run, step, given)

    def get(self, step: int) -> Any:
        """Wait for the rollouts of a step; an error of `sample` is raised here."""
        return self._rollouts[step].result()

    def __contains__(self, step: int) -> bool:
        """Whether `get` returns at once."""
        future = self._rollouts.get(step)
        return future is not None and future.done() and future.exception() is None

    def forget(self, step: int) -> None:
        """Remove a step that was trained on."""
        del self._rollouts[step]

    def close(self) -> None:
        """Stop after the step that is being sampled."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _oldest(self, step: int) -> int:
        return oldest_version(step, self._max_staleness)

    def _due(self, version: int) -> list[int]:
        return [step for step in self._unsampled if self._oldest(step) <= version]

    def _run(self, step: int, given: tuple[int, Any] | None) -> Any:
        return self._sample(step, *(given or self._newest))
