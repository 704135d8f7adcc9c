"""Whether a completion gives the right answer, by what part of it is compared."""

from __future__ import annotations

import re
from collections.abc import Callable

_AFTER_HASH = re.compile(r"#\s*(-?\d[\d,]*(?:\.\d+)?)")


def final_number(completion: str, answer: str) -> bool:
    """The last number after a `#`, as the built-in task and GSM8K write it; `answer` may be a whole solution of that form."""
    found, expected = _AFTER_HASH.findall(completion), _AFTER_HASH.findall(answer) or [answer.strip()]
    return bool(found) and _as_number(found[-1]) == _as_number(expected[-1])


def exact(completion: str, answer: str) -> bool:
    """The whole completion, spaces around it aside."""
    return completion.strip() == answer.strip()


def boxed(completion: str, answer: str) -> bool:
    r"""The last `\boxed{...}`, compared as mathematics by math-verify; only text after the last `</think>` counts."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("the grader 'boxed' needs math-verify: pip install 'opdjax[eval]'") from error
    content = last_boxed(completion.rsplit("</think>", 1)[-1])
    if content is None:
        return False
    # math-verify's own time limits use signals, which only the main thread may set.
    gold, found = (parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (answer, content))
    return bool(verify(gold, found, timeout_seconds=None))


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces balance."""
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


GRADERS: dict[str, Callable[[str, str], bool]] = {"final_number": final_number, "boxed": boxed, "exact": exact}
