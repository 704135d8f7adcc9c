"""The continuous near-policy source: each step's rollouts are sampled ahead of its update, in this
thread, in another one or in another process. They are stored in the work directory before they are
trained on, so a run that was killed finds all of them again.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np

from opdjax.config.validation import ConfigError
from opdjax.models.decoder import Params
from opdjax.models.partitioning import SAMPLER_AXES, shardings_of
from opdjax.ops.multihost import agreed
from opdjax.ops.sharding import make_mesh
from opdjax.rollouts.near_policy import stages
from opdjax.rollouts.near_policy.buffer import RolloutBuffer, oldest_version
from opdjax.rollouts.near_policy.shards import LostShardError, Shard, ShardError
from opdjax.rollouts.near_policy.stages import step_batch
from opdjax.rollouts.near_policy.store import RolloutStore
from opdjax.rollouts.rows import keep_rollouts, packed
from opdjax.rollouts.setup import Setup, with_teacher_weights
from opdjax.rollouts.source import RolloutSource, StepData
from opdjax.rollouts.weights import initial_weights
from opdjax.runs.metrics import Timer
from opdjax.types import TrainBatch

_MAX_EMPTY_STEPS = 5  # consecutive steps of which the filter keeps nothing: more end the run


class ContinuousSource(RolloutSource):
    """Samples a step's rollouts with weights that are at most `max_staleness` updates old."""

    def __init__(
        self,
        setup: Setup,
        workdir: pathlib.Path,
        first: int,
        is_stop_requested: Callable[[int], bool],
    ):
        self._setup, self._near = setup, setup.config.near_policy
        self._prefetched, self._unfiltered, self._num_empty_steps = None, None, 0
        near, self._buffer = self._near, None  # None: another process samples
        if near.generator == "process":
            self._store = RolloutStore(setup, workdir, is_stop_requested)
            return
        self._store = self._generator = RolloutStore(setup, workdir)
        is_threaded, self._idle_since = near.generator == "thread", time.time()
        if is_threaded:
            self._generator = RolloutStore(_on_own_devices(setup), workdir)
        steps = range(first, setup.config.train.num_steps)
        self._buffer = RolloutBuffer(
            steps, near.max_staleness, near.lag, self._sample, is_threaded=is_threaded
        )
        for step in steps:
            self._adopt_stored(step, first)

    def publish(self, version: int, copy_weights: Callable[[], Params], timer: Timer) -> None:
        """See `RolloutSource`."""
        if self._near.generator == "process":
            with timer.phase("publish"):
                keep_from = version - self._near.max_staleness
                self._store.publish(version, copy_weights(), keep_from)
        elif not self._buffer.is_needed(version):
            return
        elif self._near.generator == "inline":
            with timer.phase("sample"):
                self._buffer.publish(version, copy_weights())
        else:
            with timer.phase("wait"):
                self._buffer.wait_for_room(version)
            with timer.phase("publish"):
                self._buffer.publish(version, self._sent(copy_weights()))

    def next(self, step: int, timer: Timer) -> StepData:
        """See `RolloutSource`."""
        with timer.phase("wait"):
            self._wait_for(step)
        with timer.phase("pack"):
            data, self._prefetched = self._prefetched or self._load(step), None
            if self._buffer is not None:
                self._buffer.forget(step)
        return data

    def prefetch(self, step: int) -> None:
        """See `RolloutSource`."""
        is_other = self._buffer is None
        is_stored = self._store.is_stored(step) if is_other else step in self._buffer
        if agreed(is_stored):  # all processes load together or none does
            self._prefetched = self._load(step)

    def commit(self, version: int, timer: Timer) -> None:
        """See `RolloutSource`."""
        if self._near.lag == "fixed":
            end = min(version + self._near.max_staleness, self._setup.config.train.num_steps)
            with timer.phase("wait"):
                for step in range(version, end):
                    self._wait_for(step)

    def probe(self, step: int) -> TrainBatch:
        """See `RolloutSource`."""
        return packed(self._unfiltered, self._setup.config.train, self._setup.mesh)[0]

    def close(self) -> None:
        """Stop the generator thread."""
        if self._buffer is not None:
            self._buffer.close()

    def _wait_for(self, step: int) -> None:
        if self._buffer is None:
            self._store.wait_for(step)
        else:
            self._buffer.get(step)

    def _sample(self, step: int, version: int, weights: Params) -> tuple[list[Shard], list[Shard]]:
        if self._near.generator == "thread":
            self._generator.record("admit", self._idle_since, step, -1)
        found = self._generator.step(step, version, lambda: weights)
        self._idle_since = time.time()
        return found

    def _sent(self, weights: Params) -> Params:
        """The weights on the generator's devices."""
        layout = shardings_of(weights, self._generator.setup.mesh, SAMPLER_AXES)
        # With adapters the copy contains the learner's own frozen parameters: not to be donated.
        return jax.device_put(weights, layout, donate=not self._setup.config.lora.rank)

    def _adopt_stored(self, step: int, first: int) -> None:
        """Take over a step's stored rollouts; sample lost ones again if their weights are there."""
        oldest = oldest_version(step, self._near.max_staleness)
        is_past = self._near.lag == "fixed" and oldest < first  # of weights before the learner's
        if is_past and oldest:
            try:
                samples = self._store.samples(oldest, step, None)
            except LostShardError as error:
                raise ShardError(
                    f"{error}; the weights of {oldest} updates that sampled it are gone, because "
                    f"the run continues from step {first}: put the file back or start in a new "
                    "work directory"
                ) from error
        else:
            samples = self._store.whole_samples(step)
        if samples is not None:
            self._buffer.put(step, (samples, None))
        elif is_past:
            weights = lambda: initial_weights(self._setup)
            self._buffer.put(step, self._store.step(step, 0, weights))

    def _load(self, step: int) -> StepData:
        setup, config = self._setup, self._setup.config
        if self._buffer is None:
            version, annotations = self._store.sampled_version(step), None
            samples = self._store.samples(version, step, None)
        else:
            samples, annotations = self._buffer.get(step)
        if annotations is None:
            annotations = self._store.annotations(samples, step)
        rollouts, batch, metrics = step_batch(setup, step, samples, annotations)
        kept, filtering = stages.select(setup, samples, annotations, step)
        self._unfiltered = batch
        self._check_filter_not_empty(kept, step, samples[0].path.parent)
        rows, packing = packed(keep_rollouts(batch, kept), config.train, setup.mesh)
        rollouts, batch = jax.tree.map(lambda x: np.asarray(x)[kept], (rollouts, batch))
        return StepData(rollouts, batch, rows, metrics | filtering | packing)

    def _check_filter_not_empty(self, kept: np.ndarray, step: int, directory: pathlib.Path) -> None:
        """ConfigError after too many empty steps in a row: even they move the optimizer."""
        self._num_empty_steps = 0 if kept.any() else self._num_empty_steps + 1
        if self._num_empty_steps >= _MAX_EMPTY_STEPS:
            raise ConfigError(
                f"near_policy.filter {self._near.filter} has kept no rollout of the last "
                f"{_MAX_EMPTY_STEPS} steps, up to {step} (opdjax rollouts {directory}); start in a "
                "new work directory with wider near_policy.ifd_min and ifd_max"
            )


def _on_own_devices(setup: Setup) -> Setup:
    """The setup of a generator that samples on the last devices of this process."""
    config = setup.config
    tensor = config.mesh.tensor
    count = config.mesh.generator_devices(len(jax.devices()))
    mesh = make_mesh(count // tensor, 1, tensor, devices=jax.devices()[-count:])
    setup = dataclasses.replace(setup, mesh=mesh)
    if not stages.is_annotated(config):
        return dataclasses.replace(setup, teacher=None)
    params = jax.device_put(setup.teacher.params, shardings_of(setup.teacher.params, mesh))
    return dataclasses.replace(setup, teacher=with_teacher_weights(setup.teacher, params, config))
