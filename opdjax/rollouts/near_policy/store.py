"""The stored rollouts of a run: whole shards are read, missing and damaged ones are made."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator

from opdjax.models.decoder import Params
from opdjax.ops.multihost import on_process_zero
from opdjax.rollouts.near_policy import shards, stages
from opdjax.rollouts.near_policy.shards import DamagedShardError, MissingShardError, Shard
from opdjax.rollouts.on_policy import prompts_of
from opdjax.rollouts.setup import Setup
from opdjax.runs.workdir import append_lines
from opdjax.types import PromptBatch


@dataclasses.dataclass(frozen=True)
class StoredStep:
    """The shards of a step, as they were read from its files."""

    samples: Shard
    annotations: Shard | None = None  # None: not read yet, or the recipe stores none


@dataclasses.dataclass(frozen=True)
class RolloutStore:
    """The shards of a run, and what is needed to make them."""

    setup: Setup
    workdir: pathlib.Path

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
        prompts: PromptBatch,
        weights: Callable[[], Params],
        *,
        number: int,
        step: int,
        version: int,
    ) -> Shard:
        """The answers to these prompts, sampled with weights of `version` updates unless they are
        stored already.
        """
        found = self.read_if_whole(version, "samples", number)
        if found is None:
            place = {"number": number, "step": step, "version": version}
            with self.span("generate", step, version):
                stages.generate(self.setup, weights(), prompts, self.directory(version), **place)
            found = self.read(version, "samples", number)
        return found

    def annotations(self, samples: Shard, step: int) -> Shard | None:
        """The annotations of a shard of samples; missing or damaged ones are made first. None if
        the recipe stores none.
        """
        if not stages.is_annotated(self.setup.config):
            return None
        number, version = samples.facts["number"], int(samples.path.parent.name)
        found = self.read_if_whole(version, "annotations", number)
        if found is None:
            with self.span("annotate", step, version):
                stages.annotate(self.setup, samples, self.directory(version))
            found = self.read(version, "annotations", number)
        return found

    def step(self, step: int, version: int, weights: Callable[[], Params]) -> StoredStep:
        """The rollouts of a step of a continuous run, made if they are not stored."""
        prompts = prompts_of(self.setup.prompts, self.setup.config, step)
        samples = self.samples(prompts, weights, number=step, step=step, version=version)
        return StoredStep(samples, self.annotations(samples, step))

    def sampled_version(self, step: int) -> int | None:
        """The version of the weights that sampled a step; None if no samples are stored. Damage is
        not checked.
        """
        near = self.setup.config.near_policy
        oldest = max(step - near.max_staleness, 0)
        newest = oldest if near.lag == "fixed" else step
        is_stored = lambda version: step in shards.shard_paths(self.directory(version), "samples")
        return next(filter(is_stored, range(oldest, newest + 1)), None)

    def is_step_stored(self, step: int) -> bool:
        """Whether everything that the learner reads of a step is stored."""
        version = self.sampled_version(step)
        if version is None or not stages.is_annotated(self.setup.config):
            return version is not None
        return step in shards.shard_paths(self.directory(version), "annotations")

    def remove_samples(self, version: int, step: int) -> None:
        """Delete the samples of a step, which other weights may then sample."""
        shards.shard_paths(self.directory(version), "samples")[step].unlink()

    @contextlib.contextmanager
    def span(self, what: str, step: int, version: int) -> Iterator[None]:
        """Write a row of `timeline-generator.jsonl` with the start and duration of the block."""
        start, clock = time.time(), time.perf_counter()
        yield
        row = {"what": what, "start": start, "seconds": time.perf_counter() - clock}
        row |= {"step": step, "version": version}
        file = self.workdir / "timeline-generator.jsonl"
        on_process_zero(lambda: append_lines(file, [row]))
