"""How the benchmark talks to a worker: one JSON object a line, on the worker's standard input and
output.

A worker of a peer runs in that peer's environment and imports this file and `inputs.py` of this
folder, nothing of opdjax. It answers `{"do": "prepare", "case": ...}` by building the work and
running it untimed, `{"do": "run"}` by running it once with the clocks on, `{"do": "drop"}` by
forgetting it. Whatever it prints else goes to its log.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Job:
    """Work that can be timed: `run()` returns when all of it is done; `describe(result)` is not
    timed and JSON-able.
    """

    run: Callable[[], Any]
    describe: Callable[[Any], dict[str, Any]] = lambda result: {}
    warm_up: Callable[[], Any] | None = (
        None  # in place of `run` before the clocks are on: less of the same, where that is enough
    )


class Stepper:
    """Gives the steps of a training loop that cannot be called one at a time: the loop runs in a
    thread and waits after each.
    """

    def __init__(self, loop: Callable[[Callable[[dict], None]], None]):
        self._go, self._done = queue.Queue(), queue.Queue()
        self._thread = threading.Thread(target=self._run, args=(loop,), daemon=True)

    def __call__(self) -> dict[str, Any]:
        if self._thread.ident is None:
            self._thread.start()
        self._go.put(None)
        result = self._done.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def _run(self, loop):
        self._go.get()
        try:
            loop(self._pause)
            raise RuntimeError("the training loop ended by itself")
        except BaseException as error:  # whatever ends the loop is what the step has to tell
            traceback.print_exc()
            self._done.put(error)

    def _pause(self, facts: dict[str, Any]) -> None:
        """Called by the loop at the end of each step."""
        self._done.put(facts)
        self._go.get()


def serve(builders: dict[str, Callable[..., Job]], versions: dict[str, str]) -> None:
    """Answer commands until standard input ends. `builders` are by form; each takes a case with the
    sizes in it.
    """
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(**message):
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    reply(versions=versions)
    job = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if command["do"] == "prepare":
                job = None
                gc.collect()
                job = builders[command["case"]["form"]](command["case"])
                for _ in range(2):
                    (job.warm_up or job.run)()
                reply()
            elif command["do"] == "run":
                start, cpu_start = time.perf_counter(), time.process_time()
                result = job.run()
                seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
                reply(seconds=seconds, cpu_seconds=cpu_seconds, facts=job.describe(result))
            else:
                job = None
                reply()
            result = None
        except Exception as error:  # a worker that fails in one case is still asked for the next
            job = result = None
            traceback.print_exc()
            reply(error=" ".join(f"{type(error).__name__}: {error}".split())[:300])
