"""Graders: whether a completion gives the right answer. They differ in the part they compare."""

from __future__ import annotations

import functools
import importlib.util
import logging
import multiprocessing
import re
from collections.abc import Callable
from typing import Any

from opdjax.config.validation import MissingExtraError

_SECONDS_PER_ANSWER = 5.0
_AFTER_HASH = re.compile(r"#\s*(-?\d[\d,]*(?:\.\d+)?)")


def final_number(completion: str, answer: str) -> bool:
    """Compares the last number after a `#`, the form of the built-in task and GSM8K.

    `answer` may be a whole solution of that form.
    """
    found = _AFTER_HASH.findall(completion)
    expected = _AFTER_HASH.findall(answer) or [answer.strip()]
    return bool(found) and _as_number(found[-1]) == _as_number(expected[-1])


def exact(completion: str, answer: str) -> bool:
    """Compares the whole completion, without surrounding spaces."""
    return completion.strip() == answer.strip()


def boxed(completion: str, answer: str) -> bool:
    r"""Compares the last `\boxed{...}` after the last `</think>`, as mathematics (math-verify)."""
    content = last_boxed(completion.rsplit("</think>", 1)[-1])
    if content is None:
        return False
    return content.strip() == answer.strip() or _is_equal(answer, content)


def _is_equal(answer: str, content: str) -> bool:
    """math-verify's result, from a separate process; False after 5 seconds.

    An answer such as `9^{9^{9}}` then costs seconds and its mark, not the run.
    """
    pending = _worker().apply_async(_verify, (answer, content))
    try:
        return pending.get(timeout=_SECONDS_PER_ANSWER)
    except multiprocessing.TimeoutError:
        _worker().terminate()
        _worker.cache_clear()
        return False


@functools.cache
def _worker() -> Any:
    """A pool of one process, started on first use and replaced after a timeout."""
    pool = multiprocessing.get_context("spawn").Pool(1)
    pool.apply(_verify, ("1", "1"))  # so that the first answer's time excludes the import
    return pool


def _verify(answer: str, content: str) -> bool:
    from math_verify import parse, verify

    # The caller limits the time: math-verify's own limit uses signals, and warns if it is off.
    logging.disable(logging.WARNING)
    gold, found = (parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (answer, content))
    return bool(verify(gold, found, timeout_seconds=None))


def require_grader(name: str) -> None:
    """Raise ImportError if the grader's package is missing."""
    if name == "boxed" and importlib.util.find_spec("math_verify") is None:
        raise MissingExtraError("the grader 'boxed' needs math-verify: pip install 'opdjax[eval]'")


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` with balanced braces; None without one."""
    start = text.rfind(r"\boxed{")
    while start >= 0:
        depth = 0
        for end in range(start + len(r"\boxed"), len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                return text[start + len(r"\boxed{") : end]
        start = text.rfind(r"\boxed{", 0, start)
    return None


def _as_number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


GRADERS: dict[str, Callable[[str, str], bool]] = {
    "final_number": final_number,
    "boxed": boxed,
    "exact": exact,
}
