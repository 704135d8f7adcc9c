"""A worker's side: one JSON object a line on standard input and output, and the common inputs.

A peer's worker runs in the peer's environment. It imports this file and nothing of opdjax; of other
packages this file needs numpy only. `{"do": "prepare", "case": ...}` builds the work of a form and
runs it untimed, `{"do": "run", "form": ...}` times one run, `{"do": "drop"}` deletes all work. All
other output of the worker goes to its log.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import pathlib
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

_BLOCK = 256  # random rows; longer inputs repeat them, which changes no cost


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


def read_prompts(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the case's rows with `prompt` (text) and `ids`."""
    lines = pathlib.Path(case["prompts_file"]).read_text().splitlines()
    return [json.loads(line) for line in lines[: case["prompts"]]]


def prompt_ids(case: dict[str, Any]) -> np.ndarray:
    """Return the ids of the case's prompts, int32 `[prompts, prompt]`."""
    return np.array([row["ids"] for row in read_prompts(case)], np.int32)


def describe_lengths(lengths) -> dict[str, Any]:
    """Return the number of useful tokens, including stop tokens, and the lengths."""
    lengths = np.asarray(lengths)
    facts = {"useful_tokens": int(lengths.sum()), "max_length": int(lengths.max())}
    return facts | {"mean_length": float(lengths.mean())}


def describe_completions(parts: list[np.ndarray], stop_ids: list[int]) -> dict[str, Any]:
    """Return the lengths of rows of tokens, up to and including the first stop token of each."""
    ends = []
    for rows in parts:
        is_stop = np.isin(rows, stop_ids)
        ends.append(np.where(is_stop.any(axis=1), is_stop.argmax(axis=1) + 1, rows.shape[1]))
    return describe_lengths(np.concatenate(ends))
