"""Who draws the rollouts of a continuous run: in turns with the learner, beside it in a thread, or
in a process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import threading
import time
from collections.abc import Callable, Iterator

import jax

from opdjax.models.decoder import Params
from opdjax.models.partitioning import shardings_of
from opdjax.ops.multihost import on_process_zero
from opdjax.ops.sharding import make_mesh
from opdjax.rollouts.near_policy import shards, stages
from opdjax.rollouts.near_policy.buffer import BufferClosedError, RolloutBuffer
from opdjax.rollouts.near_policy.shards import DamagedShardError, MissingShardError, Shard
from opdjax.rollouts.on_policy import prompts_of
from opdjax.rollouts.setup import Setup, with_teacher_weights
from opdjax.runs.metrics import Timer
from opdjax.runs.workdir import append_lines

MOST_HELD = (
    2  # versions of the weights that a generator holds: the one that it draws with, and the next
)


class Timeline:
    """What the generator did and when, in `timeline-generator.jsonl`."""

    def __init__(self, workdir: pathlib.Path):
        self._file = workdir / "timeline-generator.jsonl"

    @contextlib.contextmanager
    def span(self, what: str, step: int, version: int) -> Iterator[None]:
        """A row for what runs inside."""
        began, start = time.time(), time.perf_counter()
        yield
        row = {
            "what": what,
            "start": began,
            "seconds": time.perf_counter() - start,
            "step": step,
            "version": version,
        }
        on_process_zero(lambda: append_lines(self._file, [row]))


def produce(
    setup: Setup,
    workdir: pathlib.Path,
    timeline: Timeline,
    step: int,
    version: int,
    params: Callable[[], Params],
) -> bool:
    """Draw the rollouts of a step and have the teacher read them, as far as that is not stored
    already; whether any were drawn.
    """
    directory = shards.version_directory(workdir, version)
    is_missing = readable(directory, "samples", step) is None
    if is_missing:
        with timeline.span("generate", step, version):
            stages.generate(
                setup,
                params(),
                prompts_of(setup, step),
                directory,
                number=step,
                step=step,
                version=version,
            )
    if stages.is_annotated(setup.config) and readable(directory, "annotations", step) is None:
        with timeline.span("annotate", step, version):
            stages.annotate(setup, read(directory, "samples", step), directory)
    return is_missing


def read(directory: pathlib.Path, stage: str, number: int) -> Shard:
    """A shard that must be there; ShardError where it is not, or is damaged."""
    paths = shards.shard_paths(directory, stage)
    if number not in paths:
        raise MissingShardError(
            f"{directory} has no {stage} {number}, which had been stored; put the file back or use a new work directory"
        )
    return shards.read_shard(paths[number])


def readable(directory: pathlib.Path, stage: str, number: int) -> Shard | None:
    """A shard if it is there and whole; a damaged one is told of, so that it is made again."""
    try:
        return read(directory, stage, number)
    except MissingShardError:
        return None
    except DamagedShardError as error:
        note = f"note: {error}; it is made again"
        on_process_zero(lambda: print(note))
        return None


def drawn_by(workdir: pathlib.Path, setup: Setup, step: int) -> int | None:
    """The version whose weights drew the rollouts of a step, where they are stored; damaged or not."""
    near = setup.config.near_policy
    oldest = max(step - near.max_staleness, 0)
    possible = range(oldest, (oldest if near.lag == "fixed" else step) + 1)
    found = (
        version
        for version in possible
        if step in shards.shard_paths(shards.version_directory(workdir, version), "samples")
    )
    return next(found, None)


def where_stored(workdir: pathlib.Path, setup: Setup, step: int) -> int | None:
    """The version whose weights drew a step's rollouts, where all that the learner reads of them is
    stored.
    """
    version = drawn_by(workdir, setup, step)
    if version is None or not stages.is_annotated(setup.config):
        return version
    return (
        version
        if step in shards.shard_paths(shards.version_directory(workdir, version), "annotations")
        else None
    )


def on_own_devices(setup: Setup) -> Setup:
    """The setup of a generator that draws on the last devices of this process: what it reads lies
    there.
    """
    config = setup.config
    count, tensor = config.near_policy.generator_devices, config.mesh.tensor
    mesh = make_mesh(count // tensor, 1, tensor, devices=jax.devices()[-count:])
    setup = dataclasses.replace(setup, mesh=mesh)
    if not stages.is_annotated(config):
        return dataclasses.replace(setup, teacher=None)
    params = jax.device_put(
        setup.teacher.params, shardings_of(setup.teacher.params, mesh, config.teacher.split_over)
    )
    return dataclasses.replace(setup, teacher=with_teacher_weights(setup.teacher, params, config))


class Generator:
    """Draws the rollouts of one step after the other in a thread of its own, on devices of its own.

    It holds at most two versions of the weights, so that a learner whose weights nobody has fetched
    waits, as it does for rollouts.
    """

    def __init__(self, setup: Setup, workdir: pathlib.Path, buffer: RolloutBuffer, steps: range):
        self._setup, self._workdir, self._buffer, self._steps = (
            on_own_devices(setup),
            workdir,
            buffer,
            steps,
        )
        self._held: dict[int, Params] = {}
        self._changed = threading.Condition()
        self._next, self._is_over = steps.start, False
        self._thread = threading.Thread(target=self._run, name="generator", daemon=True)
        self._thread.start()

    def offer(self, version: int, weights: Callable[[], Params], timer: Timer) -> None:
        """Weights of `version` updates, sent to the generator's devices; waits while it holds two
        versions that it still needs.
        """
        is_fixed = self._setup.config.near_policy.lag == "fixed"
        with timer.phase("wait"), self._changed:
            self._changed.wait_for(
                lambda: self._is_over or not is_fixed or len(self._held) < MOST_HELD
            )
            is_needed = (
                self._buffer.wanted(self._next) <= version <= self._buffer.wanted(self._steps[-1])
            )
            if self._is_over or (is_fixed and not is_needed):
                return
        with timer.phase("publish"):
            self._send(version, weights(), is_fixed)

    def _send(self, version: int, copy: Params, is_fixed: bool) -> None:
        config = self._setup.config
        layout = shardings_of(copy, self._setup.mesh, config.sampling.split_over)
        # With adapters a part of the copy is the learner's own frozen kernels, which must not be
        # given away.
        sent = jax.device_put(copy, layout, donate=not config.lora.rank)
        with self._changed:
            if not is_fixed:
                self._held.clear()  # the newest is all that will be asked for
            self._held[version] = sent
        self._buffer.publish(version)

    def close(self) -> None:
        """Stop after what is being drawn."""
        self._buffer.close()
        self._end()
        self._thread.join()

    def _run(self) -> None:
        timeline = Timeline(self._workdir)
        try:
            for step in self._steps:
                self._let_go(step)
                if step in self._buffer:
                    continue
                with timeline.span("admit", step, -1):
                    version = self._buffer.admit(step)
                with self._changed:
                    if (
                        self._setup.config.near_policy.lag == "free" and version not in self._held
                    ):  # a newer one took its place
                        version = max(self._held)
                    params = self._held[version]
                # called at once
                produce(self._setup, self._workdir, timeline, step, version, lambda: params)  # noqa: B023
                del params
                self._buffer.put(step)
        except BufferClosedError:
            pass
        except BaseException as error:
            self._buffer.close(error)
        finally:
            self._end()

    def _let_go(self, step: int) -> None:
        """Drop the weights that no step from this one on is drawn with."""
        with self._changed:
            self._next = step
            if self._setup.config.near_policy.lag == "fixed":
                self._held = {
                    version: params
                    for version, params in self._held.items()
                    if version >= self._buffer.wanted(step)
                }
            self._changed.notify_all()

    def _end(self) -> None:
        with self._changed:
            self._is_over = True
            self._held.clear()
            self._changed.notify_all()
