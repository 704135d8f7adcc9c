"""The same inputs for every system, from numpy's generators: numpy is all that the workers share."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

_BLOCK = 256  # random rows; longer inputs repeat them, which changes no cost


def _tile(rows: np.ndarray, count: int) -> np.ndarray:
    return np.tile(rows, (-(-count // len(rows)), 1))[:count]


def make_logits(tokens: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a student and of a teacher that is near it, float32 `[tokens, vocab]`."""
    rng, shape = np.random.default_rng(0), (min(tokens, _BLOCK), vocab)
    student = 2 * rng.standard_normal(shape, np.float32)
    return _tile(student, tokens), _tile(student + rng.standard_normal(shape, np.float32), tokens)


def make_hidden(tokens: int, vocab: int, width: int) -> tuple[np.ndarray, ...]:
    """Hidden states `[tokens, width]` and head `[vocab, width]` of student and teacher, float32."""
    rng, shape = np.random.default_rng(0), (min(tokens, _BLOCK), width)
    student, head = (
        rng.standard_normal(shape, np.float32),
        rng.standard_normal((vocab, width), np.float32) / width**0.5,
    )
    teacher_head = head + 0.3 * rng.standard_normal((vocab, width), np.float32) / width**0.5
    teacher = student + 0.3 * rng.standard_normal(shape, np.float32)
    return _tile(2 * student, tokens), head, _tile(2 * teacher, tokens), teacher_head


def make_matrices(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two square float32 matrices."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((size, size), np.float32), rng.standard_normal(
        (size, size), np.float32
    )


def read_prompts(checkpoint: str) -> list[dict[str, Any]]:
    """Rows with `prompt` (text) and `ids`, written beside the checkpoints."""
    with (pathlib.Path(checkpoint).parent / "prompts.jsonl").open() as file:
        return [json.loads(line) for line in file]


def describe_lengths(lengths) -> dict[str, Any]:
    """What a generation tells: useful tokens (the stop token included) and how long completions
    were.
    """
    lengths = np.asarray(lengths)
    return {
        "useful_tokens": int(lengths.sum()),
        "mean_length": float(lengths.mean()),
        "max_length": int(lengths.max()),
    }


def count_until_stop(tokens: np.ndarray, stop_ids: list[int]) -> np.ndarray:
    """Tokens of each row up to its first stop token, which counts."""
    is_stop = np.isin(tokens, stop_ids)
    return np.where(is_stop.any(axis=1), is_stop.argmax(axis=1) + 1, tokens.shape[1])
