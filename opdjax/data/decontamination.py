"""Training prompts that an evaluation holds too, found by the words that they share."""

from __future__ import annotations

import re
from collections.abc import Sequence

from opdjax.data.chat import Messages, as_messages, text_of

_NGRAM = 13  # words


def parts_of(source: str) -> tuple[str, str, int] | None:
    """(SOURCE, OTHER, N) of `SOURCE without OTHER [by N]`; None for another data source."""
    found = re.fullmatch(r"(.+) without (.+?)(?: by ([1-9]\d*))?", source)
    return found and (found[1], found[2], int(found[3] or _NGRAM))


def share_words(
    prompts: Sequence[str | Messages], held_out: Sequence[str | Messages], size: int = _NGRAM
) -> list[bool]:
    """Whether each prompt has `size` words in a row that a held-out prompt has too.

    Words are runs of letters and digits, in lower case. A text of fewer words is compared as a
    whole, so a short question inside of a longer text is not found.
    """
    known = set().union(*(_ngrams(prompt, size) for prompt in held_out))
    return [not known.isdisjoint(_ngrams(prompt, size)) for prompt in prompts]


def _ngrams(prompt: str | Messages, size: int) -> set[str]:
    turns = [text_of(turn) for turn in as_messages(prompt) if turn["role"] == "user"]
    text = " ".join(turns).lower()
    words = re.findall(r"\w+", text)
    if len(words) < size:
        return {" ".join(text.split())} - {""}
    return {" ".join(words[n : n + size]) for n in range(len(words) - size + 1)}
