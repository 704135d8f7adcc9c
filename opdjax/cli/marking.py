"""Which recorded rollouts are right, by the data that their prompts came from."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from opdjax.config import Config, DataConfig
from opdjax.config.saved import upgrade
from opdjax.config.validation import from_dict
from opdjax.data.grading import GRADERS, require_grader
from opdjax.data.sources import ColumnMap, DataError, read_rows, value_at
from opdjax.runs.results import Run


def mark(run: Run, row: Mapping[str, Any]) -> tuple[bool | None, str | None]:
    """(whether the completion of a row of samples.jsonl is right, the answer of its data); None
    where the data or its answer is gone.
    """
    config = _config(json.dumps(run.config, sort_keys=True))
    answer = _answers(config.data).get(_key(row.get("prompt")))
    if answer is None:
        return None, None
    grader = config.evaluation.grader
    try:
        require_grader(grader)
    except ImportError:
        return None, answer
    return GRADERS[grader](str(row.get("completion", "")), answer), answer


@functools.lru_cache(maxsize=16)
def _config(text: str) -> Config:
    return from_dict(Config, upgrade(json.loads(text)))


@functools.lru_cache(maxsize=4)
def _answers(data: DataConfig) -> dict[str, str]:
    """By prompt. Empty where the source cannot be read any more: a report is of runs, whose data
    may lie on another machine.
    """
    columns, found = ColumnMap.from_config(data), {}
    try:
        for place, row in read_rows(data.source, columns):
            name = columns.answer or "answer"
            if name.partition(".")[0] in row and (answer := value_at(row, name, place)) is not None:
                found[_key(value_at(row, columns.prompt, place))] = str(answer)
    except (DataError, OSError, ImportError):
        return {}
    return found


def _key(prompt: Any) -> str:
    """A prompt as text; of a conversation the turns before the assistant's last one."""
    if (
        isinstance(prompt, (list, tuple))
        and prompt
        and isinstance(prompt[-1], dict)
        and prompt[-1].get("role") == "assistant"
    ):
        prompt = prompt[:-1]
    return json.dumps(prompt, sort_keys=True, default=str)
