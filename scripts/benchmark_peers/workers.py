"""A worker process of the benchmark, pinned to some cores; it takes one command at a time."""

from __future__ import annotations

import json
import os
import pathlib
import queue
import shutil
import subprocess
import threading
from typing import Any

SCRIPTS = pathlib.Path(__file__).resolve().parent.parent
_TIMEOUT = 600  # seconds for one answer: importing, compiling or one run


class WorkerError(RuntimeError):
    """The worker failed; the message says why."""


class Worker:
    """One system in its own process, on `threads` cores, or on the accelerator if None."""

    def __init__(self, system: str, python: str, threads: int | None, root: pathlib.Path):
        self.system, self.threads, self.versions = system, threads, {}
        self._command = _command(system, python, threads)
        self._environment = _environment(system, threads, root)
        self._log = (root / "logs" / f"{system}-{threads or 'gpu'}.log").open("w")
        self._answers: queue.Queue = queue.Queue()
        self._process: subprocess.Popen | None = None
        self._death: str | None = None

    def ask(self, **command: Any) -> dict[str, Any]:
        """Return the answer to one command; WorkerError if it fails.

        The first command starts the process.
        """
        if self._death:
            raise WorkerError(self._death)
        if self._process is None:
            self._start()
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer = self._next()
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def stop(self) -> None:
        """Kill the process."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _start(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        try:
            self._process = subprocess.Popen(
                self._command, cwd=SCRIPTS, env=self._environment, text=True, **pipes
            )
        except OSError as error:
            self._death = f"not started: {error}"
            raise WorkerError(self._death) from error
        threading.Thread(target=self._listen, daemon=True).start()
        self.versions = self._next()["versions"]

    def _listen(self):
        for line in self._process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put(None)

    def _next(self):
        try:
            answer = self._answers.get(timeout=_TIMEOUT)
        except queue.Empty:
            self._death = f"no answer within {_TIMEOUT} s"
        else:
            if answer is not None:
                return answer
            self._death = (
                f"its process ended with status {self._process.wait()}: {self._last_words()}"
            )
        self.stop()
        raise WorkerError(self._death)

    def _last_words(self):
        lines = pathlib.Path(self._log.name).read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "its log is empty"


def _command(system, python, threads):
    pin = []
    if threads is not None and threads < len(os.sched_getaffinity(0)) and shutil.which("taskset"):
        cores = sorted(os.sched_getaffinity(0))[:threads]
        pin = ["taskset", "-c", ",".join(map(str, cores))]
    return [*pin, python, "-m", f"benchmark_peers.{system}_worker"]


def _environment(system, threads, root):
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("XLA_", "JAX_", "OMP_", "MKL_"))
    }
    cache = root / "compiled" / f"{system}-{threads or 'gpu'}"
    path = [str(SCRIPTS.parent)] if system == "opdjax" else []
    kept |= {
        "PYTHONPATH": os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "BENCHMARK_DEVICE": "gpu" if threads is None else "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }
    if threads is None:
        # Several systems share the accelerator: none may take most of its memory at the start.
        return kept | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return kept | {
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(threads),
    }
