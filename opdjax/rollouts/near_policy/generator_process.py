"""Runs the generator alone, for a learner in another process on this machine or another one. The
two share only the work directory: weights come from `published/`, rollouts go to `rollouts/`.
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
from opdjax.rollouts.setup import as_recorded, facts, prepare
from opdjax.rollouts.weights import initial_weights
from opdjax.runs.mirror import WorkdirMirror, open_workdir
from opdjax.runs.object_store import is_remote
from opdjax.runs.workdir import WorkdirError, claim, first_day, locked, read_config


def generate_for(workdir: pathlib.Path, config: Config | None) -> int:
    """Sample and annotate what the run of `workdir` will train on; return the number of shards that
    were stored.

    `config`: of a run that need not have started; None: the work directory's. If its generator is
    `process`, this continues until the run is finished; else it ends with what the untrained
    weights sample.
    """
    with _locked_store(workdir, config) as store:
        return _generate(store)


def annotate_all(workdir: pathlib.Path) -> int:
    """Score every stored rollout that lacks whole annotations; return the number of such shards."""
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
    """The store of a run, locked for its only generator; on gs:// for its only writer."""
    with contextlib.ExitStack() as resources:
        if is_remote(workdir):
            mirror = resources.enter_context(open_workdir(workdir))
        else:
            resources.enter_context(locked(workdir, "generator"))
            mirror = WorkdirMirror(workdir)
        workdir = mirror.directory
        given = read_config(workdir) if config is None else config
        near, mesh = given.near_policy, given.mesh
        if near.generator == "process" and is_remote(mirror.name):
            raise WorkdirError(
                f"{mirror.name}: a learner and its generator need a shared file system; mount the "
                "bucket"
            )
        if near.schedule == "none":
            raise WorkdirError(
                f"{workdir}: near_policy.schedule is none; expected refresh or continuous: nothing "
                "is sampled ahead"
            )
        if near.generator == "process":  # it uses all devices of its machine
            mesh = MeshConfig(tensor=mesh.tensor)
        setup = prepare(dataclasses.replace(given, mesh=mesh), first_day(workdir))
        if config is not None:
            claim(workdir, as_recorded(config, setup), facts(setup), is_learner=False)
        yield RolloutStore(setup, workdir)
        mirror.upload()


def _generate(store: RolloutStore) -> int:
    """Sample the rollouts of one step after the other; return the number of stored shards."""
    config, near = store.setup.config, store.setup.config.near_policy
    held: dict[int, Params] = {}  # of one version
    saved = (path.name for path in (store.workdir / "checkpoints").glob("*"))
    # The update from which the learner would continue now. What is trained on already is not
    # sampled again, even if its files are gone.
    first = max((int(name) for name in saved if name.isdecimal()), default=0)
    steps, count = range(first, config.train.num_steps), 0
    if near.schedule == "refresh":
        current = version_of(config, first)
        steps = [version for version in config.refresh_steps if version >= current]
    if near.generator != "process":
        steps = [step for step in steps if oldest_version(step, near.max_staleness) == 0]
    for step in steps:
        samples = store.whole_samples(step)
        if samples is None:
            start, version = time.time(), _wait_for_weights(store, step)
            if version is None:  # the run is over
                break
            store.record("admit", start, step, -1)
            weights = lambda version=version: _weights(store, version, held)
            samples = store.samples(version, step, weights)
            count += len(samples)
        store.annotations(samples, step)
    return count


def _wait_for_weights(store: RolloutStore, step: int) -> int | None:
    """Wait for weights that may sample a step; None if the run is over before they come."""
    near = store.setup.config.near_policy
    while not (store.workdir / "result.json").exists():
        published = [0, *store.published()]  # the checkpoint's own can always be had
        version = version_for(step, published, near.max_staleness, near.lag)
        if version is not None:
            return version
        time.sleep(POLL_SECONDS)
    return None


def _weights(store: RolloutStore, version: int, held: dict[int, Params]) -> Params:
    if version not in held:
        held.clear()  # frees the old weights before the new ones are read
        try:
            held[version] = store.fetch(version) if version else initial_weights(store.setup)
        except FileNotFoundError as error:
            raise ShardError(
                f"rollouts sampled by the weights of {version} updates are missing or damaged, and "
                f"these weights are no longer in {store.workdir / 'published'}; put the shard back "
                "or start in a new work directory"
            ) from error
    return held[version]
