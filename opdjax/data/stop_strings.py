"""Texts that end a completion, found token by token: an automaton over the bytes of the text, and
where each token of a vocabulary takes it. So a text is found however it is split into tokens.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # of vocabularies that fall back to bytes
_ANCHOR = "a"  # decoders drop the space before a text's first token


@dataclasses.dataclass(frozen=True, eq=False)
class StopStrings:
    """The texts, and the automaton: state 0 is that of an empty completion, and the last one, which
    is never left, that of a completion that contains one of the texts.
    """

    texts: tuple[str, ...]
    table: np.ndarray  # [S, V], the state after a token

    def is_met(self, tokens: np.ndarray) -> np.ndarray:
        """`[B, T]`: whether a row of tokens contains a text up to this token."""
        states = np.zeros((len(tokens), tokens.shape[1] + 1), self.table.dtype)
        for column in range(tokens.shape[1]):
            states[:, column + 1] = self.table[states[:, column], tokens[:, column]]
        return states[:, 1:] == len(self.table) - 1


def find_stop_strings(texts: Sequence[str], tokenizer: Any, num_ids: int) -> StopStrings:
    """The automaton of these texts for the ids of a tokenizer, 0 to `num_ids` - 1."""
    wanted = [text.encode() for text in texts]
    prefixes = sorted({text[:size] for text in wanted for size in range(len(text))}, key=len)
    number = {prefix: state for state, prefix in enumerate(prefixes)}
    after = np.full((len(prefixes) + 1, 256), len(prefixes), np.int32)
    for prefix, state in number.items():
        for byte in range(256):
            text = prefix + bytes([byte])
            if not text.endswith(tuple(wanted)):
                suffixes = (text[start:] for start in range(len(text) + 1))
                after[state, byte] = next(number[each] for each in suffixes if each in number)
    states = np.arange(len(after), dtype=np.int32)
    follow = lambda piece: reduce(lambda found, byte: after[found, byte], piece, states)
    columns = [follow(piece) for piece in token_bytes(tokenizer, num_ids)]
    return StopStrings(tuple(texts), np.stack(columns, axis=1))


def token_bytes(tokenizer: Any, num_ids: int) -> list[bytes]:
    """What each id adds to a text, in UTF-8; a token may hold a part of a character."""
    vocabulary = tokenizer.get_vocab()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    added = backend.get_added_tokens_decoder() if backend else tokenizer.added_tokens_decoder
    bytes_of_chars, space = _byte_level(), vocabulary.get("Ġ")
    is_byte_level = space is not None and tokenizer.decode([space]) == " "
    anchor = tokenizer.encode(_ANCHOR, add_special_tokens=False)
    start, pieces = len(tokenizer.decode(anchor)), [b""] * num_ids
    for token, number in vocabulary.items():
        if number >= num_ids:
            continue
        if number in added:
            pieces[number] = str(added[number].content).encode()
        elif is_byte_level:
            pieces[number] = bytes(bytes_of_chars[char] for char in token)
        elif byte := _BYTE_TOKEN.fullmatch(token):
            pieces[number] = bytes.fromhex(byte[1])
        else:
            pieces[number] = tokenizer.decode([*anchor, number])[start:].encode()
    return pieces


def _byte_level() -> dict[str, int]:
    """The characters that stand for bytes in vocabularies of byte-level BPE (GPT-2)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): b for n, b in enumerate(others)}
