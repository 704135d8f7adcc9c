"""The stored rollouts of a run, and the weights that a learner publishes for a generator in another
process. Whole shards are read, missing and damaged ones are made.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterable

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.flax import load_file, save

from opdjax.config.validation import ConfigError
from opdjax.data.prompts import collate, indices_at
from opdjax.models.decoder import Params
from opdjax.models.partitioning import SAMPLER_AXES, shardings_of
from opdjax.ops.multihost import InterruptedRunError, on_process_zero
from opdjax.ops.sharding import to_host
from opdjax.rollouts.near_policy import shards, stages
from opdjax.rollouts.near_policy.buffer import oldest_version
from opdjax.rollouts.near_policy.shards import LostShardError, Shard, ShardError
from opdjax.rollouts.setup import Setup
from opdjax.runs.workdir import append_lines

# Rollouts in a stored file of a refresh, which are sampled and annotated together: an interrupted
# refresh repeats at most these.
SHARD_SIZE = 1024
POLL_SECONDS = 0.05  # between looks at files that another process writes


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
        """Read a shard; LostShardError if it is missing or damaged."""
        directory = self.directory(version)
        paths = shards.shard_paths(directory, stage)
        if number not in paths:
            raise LostShardError(
                f"{directory} lacks {stage} {number}, which was stored before; put the file back "
                "or use a new work directory"
            )
        return shards.read_shard(paths[number])

    def read_if_whole(self, version: int, stage: str, number: int) -> Shard | None:
        """Read a shard; None if it is missing or damaged. A damaged one is deleted, with a note."""
        path = shards.shard_paths(self.directory(version), stage).get(number)
        try:
            return path and shards.read_shard(path)
        except LostShardError as error:
            note = f"note: {error}; it is made again"
        on_process_zero(lambda: print(note))
        on_process_zero(lambda: path.unlink(missing_ok=True))  # now all processes have read it
        return None

    def report_lost(self, first: int) -> None:
        """Print what is gone of the rollouts that the steps before `first` trained on."""
        config = self.setup.config
        steps = range(config.train.first_step, first)
        stored = shards.versions(self.workdir) if steps else []
        is_continuous = config.near_policy.schedule == "continuous"
        # The newest version of a refresh is made again where it is needed.
        wanted = [v for v in config.refresh_steps if v in steps][:-1]
        for stage in ("samples", "annotations")[: 1 + stages.is_annotated(config)]:
            found = {v: shards.shard_paths(self.directory(v), stage).keys() for v in stored}
            if is_continuous:
                every = set().union(*found.values())
                lost = [n for n in steps if n not in every]
            else:
                numbers = self.blocks(0) if wanted else ()
                lost = [(v, n) for v in wanted for n in numbers if n not in found.get(v, ())]
            if lost:
                print(
                    f"note: {len(lost)} {stage} of rollouts before step {first} were lost in "
                    f"{self.workdir / 'rollouts'}, first {lost[0]}; the run goes on without them"
                )

    def blocks(self, step: int) -> dict[int, np.ndarray]:
        """Prompts that are sampled for a step, number of the shard -> indices: the step's own, or
        under refresh those of an epoch, in whole prompts, about SHARD_SIZE rollouts a shard.
        ConfigError if an epoch would use a prompt, and so train on the same answer, twice.
        """
        config, num_prompts = self.setup.config, len(self.setup.prompts)
        per_step = config.train.prompts_per_step
        if config.near_policy.schedule == "continuous":
            return {step: indices_at(step, per_step, num_prompts, config.seed)}
        count = config.steps_per_epoch * per_step
        if count > num_prompts:
            raise ConfigError(
                f"an epoch takes {count} prompts (train.num_steps / near_policy.num_epochs x "
                f"train.prompts_per_step), but {config.data.source} has {num_prompts}; expected at "
                f"most {num_prompts}: raise near_policy.num_epochs or lower train.prompts_per_step"
            )
        indices = indices_at(0, count, num_prompts, config.seed)
        size = max(SHARD_SIZE // config.sampling.num_generations, 1)
        return dict(enumerate(indices[start : start + size] for start in range(0, count, size)))

    def samples(self, version: int, step: int, weights: Callable[[], Params] | None) -> list[Shard]:
        """The samples of a step, each shard read once.

        Missing and damaged ones are made with `weights` of `version` updates, which is called at
        most once; ShardError without weights.
        """
        found, weights = [], weights and functools.cache(weights)
        for number, indices in self.blocks(step).items():
            key = version, "samples", number
            shard = self.read_if_whole(*key) if weights else self.read(*key)
            if shard is None:
                self.check_stop(step)
                start, prompts = time.time(), collate(self.setup.prompts, indices)
                place = self.directory(version), number, step
                stages.generate(self.setup, weights(), prompts, *place)
                self.record("generate", start, step, version)
                shard = self.read(*key)
            found.append(shard)
        return found

    def annotations(self, samples: Iterable[Shard], step: int) -> list[Shard]:
        """The annotations of shards of samples, made if missing; [] if none are stored."""
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
        """(samples, annotations) of a step, made if they are not stored."""
        samples = self.samples(version, step, weights)
        return samples, self.annotations(samples, step)

    def whole_samples(self, step: int) -> list[Shard] | None:
        """The samples of a step; None if they are not all stored, or if one is damaged, which is
        deleted: other weights may sample it then.
        """
        version = self.sampled_version(step)
        if version is None:
            return None
        found = [self.read_if_whole(version, "samples", number) for number in self.blocks(step)]
        return None if None in found else found

    def sampled_version(self, step: int) -> int | None:
        """The version that sampled a step; None if samples are missing, damage aside."""
        near = self.setup.config.near_policy
        oldest = oldest_version(step, near.max_staleness)
        newest = oldest if near.lag == "fixed" else step
        has_samples = lambda version: self._is_complete(version, "samples", step)
        return next(filter(has_samples, range(oldest, newest + 1)), None)

    def is_stored(self, step: int) -> bool:
        """Whether everything that the learner reads of a step exists; damage is not checked."""
        version = self.sampled_version(step)
        if version is None or not stages.is_annotated(self.setup.config):
            return version is not None
        return self._is_complete(version, "annotations", step)

    def _is_complete(self, version: int, stage: str, step: int) -> bool:
        found = shards.shard_paths(self.directory(version), stage).keys()
        return bool(found) and found >= self.blocks(step).keys()

    def wait_for(self, step: int) -> None:
        """Wait until another process has stored a step's rollouts, or a stop is requested."""
        while not self.is_stored(step):
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
        """Write the weights of a version, and delete those before `keep_from`; StorageError."""
        params = to_host(params)

        def write():
            shards.write_whole(self._weights_file(version), save(flatten_dict(params, sep=".")))
            for old in self.published():
                if old < keep_from:
                    self._weights_file(old).unlink(missing_ok=True)

        on_process_zero(write)

    def fetch(self, version: int) -> Params:
        """The published weights of a version, on the mesh; FileNotFoundError without them."""
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
