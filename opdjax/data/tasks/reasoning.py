"""The tasks of the package reasoning-gym, `tasks:NAME#SPLIT`: questions, answers and scorers.

Its scorers may evaluate the text that they score, so `is_right` is called in a process of its own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import zlib
from collections.abc import Iterator
from typing import Any

from opdjax.config.validation import MissingExtraError

# Quarters of the questions, by a hash of their text: no question is in two splits.
_SPLIT_BUCKETS = {"train": (0, 1), "validation": (2,), "test": (3,)}
SPLITS = {"train": 4096, "validation": 256, "test": 512}  # questions, fewer of a small task
_SEED, _DRAWS = 0, 16384
MAX_BYTES = 4 << 30  # of the process that scores


def require_package() -> None:
    """MissingExtraError if reasoning-gym is not installed."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise MissingExtraError("tasks:… needs reasoning-gym: pip install 'opdjax[tasks]'")


@functools.cache
def _task(name: str) -> Any:
    require_package()
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise ValueError(
            f"reasoning-gym has no task {name!r}; it has {', '.join(sorted(DATASETS))}"
        )
    try:
        return reasoning_gym.create_dataset(name, seed=_SEED, size=_DRAWS)
    except AssertionError as error:  # of a task that has no default settings
        raise ValueError(f"the task {name!r} cannot be made: {error}") from error


def rows(text: str) -> Iterator[dict[str, str]]:
    """The rows of NAME#SPLIT, always the same ones. The `answer` of a row names its question for
    the scorer; the `reference` is the answer alone. ValueError for another name or split.
    """
    name, _, split = text.partition("#")
    if split not in SPLITS:
        raise ValueError(f"tasks:{text} has no split; expected tasks:NAME# and one of {[*SPLITS]}")
    task, left = _task(name), SPLITS[split]
    for number in range(_DRAWS if left else 0):
        entry = task[number]
        if zlib.crc32(entry["question"].encode()) % 4 in _SPLIT_BUCKETS[split]:
            answer = {"task": name, "number": number, "answer": str(entry["answer"])}
            row = {"prompt": entry["question"], "answer": json.dumps(answer, ensure_ascii=False)}
            yield row | {"reference": answer["answer"]}
            left -= 1
            if not left:
                return


def warm_up() -> None:
    """Imports the package."""
    require_package()
    import reasoning_gym  # noqa: F401


def is_right(name: str, number: int, answer: str) -> bool:
    """Whether the task's scorer gives an answer to this question all of its points."""
    task = _task(name)
    with contextlib.redirect_stdout(io.StringIO()):  # the process replies on its own
        return task.score_answer(answer, task[number]) >= 1
