"""The interface between the training loop and the sources of its batches."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Protocol

import jax

from opdjax.models.decoder import Params
from opdjax.ops.multihost import on_process_zero
from opdjax.rollouts.setup import Setup
from opdjax.runs.metrics import Timer
from opdjax.types import Metrics, Rollouts, TrainBatch


@dataclasses.dataclass(frozen=True)
class StepData:
    """Inputs of one update, as host arrays."""

    rollouts: Rollouts
    batch: TrainBatch  # one rollout per row
    rows: TrainBatch  # what is trained on: `batch` or its packed rows, perhaps already scored
    metrics: Metrics


class SourceStoppedError(RuntimeError):
    """There is no batch for now. The loop saves a checkpoint, and the same command continues."""


class RolloutSource(Protocol):
    """Produces the inputs of one update after the other."""

    # The weights published last, on the learner's mesh; None if the source does not keep them.
    params: Params | None = None
    # Those of a teacher that is the student, and how to copy them where they differ from its own.
    teacher_params: Params | None = None
    copy_teacher: Callable[[], Params] | None = None

    def publish(self, version: int, copy_weights: Callable[[], Params], timer: Timer) -> None:
        """Receive the weights after `version` updates: `copy_weights` returns a copy to keep."""
        self.params = copy_weights()
        self.teacher_params = self.copy_teacher() if self.copy_teacher else self.params

    def next(self, step: int, timer: Timer) -> StepData:
        """Return the inputs of update `step` (from 0); SourceStoppedError if there are none now."""

    def prefetch(self, step: int) -> None:
        """Prepare the host work of update `step` while the device runs the update before it."""
        # Frees the old weights before the new ones are copied.
        self.params = self.teacher_params = None

    def commit(self, version: int, timer: Timer) -> None:
        """Return when all rollouts sampled with weights older than `version` are stored, so that a
        run that is killed now finds them again. Called before a checkpoint is saved.
        """

    def probe(self, step: int) -> TrainBatch | None:
        """Unfiltered rows from this step's policy; None if this source never filters."""


@contextlib.contextmanager
def open_source(
    setup: Setup, workdir: pathlib.Path, first: int, is_stop_requested: Callable[[int], bool]
) -> Iterator[RolloutSource]:
    """The source that the config asks for, from update `first` on, closed at the end."""
    # Imported here: these modules import this one, and judges and shards need packages of extras.
    near = setup.config.near_policy
    with contextlib.ExitStack() as resources:
        if setup.config.is_judged:
            from opdjax.rollouts.judged import JudgedSource, background_judge

            # Of several processes, one alone must not stop.
            is_alone = jax.process_count() == 1
            is_stopped = lambda: is_alone and is_stop_requested(first)
            judge = background_judge(setup.config, workdir, is_stopped)
            opened = on_process_zero(lambda: resources.enter_context(judge))
            yield JudgedSource(setup, workdir, opened)
            return
        if near.schedule == "none":
            from opdjax.rollouts.on_policy import OnPolicySource

            yield OnPolicySource(setup)
            return
        from opdjax.rollouts.near_policy.continuous import ContinuousSource
        from opdjax.rollouts.near_policy.refresh import RefreshSource
        from opdjax.rollouts.near_policy.store import RolloutStore

        on_process_zero(lambda: RolloutStore(setup, workdir).report_lost(first))
        if near.generator == "process":
            command = f"opdjax sample --store {workdir}"
            on_process_zero(lambda: print(f"another process samples the rollouts: run {command}"))
        if near.schedule == "refresh":
            yield RefreshSource(setup, workdir, is_stop_requested)
            return
        source = ContinuousSource(setup, workdir, first, is_stop_requested)
        resources.callback(source.close)
        yield source
