"""Runs the generator alone: for a learner in another process, on this machine or another one.

The two share only the work directory: weights come from `published/`, rollouts go to `rollouts/`.
Either may be killed and restarted at any time; neither needs the other to be running.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator

from opdjax.config import Config, MeshConfig
from opdjax.models.decoder import Params
from opdjax.rollouts.near_policy import published_weights, shards, stages
from opdjax.rollouts.near_policy.buffer import BufferClosedError, RolloutBuffer
from opdjax.rollouts.near_policy.refresh import (
    is_complete,
    require_prompts,
    stored_annotations,
    stored_samples,
    version_of,
)
from opdjax.rollouts.near_policy.shards import ShardError
from opdjax.rollouts.near_policy.store import RolloutStore
from opdjax.rollouts.setup import Setup, facts, initial_weights, prepare
from opdjax.runs.mirror import WorkdirMirror, open_workdir
from opdjax.runs.object_store import is_remote
from opdjax.runs.workdir import WorkdirError, claim, first_day, locked, read_config

_POLL_SECONDS = 0.1  # between looks for published weights


def generate_for(workdir: pathlib.Path, config: Config | None) -> int:
    """Sample and annotate what the run of `workdir` will train on; return the number of shards that
    were stored.

    `config`: of a run that need not have started; None: the work directory's. If its generator is
    `process`, this continues until the run is finished; else it ends with what the untrained
    weights sample.
    """
    with _locked_workdir(workdir) as mirror:
        work = _Work(RolloutStore(_setup(mirror, config), mirror.directory))
        is_refresh = work.config.near_policy.schedule == "refresh"
        (work.store_epochs if is_refresh else work.store_steps)()
        mirror.upload()
        return work.num_stored


def annotate_all(workdir: pathlib.Path) -> int:
    """Have the teacher score every stored rollout whose annotations are missing or damaged; return
    the number of such shards.
    """
    with _locked_workdir(workdir) as mirror:
        store, count = RolloutStore(_setup(mirror, None), mirror.directory), 0
        if not stages.is_annotated(store.setup.config):
            raise WorkdirError(
                f"{store.workdir} holds a run whose recipe reads the teacher's hidden states; "
                "these are computed for each update and never stored"
            )
        for version in shards.versions(store.workdir):
            for number in shards.shard_paths(store.directory(version), "samples"):
                if store.read_if_whole(version, "annotations", number) is None:
                    samples = store.read(version, "samples", number)
                    with store.span("annotate", version, version):
                        stages.annotate(store.setup, samples, store.directory(version))
                    count += 1
        mirror.upload()
        return count


@contextlib.contextmanager
def _locked_workdir(workdir: pathlib.Path) -> Iterator[WorkdirMirror]:
    """The work directory, locked for its only generator; on gs:// for its only writer, because a
    learner and a generator cannot share it there.
    """
    if is_remote(workdir):
        with open_workdir(workdir) as mirror:
            yield mirror
        return
    with locked(workdir, "generator"):
        yield WorkdirMirror(workdir)


def _setup(mirror: WorkdirMirror, config: Config | None) -> Setup:
    workdir = mirror.directory
    if config is None and not (workdir / "config.json").exists():
        raise WorkdirError(
            f"{workdir} has no config.json; start the run first (opdjax train), or give the "
            "EXPERIMENT: the generator reads its config"
        )
    given = read_config(workdir) if config is None else config
    near = given.near_policy
    if near.generator == "process" and mirror.is_remote:
        raise WorkdirError(
            f"{mirror.name}: a learner and its generator need a shared file system; mount the "
            "bucket"
        )
    if near.schedule == "none":
        raise WorkdirError(
            f"{workdir}: near_policy.schedule is none; expected refresh or continuous: nothing is "
            "sampled ahead"
        )
    # A generator process uses all devices of its machine: their number may differ from the
    # learner's.
    own_mesh = MeshConfig(tensor=given.mesh.tensor) if near.generator == "process" else given.mesh
    setup = prepare(dataclasses.replace(given, mesh=own_mesh), first_day(workdir))
    if config is not None:
        claim(workdir, dataclasses.replace(config, data=setup.config.data), facts(setup))
    return setup


class _Work:
    """The rollouts that a generator process samples, and the weights that it holds."""

    def __init__(self, store: RolloutStore):
        self._store, self.config = store, store.setup.config
        self._follows_learner = self.config.near_policy.generator == "process"
        self._held: tuple[int, Params] | None = None
        self.num_stored = 0

    def store_epochs(self) -> None:
        """Answer all prompts of an epoch, for each version of the schedule."""
        require_prompts(self.config, len(self._store.setup.prompts))
        current = version_of(self.config, self._first_step())  # earlier ones are trained on
        versions = [version for version in self.config.refresh_steps if version >= current]
        for version in versions if self._follows_learner else (0,):
            if is_complete(self._store, version):
                continue
            if not self._wait_for(version):
                return
            weights = lambda version=version: self._weights(version)
            samples = stored_samples(self._store, version, weights)
            stored_annotations(self._store, version, samples)
            self.num_stored += len(samples)

    def store_steps(self) -> None:
        """Sample the rollouts of one step after the other."""
        store, near = self._store, self.config.near_policy
        buffer = RolloutBuffer(near.max_staleness, near.lag, lambda: self._look(buffer))
        end = self.config.train.num_steps if self._follows_learner else near.max_staleness + 1
        # Steps that are trained on already are not sampled again, even if their files are gone.
        for step in range(self._first_step(), end):
            version = store.sampled_version(step)
            if version is not None:
                samples = store.read_if_whole(version, "samples", step)
                if samples is not None:
                    store.annotations(samples, step)
                    continue
                store.remove_samples(version, step)
            try:
                with store.span("admit", step, -1):
                    version = buffer.admit(step)
            except BufferClosedError:
                return
            store.step(step, version, lambda version=version: self._weights(version))
            self.num_stored += 1

    def _look(self, buffer: RolloutBuffer) -> tuple[list[int], list[int]]:
        if self._is_over():
            buffer.close()
        return [0, *published_weights.published(self._store.workdir)], []

    def _wait_for(self, version: int) -> bool:
        """Wait for the weights of a version; False if the run is over before they come."""
        while version and version not in published_weights.published(self._store.workdir):
            if self._is_over():
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def _first_step(self) -> int:
        """The update from which the learner would continue now."""
        saved = (path.name for path in (self._store.workdir / "checkpoints").glob("*"))
        return max((int(name) for name in saved if name.isdecimal()), default=0)

    def _is_over(self) -> bool:
        return (self._store.workdir / "result.json").exists()

    def _weights(self, version: int) -> Params:
        if self._held is not None and self._held[0] == version:
            return self._held[1]
        self._held = None  # frees the old weights before the new ones are read
        setup = self._store.setup
        try:
            if version == 0:  # the checkpoint's own weights: the learner need not publish them
                params = initial_weights(setup)
            else:
                params = published_weights.fetch(self._store.workdir, version, setup.mesh)
        except FileNotFoundError as error:
            raise ShardError(
                f"rollouts sampled by the weights of {version} updates are missing or damaged, and "
                f"these weights are no longer in {self._store.workdir / 'published'}; put the "
                "shard back or start in a new work directory"
            ) from error
        self._held = version, params
        return params
