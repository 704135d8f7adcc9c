"""A worker process, pinned to some cores, in the environment of its system."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
from typing import Any

SCRIPTS = pathlib.Path(__file__).resolve().parents[2]
TIMEOUT = 600  # seconds for one answer: importing, compiling or one run
# easydel needs pillow and torch but does not declare them.
PINS = {
    "trl": "trl==1.16.0 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0",
    "tunix": "google-tunix==0.1.7 jax==0.10.2 flax==0.12.8 transformers==5.12.1",
    "easydel": "easydel==0.3.0 jax==0.9.2 flax==0.12.3 transformers==5.5.4 torch==2.13.0 "
    "pillow==12.3.0",
}


def python_of(peer: str, root: pathlib.Path) -> str:
    """Return the interpreter of a peer's environment with these pins; OSError without one."""
    pins, directory = PINS[peer].split(), root / "venvs" / peer
    python = str(directory / "bin" / "python")
    print(f"{directory} needs {', '.join(pins)}", file=sys.stderr, flush=True)
    # pip changes nothing, and needs no network, where all of these are installed.
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins]
    for command in ([sys.executable, "-m", "venv", str(directory)], install):
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise OSError(f"not installed: {' '.join(command)} failed")
    return python


class Worker:
    """One system in its own process, on `threads` cores."""

    def __init__(self, system: str, python: str, threads: int, root: pathlib.Path):
        self.threads, self.versions = threads, {}
        self._death: str | None = None
        (root / "logs").mkdir(parents=True, exist_ok=True)
        self._log = root / "logs" / f"{system}-{threads}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                _command(system, python, threads),
                cwd=SCRIPTS,
                env=_environment(system, threads, root),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def ask(self, **command: Any) -> dict[str, Any]:
        """Return the answer to one command; its `error` says why a command failed."""
        if self._death is None:
            line, is_answered = b"", True
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(command).encode() + b"\n")
                self._process.stdin.flush()
                # A worker answers one line to one line, so none is left in a buffer.
                is_answered = bool(select.select([self._process.stdout], [], [], TIMEOUT)[0])
                line = self._process.stdout.readline() if is_answered else b""
            if line:
                answer = json.loads(line)
                self.versions |= answer.get("versions", {})
                return answer
            self._death = self._end() if is_answered else f"no answer within {TIMEOUT} s"
            self.stop()
        return {"error": self._death}

    def stop(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.communicate()

    def _end(self) -> str:
        status, log = self._process.wait(), self._log.read_text(errors="replace").strip()
        last = log.splitlines()[-1][:200] if log else "its log is empty"
        return f"its process ended with status {status}: {last}"


def _command(system: str, python: str, threads: int) -> list[str]:
    cores, pin = sorted(os.sched_getaffinity(0)), []
    if threads < len(cores) and shutil.which("taskset"):
        pin = ["taskset", "-c", ",".join(map(str, cores[:threads]))]
    return [*pin, python, "-m", f"benchmarks.peers.{system}_worker"]


def _environment(system: str, threads: int, root: pathlib.Path) -> dict[str, str]:
    others = ("XLA_", "JAX_", "OMP_", "MKL_", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    return kept | {
        # Only opdjax's own worker may import the package.
        "PYTHONPATH": str(SCRIPTS.parent) if system == "opdjax" else "",
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(threads),
        "JAX_COMPILATION_CACHE_DIR": str(root / "compiled" / f"{system}-{threads}"),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }
