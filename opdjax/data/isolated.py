"""Functions that may hang or take all memory, run in a process of their own with limits.

The process runs this file as a script, and nothing else: it imports neither opdjax nor the user's
main module, which a script without a `__main__` guard would run again.
"""

from __future__ import annotations

import atexit
import json
import logging
import re
import selectors
import subprocess
import sys
import threading
from typing import Any

_SECONDS_PER_CALL = 5.0
_START_SECONDS = 120.0  # importing math-verify takes seconds, on a loaded machine many
_MAX_BYTES = 4 << 30  # of the process
_lock = threading.Lock()
_process: subprocess.Popen | None = None


def call(function: str, *arguments: str) -> Any | None:
    """The result of a function of this file; None if it fails or exceeds 5 seconds or 4 GiB.

    `9^{9^{9}}` then costs an answer its mark, not the run its time.
    """
    global _process
    with _lock:
        if _process is None:
            _process = _start()
        result = _ask(_process, function, arguments, _SECONDS_PER_CALL)
        if result is _FAILED:
            stop()
            return None
        return result


def stop() -> None:
    """Ends the process; the next call starts another."""
    global _process
    if _process is not None:
        _process.kill()
        _process.communicate()
        _process = None


_FAILED = object()
_FAILURES = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, SyntaxError)
_FAILURES += (TypeError, ValueError)


def _start() -> subprocess.Popen:
    atexit.register(stop)
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-P", __file__], stdin=pipe, stdout=pipe, bufsize=0)
    _ask(process, "warm_up", (), _START_SECONDS)  # so that the first call's time excludes imports
    return process


def _ask(process: subprocess.Popen, function: str, arguments: tuple, seconds: float) -> Any:
    try:
        process.stdin.write(json.dumps([function, *arguments]).encode() + b"\n")
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            line = process.stdout.readline() if selector.select(seconds) else b""
    except BrokenPipeError:
        line = b""
    return json.loads(line) if line else _FAILED


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


def _serve() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))
    logging.disable(logging.WARNING)  # math-verify warns that its own time limit is off
    functions = {f.__name__: f for f in (warm_up, verify_math, last_match)}
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            result = functions[name](*arguments)
        except _FAILURES:  # of a library on this text; another one costs a new process
            result = None
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    _serve()
