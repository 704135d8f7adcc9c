"""The stored rollouts of a run, and the weights that a learner publishes for a generator in another
process. Whole shards are read, missing and damaged ones are made.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.flax import load_file, save

from opdjax.data.prompts import collate, indices_at
from opdjax.models.decoder import Params
from opdjax.models.partitioning import SAMPLER_AXES, shardings_of
from opdjax.ops.multihost import InterruptedRunError, on_process_zero
from opdjax.ops.sharding import to_host
from opdjax.rollouts.near_policy import shards, stages
from opdjax.rollouts.near_policy.buffer import oldest_version
from opdjax.rollouts.near_policy.shards import (
    DamagedShardError,
    MissingShardError,
    Shard,
    ShardError,
)
from opdjax.rollouts.setup import Setup
from opdjax.runs.workdir import append_lines

POLL_SECONDS = 0.02  # between looks at files that another process writes


@dataclasses.dataclass(frozen=True)
class RolloutStore:
    """The shards of a run, and what is needed to make them."""

    setup: Setup
    workdir: pathlib.Path
    is_stop_requested: Callable[[int], bool] = lambda step: False

    def directory(self, version: int) -> pathlib.Path:
        """The directory of the rollouts of one version; it need not exist."""
        return shards.version_directory(self.workdir, version)

    def read(self, version: int, stage: str, number: int) -> Shard:
        """Read a shard; ShardError if it is missing or damaged."""
        directory = self.directory(version)
        paths = shards.shard_paths(directory, stage)
        if number not in paths:
            raise MissingShardError(
                f"{directory} lacks {stage} {number}, which was stored before; put the file back "
                "or use a new work directory"
            )
        return shards.read_shard(paths[number])

    def read_if_whole(self, version: int, stage: str, number: int) -> Shard | None:
        """Read a shard; None if it is missing or damaged, and a note is printed for a damaged
        one.
        """
        try:
            return self.read(version, stage, number)
        except MissingShardError:
            return None
        except DamagedShardError as error:
            note = f"note: {error}; it is made again"
            on_process_zero(lambda: print(note))
            return None

    def samples(
        self,
        version: int,
        step: int,
        blocks: Mapping[int, np.ndarray],
        weights: Callable[[], Params] | None,
    ) -> list[Shard]:
        """The shards with the answers to blocks of prompts, number -> indices; each is read once.

        Missing and damaged ones are sampled for `step` with `weights` of `version` updates, which
        is called at most once; ShardError without weights.
        """
        if weights is None:
            return [self.read(version, "samples", number) for number in blocks]
        found, weights = [], functools.cache(weights)
        for number, indices in blocks.items():
            shard = self.read_if_whole(version, "samples", number)
            if shard is None:
                self.check_stop(step)
                start, place = time.time(), {"number": number, "step": step, "version": version}
                prompts = collate(self.setup.prompts, indices)
                stages.generate(self.setup, weights(), prompts, self.directory(version), **place)
                self.record("generate", start, step, version)
                shard = self.read(version, "samples", number)
            found.append(shard)
        return found

    def annotations(self, samples: Iterable[Shard], step: int) -> list[Shard]:
        """The annotations of shards of samples; missing or damaged ones are made first. [] if the
        recipe stores none.
        """
        found = []
        for shard in samples if stages.is_annotated(self.setup.config) else ():
            key = int(shard.path.parent.name), "annotations", shard.facts["number"]
            annotated = self.read_if_whole(*key)
            if annotated is None:
                self.check_stop(step)
                self.annotate(shard, step)
                annotated = self.read(*key)
            found.append(annotated)
        return found

    def annotate(self, samples: Shard, step: int) -> None:
        """Have the teacher score a shard of samples, and store its scores."""
        start = time.time()
        stages.annotate(self.setup, samples)
        self.record("annotate", start, step, int(samples.path.parent.name))

    def step(
        self, step: int, version: int, weights: Callable[[], Params]
    ) -> tuple[list[Shard], list[Shard]]:
        """(samples, annotations) of a step of a continuous run, made if they are not stored."""
        config, prompts = self.setup.config, self.setup.prompts
        indices = indices_at(step, config.train.prompts_per_step, len(prompts), config.seed)
        samples = self.samples(version, step, {step: indices}, weights)
        return samples, self.annotations(samples, step)

    def sampled_version(self, step: int) -> int | None:
        """The version of the weights that sampled a step of a continuous run; None if no samples
        are stored. Damage is not checked.
        """
        near = self.setup.config.near_policy
        oldest = oldest_version(step, near.max_staleness)
        newest = oldest if near.lag == "fixed" else step
        is_stored = lambda version: step in shards.shard_paths(self.directory(version), "samples")
        return next(filter(is_stored, range(oldest, newest + 1)), None)

    def is_step_stored(self, step: int) -> bool:
        """Whether everything that the learner reads of a step is stored."""
        version = self.sampled_version(step)
        return version is not None and self.is_complete(version, [step])

    def is_complete(self, version: int, numbers: Iterable[int]) -> bool:
        """Whether the shards that the learner reads exist; damage is not checked."""
        stages_read = shards.SCHEMAS if stages.is_annotated(self.setup.config) else ("samples",)
        paths = [shards.shard_paths(self.directory(version), stage) for stage in stages_read]
        return all(found.keys() >= set(numbers) for found in paths)

    def remove_samples(self, version: int, step: int) -> None:
        """Delete the samples of a step, which other weights may then sample."""
        shards.shard_paths(self.directory(version), "samples")[step].unlink()

    def wait_until(self, is_stored: Callable[[], bool], step: int) -> None:
        """Wait for rollouts of another process. It may never store any, so a stop request ends the
        wait.
        """
        while not is_stored():
            self.check_stop(step)
            time.sleep(POLL_SECONDS)

    def check_stop(self, step: int) -> None:
        """InterruptedRunError if this run, which is one process, is asked to stop."""
        if jax.process_count() == 1 and self.is_stop_requested(step):
            raise InterruptedRunError(
                f"stopped before all rollouts of step {step} were stored; the same command "
                f"continues {self.workdir}"
            )

    def record(self, what: str, start: float, step: int, version: int) -> None:
        """Write a row of `timeline-generator.jsonl` about what lasted from `start` until now."""
        row = {"what": what, "start": start, "seconds": time.time() - start}
        row |= {"step": step, "version": version}
        file = self.workdir / "timeline-generator.jsonl"
        on_process_zero(lambda: append_lines(file, [row]))

    # Weights for a generator in another process: one file per version, written atomically.

    def published(self) -> list[int]:
        """The published versions of the weights, in ascending order."""
        return sorted(int(path.stem) for path in self._weights_file(0).parent.glob("*.safetensors"))

    def publish(self, version: int, params: Params, keep_from: int = 0) -> None:
        """Write the weights after `version` updates and delete those of versions before
        `keep_from`; StorageError if there is no room.
        """
        params = to_host(params)

        def write():
            shards.write_whole(self._weights_file(version), save(flatten_dict(params, sep=".")))
            for old in self.published():
                if old < keep_from:
                    self._weights_file(old).unlink(missing_ok=True)

        on_process_zero(write)

    def fetch(self, version: int) -> Params:
        """The published weights of a version, sharded over the mesh; FileNotFoundError if they are
        not stored.
        """
        path = self._weights_file(version)
        try:
            params = unflatten_dict(load_file(path), sep=".")
        except SafetensorError as error:
            raise ShardError(
                f"{path} is damaged: {error}; restart the learner, which publishes its weights "
                "again"
            ) from error
        return jax.device_put(params, shardings_of(params, self.setup.mesh, SAMPLER_AXES))

    def _weights_file(self, version: int) -> pathlib.Path:
        return self.workdir / "published" / f"{version:08}.safetensors"
