"""The one JSON object of a judge's reply, in time linear in the reply.

A reply with several objects that differ is ambiguous: one of them may be a draft, an echo of the
requested form, or an object in a student's answer that the judge quotes. It is never guessed which
one counts: ReplyError says what is wrong, and the judge is asked again with its text.
"""

from __future__ import annotations

import re
from typing import Any

from opdjax.runs.bounds import parse_json

# Why a reply cannot be used, and what was repaired: names of metrics.
ERRORS = ("empty", "truncated", "parse_error", "ambiguous", "schema_error")
ERRORS += ("answer_index", "validation_error")
REPAIRS = ("fence", "prose", "unknown_keys", "id_case")
MAX_REPLY_CHARS = 400_000  # about 100,000 tokens, reasoning included
_MAX_MESSAGE = 500  # characters; an error may quote the reply, and becomes part of a prompt
# Possessive quantifiers, as in *+, never try a shorter match: the time stays linear.
# A brace of other text, such as \frac{1}{2}, opens no object.
_START = re.compile(r'\{\s*["}]')
_STRING_OR_BRACE = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[{}]', re.DOTALL)
_FENCE_LINE = re.compile("(?:```[A-Za-z]*)?")
_END_OF_LINE = re.compile(r"[^\S\n]*+(?:```)?+[^\S\n]*+(?:\n|\Z)")


# Its text becomes part of the next prompt, and replies are cached by the prompt's bytes: messages
# below keep their wording.
class ReplyError(ValueError):
    """A reply that cannot be used; `kind` is one of ERRORS, the text says what was expected."""

    def __init__(self, kind: str, message: str):
        super().__init__(message[:_MAX_MESSAGE])
        self.kind = kind


def read_object(text: str, key: str) -> tuple[dict[str, Any], set[str]]:
    """The JSON object with this key in a reply, and the repairs made; else ReplyError.

    The object may stand in a code fence, or apart from other text ("prose"): not inside of a line.
    """
    if not text.strip():
        raise ReplyError("empty", "the reply is empty; expected a JSON object")
    if len(text) > MAX_REPLY_CHARS:
        message = f"the reply has {len(text)} characters; expected at most {MAX_REPLY_CHARS}"
        raise ReplyError("parse_error", message)
    answer, wanted = _after_reasoning(text), f"expected one with {key!r}, and nothing around it"
    found, repairs = _loaded(text), set()
    if found is None:
        found, repairs = _loaded(answer), {"prose"}
    if found is None:
        found = _loaded(_without_fence(answer))
        repairs = {"fence"} if answer == text else {"fence", "prose"}
    if found is None:
        found, repairs = _loaded(_object_in_prose(answer, wanted)), {"prose"}
    if found is None:
        raise ReplyError("parse_error", f"the reply holds no JSON object; {wanted}")
    if not isinstance(found, dict) or key not in found:
        message = f"the reply is {describe(found)}; expected a JSON object with {key!r}"
        raise ReplyError("schema_error", message)
    return found, repairs


def require_own_object(text: str, prompt: str) -> None:
    """ReplyError where the object among the prose of a reply also stands in the prompt.

    It is then a quotation, or an echo of the requested form, and no reply of the judge's own.
    """
    (found,) = {_squeezed(found) for found, _ in _objects(_after_reasoning(text))} - {"{}"}
    if found in _squeezed(prompt).replace("},...]}", "}]}"):
        message = "the JSON object is a quotation of the request; expected your own, alone"
        raise ReplyError("ambiguous", message)


def describe(value: Any) -> str:
    """What kind of JSON value it is, for an error message."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return (names | {type(None): "null"}).get(type(value), "a number")


def is_written(text: str) -> bool:
    """Whether the text has a letter or a digit: the dots of a form that was filled in have none."""
    return any(map(str.isalnum, text))


def _after_reasoning(text: str) -> str:
    """The text after the last `</think>`: a draft inside the reasoning is no answer."""
    _, closed, rest = text.rpartition("</think>")
    return "" if not closed and text.lstrip().startswith("<think>") else rest


def _without_fence(text: str) -> str:
    """The text between the fence lines that enclose all of it; "" if there are none."""
    first, _, rest = text.strip().partition("\n")
    is_fenced = first and _FENCE_LINE.fullmatch(first.strip()) and rest.endswith("```")
    return rest.removesuffix("```") if is_fenced else ""


def _loaded(text: str) -> Any:
    """The JSON value, or None; NaN, numbers of thousands of digits, endless nesting are None."""
    try:
        return parse_json(text, parse_constant=_refuse, object_pairs_hook=_with_distinct_keys)
    except ReplyError:
        raise
    except ValueError:
        return None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _with_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        message = "an object has the same key more than once; expected each key once"
        raise ReplyError("ambiguous", message)
    return found


def _object_in_prose(text: str, wanted: str) -> str:
    """The object that stands apart from the text around it; "" without one."""
    found = [each for each in _objects(text) if _squeezed(each[0]) != "{}"]
    if len({_squeezed(each) for each, _ in found}) > 1:
        raise ReplyError("ambiguous", f"the reply holds JSON objects that differ; {wanted}")
    if found and not any(is_apart for _, is_apart in found):
        raise ReplyError("ambiguous", f"the JSON object stands inside of a sentence; {wanted}")
    return found[0][0] if found else ""


def _objects(text: str) -> list[tuple[str, bool]]:
    """Each outermost object, valid or not, and whether nothing but a fence shares its lines.

    What is inside of another object is never returned, even if that is no valid JSON.
    """
    found, end = [], 0
    while start := _START.search(text, end):
        _, newline, before = text[end : start.start()].rpartition("\n")
        is_apart = (newline or not end) and _FENCE_LINE.fullmatch(before.strip())
        end = _end_of_object(text, start.start())
        is_apart = is_apart and _END_OF_LINE.match(text, end)
        found.append((text[start.start() : end], bool(is_apart)))
    return found


def _end_of_object(text: str, begin: int) -> int:
    """The place after the brace that closes the one at `begin`, or the text's end."""
    depth = 0
    for match in _STRING_OR_BRACE.finditer(text, begin):
        depth += (match[0] == "{") - (match[0] == "}")
        if not depth:
            return match.end()
    return len(text)


def _squeezed(text: str) -> str:
    return "".join(text.split())
