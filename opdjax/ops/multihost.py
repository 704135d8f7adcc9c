"""A run of several processes, one per host: they join, run actions on process zero, and stop
together.

All processes run the same program on the same config. Only process zero writes files and prints.
The work directory is on storage that all of them can read.
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
    """Another process of the run stopped with an error, which it has printed."""


class InterruptedRunError(RuntimeError):
    """The run stopped on request (SIGTERM); everything it needs to continue is saved."""

    exit_status = 143  # 128 + SIGTERM, as in shells


def join(processes: int) -> None:
    """Connect the processes of this run; does nothing if there is only one. Call it before any
    device is used.

    On TPU and under Slurm the cluster provides addresses and process ids; elsewhere
    JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID do. ConfigError if the processes do not connect.
    """
    if processes == 1 or jax.distributed.is_initialized():
        return
    given = {}
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        if "JAX_PROCESS_ID" not in os.environ or processes == -1:
            raise ConfigError(
                "JAX_COORDINATOR_ADDRESS is set, so the processes are counted by hand: also set "
                "JAX_PROCESS_ID (from 0), and set mesh.processes to their number (it is "
                f"{processes})"
            )
        given = {"num_processes": processes, "process_id": int(os.environ["JAX_PROCESS_ID"])}
    try:
        jax.distributed.initialize(**given)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"mesh.processes is {processes}, but the processes do not connect: {error}; outside of "
            "TPU and Slurm set JAX_COORDINATOR_ADDRESS (host:port of process 0) and JAX_PROCESS_ID "
            "for each process"
        ) from error
    if processes not in (-1, jax.process_count()):
        raise ConfigError(
            f"mesh.processes is {processes}, but {jax.process_count()} processes run; expected the "
            "same number, or -1"
        )


def on_process_zero(action: Callable[[], T]) -> T | None:
    """Run `action` on process zero while the others wait, and return its result (None in the
    others). Its error stops all processes.
    """
    return _together(action, is_process_zero())


def on_all(action: Callable[[], T]) -> T:
    """Run `action` in every process and return its result; an error in one stops all of them."""
    return _together(action, True)


def _together(action: Callable[[], T], is_mine: bool) -> T | None:
    if jax.process_count() == 1:
        return action()
    is_done, result = False, None
    try:
        result = action() if is_mine else None
        is_done = True
    finally:  # also after an exception: the other processes wait for this message
        is_done_by_all = np.all(multihost_utils.process_allgather(np.bool_(is_done)))
    if not is_done_by_all:
        raise OtherFailedError("another process of this run stopped with an error; see its output")
    return result


def from_process_zero(action: Callable[[], np.ndarray], like: np.ndarray) -> np.ndarray:
    """The array that process zero computes, in every process; `like` has its shape and dtype."""
    found = on_process_zero(action)
    if jax.process_count() == 1:
        return found
    return multihost_utils.broadcast_one_to_all(found if is_process_zero() else like)


def agreed(value: bool) -> bool:
    """The value of process zero, in every process."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(value)))


@contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Yields `is_requested(step)`: whether a process of the run received SIGTERM. All processes get
    the same answer at the same step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point  # jax handles the signal itself
        return
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # python allows no handler there
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield lambda step: received.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
