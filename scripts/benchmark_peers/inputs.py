"""The same inputs for every system. Only numpy is installed in all workers' environments."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

_BLOCK = 256  # random rows; longer inputs repeat them, which changes no cost


def _tile(rows: np.ndarray, count: int) -> np.ndarray:
    return np.tile(rows, (-(-count // len(rows)), 1))[:count]


def make_logits(tokens: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Return logits of a student and of a similar teacher, float32 `[tokens, vocab]`."""
    rng, shape = np.random.default_rng(0), (min(tokens, _BLOCK), vocab)
    student = 2 * rng.standard_normal(shape, np.float32)
    return _tile(student, tokens), _tile(student + rng.standard_normal(shape, np.float32), tokens)


def make_hidden(tokens: int, vocab: int, width: int) -> tuple[np.ndarray, ...]:
    """Return float32 hidden states `[tokens, width]` and heads `[vocab, width]` of both models."""
    rng, shape = np.random.default_rng(0), (min(tokens, _BLOCK), width)
    student = rng.standard_normal(shape, np.float32)
    head = rng.standard_normal((vocab, width), np.float32) / width**0.5
    teacher_head = head + 0.3 * rng.standard_normal((vocab, width), np.float32) / width**0.5
    teacher = student + 0.3 * rng.standard_normal(shape, np.float32)
    return _tile(2 * student, tokens), head, _tile(2 * teacher, tokens), teacher_head


def make_matrices(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two square float32 matrices."""
    one, other = np.random.default_rng(0).standard_normal((2, size, size), np.float32)
    return one, other


def read_prompts(checkpoint: str) -> list[dict[str, Any]]:
    """Return rows with `prompt` (text) and `ids`, from the checkpoint's parent directory."""
    with (pathlib.Path(checkpoint).parent / "prompts.jsonl").open() as file:
        return [json.loads(line) for line in file]


def describe_lengths(lengths) -> dict[str, Any]:
    """Return the number of useful tokens, including stop tokens, and the lengths."""
    lengths = np.asarray(lengths)
    return {
        "useful_tokens": int(lengths.sum()),
        "mean_length": float(lengths.mean()),
        "max_length": int(lengths.max()),
    }


def count_until_stop(tokens: np.ndarray, stop_ids: list[int]) -> np.ndarray:
    """Return the number of tokens in each row up to and including its first stop token."""
    is_stop = np.isin(tokens, stop_ids)
    return np.where(is_stop.any(axis=1), is_stop.argmax(axis=1) + 1, tokens.shape[1])
