"""Samples the rollouts of a continuous run, in turns with the learner or in a thread of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import threading
import time
from collections.abc import Callable, Iterator

import jax

from opdjax.config import Config
from opdjax.models.decoder import Params
from opdjax.models.partitioning import SAMPLER_AXES, shardings_of
from opdjax.ops.multihost import on_process_zero
from opdjax.ops.sharding import make_mesh
from opdjax.rollouts.near_policy import shards, stages
from opdjax.rollouts.near_policy.buffer import BufferClosedError, RolloutBuffer
from opdjax.rollouts.near_policy.shards import DamagedShardError, MissingShardError, Shard
from opdjax.rollouts.on_policy import prompts_of
from opdjax.rollouts.setup import Setup, with_teacher_weights
from opdjax.runs.metrics import Timer
from opdjax.runs.workdir import append_lines

_MAX_VERSIONS = 2  # of the weights that a generator holds: the one in use, and the next


@dataclasses.dataclass(frozen=True)
class StoredStep:
    """The shards of a step, as they were read from its files."""

    samples: Shard
    annotations: Shard | None = None  # None: not read yet, or the recipe stores none


class Timeline:
    """Writes the activities of the generator to `timeline-generator.jsonl`."""

    def __init__(self, workdir: pathlib.Path):
        self._file = workdir / "timeline-generator.jsonl"

    @contextlib.contextmanager
    def span(self, what: str, step: int, version: int) -> Iterator[None]:
        """Write a row with the start and duration of the block."""
        start, clock = time.time(), time.perf_counter()
        yield
        row = {"what": what, "start": start, "seconds": time.perf_counter() - clock}
        row |= {"step": step, "version": version}
        on_process_zero(lambda: append_lines(self._file, [row]))


def produce(
    setup: Setup,
    workdir: pathlib.Path,
    timeline: Timeline,
    step: int,
    version: int,
    weights: Callable[[], Params],
) -> StoredStep:
    """Sample the rollouts of a step and have the teacher score them, unless that is stored already;
    return the shards.
    """
    directory = shards.version_directory(workdir, version)
    samples = read_if_whole(directory, "samples", step)
    if samples is None:
        prompts = prompts_of(setup.prompts, setup.config, step)
        with timeline.span("generate", step, version):
            stages.generate(
                setup, weights(), prompts, directory, number=step, step=step, version=version
            )
        samples = read(directory, "samples", step)
    annotations = None
    if stages.is_annotated(setup.config):
        annotations = annotations_of(setup, samples, timeline, step, version)
    return StoredStep(samples, annotations)


def annotations_of(
    setup: Setup, samples: Shard, timeline: Timeline, step: int, version: int
) -> Shard:
    """The annotations of a shard of samples; missing or damaged ones are made first."""
    directory, number = samples.path.parent, samples.facts["number"]
    annotations = read_if_whole(directory, "annotations", number)
    if annotations is None:
        with timeline.span("annotate", step, version):
            stages.annotate(setup, samples, directory)
        annotations = read(directory, "annotations", number)
    return annotations


def read(directory: pathlib.Path, stage: str, number: int) -> Shard:
    """Read a shard; ShardError if it is missing or damaged."""
    paths = shards.shard_paths(directory, stage)
    if number not in paths:
        raise MissingShardError(
            f"{directory} lacks {stage} {number}, which was stored before; put the file back or "
            "use a new work directory"
        )
    return shards.read_shard(paths[number])


def read_if_whole(directory: pathlib.Path, stage: str, number: int) -> Shard | None:
    """Read a shard; None if it is missing or damaged, and a note is printed for a damaged one."""
    try:
        return read(directory, stage, number)
    except MissingShardError:
        return None
    except DamagedShardError as error:
        note = f"note: {error}; it is made again"
        on_process_zero(lambda: print(note))
        return None


def sampled_version(workdir: pathlib.Path, config: Config, step: int) -> int | None:
    """The version of the weights that sampled a step; None if no samples are stored. Damage is not
    checked.
    """
    near = config.near_policy
    oldest = max(step - near.max_staleness, 0)
    newest = oldest if near.lag == "fixed" else step
    for version in range(oldest, newest + 1):
        if step in shards.shard_paths(shards.version_directory(workdir, version), "samples"):
            return version
    return None


def is_step_stored(workdir: pathlib.Path, config: Config, step: int) -> bool:
    """Whether everything that the learner reads of a step is stored."""
    version = sampled_version(workdir, config, step)
    if version is None or not stages.is_annotated(config):
        return version is not None
    directory = shards.version_directory(workdir, version)
    return step in shards.shard_paths(directory, "annotations")


def _on_own_devices(setup: Setup) -> Setup:
    """The setup of a generator that samples on the last devices of this process; what it reads is
    placed there.
    """
    config = setup.config
    tensor = config.mesh.tensor
    count = config.mesh.generator_devices(len(jax.devices()))
    mesh = make_mesh(count // tensor, 1, tensor, devices=jax.devices()[-count:])
    setup = dataclasses.replace(setup, mesh=mesh)
    if not stages.is_annotated(config):
        return dataclasses.replace(setup, teacher=None)
    params = jax.device_put(setup.teacher.params, shardings_of(setup.teacher.params, mesh))
    return dataclasses.replace(setup, teacher=with_teacher_weights(setup.teacher, params, config))


class Generator:
    """Samples the rollouts of one step after the other in a thread, on devices of its own.

    It holds at most two versions of the weights: a learner that is further ahead waits.
    """

    def __init__(self, setup: Setup, workdir: pathlib.Path, buffer: RolloutBuffer, steps: range):
        self._setup, self._workdir = _on_own_devices(setup), workdir
        self._buffer, self._steps = buffer, steps
        self._is_fixed = setup.config.near_policy.lag == "fixed"
        self._weights: dict[int, Params] = {}  # by version
        self._changed = threading.Condition()
        self._next_step, self._is_over = steps.start, False
        self._thread = threading.Thread(target=self._run, name="generator", daemon=True)
        self._thread.start()

    def offer(self, version: int, copy_weights: Callable[[], Params], timer: Timer) -> None:
        """Send weights of `version` updates to the generator's devices; wait while it holds two
        versions that it still needs.
        """
        oldest = self._buffer.oldest_version
        with timer.phase("wait"), self._changed:
            has_room = lambda: len(self._weights) < _MAX_VERSIONS
            self._changed.wait_for(lambda: self._is_over or not self._is_fixed or has_room())
            is_needed = oldest(self._next_step) <= version <= oldest(self._steps[-1])
            if self._is_over or (self._is_fixed and not is_needed):
                return
        with timer.phase("publish"):
            self._send(version, copy_weights())

    def _send(self, version: int, copy: Params) -> None:
        config = self._setup.config
        layout = shardings_of(copy, self._setup.mesh, SAMPLER_AXES)
        # With adapters the copy contains the learner's own frozen parameters: not to be donated.
        sent = jax.device_put(copy, layout, donate=not config.lora.rank)
        with self._changed:
            if not self._is_fixed:
                self._weights.clear()  # only the newest weights are used
            self._weights[version] = sent
        self._buffer.publish(version)

    def close(self) -> None:
        """Stop after the step that is being sampled."""
        self._buffer.close()
        self._end()
        self._thread.join()

    def _run(self) -> None:
        timeline = Timeline(self._workdir)
        try:
            for step in self._steps:
                self._start_step(step)
                if step not in self._buffer:
                    self._buffer.put(step, self._produce(step, timeline))
        except BufferClosedError:
            pass
        except BaseException as error:  # the learner raises it
            self._buffer.close(error)
        finally:
            self._end()

    def _produce(self, step: int, timeline: Timeline) -> StoredStep:
        with timeline.span("admit", step, -1):
            version = self._buffer.admit(step)
        with self._changed:
            if not self._is_fixed and version not in self._weights:  # newer weights replaced it
                version = max(self._weights)
            params = self._weights[version]
        return produce(self._setup, self._workdir, timeline, step, version, lambda: params)

    def _start_step(self, step: int) -> None:
        """Drop the weights that neither this step nor a later one is sampled with."""
        with self._changed:
            self._next_step = step
            if self._is_fixed:
                oldest = self._buffer.oldest_version(step)
                self._weights = {v: params for v, params in self._weights.items() if v >= oldest}
            self._changed.notify_all()

    def _end(self) -> None:
        with self._changed:
            self._is_over = True
            self._weights.clear()
            self._changed.notify_all()
