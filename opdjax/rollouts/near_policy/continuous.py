"""Sources of batches whose rollouts are drawn ahead of their update: all of some epochs at once, or
step by step.

What is drawn lies in the work directory before it is trained on, and batches are made of what lies
there: so a run that is killed finds every rollout again, and a generator in this thread, in
another, or in another process are the same to the learner.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator

import jax
import numpy as np

from opdjax.config.validation import ConfigError
from opdjax.models.decoder import Params
from opdjax.ops.multihost import InterruptedRunError, agreed, on_process_zero
from opdjax.rollouts.near_policy import published_weights, shards, stages
from opdjax.rollouts.near_policy.batches import as_batch, drawn_tokens, filter_metrics, without
from opdjax.rollouts.near_policy.buffer import BufferClosedError, RolloutBuffer
from opdjax.rollouts.near_policy.generator import (
    Generator,
    Timeline,
    drawn_by,
    produce,
    read,
    readable,
    where_stored,
)
from opdjax.rollouts.near_policy.refresh import RefreshSource
from opdjax.rollouts.near_policy.shards import (
    DamagedShardError,
    MissingShardError,
    Shard,
    ShardError,
)
from opdjax.rollouts.on_policy import OnPolicySource, packed, prompts_of, with_credit
from opdjax.rollouts.setup import Setup, initial_weights
from opdjax.rollouts.source import RolloutSource, StepData
from opdjax.runs.metrics import Timer
from opdjax.types import TrainBatch


@contextlib.contextmanager
def open_source(
    setup: Setup, workdir: pathlib.Path, first: int, is_stop_asked: Callable[[int], bool]
) -> Iterator[RolloutSource]:
    """The source that the config asks for, from update `first` on; what works beside the learner
    ends with it.
    """
    schedule = setup.config.near_policy.schedule
    if setup.config.near_policy.generator == "process":
        on_process_zero(
            lambda: print(
                f"rollouts are drawn by another process, to be started beside this one: opdjax sample --store {workdir}"
            )
        )
    if schedule == "none":
        yield OnPolicySource(setup)
        return
    shards.require_pyarrow()
    if schedule == "refresh":
        yield RefreshSource(setup, workdir, is_stop_asked)
    else:
        source = ContinuousSource(setup, workdir, first, is_stop_asked)
        try:
            yield source
        finally:
            source.close()


class ContinuousSource:
    """Every step's rollouts are drawn once, by weights that are at most `max_staleness` updates old
    when they are trained on.
    """

    params = None

    def __init__(
        self, setup: Setup, workdir: pathlib.Path, first: int, is_stop_asked: Callable[[int], bool]
    ):
        self._setup, self._workdir, self._timeline = setup, workdir, Timeline(workdir)
        self._is_stop_asked = is_stop_asked
        near = setup.config.near_policy
        self._steps = range(first, setup.config.train.num_steps)
        look = self._look if near.generator == "process" else None
        self._taken, self._ahead, self._unfiltered, self._num_empty = first, None, None, 0
        self._buffer = RolloutBuffer(near.max_staleness, near.lag, look)
        if look is None:
            self._adopt(first)
        self._generator = (
            Generator(setup, workdir, self._buffer, self._steps)
            if near.generator == "thread"
            else None
        )

    def publish(self, version: int, weights_of: Callable[[], Params], timer: Timer) -> None:
        """See `RolloutSource`."""
        near = self._setup.config.near_policy
        if self._generator is not None:
            self._generator.offer(version, weights_of, timer)
        if near.generator == "process":
            with timer.phase("publish"):
                published_weights.publish(
                    self._workdir, version, weights_of(), keep_from=version - near.max_staleness
                )
        if near.generator == "inline":
            self._draw_with(version, weights_of, timer)

    def next(self, step: int, timer: Timer) -> StepData:
        """See `RolloutSource`."""
        with timer.phase("wait"):
            self._wait_for(step)
        with timer.phase("pack"):
            drawn, self._ahead = self._ahead or self._load(step), None
            self._taken = step + 1
            self._buffer.forget(step)
        return drawn

    def prefetch(self, step: int) -> None:
        """See `RolloutSource`."""
        if agreed(step in self._buffer):  # loading is done by all processes together or by none
            self._ahead = self._load(step)

    def commit(self, version: int, timer: Timer) -> None:
        """See `RolloutSource`."""
        if self._setup.config.near_policy.lag == "fixed":
            with timer.phase("wait"):
                for step in self._steps:
                    if self._taken <= step and self._buffer.wanted(step) < version:
                        self._wait_for(step)

    def probe(self, step: int) -> TrainBatch:
        """See `RolloutSource`."""
        return packed(self._setup, self._unfiltered)[0]

    def close(self) -> None:
        """Let a generator in this process end."""
        if self._generator is not None:
            self._generator.close()

    def _wait_for(self, step: int) -> None:
        try:
            self._buffer.wait_for(step)
        except BufferClosedError as closed:
            raise (
                closed.__cause__ or closed
            ) from None  # what the generator failed with is the run's error

    def _look(self) -> tuple[list[int], list[int]]:
        """What another process has stored of the steps that may be drawn by now; it may never come,
        so signals are heard here.
        """
        if jax.process_count() == 1 and self._is_stop_asked(self._taken):
            raise InterruptedRunError(
                f"stopped while waiting for rollouts of step {self._taken}; the same command continues {self._workdir}"
            )
        reach = self._taken + self._setup.config.near_policy.max_staleness + 1
        missing = (
            step
            for step in range(self._taken, min(reach, self._steps.stop))
            if step not in self._buffer
        )
        # They come in their order: those after the first that is not there need not be looked for.
        return [], list(
            itertools.takewhile(
                lambda step: where_stored(self._workdir, self._setup, step) is not None, missing
            )
        )

    def _draw_with(self, version: int, weights_of: Callable[[], Params], timer: Timer) -> None:
        """All steps that these weights are the ones for."""
        wanted = [
            step
            for step in self._steps
            if step not in self._buffer
            and step >= self._taken
            and self._buffer.wanted(step) == version
        ]
        if not wanted:
            return
        with timer.phase("sample"):
            params = weights_of()
            for step in wanted:
                produce(self._setup, self._workdir, self._timeline, step, version, lambda: params)
                self._buffer.put(step)

    def _adopt(self, first: int) -> None:
        """Take over what is stored of the steps to come; what is damaged is drawn again where its
        weights can be had again.
        """
        is_fixed = self._setup.config.near_policy.lag == "fixed"
        for step in self._steps:
            version, wanted, reason = (
                drawn_by(self._workdir, self._setup, step),
                self._buffer.wanted(step),
                None,
            )
            try:
                self._samples(step, version)
            except (DamagedShardError, MissingShardError) as error:
                reason = error
            if reason is None:
                self._buffer.put(step)
            elif is_fixed and wanted < first:
                if wanted:
                    raise ShardError(
                        f"{reason}; the weights of {wanted} updates that drew them are gone, for the run continues from {first}: put the "
                        "file back or start in a new work directory"
                    ) from reason
                produce(
                    self._setup,
                    self._workdir,
                    self._timeline,
                    step,
                    0,
                    lambda: initial_weights(self._setup),
                )
                self._buffer.put(step)
            elif (
                version is not None and not is_fixed
            ):  # other weights may draw it now; in its own place a new one replaces it
                shards.shard_paths(shards.version_directory(self._workdir, version), "samples")[
                    step
                ].unlink()

    def _samples(self, step: int, version: int | None) -> Shard:
        if version is None:
            raise MissingShardError(f"{self._workdir / 'rollouts'} has no rollouts of step {step}")
        return read(shards.version_directory(self._workdir, version), "samples", step)

    def _annotations(self, samples: Shard, directory: pathlib.Path, step: int) -> Shard:
        """What the teacher said of them, who is asked again where that is damaged."""
        found = readable(directory, "annotations", step)
        if found is None:
            stages.annotate(self._setup, samples, directory)
        return found or read(directory, "annotations", step)

    def _load(self, step: int) -> StepData:
        """What the update is made of, from its files."""
        setup, near = self._setup, self._setup.config.near_policy
        samples = self._samples(step, drawn_by(self._workdir, setup, step))
        directory = samples.path.parent
        annotations = (
            [self._annotations(samples, directory, step)]
            if stages.is_annotated(setup.config)
            else []
        )
        rollouts, batch = as_batch(setup, [samples], annotations)
        # Numbers drawn for a step are named after it, however old the weights were that drew its
        # tokens.
        batch, told = with_credit(
            setup,
            batch,
            dataclasses.replace(rollouts, policy_version=np.full(len(samples), step, np.int32)),
        )
        told |= drawn_tokens([samples], annotations)
        kept = np.ones(len(samples), bool)
        if near.filter != "none":
            document = stages.select(setup, [samples], annotations, directory, step)
            kept, told, self._unfiltered = (
                np.array(document["kept"], bool),
                told | filter_metrics(document),
                batch,
            )
        self._require_some(kept, step, directory)
        rows, filled = packed(setup, without(batch, kept))
        rollouts, batch = jax.tree.map(lambda x: np.asarray(x)[kept], (rollouts, batch))
        return StepData(prompts_of(setup, step), rollouts, batch, rows, told | filled)

    def _require_some(self, kept: np.ndarray, step: int, directory: pathlib.Path) -> None:
        """ConfigError where the filter has left nothing of too many steps in a row: each would
        still move the optimizer.
        """
        self._num_empty = 0 if kept.any() else self._num_empty + 1
        most = self._setup.config.train.max_nonfinite_steps
        if self._num_empty >= most:
            raise ConfigError(
                f"near_policy.filter {self._setup.config.near_policy.filter} has kept no rollout of the last {most} steps, up to {step} "
                f"(opdjax rollouts {directory}); start in a new work directory with wider near_policy.ifd_min and ifd_max"
            )
