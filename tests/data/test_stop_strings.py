"""Stop strings are found in the text, however it is split into tokens."""

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.generation import StopStringCriteria

from opdjax.config import MINI_PAIR
from opdjax.data.stop_strings import find_stop_strings, token_bytes
from opdjax.data.tokenizer import FileTokenizer, load_tokenizer

LINES = [
    "Question: what is it?\n\nAnswer: 问题。答案。",
    "Quest Questions ions:\n \n\n\n aabab ab",
] * 40
TEXTS = ["Question:", "\n\n", "。答", "abab"]


def byte_level():
    """As of GPT-2 and Qwen: a token may hold a part of a character."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "vocab_size": 290}
    options["special_tokens"] = ["<|end|>"]
    backend.train_from_iterator(LINES, trainers.BpeTrainer(**options))
    return backend


def with_byte_tokens():
    """As of Llama 2: words begin with a mark, and what is unknown is written as bytes."""
    words = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁Quest",
        "ion",
        "ions",
        ":",
    ]
    words += [*"Questionabwr?A"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return backend


@pytest.fixture(params=[byte_level, with_byte_tokens])
def tokenizer(request):
    return FileTokenizer(request.param(), "here", None, {})


def test_a_text_is_found_at_the_token_that_completes_it(tokenizer, rng):
    """In encoded texts, and in texts of tokens that no encoder would choose."""
    size = len(tokenizer.get_vocab())
    pieces, found = token_bytes(tokenizer, size), find_stop_strings(TEXTS, tokenizer, size)
    likely = [n for n, piece in enumerate(pieces) if piece and piece in "".join(TEXTS).encode()]
    rows = [rng.choice(likely, 30) for _ in range(300)]
    rows += [rng.integers(0, size, 30) for _ in range(50)]
    for text in ("a Question: b", "ab\n\nQ", "aabab", "Questions:", "x 。答案", "Question :"):
        ids = tokenizer.encode(text)
        assert b"".join(pieces[n] for n in ids) == text.encode()
        rows.append(np.resize(ids, 30))
    met = found.is_met(np.array(rows))
    for row, is_met in zip(rows, met):
        texts = (b"".join(pieces[n] for n in row[: end + 1]) for end in range(30))
        expected = [any(each.encode() in text for each in TEXTS) for text in texts]
        np.testing.assert_array_equal(is_met, expected)
    assert met[:300, -1].sum() > 3


def test_a_special_token_is_found_by_its_text():
    tokenizer = load_tokenizer(MINI_PAIR / "student")
    found = find_stop_strings(["<|im_end|>", "=1"], tokenizer, len(tokenizer.get_vocab()))
    ids = [tokenizer.encode(text) for text in ("3+4<|im_end|>", "3=12-11", "3=2-11+")]
    rows = np.array([np.pad(each, (0, 6 - len(each))) for each in ids])
    assert found.is_met(rows).tolist() == [
        [False, False, False, True, True, True],
        [False, False, True, True, True, True],
        [False] * 6,
    ]


def test_transformers_stops_at_the_same_token(rng):
    tokenizer = FileTokenizer(byte_level(), "here", None, {})
    found = find_stop_strings(TEXTS, tokenizer, len(tokenizer.get_vocab()))
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    is_stopped = StopStringCriteria(theirs, TEXTS)
    for text in ("a Question: b", "ab\n\nQ", "aabab", "问题。答案", "Question :", "x \n \n\n"):
        ids = np.array(tokenizer.encode(text))
        met = found.is_met(ids[None])[0]
        last = int(met.argmax()) if met.any() else len(ids) - 1
        for end in range(last + 1):
            assert bool(is_stopped(torch.tensor(ids[None, : end + 1]), None)) == met[end]
