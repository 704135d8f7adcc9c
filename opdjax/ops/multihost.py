"""A run of several processes, one a host: how they find each other, do together what only one may
do, and stop together.

All of them run the same program on the same config. The first one, the lead, alone writes files and
prints; the work directory lies on storage that all can read.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from opdjax.config.validation import ConfigError
from opdjax.ops.sharding import is_process_zero

T = TypeVar("T")


class OtherFailedError(RuntimeError):
    """Another process of the run ended with an error, which it has printed."""


class InterruptedRunError(RuntimeError):
    """The run was asked to stop (SIGTERM) and did, with everything kept that it takes to continue."""

    exit_status = 143  # as shells say of SIGTERM


def join(processes: int) -> None:
    """Find the other processes of this run; nothing to do where there is one. To be called before
    any device is touched.

    On TPU and under Slurm the cluster says who is who; elsewhere JAX_COORDINATOR_ADDRESS and
    JAX_PROCESS_ID do.
    """
    if processes == 1 or jax.distributed.is_initialized():
        return
    given = {}
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        if "JAX_PROCESS_ID" not in os.environ or processes == -1:
            raise ConfigError(
                "JAX_COORDINATOR_ADDRESS is set, so the processes are counted by hand: set JAX_PROCESS_ID (from 0) as well, and "
                f"mesh.processes, which is {processes}, to their number"
            )
        given = {"num_processes": processes, "process_id": int(os.environ["JAX_PROCESS_ID"])}
    try:
        jax.distributed.initialize(**given)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"mesh.processes is {processes}, but the processes do not find each other: {error}; where no cluster names them (TPU, Slurm), "
            "set JAX_COORDINATOR_ADDRESS (host:port of process 0) and JAX_PROCESS_ID for each"
        ) from error
    if processes not in (-1, jax.process_count()):
        raise ConfigError(
            f"mesh.processes is {processes}, but {jax.process_count()} processes run; expected the same number, or -1"
        )


def on_process_zero(action: Callable[[], T]) -> T | None:
    """What `action` returns, which the lead alone does while the others wait; its error ends all of
    them.
    """
    return _together(action, is_process_zero())


def on_all(action: Callable[[], T]) -> T:
    """What `action` returns, which every process does by itself; the error of one ends all of them."""
    return _together(action, True)


def _together(action: Callable[[], T], is_mine: bool) -> T | None:
    if jax.process_count() == 1:
        return action()
    is_done, result = False, None
    try:
        result = action() if is_mine else None
        is_done = True
    finally:  # whatever was raised: the others wait to hear of it
        is_done_by_all = np.all(multihost_utils.process_allgather(np.bool_(is_done)))
    if not is_done_by_all:
        raise OtherFailedError(
            "another process of this run stopped with an error; its message says which"
        )
    return result


def from_process_zero(action: Callable[[], np.ndarray], like: np.ndarray) -> np.ndarray:
    """The array that the lead computes, in every process; `like` has its shape and type."""
    found = on_process_zero(action)
    return (
        found
        if jax.process_count() == 1
        else multihost_utils.broadcast_one_to_all(found if is_process_zero() else like)
    )


def agreed(value: bool) -> bool:
    """The lead's answer, in every process."""
    return (
        value
        if jax.process_count() == 1
        else bool(multihost_utils.broadcast_one_to_all(np.bool_(value)))
    )


@contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Yields `asked(step)`: whether a process of the run was sent SIGTERM. All processes get the
    same answer at the same step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point  # jax listens to the signal itself
        return
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where python allows no handler
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield lambda step: received.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
