"""The faults of `scripts/chaos.py`: what strikes a process, its files after a kill, or its world.

A fault inside a process strikes at a write to a file of the run, which an audit hook sees. Patches
of the package's functions are made here, in the forked process, not in the package.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import itertools
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import jax
import numpy as np

import opdjax.train
from opdjax.rollouts import judged, on_policy
from opdjax.rollouts.near_policy import stages

# Files of a run, by a regular expression of their path; those that a mode does not write are left
# out.
KINDS = {
    "config": r"/config\.json",
    "metrics": r"/metrics\.jsonl",
    "samples": r"/samples\.jsonl",
    "evaluations": r"/eval\.jsonl",
    "judgements": r"/rubrics\.jsonl",
    "spending": r"/spending\.jsonl",
    "replies": r"/replies\.sqlite",
    "timeline": r"/timeline-",
    "rollouts": r"/rollouts/",
    "published weights": r"/published/",
    "checkpoint data": r"/checkpoints/.*/d/",
    "checkpoint metadata": r"/checkpoints/.*(/_|/manifest|/metrics|array_metadatas)",
    "checkpoint": r"/checkpoints/",
    "student": r"/student/",
    "result": r"/result\.json",
}


# Faults inside a process: each takes a `Moment` and arms itself.


@dataclasses.dataclass
class Moment:
    """The `count`-th write to a file of `kind` below `root`."""

    root: str
    kind: str
    count: int
    mark: str  # a file that says when the fault struck; not below the root
    draw: random.Random

    def strike(self, act: Callable[[str], None] = lambda path: None, *, once: bool = True) -> None:
        """Call `act(path)` then, and if not `once` also at every later write of the kind."""
        seen, pattern = itertools.count(1), re.compile(KINDS.get(self.kind, ""))

        def hook(event: str, given: tuple) -> None:
            path = written(event, given)
            if path is None or not path.startswith(self.root) or not pattern.search(path):
                return
            number = next(seen)
            if number == self.count:
                self.note()
            if number == self.count or (number > self.count and not once):
                act(path)

        sys.addaudithook(hook)

    def note(self) -> None:
        """The fault strikes now."""
        pathlib.Path(self.mark).write_text(str(time.monotonic()))


def written(event: str, given: tuple) -> str | None:
    """The path that an audit event writes, creates or renames."""
    path = None
    if event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR):
        path = given[0]
    elif event in ("os.mkdir", "os.rename"):
        path = given[1 if event == "os.rename" else 0]
    return os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else None


def send(number: int, longest: float = 0.3) -> Callable[[Moment], None]:
    """A signal, at a write or up to `longest` seconds after it."""

    def arm(moment: Moment) -> None:
        delay = moment.draw.choice((0.0, moment.draw.uniform(0, longest)))

        def kill() -> None:
            moment.note()
            os.kill(os.getpid(), number)

        def later() -> None:
            time.sleep(delay)
            kill()

        start = lambda: threading.Thread(target=later, daemon=True).start()
        moment.strike(lambda path: start() if delay else kill())

    return arm


def pause(moment: Moment) -> None:
    """SIGSTOP, and SIGCONT half a second later."""

    def stop(path: str) -> None:
        pid = os.getpid()
        subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -CONT {pid}"])
        os.kill(pid, signal.SIGSTOP)

    moment.strike(stop)


def refuse(code: int) -> Callable[[Moment], None]:
    """From this write on, the system refuses writes of this kind."""

    def arm(moment: Moment) -> None:
        def act(path: str) -> None:
            raise OSError(code, os.strerror(code), path)

        moment.strike(act, once=False)

    return arm


def fill(moment: Moment) -> None:
    """From this write on, no file may grow beyond 100 kB; files of weights do."""
    limit = 100_000, resource.RLIM_INFINITY
    moment.strike(lambda path: resource.setrlimit(resource.RLIMIT_FSIZE, limit))


def slow(moment: Moment) -> None:
    """Every write takes longer."""
    moment.strike(lambda path: time.sleep(0.02), once=False)


def turn_clock(moment: Moment) -> None:
    """The clock of the system jumps by up to ten days."""
    jump, real = moment.draw.uniform(-1e6, 1e6), time.time
    moment.strike(lambda path: setattr(time, "time", lambda: real() + jump))


def patch(module, name: str, count: int, spoil: Callable) -> None:
    """The `count`-th call of a function becomes `spoil(function, *arguments)`."""
    real, calls = getattr(module, name, None), itertools.count(1)
    if real is not None:
        turned = lambda *a, **k: spoil(real, *a, **k) if next(calls) == count else real(*a, **k)
        setattr(module, name, turned)


def exhaust(real: Callable, *_, **__) -> None:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123456 bytes.")


def no_memory_in_sampler(moment: Moment) -> None:
    for module in (on_policy, judged, stages):
        patch(module, "draw", moment.draw.randint(1, 3), exhaust)


def patch_update(moment: Moment, spoil: Callable) -> None:
    real, holder = opdjax.train.make_update, argparse.Namespace()

    def make(*arguments):
        holder.update = real(*arguments)
        patch(holder, "update", moment.draw.randint(1, 4), spoil)
        return holder.update

    opdjax.train.make_update = make


def no_memory_in_update(moment: Moment) -> None:
    patch_update(moment, exhaust)


def nan_gradient(moment: Moment) -> None:
    def spoil(real, state, batch, *others):
        spoiled = lambda x: x * np.nan if jax.numpy.issubdtype(x.dtype, np.floating) else x
        return real(state, jax.tree.map(spoiled, batch), *others)

    patch_update(moment, spoil)


# Faults to files, between the kill and the restart


def flip(data: bytearray, draw: random.Random) -> bytearray:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def zero(data: bytearray, draw: random.Random) -> bytearray:
    start = draw.randrange(len(data))
    end = min(start + draw.randint(1, 512), len(data))
    return data[:start] + bytes(end - start) + data[end:]


def cut(data: bytearray, draw: random.Random) -> bytearray:
    return data[: draw.randrange(len(data))]


def half_row(data: bytearray, draw: random.Random) -> bytearray:
    return data + data[: draw.randint(1, max(data.find(b"\n") - 1, 1))]


def drop_row(data: bytearray, draw: random.Random) -> bytearray:
    rows = data.splitlines(keepends=True)
    rows.pop(draw.randrange(len(rows)))
    return bytearray(b"".join(rows))


def delete(data: bytearray, draw: random.Random) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens in a process, to the files after a kill, or around the run."""

    arm: Callable[[Moment], None] | None = None
    damage: Callable | None = None
    scene: str = ""  # what `Trial.play` does about it
    modes: str = ""  # a regular expression of the modes that can have it
    kinds: str = ""  # of the kinds of files that it strikes; "": any write
    may_stop: bool = False  # the restarted run may refuse to go on
    may_lose: bool = False  # it may end otherwise, and says so


DAMAGE = {"may_stop": True, "may_lose": True, "arm": send(signal.SIGKILL, 0), "kinds": "."}
ROWS = DAMAGE | {"kinds": "metrics|samples|evaluations|judgements|spending|timeline"}
FAULTS = {
    "kill": Fault(send(signal.SIGKILL)),
    "kill at a file": Fault(send(signal.SIGKILL, 0.02), kinds="."),
    "SIGTERM": Fault(send(signal.SIGTERM, 2)),
    "SIGINT": Fault(send(signal.SIGINT)),
    "SIGSTOP": Fault(pause),
    "no space": Fault(refuse(errno.ENOSPC), kinds="."),
    "full disk": Fault(fill, kinds="."),
    "read-only": Fault(refuse(errno.EROFS)),
    "slow disk": Fault(slow),
    "clock": Fault(turn_clock),
    "memory, sampler": Fault(no_memory_in_sampler, modes="^(?!refresh, p|process|free lag, p)"),
    "memory, update": Fault(no_memory_in_update),
    "NaN gradient": Fault(nan_gradient, modes="^(?!two)", may_lose=True),
    "flipped bit": Fault(damage=flip, **DAMAGE),
    "zeroed span": Fault(damage=zero, **DAMAGE),
    "truncated": Fault(damage=cut, **DAMAGE),
    "deleted file": Fault(damage=delete, **DAMAGE),
    "half a row": Fault(damage=half_row, **ROWS),
    "deleted row": Fault(damage=drop_row, **ROWS),
    "poisoned row": Fault(scene="poison", modes="on-policy|inline", may_stop=True, may_lose=True),
    "second run": Fault(scene="second", modes="^(?!two)"),
    "split brain": Fault(send(signal.SIGSTOP, 0), scene="takeover", modes="gs"),
    "lost lease": Fault(scene="lease", modes="gs"),
    "storage faults": Fault(scene="storage", modes="gs"),
    "judge faults": Fault(scene="--faults 0.25", modes="judged", may_lose=True),
    "judge down": Fault(scene="--down-after {}", modes="judged"),
}
POISON = ("{", '{"prompt": 7}', '{"question": "1+1="}', "[1, 2]", '{"prompt": "' + "9+" * 40 + '"}')
