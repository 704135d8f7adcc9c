"""Judges' prompts: templates (text files of the package) and the blocks of text inserted in them.

A block stands between fence lines with a tag, a digest of all blocks of the message. An answer
cannot forge its own end: it would have to contain a digest of itself. What only looks like a fence,
and the control tokens with which a server's chat template ends a message, get a backslash inside.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from opdjax.config.model import PACKAGE
from opdjax.config.validation import ConfigError

TEMPLATES = PACKAGE / "assets" / "judge"
_PLACE = re.compile(r"\[\[(\w+)\]\]")
_VERSION = re.compile(r"\A# (\w+ \d+)\n")
_CONTROL = (
    r"== *(?:end of +)?\w+ +\d|\|[^\s<>|\[\]]{1,40}\|>|｜[^\s<>｜\[\]]{1,40}｜>|/?(?:s|think)>"
    r"|(?:(?:start|end)_of_turn|bos|eos|pad|unk)>|/?(?:INST|SYSTEM_PROMPT)\]"
)
_AS_CONTROL = re.compile(rf"([=<\[])(\\*)(?={_CONTROL})", re.IGNORECASE)
_AS_TEXT = re.compile(rf"([=<\[])\\(\\*)(?={_CONTROL})", re.IGNORECASE)
_TAG = re.compile(r"carry the tag ([0-9a-f]{12})\b")
# Parts of the prompt. Replies are cached by the prompt's bytes: a changed word is a cache miss.
_CUT_OFF = "[cut off: the answer reached its length limit before it ended]"
_LEFT_OUT = "[the beginning of this long answer is left out]"
_NEVER_CLOSED = (
    "[no final answer: the length limit was reached while the answer was still being thought out; "
    "its end follows]"
)

Block = tuple[str, Sequence[str]]  # a label, and the texts it numbers


def load_template(name: str, directory: str = "") -> str:
    """The template of that name: from the user's directory if it is there, else the package's.

    Raises ConfigError if the directory does not exist or the template has no version.
    """
    own = pathlib.Path(directory or TEMPLATES, f"{name}.txt")
    if not own.parent.is_dir():
        raise ConfigError(
            f"rubrics.templates is {directory!r}; expected a directory with files such as "
            "rubricator.txt"
        )
    file = own if own.exists() else TEMPLATES / own.name
    text = file.read_text(encoding="utf-8")
    if not _VERSION.match(text):
        raise ConfigError(
            f"the prompt template {file} has no version; expected a first line such as '# {name} 1'"
        )
    return text


def template_versions(directory: str = "") -> dict[str, str]:
    """Version and digest of every template, as a run's config records them."""
    names = [file.stem for file in sorted(TEMPLATES.glob("*.txt"))]
    texts = {name: load_template(name, directory) for name in names}
    digest = lambda text: hashlib.sha256(text.encode()).hexdigest()[:12]
    return {name: f"{_version(text)} {digest(text)}" for name, text in texts.items()}


def fill(template: str, words: Mapping[str, str], blocks: Mapping[str, Block]) -> str:
    """The template with its places filled in one pass: inserted texts are never read as places.

    `[[name]]` takes the word or the fenced texts of that name, `[[tag]]` the tag of the fences.
    Raises ConfigError if a place has no value, or if a block has no place: the judge would not see
    it.
    """
    body = _VERSION.sub("", template, count=1)
    tag = _tag_of([text for _, texts in blocks.values() for text in texts])
    values = {**words, "tag": tag}
    values |= {name: _fenced(label, texts, tag) for name, (label, texts) in blocks.items()}
    places = set(_PLACE.findall(body))
    if unknown := places - values.keys():
        raise ConfigError(
            f"the prompt template {_version(template)} has [[{min(unknown)}]]; it can have "
            f"{sorted(values)}"
        )
    if unseen := (blocks.keys() | ({"tag"} if blocks else set())) - places:
        raise ConfigError(f"the prompt template {_version(template)} lacks [[{min(unseen)}]]")
    return _PLACE.sub(lambda match: values[match[1]], body).strip() + "\n"


def _version(template: str) -> str:
    return _VERSION.match(template)[1]


def _tag_of(texts: Sequence[str]) -> str:
    """The first digest of the texts that does not occur in them."""
    joined = "\x00".join(texts)
    numbered = (f"{attempt}\x00{joined}" for attempt in itertools.count())
    digests = (hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest() for text in numbered)
    return next(digest[:12] for digest in digests if digest[:12] not in joined)


def _fenced(label: str, texts: Sequence[str], tag: str) -> str:
    named = ((f"{label} {number} {tag}", text) for number, text in enumerate(texts, 1))
    quoted = ((name, _AS_CONTROL.sub(r"\1\\\2", text)) for name, text in named)
    return "\n\n".join(f"=== {name} ===\n{text}\n=== end of {name} ===" for name, text in quoted)


def read_blocks(message: str) -> dict[str, list[str]]:
    """The texts in a filled template by label, in their order: the inverse of `fill`."""
    tag = _TAG.search(message)
    if tag is None:
        raise ValueError(
            "the message has no fenced blocks; expected a prompt made by opdjax.judge.prompts"
        )
    fence = re.compile(
        rf"^=== (\w+) (\d+) {tag[1]} ===\n(.*?)\n=== end of \1 \2 {tag[1]} ===$",
        re.DOTALL | re.MULTILINE,
    )
    found: dict[str, list[str]] = {}
    for match in fence.finditer(message):
        found.setdefault(match[1], []).append(_AS_TEXT.sub(r"\1\2", match[3]))
    return found


def list_example(name: str, item: Mapping[str, Any]) -> str:
    """An example of a reply: a JSON object with a list of items of this form."""
    return json.dumps({name: [item]}, ensure_ascii=False).replace("}]}", "}, ...]}")


def shown_answer(text: str, is_truncated: bool, max_chars: int) -> str:
    """The part of an answer that judges see: what follows its reasoning, at most `max_chars`.

    A mark says if the answer was cut off. Of an answer cut off inside its reasoning the end is
    shown: thousands of characters of scratch are no answer.
    """
    parts = [part.strip() for part in text.split("</think>")]
    is_open = is_truncated and len(parts) == 1 and "<think>" in text
    body = next(filter(None, reversed(parts)), "")
    # A lone surrogate cannot be sent, stored or hashed.
    body = body.encode("utf-8", "replace").decode("utf-8")
    if len(body) > max_chars:
        body = f"{_LEFT_OUT}\n{body[-max_chars:]}" if not is_open else body[-max_chars:]
    if is_open:
        return f"{_NEVER_CLOSED}\n{body}"
    return f"{body}\n{_CUT_OFF}" if is_truncated else body
