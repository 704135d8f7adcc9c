"""The interface between the loop and where its batches come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

from opdjax.models.decoder import Params
from opdjax.runs.metrics import Timer
from opdjax.types import Metrics, PromptBatch, Rollouts, TrainBatch


@dataclasses.dataclass(frozen=True)
class StepData:
    """What one update is made of; all on the host."""

    prompts: PromptBatch
    rollouts: Rollouts
    batch: TrainBatch  # one rollout a row
    # as it is trained on: rollouts may share a row, and what the teacher says may be there
    rows: TrainBatch
    told: Metrics


class SourceStoppedError(RuntimeError):
    """No batch can be had for now; what has been trained is worth keeping, and the same command
    goes on from there.
    """


class RolloutSource(Protocol):
    """Batches for one update after the other."""

    params: (
        Params | None
    )  # the weights published last, on the learner's mesh, where the source keeps them

    def publish(self, version: int, weights: Callable[[], Params], timer: Timer) -> None:
        """The student after `version` updates; `weights` makes a copy that is the source's own."""

    def next(self, step: int, timer: Timer) -> StepData:
        """What update `step` (from 0) is made of; SourceStoppedError where it cannot be had for
        now.
        """

    def prefetch(self, step: int) -> None:
        """The update before `step` is under way: do on the host what can be done for this one, if
        there is one.
        """

    def commit(self, version: int, timer: Timer) -> None:
        """Return once everything drawn by weights older than `version` is where a run that is
        killed finds it again.
        """

    def probe(self, step: int) -> TrainBatch | None:
        """Rows in which nothing was left out, from the policy that drew those of this step; None
        where none ever is.
        """
