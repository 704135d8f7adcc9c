"""A worker's side: one JSON object a line on standard input and output, and the common inputs.

A peer's worker runs in the peer's environment. It imports this file and nothing of opdjax; of other
packages this file needs numpy, and jax for losses in jax. `{"do": "prepare", "case": ...}` builds
the work of a form and runs it untimed, `{"do": "run", "form": ...}` times one run, `{"do": "drop"}`
deletes all work. All other output of the worker goes to its log.
"""

from __future__ import annotations

import dataclasses
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
from typing import Any

import numpy as np

_BLOCK = 256  # random rows; longer inputs repeat them, which changes no cost


@dataclasses.dataclass(frozen=True)
class Job:
    """Work to be timed. `run()` returns when the work is done.

    `describe(result)` is not timed and returns JSON values.
    """

    run: Callable[[], Any]
    describe: Callable[[Any], dict[str, Any]] = lambda result: result
    warm_up: Callable[[], Any] | None = None  # a shorter `run` for the untimed runs


def jax_loss(loss: Callable, arrays: Iterable[Any], argnums: Any = 0) -> Job:
    """Return the job of a loss in jax and its gradient with respect to `argnums`."""
    import jax
    import jax.numpy as jnp

    function, arrays = jax.jit(jax.value_and_grad(loss, argnums)), list(arrays)

    def describe(result):
        leaves = [leaf.astype(jnp.float32).ravel() for leaf in jax.tree.leaves(result[1])]
        return {"loss": float(result[0]), "norms": [float(jnp.linalg.norm(x)) for x in leaves]}

    return Job(lambda: jax.block_until_ready(function(*arrays)), describe)


def generation(
    case: dict[str, Any], batch: int, generate: Callable[[slice, int], Sequence[Sequence[int]]]
) -> Job:
    """Return the job of all the case's prompts, `batch` at a time.

    `generate(rows, seed)` returns the completions of these prompts, with or without what follows
    the first stop token. Useful tokens include the stop token.
    """
    seeds, stops = itertools.count(), set(case["stop_ids"])

    def run(count=case["prompts"]):
        return [generate(slice(i, i + batch), next(seeds)) for i in range(0, count, batch)]

    def describe(parts):
        rows = itertools.chain.from_iterable(parts)
        ends = lambda row: (n for n, token in enumerate(row, 1) if int(token) in stops)
        lengths = [next(ends(row), len(row)) for row in rows]
        facts = {"useful_tokens": sum(lengths), "max_length": max(lengths)}
        return facts | {"mean_length": sum(lengths) / len(lengths)}

    return Job(run, describe, warm_up=lambda: run(case["batch"]))


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
            jobs[form] = job = builders[form](case)
            for _ in range(2):
                (job.warm_up or job.run)()
        else:
            start, cpu_start = time.perf_counter(), time.process_time()
            result = jobs[form].run()
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            facts = jobs[form].describe(result)
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


def make_logits(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return logits of a student and of a similar teacher, float32 `[tokens, vocab]`."""
    rng, shape = np.random.default_rng(0), (min(case["tokens"], _BLOCK), case["vocab"])
    student = 2 * rng.standard_normal(shape, np.float32)
    teacher = student + rng.standard_normal(shape, np.float32)
    return _tile(student, case["tokens"]), _tile(teacher, case["tokens"])


def make_hidden(case: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """Return float32 hidden states `[tokens, width]` and heads `[vocab, width]` of both models."""
    rng, tokens, width = np.random.default_rng(0), case["tokens"], case["width"]
    shape, head_shape = (min(tokens, _BLOCK), width), (case["vocab"], width)
    student = rng.standard_normal(shape, np.float32)
    head = rng.standard_normal(head_shape, np.float32) / width**0.5
    teacher_head = head + 0.3 * rng.standard_normal(head_shape, np.float32) / width**0.5
    teacher = student + 0.3 * rng.standard_normal(shape, np.float32)
    return _tile(2 * student, tokens), head, _tile(2 * teacher, tokens), teacher_head


def _tile(rows: np.ndarray, count: int) -> np.ndarray:
    return np.tile(rows, (-(-count // len(rows)), 1))[:count]


def read_prompts(case: dict[str, Any], field: str = "prompt") -> list[Any]:
    """Return the texts of the case's prompts, or their `ids`, of equal length."""
    lines = pathlib.Path(case["prompts_file"]).read_text().splitlines()
    return [json.loads(line)[field] for line in lines[: case["prompts"]]]
