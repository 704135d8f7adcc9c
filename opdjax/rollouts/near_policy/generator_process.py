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
from opdjax.rollouts.near_policy import shards, stages
from opdjax.rollouts.near_policy.buffer import oldest_version, version_for
from opdjax.rollouts.near_policy.refresh import version_of
from opdjax.rollouts.near_policy.shards import ShardError
from opdjax.rollouts.near_policy.store import POLL_SECONDS, RolloutStore
from opdjax.rollouts.setup import Setup, facts, initial_weights, prepare
from opdjax.runs.mirror import WorkdirMirror, open_workdir
from opdjax.runs.object_store import is_remote
from opdjax.runs.workdir import WorkdirError, claim, locked, read_config


def generate_for(workdir: pathlib.Path, config: Config | None) -> int:
    """Sample and annotate what the run of `workdir` will train on; return the number of shards that
    were stored.

    `config`: of a run that need not have started; None: the work directory's. If its generator is
    `process`, this continues until the run is finished; else it ends with what the untrained
    weights sample.
    """
    with _locked_store(workdir, config) as store:
        return _Generator(store).run()


def annotate_all(workdir: pathlib.Path) -> int:
    """Have the teacher score every stored rollout whose annotations are missing or damaged; return
    the number of such shards.
    """
    with _locked_store(workdir, None) as store:
        if not stages.is_annotated(store.setup.config):
            raise WorkdirError(
                f"{store.workdir} holds a run whose recipe reads the teacher's hidden states; "
                "these are computed for each update and never stored"
            )
        count = 0
        for version in shards.versions(store.workdir):
            for number in shards.shard_paths(store.directory(version), "samples"):
                if store.read_if_whole(version, "annotations", number) is None:
                    store.annotate(store.read(version, "samples", number), version)
                    count += 1
        return count


@contextlib.contextmanager
def _locked_store(workdir: pathlib.Path, config: Config | None) -> Iterator[RolloutStore]:
    """The store of a run, locked for its only generator; on gs:// for its only writer, because a
    learner and a generator cannot share it there.
    """
    with contextlib.ExitStack() as resources:
        if is_remote(workdir):
            mirror = resources.enter_context(open_workdir(workdir))
        else:
            resources.enter_context(locked(workdir, "generator"))
            mirror = WorkdirMirror(workdir)
        yield RolloutStore(_setup(mirror, config), mirror.directory)
        mirror.upload()


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
    setup = prepare(dataclasses.replace(given, mesh=own_mesh))
    if config is not None:
        claim(workdir, config, facts(setup))
    return setup


class _Generator:
    """Samples rollouts, with weights of one version at a time."""

    def __init__(self, store: RolloutStore):
        self._store, self._config = store, store.setup.config
        self._held: dict[int, Params] = {}  # of one version

    def run(self) -> int:
        """Sample the rollouts of one step after the other; return the number of stored shards."""
        store, config, near, count = self._store, self._config, self._config.near_policy, 0
        steps, first = range(config.train.num_steps), self._first_step()
        if near.schedule == "refresh":
            steps, first = config.refresh_steps, version_of(config, first)
        for step in steps:
            # Steps that are trained on already are not sampled again, even if their files are gone.
            is_untrained = oldest_version(step, near.max_staleness) == 0
            if step < first or not (near.generator == "process" or is_untrained):
                continue
            samples = store.whole_samples(step)
            if samples is not None:
                store.annotations(samples, step)
                continue
            start, version = time.time(), self._wait_for(step)
            if version is None:
                break
            store.record("admit", start, step, -1)
            samples, _ = store.step(step, version, lambda version=version: self._weights(version))
            count += len(samples)
        return count

    def _wait_for(self, step: int) -> int | None:
        """Wait for weights that may sample a step; None if the run is over before they come."""
        near, store = self._config.near_policy, self._store
        while not (store.workdir / "result.json").exists():
            published = [0, *store.published()]  # the checkpoint's own can always be had
            version = version_for(step, published, near.max_staleness, near.lag)
            if version is not None:
                return version
            time.sleep(POLL_SECONDS)
        return None

    def _first_step(self) -> int:
        """The update from which the learner would continue now."""
        saved = (path.name for path in (self._store.workdir / "checkpoints").glob("*"))
        return max((int(name) for name in saved if name.isdecimal()), default=0)

    def _weights(self, version: int) -> Params:
        if version in self._held:
            return self._held[version]
        self._held.clear()  # frees the old weights before the new ones are read
        store = self._store
        try:
            params = store.fetch(version) if version else initial_weights(store.setup)
        except FileNotFoundError as error:
            raise ShardError(
                f"rollouts sampled by the weights of {version} updates are missing or damaged, and "
                f"these weights are no longer in {store.workdir / 'published'}; put the shard back "
                "or start in a new work directory"
            ) from error
        self._held[version] = params
        return params
