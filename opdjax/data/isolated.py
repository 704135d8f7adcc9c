"""Functions that may hang or take all memory, run in processes of their own with limits.

Such a process imports the module of its functions, and nothing else: not the user's main module,
which a script without a `__main__` guard would run again.
"""

from __future__ import annotations

import atexit
import importlib
import json
import logging
import os
import pathlib
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from typing import Any

_SECONDS_PER_CALL = 5.0  # of CPU time, which a loaded or suspended machine does not change
_START_SECONDS = 30.0  # importing math-verify takes seconds
_WAITING = 10  # a call ends after 10 times its seconds, even if it has used none of them
MAX_BYTES = 4 << 30  # of the process
_ROOT = pathlib.Path(__file__).parents[2]
_lock = threading.Lock()
_processes: dict[str, subprocess.Popen] = {}  # by module


def call(
    function: str, *arguments: Any, module: str = __name__, seconds: float | None = None
) -> Any | None:
    """The result of a function of a module, as JSON; None if it fails, or exceeds its seconds
    (None: 5) or the MAX_BYTES of its module.

    `9^{9^{9}}` then costs an answer its mark, not the run its time.
    """
    with _lock:
        if module not in _processes:
            _processes[module] = _start(module)
        line = _ask(_processes[module], seconds or _SECONDS_PER_CALL, function, *arguments)
        if not line:
            _end(module)
            return None
        return json.loads(line)


def stop() -> None:
    """Ends the processes; the next call starts another."""
    for module in list(_processes):
        _end(module)


def _end(module: str) -> None:
    process = _processes.pop(module)
    process.kill()
    process.communicate()


_FAILURES = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, SyntaxError)
_FAILURES += (TypeError, ValueError)


def _start(module: str) -> subprocess.Popen:
    atexit.register(stop)
    # The package's directory comes last: -P alone would hide it, and nothing may be hidden by it.
    code = "import sys; sys.path.append(sys.argv[1]); from opdjax.data.isolated import serve; "
    command = [sys.executable, "-P", "-c", code + "serve(sys.argv[2])", str(_ROOT), module]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    _ask(process, _START_SECONDS, "warm_up")  # so that the first call's time excludes imports
    return process


def _ask(process: subprocess.Popen, seconds: float, *request: Any) -> bytes:
    """The line that answers a request; empty if there is none in time."""
    deadline, parts = time.monotonic() + _WAITING * seconds, [b""]
    try:
        process.stdin.write(json.dumps([seconds, *request]).encode() + b"\n")
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not parts[-1].endswith(b"\n"):
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    return b""
                if not (part := os.read(process.stdout.fileno(), 1 << 16)):
                    return b""
                parts.append(part)
    except BrokenPipeError:
        return b""
    return b"".join(parts)


def warm_up() -> None:
    """Imports math-verify, if it is installed."""
    try:
        import math_verify  # noqa: F401
    except ImportError:
        return


def verify_math(answer: str, found: str) -> bool:
    """Whether math-verify calls two LaTeX expressions equal."""
    from math_verify import parse, verify

    gold, found = (parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (answer, found))
    return bool(verify(gold, found, timeout_seconds=None))


def last_match(pattern: str, text: str) -> str | None:
    """The last match of a regular expression, or its first group, without surrounding spaces."""
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    return (matches[-1][1 if matches[-1].re.groups else 0] or "").strip() or None


def serve(module: str) -> None:
    """Answers requests for functions of a module, a line of JSON each, until the input ends."""
    import resource

    functions = vars(importlib.import_module(module))
    limit = functions["MAX_BYTES"]
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    logging.disable(logging.WARNING)  # math-verify warns that its own time limit is off
    for line in sys.stdin:
        seconds, name, *arguments = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
        try:
            result = functions[name](*arguments)
        except _FAILURES:  # of a library on this text; another one costs a new process
            result = None
        print(json.dumps(result), flush=True)
