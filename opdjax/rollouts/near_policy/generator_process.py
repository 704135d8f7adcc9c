"""The stages by themselves: a generator for a run whose learner is another process, on this machine
or another one.

Both ends share nothing but the work directory: weights come from `published/`, rollouts go to
`rollouts/`. Either may be killed and started again at any time; neither waits for the other to be
there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from opdjax.config import Config, MeshConfig
from opdjax.models.decoder import Params
from opdjax.rollouts.near_policy import published_weights, shards, stages
from opdjax.rollouts.near_policy.buffer import BufferClosedError, RolloutBuffer
from opdjax.rollouts.near_policy.generator import Timeline, drawn_by, produce, readable
from opdjax.rollouts.near_policy.refresh import (
    annotate_missing,
    generate_missing,
    is_complete,
    require_prompts,
    version_of,
)
from opdjax.rollouts.near_policy.shards import ShardError
from opdjax.rollouts.setup import Setup, facts, initial_weights, prepare
from opdjax.runs.mirror import WorkdirMirror, open_workdir
from opdjax.runs.object_store import is_remote
from opdjax.runs.workdir import WorkdirError, claim, locked, read_config

_SECONDS_BETWEEN_LOOKS = 0.1


def generate_for(workdir: pathlib.Path, config: Config | None) -> int:
    """Draw, and have the teacher read, what the run of `workdir` will be trained on; how many
    shards were stored.

    `config`: of a run that need not have begun; None: as the work directory says. Where the
    config's generator is `process` this goes on until the run is finished; else it ends with what
    is drawn by the weights before the first update.
    """
    with _held(workdir) as mirror:
        setup = _setup(mirror, config)
        draws = _Draws(setup, mirror.directory)
        (draws.refreshes if setup.config.near_policy.schedule == "refresh" else draws.steps)()
        mirror.upload()
        return draws.num_stored


def annotate_all(workdir: pathlib.Path) -> int:
    """Have the teacher read every stored rollout that it has not read, or not whole; how many
    shards those were.
    """
    with _held(workdir) as mirror:
        setup, workdir = _setup(mirror, None), mirror.directory
        if not stages.is_annotated(setup.config):
            raise WorkdirError(
                f"{workdir} holds a run whose recipe reads hidden states, which are made anew for each update; none are stored"
            )
        timeline = Timeline(workdir)
        count = sum(
            annotate_missing(setup, workdir, timeline, version, lambda: None)
            for version in shards.versions(workdir)
        )
        mirror.upload()
        return count


@contextlib.contextmanager
def _held(workdir: pathlib.Path) -> Iterator[WorkdirMirror]:
    """The work directory, for its only generator; on gs:// for its only writer, as nobody draws
    beside a run there.
    """
    if is_remote(workdir):
        with open_workdir(workdir) as mirror:
            yield mirror
        return
    with locked(workdir, "generator"):
        yield WorkdirMirror(workdir)


def _setup(mirror: WorkdirMirror, config: Config | None) -> Setup:
    shards.require_pyarrow()
    workdir = mirror.directory
    if config is None and not (workdir / "config.json").exists():
        raise WorkdirError(
            f"{workdir} has no config.json; start the run first (opdjax train), or give the EXPERIMENT: the generator reads it"
        )
    asked = read_config(workdir) if config is None else config
    # Beside a learner all devices of this machine draw, which need not be as many as the learner's.
    is_beside = asked.near_policy.generator == "process"
    if is_beside and mirror.is_remote:
        raise WorkdirError(
            f"{mirror.name}: a generator beside a run needs a file system that both see; mount the bucket"
        )
    setup = prepare(
        dataclasses.replace(asked, mesh=MeshConfig(tensor=asked.mesh.tensor))
        if is_beside
        else asked
    )
    if setup.config.near_policy.schedule == "none":
        raise WorkdirError(
            f"{workdir}: near_policy.schedule is none; expected refresh or continuous: nothing is drawn ahead"
        )
    if config is not None:
        claim(workdir, config, facts(setup))
    return setup


class _Draws:
    """What a generator of its own draws, and the weights that it holds."""

    def __init__(self, setup: Setup, workdir: pathlib.Path):
        self._setup, self._workdir, self._timeline = setup, workdir, Timeline(workdir)
        self._goes_on = setup.config.near_policy.generator == "process"
        self._held: tuple[int, Params] | None = None
        self.num_stored = 0

    def refreshes(self) -> None:
        """All prompts of an epoch, for each version that the schedule names."""
        setup, workdir = self._setup, self._workdir
        require_prompts(setup.config, len(setup.prompts))
        current = version_of(setup.config, self._first())  # those before it are trained on already
        for version in (
            (v for v in setup.config.refresh_steps if v >= current) if self._goes_on else (0,)
        ):
            if not is_complete(setup, workdir, version):
                if not self._wait_for(version):
                    return
                generate_missing(
                    setup,
                    workdir,
                    self._timeline,
                    version,
                    lambda: self._weights(version),
                    lambda: None,
                )
                annotate_missing(setup, workdir, self._timeline, version, lambda: None)
                self.num_stored += len(
                    shards.shard_paths(shards.version_directory(workdir, version), "samples")
                )

    def steps(self) -> None:
        """The rollouts of one step after the other."""
        setup, near = self._setup, self._setup.config.near_policy
        buffer = RolloutBuffer(near.max_staleness, near.lag, lambda: self._look(buffer))
        # What is trained on already is not drawn again, should somebody have removed it.
        for step in range(
            self._first(), setup.config.train.num_steps if self._goes_on else near.max_staleness + 1
        ):
            version = drawn_by(self._workdir, setup, step)
            if (
                version is not None
                and readable(shards.version_directory(self._workdir, version), "samples", step)
                is None
            ):
                shards.shard_paths(shards.version_directory(self._workdir, version), "samples")[
                    step
                ].unlink()
                version = None
            if version is None:
                try:
                    with self._timeline.span("admit", step, -1):
                        version = buffer.admit(step)
                except BufferClosedError:
                    return
            self.num_stored += produce(
                setup, self._workdir, self._timeline, step, version, lambda: self._weights(version)
            )

    def _look(self, buffer: RolloutBuffer) -> tuple[list[int], list[int]]:
        if self._is_over():
            buffer.close()
        return [0, *published_weights.published(self._workdir)], []

    def _wait_for(self, version: int) -> bool:
        """Whether the weights of a version came before the run was over."""
        while version and version not in published_weights.published(self._workdir):
            if self._is_over():
                return False
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return True

    def _first(self) -> int:
        """The update that the learner continues from if it is started now."""
        saved = (path.name for path in (self._workdir / "checkpoints").glob("*"))
        return max((int(name) for name in saved if name.isdecimal()), default=0)

    def _is_over(self) -> bool:
        return (self._workdir / "result.json").exists()

    def _weights(self, version: int) -> Any:
        if self._held is None or self._held[0] != version:
            self._held = None  # let go of before there are new ones
            setup, over = self._setup, self._setup.config.sampling.split_over
            # The first need not be published: they are those of the checkpoint.
            try:
                made = (
                    initial_weights(setup)
                    if version == 0
                    else published_weights.fetch(self._workdir, version, setup.mesh, over)
                )
            except FileNotFoundError as error:
                raise ShardError(
                    f"rollouts drawn by the weights of {version} updates are missing or damaged, and these weights are no longer in "
                    f"{self._workdir / 'published'}; put the shard back or start in a new work directory"
                ) from error
            self._held = version, made
        return self._held[1]
