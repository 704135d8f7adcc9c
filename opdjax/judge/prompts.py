"""The prompts of judges: templates, which are text files of the package, and the blocks of text
that are put into them.

A block is fenced by lines that carry a tag, a digest of all blocks of the message: an answer cannot
forge its own end, since it would have to contain a digest of itself.
"""

from __future__ import annotations

import hashlib
import pathlib
import re
from collections.abc import Mapping, Sequence

from opdjax.config.model import PACKAGE
from opdjax.config.validation import ConfigError

TEMPLATES = PACKAGE / "assets" / "judge"
_PLACE = re.compile(r"\[\[(\w+)\]\]")
_VERSION = re.compile(r"\A# (\w+ \d+)\n")
_TAG = re.compile(r"carry the tag ([0-9a-f]{12})\b")
_CUT_OFF = "[cut off: the answer reached its length limit before it ended]"
_LEFT_OUT = "[the beginning of this long answer is left out]"
_NEVER_CLOSED = "[no final answer: the length limit was reached while the answer was still being thought out; its end follows]"

Block = tuple[str, Sequence[str]]  # what its texts are called, and the texts


def load_template(name: str, directory: str = "") -> str:
    """The template of that name: the user's own where the directory has it, else the package's.
    ConfigError on one without a version.
    """
    own = pathlib.Path(directory) / f"{name}.txt" if directory else None
    if own is not None and not own.parent.is_dir():
        raise ConfigError(
            f"rubrics.templates is {directory!r}; expected a directory with files such as rubricator.txt"
        )
    file = own if own is not None and own.exists() else TEMPLATES / f"{name}.txt"
    text = file.read_text(encoding="utf-8")
    if not _VERSION.match(text):
        raise ConfigError(
            f"the prompt template {file} has no version; expected a first line such as '# {name} 1'"
        )
    return text


def template_versions(directory: str = "") -> dict[str, str]:
    """Version and digest of every template, as the config of a run records them."""
    found = {}
    for file in sorted(TEMPLATES.glob("*.txt")):
        text = load_template(file.stem, directory)
        found[file.stem] = (
            f"{_VERSION.match(text)[1]} {hashlib.sha256(text.encode()).hexdigest()[:12]}"
        )
    return found


def fill(template: str, words: Mapping[str, str], blocks: Mapping[str, Block]) -> str:
    """The template with its places filled, in one pass: what is put in is never read as a place
    itself.

    `[[name]]` takes the word or the fenced texts of that name, `[[tag]]` the tag of the fences.
    ConfigError on a place that nothing fills, and where a block has no place: the judge would not
    see it.
    """
    body = _VERSION.sub("", template, count=1)
    tag = _tag_of([text for _, texts in blocks.values() for text in texts])
    values = (
        dict(words)
        | {"tag": tag}
        | {name: _fenced(label, texts, tag) for name, (label, texts) in blocks.items()}
    )
    places = set(_PLACE.findall(body))
    if places - values.keys():
        raise ConfigError(
            f"the prompt template {_name(template)} has [[{min(places - values.keys())}]]; it can have {sorted(values)}"
        )
    unseen = (blocks.keys() | ({"tag"} if blocks else set())) - places
    if unseen:
        raise ConfigError(f"the prompt template {_name(template)} lacks [[{min(unseen)}]]")
    return _PLACE.sub(lambda match: values[match[1]], body).strip() + "\n"


def _name(template: str) -> str:
    return _VERSION.match(template)[1]


def _tag_of(texts: Sequence[str]) -> str:
    joined = "\x00".join(texts)
    attempt = 0
    while True:
        tag = hashlib.sha256(f"{attempt}\x00{joined}".encode(errors="surrogatepass")).hexdigest()[
            :12
        ]
        if tag not in joined:
            return tag
        attempt += 1


def _fenced(label: str, texts: Sequence[str], tag: str) -> str:
    named = (f"{label} {place + 1} {tag}" for place in range(len(texts)))
    return "\n\n".join(
        f"=== {name} ===\n{text}\n=== end of {name} ===" for name, text in zip(named, texts)
    )


def read_blocks(message: str) -> dict[str, list[str]]:
    """The texts of a filled template by their label, in their order: the inverse of what `fill`
    puts in.
    """
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
        found.setdefault(match[1], []).append(match[3])
    return found


def shown_answer(text: str, is_truncated: bool, max_chars: int) -> str:
    """What a judge sees of an answer: what follows its last `</think>`, at most so many characters,
    and whether it was cut off.

    Of an answer that ends while it is still thinking, the end: thousands of characters of scratch
    are no answer.
    """
    thought, closed, rest = text.rpartition("</think>")
    is_open = is_truncated and not closed and "<think>" in text
    body = (rest.strip() or thought.strip()) if closed else text.strip()
    # A lone surrogate cannot be sent, stored or hashed.
    body = body.encode("utf-8", "replace").decode("utf-8")
    if len(body) > max_chars:
        body = f"{_LEFT_OUT}\n{body[-max_chars:]}" if not is_open else body[-max_chars:]
    if is_open:
        return f"{_NEVER_CLOSED}\n{body}"
    return f"{body}\n{_CUT_OFF}" if is_truncated else body
