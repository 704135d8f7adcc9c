"""A worker's side: one JSON object a line on standard input and output, and the common inputs.

A peer's worker runs in the peer's environment and imports this file alone. `{"do": "prepare",
"case": ...}` builds the work of a form and runs it untimed, `{"do": "run", "form": ...}` times one
run, `{"do": "drop"}` deletes all work. All other output of the worker goes to its log.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import pathlib
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Job(NamedTuple):
    """Work to be timed. `run()` returns when the work is done."""

    run: Callable[[], Any]
    describe: Callable[[Any], dict[str, Any]] = lambda result: result  # JSON values; not timed


def jax_loss(loss: Callable, arrays: Iterable[Any]) -> Job:
    """Return the job of a loss in jax and its gradient for the first array."""
    import jax
    import jax.numpy as jnp

    function, arrays = jax.jit(jax.value_and_grad(loss)), list(map(jnp.asarray, arrays))
    norm = lambda gradient: float(jnp.linalg.norm(gradient.ravel()))
    describe = lambda result: {"loss": float(result[0]), "gradient norm": norm(result[1])}
    return Job(lambda: jax.block_until_ready(function(*arrays)), describe)


def generation(generate: Callable[[int], Sequence[Sequence[int]]]) -> Job:
    """Return the job of `generate(seed)`, which returns the completions of all prompts."""
    seeds = itertools.count()
    describe = lambda rows: {"useful_tokens": sum(map(len, rows))}
    return Job(lambda: generate(next(seeds)), describe)


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


def serve(builders: dict[str, Callable[[dict], Job]], **versions: str) -> None:
    """Answer commands until standard input ends.

    `builders` map the name of a form to a function of a case with its sizes.
    """
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    jobs: dict[str, Job] = {}

    def answer(do: str, form: str = "", case: dict[str, Any] | None = None) -> dict[str, Any]:
        if do == "drop":
            jobs.clear()
            gc.collect()
        elif do == "prepare":
            jobs[form] = builders[form](case)
            for _ in range(2):
                jobs[form].run()
        else:
            start, cpu_start = time.perf_counter(), time.process_time()
            result = jobs[form].run()
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            facts = jobs[form].describe(result) | {"peak GB": peak_memory() / 1e9}
            return {"seconds": seconds, "cpu_seconds": cpu_seconds, "facts": facts}
        return {"versions": versions}

    for line in sys.stdin:
        try:
            reply = answer(**json.loads(line))
        except Exception as error:  # other forms may still work
            traceback.print_exc()
            reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        channel.write(json.dumps(reply) + "\n")
        channel.flush()


def peak_memory() -> int:
    """Return the most bytes of memory that this process has held since it began."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def make_logits(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return logits of a student and of a similar teacher, float32 `[tokens, vocab]`."""
    rng, shape = np.random.default_rng(0), (case["tokens"], case["vocab"])
    student = 2 * rng.standard_normal(shape, np.float32)
    return student, student + rng.standard_normal(shape, np.float32)


def read_prompts(case: dict[str, Any], field: str = "prompt") -> list[Any]:
    """Return the texts of the case's prompts, or their `ids`, of equal length."""
    lines = pathlib.Path(case["prompts_file"]).read_text().splitlines()
    return [json.loads(line)[field] for line in lines[: case["prompts"]]]
