"""Samples the rollouts of a continuous run in a thread of its own."""

from __future__ import annotations

import dataclasses
import pathlib
import threading
from collections.abc import Callable

import jax

from opdjax.models.decoder import Params
from opdjax.models.partitioning import SAMPLER_AXES, shardings_of
from opdjax.ops.sharding import make_mesh
from opdjax.rollouts.near_policy import stages
from opdjax.rollouts.near_policy.buffer import BufferClosedError, RolloutBuffer
from opdjax.rollouts.near_policy.store import RolloutStore, StoredStep
from opdjax.rollouts.setup import Setup, with_teacher_weights
from opdjax.runs.metrics import Timer

_MAX_VERSIONS = 2  # of the weights that a generator holds: the one in use, and the next


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
        self._store = RolloutStore(_on_own_devices(setup), workdir)
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
        config = self._store.setup.config
        layout = shardings_of(copy, self._store.setup.mesh, SAMPLER_AXES)
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
        try:
            for step in self._steps:
                self._start_step(step)
                if step not in self._buffer:
                    self._buffer.put(step, self._produce(step))
        except BufferClosedError:
            pass
        except BaseException as error:  # the learner raises it
            self._buffer.close(error)
        finally:
            self._end()

    def _produce(self, step: int) -> StoredStep:
        with self._store.span("admit", step, -1):
            version = self._buffer.admit(step)
        with self._changed:
            if not self._is_fixed and version not in self._weights:  # newer weights replaced it
                version = max(self._weights)
            params = self._weights[version]
        return self._store.step(step, version, lambda: params)

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
