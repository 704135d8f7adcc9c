"""A run of several processes, one per host: they join, run actions on process zero, and stop
together.

All processes run the same program on the same config. Only process zero writes files and prints.
The work directory is on storage that all of them can read.
"""

from __future__ import annotations

import operator
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """The run stopped on request (SIGTERM, Ctrl-C); what it needs to continue is saved."""

    exit_status = 143  # 128 + SIGTERM, as in shells; `stop_requests` sets that of another signal


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


def numbers_from_process_zero(
    names: Sequence[str], read: Callable[[], Mapping[str, float]]
) -> dict[str, float]:
    """The numbers of these names that process zero reads in its files, in every process."""
    values = lambda: np.array(operator.itemgetter(*names)(read()), float)
    return dict(zip(names, from_process_zero(values, np.zeros(len(names))).tolist()))


def agreed(value: bool) -> bool:
    """The value of process zero, in every process."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(value)))


@contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Yields `is_requested(step)`: whether a process of the run received SIGTERM or Ctrl-C. All
    processes get the same answer at the same step. A second Ctrl-C ends the process at once, and so
    does SIGTERM if a run of one process does not save within $OPDJAX_STOP_SECONDS: the sender may
    kill it soon, and what is saved continues in the same way. `is_requested(step, is_saving=True)`
    says that the run saves now, which may take longer.

    A run of several processes has no such limit, because jax takes their SIGTERM before python sees
    it: they stop after the step in progress, however long it takes. If one is killed before, the
    others end with an error when jax misses it, after minutes; what is saved continues as well.
    """
    is_alone = jax.process_count() == 1
    received: list[int] = []
    is_asked, is_seen = threading.Event(), threading.Event()

    def is_requested(step: int, *, is_saving: bool = False) -> bool:
        if not is_alone:
            return not is_saving and multihost_utils.reached_preemption_sync_point(step)
        if received and is_saving and is_asked.is_set():
            is_seen.set()
        if received:
            is_asked.set()
        return bool(received)

    if threading.current_thread() is not threading.main_thread():  # python allows no handler there
        yield is_requested
        return
    # A notebook interrupts a cell by SIGINT. Of several processes, jax handles SIGTERM itself.
    handled = set() if "ps1" in vars(sys) else {signal.SIGINT}
    handled |= {signal.SIGTERM} if is_alone else set()
    before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in handled}
    # Python calls a handler after the step or the compilation in progress, but writes the number of
    # the signal to this file at once.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watched = reader, handled, received, is_seen
    watcher = threading.Thread(target=_watch, args=watched, daemon=True)
    watcher.start()
    try:
        yield is_requested
    except InterruptedRunError as error:
        error.exit_status = 128 + (received or [signal.SIGTERM])[0]
        raise
    finally:
        is_seen.set()  # the run has ended
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
        watcher.join()
        os.close(reader)


def _watch(reader: int, handled: set[int], received: list[int], is_seen: threading.Event) -> None:
    """Act on the signals whose numbers can be read, until the end of the file."""
    interrupts = 0
    while found := os.read(reader, 1):
        received += [number for number in found if number in handled]
        if signal.SIGTERM in received:
            threading.Thread(target=_end_unless, args=(is_seen,), daemon=True).start()
        if found[0] != signal.SIGINT or found[0] not in handled:
            continue
        interrupts += 1
        if interrupts > 1:
            os._exit(128 + signal.SIGINT)
        text = "\nstopping after the step in progress; a second Ctrl-C ends the run at once"
        print(text, file=sys.stderr, flush=True)
        if signal.SIGTERM not in handled:  # jax handles it, and tells the other processes
            os.kill(os.getpid(), signal.SIGTERM)


def _end_unless(is_seen: threading.Event) -> None:
    """End the process if the run neither saves nor ends in time."""
    seconds = float(os.environ.get("OPDJAX_STOP_SECONDS", 8))
    if not is_seen.wait(seconds):
        text = (
            f"opdjax: stopped, as asked by SIGTERM, within what takes longer than {seconds:g} s "
            "($OPDJAX_STOP_SECONDS); the same command continues from the last checkpoint"
        )
        print(text, file=sys.stderr, flush=True)
        os._exit(InterruptedRunError.exit_status)
