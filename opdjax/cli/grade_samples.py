"""Grades the completions of samples.jsonl with the answers of a run's data, for reports."""

import functools
import json
from collections.abc import Mapping
from typing import Any

from opdjax.config import Config, DataConfig
from opdjax.config.sampling import is_own_function
from opdjax.config.saved import upgrade
from opdjax.config.validation import MissingExtraError, from_dict
from opdjax.data.grading import grader_named
from opdjax.data.sources import ColumnMap, DataError, read_rows, value_at
from opdjax.runs.results import Run


def grade_sample(run: Run, row: Mapping[str, Any]) -> tuple[bool | None, str | None]:
    """(whether the completion of a row of samples.jsonl is correct, the answer in the data); None
    if the data, its answer or the grader's package is missing.
    """
    config = _config(json.dumps(run.config, sort_keys=True))
    answer = _answers(config.data).get(_key(row.get("prompt")))
    if answer is None:
        return None, None
    if is_own_function(config.grader):  # a report runs no file that a run's config names
        return None, answer
    try:
        grade = grader_named(config.grader)
    except MissingExtraError:
        return None, answer
    return grade(str(row.get("completion", "")), answer), answer


@functools.lru_cache(maxsize=16)
def _config(text: str) -> Config:
    return from_dict(Config, upgrade(json.loads(text)))


@functools.lru_cache(maxsize=4)
def _answers(data: DataConfig) -> dict[str, str]:
    """Prompt -> answer; empty if the data cannot be read, which may be on another machine."""
    columns, answers = ColumnMap(**data.column_names), {}
    name = columns.answer or "answer"
    try:
        for _, row in read_rows(data.source, columns):
            if name.partition(".")[0] in row and (answer := value_at(row, name)) is not None:
                answers[_key(value_at(row, columns.prompt))] = str(answer)
    except (DataError, OSError, ImportError):
        return {}
    return answers


def _key(prompt: Any) -> str:
    """A prompt as text; of a conversation, the messages before the assistant's last one."""
    last = prompt[-1] if isinstance(prompt, (list, tuple)) and prompt else None
    if isinstance(last, dict) and last.get("role") == "assistant":
        prompt = prompt[:-1]
    return json.dumps(prompt, sort_keys=True, default=str)
