"""The continuous near-policy source: each step's rollouts are sampled ahead of its update.

Rollouts are stored in the work directory before they are trained on. So a run that was killed finds
all of them again, and it makes no difference to the learner whether the generator is this thread,
another thread or another process.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from opdjax.config.validation import ConfigError
from opdjax.models.decoder import Params
from opdjax.ops.multihost import InterruptedRunError, agreed
from opdjax.rollouts.near_policy import published_weights, stages
from opdjax.rollouts.near_policy.batches import filter_metrics, step_batch, stored_token_counts
from opdjax.rollouts.near_policy.buffer import BufferClosedError, RolloutBuffer
from opdjax.rollouts.near_policy.generator import Generator
from opdjax.rollouts.near_policy.shards import (
    DamagedShardError,
    MissingShardError,
    Shard,
    ShardError,
)
from opdjax.rollouts.near_policy.store import RolloutStore, StoredStep
from opdjax.rollouts.rows import keep_rollouts, packed
from opdjax.rollouts.setup import Setup, initial_weights
from opdjax.rollouts.source import RolloutSource, StepData
from opdjax.runs.metrics import Timer
from opdjax.types import TrainBatch

_MAX_EMPTY_STEPS = 5  # consecutive steps of which the filter keeps nothing: more end the run


class ContinuousSource(RolloutSource):
    """Samples every step's rollouts once, with weights that are at most `max_staleness` updates old
    when the rollouts are trained on.
    """

    def __init__(
        self,
        setup: Setup,
        workdir: pathlib.Path,
        first: int,
        is_stop_requested: Callable[[int], bool],
    ):
        self._setup, self._workdir = setup, workdir
        self._store = RolloutStore(setup, workdir)
        self._is_stop_requested = is_stop_requested
        near = setup.config.near_policy
        self._steps = range(first, setup.config.train.num_steps)
        self._next_step, self._prefetched = first, None
        self._unfiltered, self._num_empty_steps = None, 0
        look = self._look if near.generator == "process" else None
        self._buffer = RolloutBuffer(near.max_staleness, near.lag, look)
        if look is None:
            self._adopt_stored(first)
        self._generator = None
        if near.generator == "thread":
            self._generator = Generator(setup, workdir, self._buffer, self._steps)

    def publish(self, version: int, copy_weights: Callable[[], Params], timer: Timer) -> None:
        """See `RolloutSource`."""
        near = self._setup.config.near_policy
        if self._generator is not None:
            self._generator.offer(version, copy_weights, timer)
        if near.generator == "process":
            with timer.phase("publish"):
                keep_from = version - near.max_staleness
                published_weights.publish(self._workdir, version, copy_weights(), keep_from)
        if near.generator == "inline":
            self._sample_with(version, copy_weights, timer)

    def next(self, step: int, timer: Timer) -> StepData:
        """See `RolloutSource`."""
        with timer.phase("wait"):
            self._wait_for(step)
        with timer.phase("pack"):
            data, self._prefetched = self._prefetched or self._load(step), None
            self._next_step = step + 1
            self._buffer.forget(step)
        return data

    def prefetch(self, step: int) -> None:
        """See `RolloutSource`."""
        if agreed(step in self._buffer):  # all processes load together or none does
            self._prefetched = self._load(step)

    def commit(self, version: int, timer: Timer) -> None:
        """See `RolloutSource`."""
        if self._setup.config.near_policy.lag == "fixed":
            with timer.phase("wait"):
                for step in self._steps:
                    if self._next_step <= step and self._buffer.oldest_version(step) < version:
                        self._wait_for(step)

    def probe(self, step: int) -> TrainBatch:
        """See `RolloutSource`."""
        return packed(self._unfiltered, self._setup.config.train, self._setup.mesh)[0]

    def close(self) -> None:
        """Stop the generator thread."""
        if self._generator is not None:
            self._generator.close()

    def _wait_for(self, step: int) -> None:
        try:
            self._buffer.wait_for(step)
        except BufferClosedError as closed:
            raise (closed.__cause__ or closed) from None  # the generator's error ends the run

    def _look(self) -> tuple[list[int], list[int]]:
        """The steps that another process has stored. It may never store any, so a stop request is
        checked here.
        """
        if jax.process_count() == 1 and self._is_stop_requested(self._next_step):
            raise InterruptedRunError(
                f"stopped while waiting for rollouts of step {self._next_step}; the same command "
                f"continues {self._workdir}"
            )
        config = self._setup.config
        end = min(self._next_step + config.near_policy.max_staleness + 1, self._steps.stop)
        wanted = (step for step in range(self._next_step, end) if step not in self._buffer)
        # Steps are stored in order: none is stored after the first missing one.
        return [], list(itertools.takewhile(self._store.is_step_stored, wanted))

    def _sample_with(self, version: int, copy_weights: Callable[[], Params], timer: Timer) -> None:
        """Sample all steps that these weights are meant for."""
        is_due = lambda step: step >= self._next_step and step not in self._buffer
        of_version = lambda step: self._buffer.oldest_version(step) == version
        steps = [step for step in self._steps if is_due(step) and of_version(step)]
        if not steps:
            return
        with timer.phase("sample"):
            params = copy_weights()
            for step in steps:
                self._buffer.put(step, self._store.step(step, version, lambda: params))

    def _adopt_stored(self, first: int) -> None:
        """Take over the stored rollouts of future steps. Damaged ones are sampled again if their
        weights can be had again.
        """
        is_fixed = self._setup.config.near_policy.lag == "fixed"
        for step in self._steps:
            oldest = self._buffer.oldest_version(step)
            try:
                self._buffer.put(step, StoredStep(self._samples(step)))
                continue
            except (DamagedShardError, MissingShardError) as error:
                reason = error
            if is_fixed and oldest < first:
                if oldest:
                    raise ShardError(
                        f"{reason}; the weights of {oldest} updates that sampled it are gone, "
                        f"because the run continues from step {first}: put the file back or start "
                        "in a new work directory"
                    ) from reason
                weights = lambda: initial_weights(self._setup)
                self._buffer.put(step, self._store.step(step, 0, weights))
            elif isinstance(reason, DamagedShardError) and not is_fixed:
                # Other weights may sample it now; only in the same directory is it replaced.
                self._store.remove_samples(self._store.sampled_version(step), step)

    def _samples(self, step: int) -> Shard:
        version = self._store.sampled_version(step)
        if version is None:
            raise MissingShardError(f"{self._workdir / 'rollouts'} has no rollouts of step {step}")
        return self._store.read(version, "samples", step)

    def _stored(self, step: int) -> StoredStep:
        """The shards of a step, read from disk unless the buffer holds them. The teacher scores
        samples again whose annotations are damaged.
        """
        stored = self._buffer.content(step) or StoredStep(self._samples(step))
        if stored.annotations is not None:
            return stored
        return StoredStep(stored.samples, self._store.annotations(stored.samples, step))

    def _load(self, step: int) -> StepData:
        setup, config, stored = self._setup, self._setup.config, self._stored(step)
        samples = [stored.samples]
        annotations = [] if stored.annotations is None else [stored.annotations]
        directory, count = stored.samples.path.parent, len(stored.samples)
        rollouts, batch, metrics = step_batch(setup, step, samples, annotations)
        metrics |= stored_token_counts(samples, annotations)
        kept = np.ones(count, bool)
        if config.near_policy.filter != "none":
            document = stages.select(setup, samples, annotations, directory, step)
            kept, self._unfiltered = np.array(document["kept"], bool), batch
            metrics |= filter_metrics(document)
        self._check_filter_not_empty(kept, step, directory)
        rows, packing = packed(keep_rollouts(batch, kept), config.train, setup.mesh)
        rollouts, batch = jax.tree.map(lambda x: np.asarray(x)[kept], (rollouts, batch))
        return StepData(rollouts, batch, rows, metrics | packing)

    def _check_filter_not_empty(self, kept: np.ndarray, step: int, directory: pathlib.Path) -> None:
        """ConfigError if the filter kept nothing in too many consecutive steps: even an empty step
        moves the optimizer.
        """
        self._num_empty_steps = 0 if kept.any() else self._num_empty_steps + 1
        if self._num_empty_steps >= _MAX_EMPTY_STEPS:
            chosen = self._setup.config.near_policy.filter
            raise ConfigError(
                f"near_policy.filter {chosen} has kept no rollout of the last {_MAX_EMPTY_STEPS} "
                f"steps, up to {step} (opdjax rollouts {directory}); start in a new work "
                "directory with wider near_policy.ifd_min and ifd_max"
            )
