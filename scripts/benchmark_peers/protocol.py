"""The protocol of a worker: one JSON object a line on its standard input and output.

A peer's worker runs in the peer's environment. It imports this file and `inputs.py`, and nothing of
opdjax. `{"do": "prepare", "case": ...}` builds the work and runs it untimed, `{"do": "run"}` times
one run, `{"do": "drop"}` deletes the work. All other output of the worker goes to its log.
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
    """Work to be timed. `run()` returns when the work is done.

    `describe(result)` is not timed and returns JSON values.
    """

    run: Callable[[], Any]
    describe: Callable[[Any], dict[str, Any]] = lambda result: {}
    warm_up: Callable[[], Any] | None = None  # a shorter `run` for the untimed runs


class Stepper:
    """Runs a training loop step by step: the loop runs in a thread and pauses after each step."""

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
        except BaseException as error:  # the next step raises it
            traceback.print_exc()
            self._done.put(error)

    def _pause(self, facts: dict[str, Any]) -> None:
        """Wait for the next step; the loop calls it at the end of each step."""
        self._done.put(facts)
        self._go.get()


def serve(builders: dict[str, Callable[..., Job]], versions: dict[str, str]) -> None:
    """Answer commands until standard input ends.

    `builders` map the name of a form to a function of a case with its sizes.
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
        except Exception as error:  # other cases may still work
            job = result = None
            traceback.print_exc()
            reply(error=" ".join(f"{type(error).__name__}: {error}".split())[:300])
